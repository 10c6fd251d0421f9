"""The packed vision operations compute what vLLM's MoonViT (Kimi-VL) and MoonViT-3D (K2.5) compute image by image."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kimi_kernels import interpolate_pos_embed, merge_patches, rope_2d, rope_2d_, sincos_time_embed

moonvit = pytest.importorskip("vllm.model_executor.models.moonvit")
k25 = pytest.importorskip("vllm.model_executor.models.kimi_k25_vit")

WIDTH, HEADS = 48, 2
IMAGES = torch.tensor([[4, 6], [8, 8], [2, 12], [10, 2]])
VIDEOS = torch.tensor([[1, 4, 6], [3, 8, 8], [2, 2, 12], [4, 2, 2]])


def patches(grid: Tensor) -> int:
    return int(grid.prod(1).sum())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def eager() -> Iterator[None]:
    """vLLM compiles its resampling; not compiled it is the same, and takes no minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("grid", [IMAGES, VIDEOS], ids=["images", "videos"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation(grid: Tensor, dtype: torch.dtype) -> None:
    head = WIDTH // HEADS
    qkv = torch.randn(patches(grid), 3, HEADS, head).to(dtype)
    if grid.shape[1] == 2:
        cis = moonvit.Rope2DPosEmb(head, 16, 16, device="cpu").get_freqs_cis_by_seqlens(grid)
    else:
        cis = k25.Rope2DPosEmbRepeated(head, 16, 16).get_freqs_cis(grid, torch.device("cpu"))
    want = moonvit.apply_rope(qkv[:, 0].contiguous(), qkv[:, 1].contiguous(), cis)
    limits = {"rtol": 2**-7, "atol": 2**-8} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for got, wanted in zip(rope_2d(qkv[:, 0], qkv[:, 1], grid), want):
        torch.testing.assert_close(got, wanted, **limits)
    v = qkv[:, 2].clone()
    torch.testing.assert_close(rope_2d_(qkv, grid), torch.stack([*want, v], dim=1), **limits)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_positions_of_images(mode: str) -> None:
    module = moonvit.Learnable2DInterpPosEmb(8, 8, WIDTH, mode)
    x = torch.randn(patches(IMAGES), WIDTH)
    with torch.no_grad():
        got = interpolate_pos_embed(x, module.weight, IMAGES, mode)
        torch.testing.assert_close(got, module(x, IMAGES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_positions_of_videos(eager: None, mode: str) -> None:
    module = k25.Learnable2DInterpPosEmbDivided_fixed(8, 8, 4, WIDTH, mode)
    times = sincos_time_embed(4, WIDTH)
    torch.testing.assert_close(times, module.time_weight.squeeze(1), rtol=0, atol=1e-6)
    x = torch.randn(patches(VIDEOS), WIDTH)
    with torch.no_grad():
        got = interpolate_pos_embed(x, module.weight, VIDEOS, mode, times)
        torch.testing.assert_close(got, module(x, VIDEOS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging(dtype: torch.dtype) -> None:
    x = torch.randn(patches(IMAGES), WIDTH).to(dtype)
    assert torch.equal(merge_patches(x, IMAGES), torch.cat(moonvit.patch_merger(x, IMAGES)))
    x = torch.randn(patches(VIDEOS), WIDTH).to(dtype)
    limits = {"rtol": 2**-7, "atol": 2**-8} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    want = torch.cat(k25.tpool_patch_merger(x, VIDEOS))
    torch.testing.assert_close(merge_patches(x, VIDEOS), want, **limits)
