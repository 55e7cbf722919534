"""Serving thousands of adapters on one base: adapters and key-value cache in one pool of pages.

"S-LoRA: Serving Thousands of Concurrent LoRA Adapters" (arXiv 2311.03285); the grouped products follow "Punica:
Multi-Tenant LoRA Serving" (arXiv 2310.18547). With tokens t = 1..T of a batch and adapter a(t) of token t,

    y_t = W0 x_t + s_a B_a A_a x_t            W0 (out, in), A_a (r_a, in), B_a (out, r_a)

The product with W0 is one for the whole batch; only the low-rank part differs. Nothing is merged, ranks are not padded,
and tokens without an adapter have none (not one of zeros).

    pool.py      pages, each owned by a request's cache, by an adapter, or free
    packing.py   an adapter as rows of pages
    store.py     adapters in host memory; the resident ones in the pool, evicted when the pages are needed
    admission.py how many pages running requests can ever need, so that the pool cannot overflow
    dispatch.py  hooks that add B A x to the model's own modules, one plan per step
    kernels/     three ways to compute it: reference, batched (torch), triton
"""
