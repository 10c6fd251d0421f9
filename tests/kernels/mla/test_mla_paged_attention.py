"""Paged MLA attention against scaled_dot_product_attention in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from kimi_kernels import BackendError, mla_paged_attention


def paged(lengths, queries, heads, width, v_dim, block_size=16, dtype=torch.float32):
    """Arguments for sequences scattered over a shuffled block pool; unused cache rows are NaN."""
    blocks = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(blocks) + 2).int()
    cache = torch.full((sum(blocks) + 2, block_size, width), float("nan"))
    table = torch.zeros(len(lengths), max(blocks) + 1, dtype=torch.int32)
    first = 0
    for n, (length, count) in enumerate(zip(lengths, blocks)):
        table[n, :count] = order[first : first + count]
        rows = torch.full((count * block_size, width), float("nan"))
        rows[:length] = torch.randn(length, width)
        cache[table[n, :count].long()] = rows.view(count, block_size, width)
        first += count
    cu_seqlens = torch.tensor([0, *torch.tensor(queries).cumsum(0)], dtype=torch.int32)
    q = torch.randn(sum(queries), heads, width).to(dtype)
    return q, cache.to(dtype), table, torch.tensor(lengths, dtype=torch.int32), cu_seqlens, width**-0.5, v_dim


def oracle(q, kv_cache, block_table, seq_lens, cu_seqlens_q, scale, v_dim):
    out = []
    for n, (a, b) in enumerate(pairwise(cu_seqlens_q.tolist())):
        length = int(seq_lens[n])
        keys = torch.stack(
            [kv_cache[block_table[n, t // kv_cache.shape[1]], t % kv_cache.shape[1]] for t in range(length)]
        ).double()
        visible = torch.ones(b - a, length, dtype=torch.bool).tril(length - (b - a))
        attended = F.scaled_dot_product_attention(
            q[a:b].double().transpose(0, 1),
            keys.expand(q.shape[1], -1, -1),
            keys[:, :v_dim].expand(q.shape[1], -1, -1),
            attn_mask=visible,
            scale=scale,
        )
        out.append(attended.transpose(0, 1))
    return torch.cat(out)


CASES = {
    "decode": ([5, 1, 77, 33], [1, 1, 1, 1], 4, 80, 64, 16),
    "prefill": ([40, 19], [40, 19], 3, 72, 64, 8),
    "mixed with an idle sequence": ([5, 40, 130, 33], [5, 0, 7, 1], 5, 40, 32, 32),
    "long": ([2500], [2], 2, 24, 16, 64),
    "full-size rows": ([70], [3], 32, 576, 512, 64),
    "odd sizes": ([50], [50], 3, 44, 19, 7),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_float64_attention(isa, case, dtype, accurate):
    arguments = paged(*CASES[case], dtype=dtype)
    accurate("out", mla_paged_attention(*arguments), oracle(*arguments))


def test_reference_matches_float64_attention(accurate):
    q, cache, *rest = paged(*CASES["mixed with an idle sequence"])
    out = mla_paged_attention(q.double(), cache.double(), *rest)
    torch.testing.assert_close(out, oracle(q, cache, *rest), rtol=1e-12, atol=1e-12)


def alone(n, q, kv_cache, block_table, seq_lens, cu_seqlens_q, scale, v_dim):
    a, b = cu_seqlens_q[n], cu_seqlens_q[n + 1]
    offsets = torch.tensor([0, b - a], dtype=torch.int32)
    return mla_paged_attention(
        q[a:b], kv_cache, block_table[n : n + 1], seq_lens[n : n + 1], offsets, scale, v_dim
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_a_sequence_has_the_bits_it_has_alone(isa, threads):
    arguments = paged([5, 2300, 77, 1100], [1, 1, 60, 3], 4, 80, 64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together = mla_paged_attention(*arguments)
        torch.set_num_threads(3 - threads)
        separate = [alone(n, *arguments) for n in range(4)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, torch.cat(separate))


def test_prefill_in_pieces_and_decode_give_the_bits_of_one_prefill(isa):
    q, cache, table, _, _, scale, v_dim = paged([90], [90], 3, 40, 32)
    offsets = lambda count: torch.tensor([0, count], dtype=torch.int32)
    length = lambda count: torch.tensor([count], dtype=torch.int32)
    whole = mla_paged_attention(q, cache, table, length(90), offsets(90), scale, v_dim)
    pieces = [
        mla_paged_attention(q[a:b], cache, table, length(b), offsets(b - a), scale, v_dim)
        for a, b in pairwise([0, 37, 64, 88, 89, 90])
    ]
    assert torch.equal(torch.cat(pieces), whole)


def test_cache_may_be_strided_and_of_another_dtype(isa, accurate):
    q, cache, *rest = paged([33, 9], [2, 9], 4, 40, 32)
    wide = torch.full((cache.shape[0], cache.shape[1], 2, 48), float("nan")).bfloat16()
    wide[:, :, 1, :40] = cache.bfloat16()
    view = wide[:, :, 1, :40]
    accurate("out", mla_paged_attention(q, view, *rest), oracle(q, view, *rest))


def test_padding_tokens_give_zeros(isa):
    q, *rest = paged([9, 4], [3, 1], 2, 16, 16)
    padded = torch.cat([q, torch.full((2, 2, 16), float("nan"))])
    out = mla_paged_attention(padded, *rest)
    assert torch.equal(out[:4], mla_paged_attention(q, *rest))
    assert torch.equal(out[4:], torch.zeros(2, 2, 16))


def test_large_scores_stay_finite(isa, accurate):
    q, cache, *rest = paged([300], [4], 2, 32, 32)
    accurate("out", mla_paged_attention(30 * q, cache, *rest), oracle(30 * q, cache, *rest))


def test_opcheck_and_trace(native):
    arguments = paged([5, 9], [1, 2], 2, 16, 16)
    torch.library.opcheck(torch.ops.kimi.mla_paged_attention.default, arguments)
    compiled = torch.compile(mla_paged_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), mla_paged_attention(*arguments))


def test_errors_name_the_argument():
    q, cache, table, lengths, offsets, scale, v_dim = paged([5, 9], [1, 2], 2, 16, 16)
    with pytest.raises(ValueError, match=r"kv_cache must be \[blocks, block_size, 16\] to match q"):
        mla_paged_attention(q, cache[..., :8], table, lengths, offsets, scale, v_dim)
    with pytest.raises(ValueError, match=r"v_dim must be in 1\.\.16 .*got 17"):
        mla_paged_attention(q, cache, table, lengths, offsets, scale, 17)
    with pytest.raises(ValueError, match=r"block_table must be \[2, max_blocks\], got \(1, 2\)"):
        mla_paged_attention(q, cache, table[:1], lengths, offsets, scale, v_dim)
    with pytest.raises(ValueError, match=r"cu_seqlens_q must have shape \(3,\), got \(2,\)"):
        mla_paged_attention(q, cache, table, lengths, offsets[:2], scale, v_dim)


def test_forced_native_backend_says_why_it_cannot(native, monkeypatch):
    monkeypatch.setenv("KIMI_KERNELS_BACKEND", "cpu")
    q, cache, *rest = paged([5], [1], 2, 16, 16)
    with pytest.raises(BackendError, match="adjacent elements, got stride 2 in the last dimension"):
        mla_paged_attention(q, cache.repeat_interleave(2, -1)[..., ::2], *rest)
