"""Weights over TENT for stacks that name their transport in their code.

`agent` is NIXL with one backend, `buckets` and `chain` move named tensors along a line of processes, and know no stack.
`verl` and `p2p_store` are the adapters; `compat` has the rows of what they use upstream.
"""
