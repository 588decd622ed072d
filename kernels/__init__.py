"""Numba CUDA kernels, imported as `bitnet_numba.kernels`. Importing this touches no device.

One module per operation, each with a launcher of the same name (`bitnet_numba.kernels.w2a8_gemv.w2a8_gemv`):
    one token                  embed, w2a8_gemv, attention, head, sampler: what a decode step is made of (see `decode`)
    many rows at once          norm_quant, w2a8_matmul, kv_cache, attention_prompt, attention_batch, attention_rows,
                               head_many, head_warpgroup, sampler_many: what prompts and batches are made of (see
                               `rows` and `batch`)
`backend` puts them behind the engine's interface; `sequences` and `weights` hold what lies in device memory;
`compilation` and `device` compile and launch; `intrinsics` and `tensor_cores` have the machine's instructions, `forms`
describes a compiled kernel.
"""
