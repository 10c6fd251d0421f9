"""The vision operations in plain torch against one image after the other in float64, and against transformers."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from kimi_kernels import interpolate_pos_embed, merge_patches, rope_2d, rope_2d_, sincos_time_embed
from kimi_kernels.vision import ops

DTYPES = [torch.float32, torch.bfloat16]
# Images and videos, lines of one patch, images without patches, and none at all.
GRIDS = {
    "images": [[4, 6], [1, 7], [9, 1], [1, 1], [3, 5]],
    "videos": [[1, 4, 6], [3, 2, 2], [1, 1, 8], [2, 6, 5], [4, 1, 1]],
    "empty ones": [[0, 0, 0], [2, 3, 4], [0, 0, 0], [0, 0, 0], [1, 2, 2], [0, 0, 0]],
    "none": [],
}
EVEN_GRIDS = {
    "images": [[4, 6], [2, 8], [10, 2], [2, 2]],
    "videos": [[1, 4, 6], [3, 2, 2], [1, 2, 8], [4, 6, 4]],
    "empty ones": [[0, 0, 0], [2, 4, 4], [0, 0, 0], [1, 2, 2]],
    "none": [],
}


def grid_of(rows: list[list[int]], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(rows, dtype=dtype).reshape(len(rows), len(rows[0]) if rows else 3)


def patches(grid: Tensor) -> int:
    return int(grid.prod(1).sum())


grids = pytest.mark.parametrize("rows", GRIDS.values(), ids=GRIDS.keys())
even_grids = pytest.mark.parametrize("rows", EVEN_GRIDS.values(), ids=EVEN_GRIDS.keys())


@grids
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [4, 72])
def test_rotation_is_a_product_of_complex_numbers(rotated, accurate_with_gradients, rows, dtype, width):
    grid = grid_of(rows, torch.int32)
    q, k = torch.randn(2, patches(grid), 3, width).to(dtype)
    accurate_with_gradients(lambda *x: rope_2d(*x, grid), lambda *x: rotated(*x, grid), [q, k])


def test_rotation_of_another_base(rotated, accurate):
    grid = grid_of([[3, 8]])
    q, k = torch.randn(2, 24, 2, 32)
    for got, want in zip(
        rope_2d(q, k, grid, theta=100.0), rotated(q.double(), k.double(), grid, theta=100.0)
    ):
        accurate("rotated", got, want)


@pytest.mark.parametrize("rows", [[[1, 2048]], [[2048, 1]]])
def test_far_patches_are_rotated_as_exactly_as_near_ones(rotated, accurate, rows):
    grid = grid_of(rows)
    q, k = torch.randn(2, 2048, 1, 72)
    got, want = rope_2d(q, k, grid)[0], rotated(q.double(), k.double(), grid)[0]
    accurate("last patches", got[-64:], want[-64:])


def test_scores_depend_on_the_offset_of_two_patches_only():
    h, w = 5, 7
    q, k = torch.randn(2, 1, 2, 24, dtype=torch.float64).expand(-1, h * w, -1, -1)
    q, k = (x.unflatten(0, (h, w)) for x in rope_2d(q, k, grid_of([[h, w]])))
    scores = torch.einsum("abhd,xyhd->abxyh", q, k)
    torch.testing.assert_close(scores[0, 1, 2, 4], scores[2, 3, 4, 6])
    torch.testing.assert_close(scores[4, 1, 0, 5], scores[4, 2, 0, 6])
    assert not torch.allclose(scores[0, 0, 0, 1], scores[0, 0, 1, 0])


def test_turning_back_undoes_a_rotation():
    grid = grid_of([[2, 3, 4]])
    q, k = torch.randn(2, 24, 2, 16, dtype=torch.float64)
    for got, want in zip(ops.rope(*ops.rope(q, k, grid, 1e4, False), grid, 1e4, True), (q, k)):
        torch.testing.assert_close(got, want)


def test_packed_projections_are_rotated_in_place_and_read_where_they_lie():
    grid = grid_of([[3, 5], [2, 2]])
    room = torch.randn(19, 3, 4, 40)
    qkv, before = room[:, :, 1:3, 4:20], room.clone()
    q, k, v = qkv.clone().unbind(1)
    want = rope_2d(q, k, grid)
    assert all(torch.equal(a, b) for a, b in zip(rope_2d(qkv[:, 0], qkv[:, 1], grid), want))
    assert torch.equal(room, before)
    assert rope_2d_(qkv, grid) is qkv
    assert torch.equal(qkv, torch.stack([*want, v], 1))
    room[:, :, 1:3, 4:20] = before[:, :, 1:3, 4:20]
    assert torch.equal(room, before)


@grids
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_positions_are_those_of_interpolate(embedded, accurate_with_gradients, rows, mode, dtype):
    """Grids smaller and larger than the table, and of its size in one direction or both."""
    grid, frames = grid_of(rows), sincos_time_embed(4, 20)
    for size in ((4, 6), (16, 3), (1, 2)):
        x, weight = torch.randn(patches(grid), 20).to(dtype), torch.randn(*size, 20).to(dtype)
        accurate_with_gradients(
            lambda x, w: interpolate_pos_embed(x, w, grid, mode, frames),
            lambda x, w: embedded(x, w, grid, mode, frames.double()),
            [x, weight],
        )


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_the_published_table_at_the_sizes_of_real_images(embedded, accurate, mode):
    """64 x 64, for 28 x 46 (a photo), 128 x 96 (16 thousand pixels more than the table) and 64 x 64 itself."""
    grid = grid_of([[28, 46], [128, 96], [64, 64], [2, 300]])
    weight, x = torch.randn(64, 64, 8), torch.zeros(patches(grid), 8)
    got = interpolate_pos_embed(x, weight, grid, mode)
    accurate("embedded", got, embedded(x.double(), weight.double(), grid, mode))
    torch.testing.assert_close(
        got, embedded(x, weight, grid, mode), rtol=1e-4, atol=2e-5
    )  # torch's own float32
    first = 28 * 46 + 128 * 96
    assert torch.equal(got[first : first + 64 * 64], weight.flatten(0, 1))


def test_result_has_the_dtype_of_the_patches_and_is_rounded_once(embedded, accurate):
    grid = grid_of([[3, 5, 4]])
    x, weight, frames = torch.randn(60, 16).bfloat16(), torch.randn(8, 8, 16), sincos_time_embed(3, 16)
    got = interpolate_pos_embed(x, weight, grid, time_weight=frames)
    assert got.dtype == torch.bfloat16
    accurate("embedded", got, embedded(x.double(), weight.double(), grid, "bicubic", frames.double()))


def test_images_get_no_time_and_frames_without_a_table_are_alike():
    frames, weight = sincos_time_embed(4, 8), torch.randn(4, 4, 8)
    image, video = grid_of([[1, 3, 3]]), grid_of([[4, 3, 3]])
    still = interpolate_pos_embed(torch.zeros(9, 8), weight, image, time_weight=frames)
    assert torch.equal(still, interpolate_pos_embed(torch.zeros(9, 8), weight, image))
    moving = interpolate_pos_embed(torch.zeros(36, 8), weight, video)
    assert torch.equal(moving, still.repeat(4, 1))
    timed = interpolate_pos_embed(torch.zeros(36, 8), weight, video, time_weight=frames)
    torch.testing.assert_close(timed - moving, frames.repeat_interleave(9, 0))


def test_time_embedding_is_sines_then_cosines():
    table = sincos_time_embed(4, 6).double()
    assert torch.equal(table[0], torch.tensor([0.0, 0, 0, 1, 1, 1], dtype=torch.float64))
    for f in range(4):
        for i in range(3):
            angle = torch.tensor(f * 10000.0 ** (-i / 3), dtype=torch.float64)
            torch.testing.assert_close(table[f, i], angle.sin(), rtol=0, atol=6e-8)
            torch.testing.assert_close(table[f, 3 + i], angle.cos(), rtol=0, atol=6e-8)
    with pytest.raises(ValueError, match="dim must be even, got 7"):
        sincos_time_embed(4, 7)


@even_grids
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [(2, 2), (1, 2), (1, 1)])
def test_merging_regroups_and_averages(merged, accurate_with_gradients, rows, dtype, kernel):
    grid = grid_of(rows)
    accurate_with_gradients(
        lambda x: merge_patches(x, grid, kernel),
        lambda x: merged(x, grid, kernel),
        [torch.randn(patches(grid), 10).to(dtype)],
    )


def test_images_are_merged_to_the_bit():
    grid = grid_of([[1, 4, 6], [1, 2, 2]])
    x = torch.arange(28.0).unsqueeze(1)
    got = merge_patches(x, grid).squeeze(2).int().tolist()
    assert got == [
        [0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11], [12, 13, 18, 19], [14, 15, 20, 21], [16, 17, 22, 23],
        [24, 25, 26, 27],
    ]  # fmt: skip


def test_a_video_of_one_frame_repeated_is_that_image():
    """All of the tower's grid operations, without time: K2.5 gives a still video the features of its frame."""
    x, weight, frames = torch.randn(24, 8), torch.randn(5, 5, 8), 4
    image, video = grid_of([[1, 4, 6]]), grid_of([[frames, 4, 6]])

    def features(x: Tensor, grid: Tensor) -> Tensor:
        x = interpolate_pos_embed(x, weight, grid)
        return merge_patches(rope_2d(x.unsqueeze(1), x.unsqueeze(1), grid)[0].squeeze(1), grid)

    assert torch.equal(features(x.repeat(frames, 1), video), features(x, image))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_has_the_bits_it_has_alone(dtype):
    grid = grid_of([[1, 4, 6], [3, 2, 2], [1, 2, 8], [2, 6, 4]])
    total, weight = patches(grid), torch.randn(7, 5, 24).to(dtype)
    q, k = torch.randn(2, total, 3, 24).to(dtype)
    x, frames = torch.randn(total, 24).to(dtype), sincos_time_embed(4, 24)
    whole = [*rope_2d(q, k, grid), interpolate_pos_embed(x, weight, grid, time_weight=frames)]
    together = merge_patches(x, grid)
    start = first = 0
    for image in grid.split(1):
        part = slice(start, start := start + patches(image))
        alone = [
            *rope_2d(q[part], k[part], image),
            interpolate_pos_embed(x[part], weight, image, time_weight=frames),
        ]
        assert all(torch.equal(a, b[part]) for a, b in zip(alone, whole))
        alone = merge_patches(x[part], image)
        assert torch.equal(alone, together[first : first + len(alone)])
        first += len(alone)


def test_padding_is_copied_and_merges_to_zeros():
    """What a captured graph does with buffers that a batch does not fill."""
    grid, padded = grid_of([[2, 2, 4]]), grid_of([[2, 2, 4], [0, 0, 0]])
    q, k = torch.randn(2, 20, 2, 8)
    x, weight, frames = torch.randn(20, 8), torch.randn(3, 3, 8), sincos_time_embed(2, 8)
    filled = [
        *rope_2d(q[:16], k[:16], grid),
        interpolate_pos_embed(x[:16], weight, grid, time_weight=frames),
    ]
    got = [*ops.rope(q, k, padded, 1e4, False), ops.interpolate(x, weight, padded, frames, True)]
    for a, b, before in zip(got, filled, (q, k, x)):
        assert torch.equal(a, torch.cat([b, before[16:]]))
    leaf = x.clone().requires_grad_()
    merged = ops.merge(leaf, padded, 2, 2, 3)
    assert torch.equal(merged[:2], merge_patches(x[:16], grid)) and not merged[2].any()
    merged.sum().backward()
    assert (leaf.grad[:16] == 0.5).all() and not leaf.grad[16:].any()


def test_padding_has_no_part_in_the_gradient_of_the_table():
    grid = grid_of([[3, 4]])
    d_out, weight = torch.randn(15, 8), torch.randn(5, 5, 8)
    got = ops._interpolate_backward(d_out, weight, grid, True)
    assert torch.equal(got, ops._interpolate_backward(d_out[:12], weight, grid, True))


def test_gradcheck_in_float64():
    leaf = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    grid = grid_of([[1, 2, 2], [2, 2, 4]])
    assert torch.autograd.gradcheck(lambda q, k: rope_2d(q, k, grid), [leaf(20, 1, 8), leaf(20, 1, 8)])
    for mode in ("bicubic", "bilinear"):
        op = functools.partial(interpolate_pos_embed, grid_thw=grid, mode=mode)
        assert torch.autograd.gradcheck(op, [leaf(20, 2), leaf(3, 5, 2)])
    assert torch.autograd.gradcheck(lambda x: merge_patches(x, grid), [leaf(20, 2)])
    assert torch.autograd.gradgradcheck(lambda q, k: rope_2d(q, k, grid), [leaf(20, 1, 4), leaf(20, 1, 4)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype):
    leaf = lambda *shape: torch.randn(*shape, dtype=dtype, requires_grad=True)
    grid, frames = grid_of([[1, 2, 2], [2, 2, 4]]), sincos_time_embed(2, 8)
    torch.library.opcheck(ops.rope.default, (leaf(20, 2, 8), leaf(20, 2, 8), grid, 1e4, False))
    torch.library.opcheck(ops.rope_inplace.default, (leaf(20, 3, 2, 8).detach(), grid, 1e4))
    for time in (frames, None):
        torch.library.opcheck(ops.interpolate.default, (leaf(20, 8), leaf(3, 5, 8), grid, time, True))
    torch.library.opcheck(ops.merge.default, (leaf(20, 8), grid, 2, 2, 3))


def test_traces_as_one_graph_for_all_batches():
    def tower(x: Tensor, weight: Tensor, grid: Tensor, merged: int | None) -> Tensor:
        x = interpolate_pos_embed(x, weight, grid)
        q, k = rope_2d(x.view(-1, 2, 8), x.view(-1, 2, 8), grid)
        with torch.no_grad():
            rope_2d_(torch.stack([q, k, q], 1), grid)
        return merge_patches((q * k).flatten(1), grid, num_merged=merged)

    compiled = torch.compile(tower, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in ([[2, 2], [4, 6]], [[4, 4], [2, 6], [8, 2]], [[3, 2, 4], [1, 2, 2]]):
        grid = grid_of(rows)
        merged = sum(h * w // 4 for *_, h, w in rows) if len(rows[0]) == 3 else None
        x, weight = (
            torch.randn(patches(grid), 16, requires_grad=True),
            torch.randn(3, 3, 16, requires_grad=True),
        )
        got, want = compiled(x, weight, grid, merged), tower(x, weight, grid, merged)
        assert torch.equal(got, want)
        for a, b in zip(
            torch.autograd.grad(got.sum(), [x, weight]), torch.autograd.grad(want.sum(), [x, weight])
        ):
            assert torch.equal(a, b)


def test_the_values_of_a_grid_on_a_device_are_not_read():
    """Tensors on the meta device have none: reading them, as the host would have to on a GPU, raises."""
    meta = functools.partial(torch.empty, device="meta")
    grid, images = meta(3, 3, dtype=torch.int64), meta(3, 2, dtype=torch.int64)
    assert [x.shape for x in rope_2d(meta(40, 2, 8), meta(40, 2, 8), grid)] == [(40, 2, 8)] * 2
    assert rope_2d_(meta(40, 3, 2, 8), grid).shape == (40, 3, 2, 8)
    assert interpolate_pos_embed(meta(40, 8), meta(4, 4, 8), grid).shape == (40, 8)
    assert merge_patches(meta(40, 8), images).shape == (10, 4, 8)
    assert merge_patches(meta(40, 8), grid, num_merged=5).shape == (5, 4, 8)
    with pytest.raises(ValueError, match="num_merged is missing: a grid"):
        merge_patches(meta(40, 8), grid)


def rope(q=(12, 2, 8), k=None, grid=((3, 4),), **options):
    return rope_2d(torch.zeros(q), torch.zeros(k or q), torch.tensor(grid), **options)


def packed(qkv=(12, 3, 2, 8), grid=((3, 4),), leaf=False):
    return rope_2d_(torch.zeros(qkv, requires_grad=leaf), torch.tensor(grid))


def position(x=(12, 8), weight=(4, 4, 8), grid=((1, 3, 4),), time=(2, 8), leaf=False, **options):
    table = torch.zeros(time, requires_grad=leaf)
    return interpolate_pos_embed(
        torch.zeros(x), torch.zeros(weight), torch.tensor(grid), time_weight=table, **options
    )


def merging(x=(24, 8), grid=((2, 2, 6),), **options):
    return merge_patches(torch.zeros(x), torch.tensor(grid), **options)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rope(q=(12, 8)), r"q must have shape \[L, H, D\], got \(12, 8\)"),
        (lambda: rope(k=(12, 3, 8)), "q and k must share shape and dtype"),
        (lambda: rope(q=(12, 2, 10)), "q must have a head size that is a multiple of 4, got 10"),
        (lambda: rope(theta=0.0), r"theta must be positive, got 0.0"),
        (lambda: rope(q=(13, 2, 8)), "q must have the 12 patches of grid_thw's images, got 13"),
        (lambda: rope(grid=((-3, -4),)), r"grid_thw\[0\] must not be negative, got \[-3, -4\]"),
        (
            lambda: rope(grid=(3, 4)),
            r"grid_thw must have shape \[N, 3\] \(frames, rows, columns\) or \[N, 2\]",
        ),
        (lambda: rope(grid=((3.0, 4.0),)), "grid_thw must be int32 or int64, got torch.float32"),
        (lambda: packed(qkv=(12, 2, 2, 8)), r"qkv must have shape \[L, 3, H, D\], got \(12, 2, 2, 8\)"),
        (lambda: packed(qkv=(12, 3, 2, 6)), "qkv must have a head size that is a multiple of 4, got 6"),
        (lambda: packed(qkv=(11, 3, 2, 8)), "qkv must have the 12 patches"),
        (lambda: packed(leaf=True), "qkv requires a gradient"),
        (lambda: position(x=(12, 2, 8)), r"x must have shape \[L, D\], got \(12, 2, 8\)"),
        (lambda: position(weight=(4, 4, 9)), r"weight must have shape \[rows, columns, 8\] to match x"),
        (lambda: position(weight=(0, 4, 8)), r"weight must have shape \[rows, columns, 8\] to match x"),
        (lambda: position(mode="nearest"), "mode must be one of bicubic, bilinear, got 'nearest'"),
        (lambda: position(time=(2, 9)), r"time_weight must have shape \[T, 8\] to match x, got \(2, 9\)"),
        (lambda: position(leaf=True), "time_weight requires a gradient, but is taken as constant"),
        (lambda: position(grid=((3, 2, 2),)), r"grid_thw\[0\] has 3 frames, time_weight rows for 2"),
        (lambda: position(grid=((1, 3, 3),)), "x must have the 9 patches of grid_thw's images, got 12"),
        (lambda: merging(x=(24,)), r"x must have shape \[L, D\], got \(24,\)"),
        (lambda: merging(kernel=(0, 2)), r"kernel must be two positive integers, got \(0, 2\)"),
        (
            lambda: merging(grid=((1, 3, 8),)),
            r"grid_thw\[0\] has 3 x 8 patches, no multiple of the kernel 2 x 2",
        ),
        (
            lambda: merging(grid=((1, 8, 3),)),
            r"grid_thw\[0\] has 8 x 3 patches, no multiple of the kernel 2 x 2",
        ),
        (lambda: merging(x=(23, 8)), "x must have the 24 patches of grid_thw's images, got 23"),
        (lambda: merging(num_merged=4), "num_merged must be 3 for this grid_thw, got 4"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture
def k25():
    return pytest.importorskip("transformers.models.kimi_k25.modeling_kimi_k25")


def k25_config(**sizes):
    from transformers import Kimi_K25VisionConfig

    return Kimi_K25VisionConfig(
        hidden_size=32, num_attention_heads=2, intermediate_size=48, num_hidden_layers=1, **sizes
    )


def test_positions_equal_those_of_transformers(k25):
    config = k25_config(pos_emb_height=8, pos_emb_width=8, pos_emb_time=4)
    module = k25.Kimi_K25VisionPositionEmbeddings(config)
    weight = torch.nn.init.normal_(module.position_embeddings)
    grid = grid_of([[1, 4, 6], [3, 8, 8], [1, 12, 10], [4, 2, 2]])
    x = torch.randn(patches(grid), 32)
    got = interpolate_pos_embed(x, weight, grid, time_weight=sincos_time_embed(4, 32))
    torch.testing.assert_close(got, module(x, grid), rtol=1e-5, atol=1e-5)


def test_rotation_equals_that_of_transformers(k25):
    """Which has the two channels of a pair half a head apart, and permutes the weights to fit."""
    grid = grid_of([[2, 4, 6], [1, 9, 2]])
    q, k = torch.randn(2, patches(grid), 2, 16)
    halves = lambda x: torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)
    places = k25.get_vision_position_ids(grid, spatial_merge_size=1)
    cos, sin = k25.Kimi_K25VisionRotaryEmbedding(k25_config())(q, places)
    want = k25.apply_rotary_pos_emb_vision(halves(q), halves(k), cos, sin)
    for a, b in zip(rope_2d(q, k, grid), want):
        torch.testing.assert_close(halves(a), b, rtol=1e-5, atol=1e-5)


def test_merging_equals_that_of_transformers(k25):
    grid = grid_of([[2, 4, 6], [2, 2, 2]])
    x = torch.randn(patches(grid), 8)
    want = x[k25.get_vision_temporal_merge_index(grid, 2, 2)].mean(dim=1)
    torch.testing.assert_close(merge_patches(x, grid), want)
