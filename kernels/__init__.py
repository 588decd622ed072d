"""Numba CUDA kernels, imported as `bitnet_numba.kernels`. Importing this touches no device.

One module per operation, each with a launcher of the same name (`bitnet_numba.kernels.w2a8_gemv.w2a8_gemv`):
    embed, w2a8_gemv, attention, head, sampler    what a decode step is made of (see `decode`)
    norm_quant                                    RMSNorm and quantisation of many tokens at once
`backend` puts them behind the engine's interface; `compilation` and `device` compile and launch; `intrinsics` has the
machine's instructions, `forms` describes a compiled kernel.
"""
