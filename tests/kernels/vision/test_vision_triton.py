"""The vision operations' Triton kernels: interpreted on the CPU, or on a GPU where there is one.

The tolerances are those of the native kernels: angles are reduced and their sines computed in the kernel's own
arithmetic, not by a GPU's approximations.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kimi_kernels import (
    BackendError,
    _triton,
    interpolate_pos_embed,
    merge_patches,
    rope_2d,
    rope_2d_,
    sincos_time_embed,
)
from kimi_kernels.vision import ops

pytest.importorskip("triton")
DEVICE = "cpu" if _triton.interpreting() else "cuda"
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
)
DTYPES = [torch.float32, torch.bfloat16]
IMAGES = [[4, 6], [2, 2], [0, 0], [6, 2]]
VIDEOS = [[1, 2, 4], [3, 2, 2], [0, 0, 0], [2, 4, 2]]
LINES = [[1, 7], [5, 1], [1, 1]]


@pytest.fixture(autouse=True)
def _forced(monkeypatch):
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "triton")


@pytest.fixture
def launches(monkeypatch):
    """The kernels that were launched."""
    seen = []

    def launch(kernel, *args, run=_triton.launch, **kwargs):
        seen.append(kernel)
        run(kernel, *args, **kwargs)

    monkeypatch.setattr(_triton, "launch", launch)
    return seen


def grid_of(rows: list[list[int]], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(rows, dtype=dtype).reshape(len(rows), len(rows[0]) if rows else 3)


def patches(grid: Tensor) -> int:
    return int(grid.prod(1).sum())


def on_device(op):
    """`op` on the device of this run, for tensors on the CPU; differentiable."""

    def run(*args, **options):
        move = lambda x, device: x.to(device) if isinstance(x, Tensor) else x
        result = op(*(move(x, DEVICE) for x in args), **{k: move(x, DEVICE) for k, x in options.items()})
        return move(result, "cpu") if isinstance(result, Tensor) else tuple(move(x, "cpu") for x in result)

    return run


rope, embed, merge = on_device(rope_2d), on_device(interpolate_pos_embed), on_device(merge_patches)
count = lambda grid: sum(h * w // 4 for *_, h, w in grid.tolist())


@pytest.mark.parametrize("rows", [IMAGES, VIDEOS, [], LINES])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [4, 72])
def test_rotation_and_gradients_match_float64(rotated, accurate_with_gradients, rows, dtype, width):
    grid = grid_of(rows, torch.int32)
    q, k = torch.randn(2, patches(grid), 3, width).to(dtype)
    accurate_with_gradients(lambda *x: rope(*x, grid), lambda *x: rotated(*x, grid), [q, k])


@pytest.mark.parametrize("heads, width", [(1, 256), (9, 12), (17, 8)])
def test_rotation_of_all_heads(rotated, accurate, heads, width):
    grid = grid_of([[3, 5], [2, 1]])
    q, k = torch.randn(2, 17, heads, width)
    for got, want in zip(rope(q, k, grid, theta=100.0), rotated(q.double(), k.double(), grid, theta=100.0)):
        accurate("rotated", got, want)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [[[1, 200]], [[1100, 1]]])
def test_far_patches_are_rotated_as_exactly_as_near_ones(rotated, accurate, rows):
    grid = grid_of(rows)
    q, k = torch.randn(2, patches(grid), 1, 72)
    got, want = rope(q, k, grid)[0], rotated(q.double(), k.double(), grid)[0]
    accurate("last patches", got[-64:], want[-64:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_projections_are_rotated_in_place(dtype):
    grid = grid_of([[3, 5], [2, 2]])
    room = torch.randn(19, 3, 4, 40, device=DEVICE).to(dtype)
    qkv, before = room[:, :, 1:3, 4:20], room.clone()
    q, k, v = qkv.clone().unbind(1)
    want = rope_2d(q, k, grid)
    assert all(torch.equal(a, b) for a, b in zip(rope_2d(qkv[:, 0], qkv[:, 1], grid), want))
    assert torch.equal(room, before)
    assert rope_2d_(qkv, grid) is qkv
    assert torch.equal(qkv, torch.stack([*want, v], 1))
    room[:, :, 1:3, 4:20] = before[:, :, 1:3, 4:20]
    assert torch.equal(room, before)
    turned = before[:, :, 1:3, 4:20].transpose(0, 3).contiguous().transpose(0, 3)  # channels are strided
    assert torch.equal(rope_2d_(turned, grid), torch.stack([*want, v], 1))


@pytest.mark.parametrize("rows, size", [(IMAGES, (4, 6)), (VIDEOS, (9, 2)), (LINES, (1, 3)), ([], (2, 2))])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_positions_and_gradients_match_float64(embedded, accurate_with_gradients, rows, size, mode, dtype):
    grid, frames = grid_of(rows), sincos_time_embed(3, 20)
    accurate_with_gradients(
        lambda x, w: embed(x, w, grid, mode, frames),
        lambda x, w: embedded(x, w, grid, mode, frames.double()),
        [torch.randn(patches(grid), 20).to(dtype), torch.randn(*size, 20).to(dtype)],
    )


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_positions_of_a_wide_table_and_of_its_own_size(embedded, accurate, mode):
    """Two blocks of channels, the second one not full; the table itself where a grid has its size."""
    grid = grid_of([[5, 9], [5, 3], [3, 7]])
    x, weight = torch.randn(patches(grid), 136), torch.randn(5, 3, 136)
    accurate("embedded", embed(x, weight, grid, mode), embedded(x.double(), weight.double(), grid, mode))
    got = embed(torch.zeros_like(x), weight, grid, mode)
    assert torch.equal(got[45:60], weight.flatten(0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_gradient_of_the_table_at_all_ratios(embedded, accurate, mode):
    """Every size of an image against every size of a table, to the last user of each entry."""
    for side in (1, 2, 3, 8):
        for size in (1, 3, 7, 8, 19):
            grid = grid_of([[size, 1], [1, size]])
            d_out, weight = torch.randn(2 * size, 4), torch.randn(side, 2, 4, requires_grad=True)
            (got,) = torch.autograd.grad(embed(torch.zeros(2 * size, 4), weight, grid, mode), weight, d_out)
            exact = weight.detach().double().requires_grad_()
            want = embedded(torch.zeros(2 * size, 4).double(), exact, grid, mode)
            accurate(f"{side} {size}", got, torch.autograd.grad(want, exact, d_out.double())[0])


@pytest.mark.parametrize("rows", [IMAGES, VIDEOS, []])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [(2, 2), (1, 2), (1, 1)])
def test_merging_and_gradients_match_float64(merged, accurate_with_gradients, rows, dtype, kernel):
    grid = grid_of(rows)
    m = sum(h // kernel[0] * (w // kernel[1]) for *_, h, w in grid.tolist())
    accurate_with_gradients(
        lambda x: merge(x, grid, kernel, num_merged=m),
        lambda x: merged(x, grid, kernel),
        [torch.randn(patches(grid), 10).to(dtype)],
    )


def test_float16(rotated, embedded, merged):
    grid = grid_of(VIDEOS)
    q, k = torch.randn(2, patches(grid), 2, 8).half()
    x, weight = torch.randn(patches(grid), 8).half(), torch.randn(3, 5, 8).half()
    wide = [y.double() for y in (q, k, x, weight)]
    got = [*rope(q, k, grid), embed(x, weight, grid), merge(x, grid, num_merged=count(grid))]
    want = [*rotated(*wide[:2], grid), embedded(*wide[2:], grid), merged(wide[2], grid)]
    for a, b in zip(got, want):
        assert a.dtype == torch.float16
        torch.testing.assert_close(a.double(), b, rtol=2**-11, atol=2**-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_has_the_bits_it_has_alone(dtype):
    grid = grid_of(VIDEOS)
    total, weight = patches(grid), torch.randn(7, 5, 24).to(dtype)
    q, k = torch.randn(2, total, 3, 24).to(dtype)
    x, frames = torch.randn(total, 24).to(dtype), sincos_time_embed(4, 24)
    whole = [*rope(q, k, grid), embed(x, weight, grid, time_weight=frames)]
    together = merge(x, grid, num_merged=count(grid))
    start = first = 0
    for image in grid.split(1):
        part = slice(start, start := start + patches(image))
        alone = [*rope(q[part], k[part], image), embed(x[part], weight, image, time_weight=frames)]
        assert all(torch.equal(a, b[part]) for a, b in zip(alone, whole))
        alone = merge(x[part], image, num_merged=count(image))
        assert torch.equal(alone, together[first : first + len(alone)])
        first += len(alone)


def test_more_images_than_are_looked_at_at_once(rotated, embedded, merged, accurate):
    grid = grid_of([[1, 1, 2], [2, 2, 1], [0, 0, 0]] * 12)
    x, weight = torch.randn(patches(grid), 8), torch.randn(3, 3, 8)
    q = x.view(-1, 2, 4)
    accurate("rotated", rope(q, q, grid)[0], rotated(q.double(), q.double(), grid)[0])
    accurate("embedded", embed(x, weight, grid), embedded(x.double(), weight.double(), grid))
    accurate("merged", merge(x, grid, (1, 1), 48), merged(x.double(), grid, (1, 1)))


def test_one_launch_for_all_images(launches):
    grid = grid_of(VIDEOS)
    x, weight, qkv = torch.randn(patches(grid), 8), torch.randn(3, 3, 8), torch.randn(patches(grid), 3, 2, 4)
    for call in (
        lambda: rope(qkv[:, 0], qkv[:, 1], grid),
        lambda: on_device(rope_2d_)(qkv, grid),
        lambda: embed(x, weight, grid, time_weight=torch.randn(3, 8)),
        lambda: merge(x, grid, num_merged=count(grid)),
    ):
        launches.clear()
        call()
        assert len(launches) == 1


def padded_ops(q, k, x, weight, frames, grid):
    run = [on_device(op) for op in (ops.rope, ops.interpolate, ops.merge, ops._interpolate_backward)]
    return [
        *run[0](q, k, grid, 1e4, False),
        run[1](x, weight, grid, frames, True),
        run[2](x, grid, 2, 2, 3),
        run[3](x, weight, grid, True),
        on_device(ops._merge_backward)(torch.ones(3, 4, 8), grid, 2, 2, len(x)),
    ]


def test_padding_is_as_in_the_reference(monkeypatch):
    grid = grid_of([[2, 2, 4], [0, 0, 0]])
    inputs = (
        *torch.randn(2, 20, 2, 8),
        torch.randn(20, 8),
        torch.randn(3, 3, 8),
        sincos_time_embed(2, 8),
        grid,
    )
    got = padded_ops(*inputs)
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "reference")
    for a, b in zip(got, padded_ops(*inputs)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a[16:], b[16:]) for a, b in zip(got, inputs[:3]))


def test_a_grid_of_too_many_patches_reads_nothing_outside():
    """Such a grid cannot be refused where it is not read; NaN lies around what may be read."""
    grid = grid_of([[3, 4, 4], [2, 6, 6]])
    room = torch.full((60, 8), float("nan"))
    room[8:28] = torch.randn(20, 8)
    x = room[8:28]
    q = x.view(20, 2, 4)
    for out in padded_ops(q, q, x, torch.randn(3, 3, 8), sincos_time_embed(2, 8), grid):
        assert out.isfinite().all()


@pytest.mark.skipif(DEVICE == "cuda", reason="the storage is reserved memory that a GPU would have to have")
def test_offsets_beyond_32_bits():
    stride, grid = 2**30, grid_of([[2, 2]])
    room = torch.empty(0).set_(torch.UntypedStorage(4 * (3 * stride + 64)))
    far = room.as_strided((4, 16), (stride, 1))
    x, weight = torch.randn(4, 16), torch.randn(3, 3, 16)
    far.copy_(x)
    heads = lambda x: x.unflatten(1, (2, 8))
    for got, want in zip(rope(heads(far), heads(far), grid), rope(heads(x), heads(x), grid)):
        assert torch.equal(got, want)
    assert torch.equal(embed(far, weight, grid), embed(x, weight, grid))
    assert torch.equal(merge(far, grid), merge(x, grid))
    near = ops._interpolate_backward(x, weight, grid, True)
    assert torch.equal(ops._interpolate_backward(far, weight, grid, True), near)
    d_out = heads(far).view(4, 2, 8)
    assert torch.equal(
        ops._merge_backward(d_out, grid_of([[4, 2]]), 1, 2, 8),
        ops._merge_backward(heads(x), grid_of([[4, 2]]), 1, 2, 8),
    )


def test_gradients_that_are_one_number_everywhere():
    """`sum().backward()` hands on expanded tensors, whose strides are 0."""
    grid = grid_of([[2, 4]])
    x = torch.randn(8, 8, device=DEVICE, requires_grad=True)
    weight = torch.randn(2, 4, 8, device=DEVICE, requires_grad=True)
    out = merge_patches(interpolate_pos_embed(x, weight, grid), grid)
    grads = torch.autograd.grad(out.sum(), [x, weight])
    assert all((grad == 1).all() for grad in grads)


@pytest.mark.slow
def test_opcheck():
    leaf = lambda *shape: torch.randn(*shape, device=DEVICE, requires_grad=True)
    grid, frames = grid_of([[1, 2, 2], [2, 2, 4]]).to(DEVICE), sincos_time_embed(2, 8).to(DEVICE)
    torch.library.opcheck(ops.rope.default, (leaf(20, 2, 8), leaf(20, 2, 8), grid, 1e4, False))
    torch.library.opcheck(ops.rope_inplace.default, (leaf(20, 3, 2, 8).detach(), grid, 1e4))
    torch.library.opcheck(ops.interpolate.default, (leaf(20, 8), leaf(3, 5, 8), grid, frames, True))
    torch.library.opcheck(ops.merge.default, (leaf(20, 8), grid, 2, 2, 3))


def test_compiles_as_one_graph():
    grid = grid_of([[2, 4], [2, 2]]).to(DEVICE)
    x, weight = torch.randn(12, 8, device=DEVICE), torch.randn(3, 3, 8, device=DEVICE)

    def tower(x: Tensor, weight: Tensor, grid: Tensor) -> Tensor:
        x = interpolate_pos_embed(x, weight, grid)
        q, _ = rope_2d(x.view(-1, 2, 4), x.view(-1, 2, 4), grid)
        return merge_patches(q.flatten(1), grid)

    compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, grid), tower(x, weight, grid))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_captured_graph_serves_other_grids():
    """Fixed buffers, padding and all: the grid is read when the graph is replayed."""
    grid = grid_of([[2, 2, 4], [0, 0, 0]]).to(DEVICE)
    x, weight = torch.randn(32, 8, device=DEVICE), torch.randn(3, 3, 8, device=DEVICE)

    def tower() -> Tensor:
        y = interpolate_pos_embed(x, weight, grid)
        q, _ = rope_2d(y.view(-1, 2, 4), y.view(-1, 2, 4), grid)
        return merge_patches(q.flatten(1), grid, num_merged=6)

    tower()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tower()
    for rows in ([[2, 2, 4], [0, 0, 0]], [[1, 4, 4], [2, 2, 4]]):
        grid.copy_(grid_of(rows))
        graph.replay()
        assert torch.equal(out, tower())


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda x: rope_2d(x, x, grid_of([[2, 2]])),
            "cannot run rope_2d: takes float32, bfloat16 or float16",
        ),
        (lambda x: rope_2d_(torch.stack([x] * 3, 1), grid_of([[2, 2]])), "cannot run rope_2d_inplace: takes"),
        (lambda x: interpolate_pos_embed(x[:, 0], x, grid_of([[2, 2]])), "float16, got torch.float64 for x"),
        (lambda x: merge_patches(x[:, 0], grid_of([[2, 2]])), "float16, got torch.float64 for x"),
    ],
)
def test_what_it_cannot_run_is_said(call, message):
    with pytest.raises(BackendError, match=message):
        call(torch.zeros(4, 2, 8, dtype=torch.float64, device=DEVICE))


def test_heads_that_are_too_wide():
    q = torch.zeros(4, 1, 260, device=DEVICE)
    with pytest.raises(BackendError, match="takes head sizes up to 256, got 260"):
        rope_2d(q, q, grid_of([[2, 2]]))


def test_configurations_do_not_depend_on_the_batch():
    """Batch invariance: what a kernel is compiled for follows from the width of a row."""
    from kimi_kernels.vision import triton_kernels as kernels

    seen = []
    for rows in ([[2, 2]], [[2, 2], [4, 8], [10, 2]]):
        x = torch.randn(patches(grid_of(rows)), 8, device=DEVICE)
        constants = []

        def launch(kernel, grid, like, *args, config, into=constants):
            into.append(config)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_triton, "launch", launch)
            rope_2d(x.view(-1, 2, 4), x.view(-1, 2, 4), grid_of(rows))
            interpolate_pos_embed(x, torch.randn(3, 3, 8, device=DEVICE), grid_of(rows))
            merge_patches(x, grid_of(rows))
        seen.append(constants)
    assert seen[0] == seen[1] and len(seen[0]) == 3
    assert kernels.rope_config(72, 1e4).constants["DP"] == 128
