"""The model's operations on a CPU, compiled by Numba: vectors as values, one LLVM instruction a function.

Reading order:

    vec, memory, isa, dot        registers and memory as Numba values; instruction sets, and the one operation of theirs
    gemv, gemm                   the W2A8 product on packed words: one token, and many
    norm, math                   RMSNorm and quantisation; exp, log and activations of 16 lanes
    kv_cache, attention          the cache's layout; attention over it (attention_tiles: its registers)
    lm_head, sampler             logits (row_tiles: its registers); the next token (gumbel: its noise)
    team                         threads that share a pass: jobs, regions, pieces
    layout, products, step       what a pass is told by address; a layer's products; the pass, which every member runs
    compiler, kernels            machine code by address and its disk cache; which kernels a model needs
"""
