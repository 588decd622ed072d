"""Numba kernels for NVIDIA GPUs and, in `cpu`, for CPUs: `bitnet_numba.kernels`. Importing this touches no device.

    linear      y = x W^T with packed ternary weights and int8 activations: GEMV for one token, GEMM for many
    attention   the KV cache, and attention of one token, of prompts and of batches
    lm_head     the last RMSNorm and the logits
    sampling    the next token, for one sequence and for a batch
    embedding   token ids to hidden states, and the ends of steps
    operands    the operands that operations share, and the check that launchers make of them
    cpu         all of the above for CPUs: one compiled step for a team of threads
    ptx         the GPU's instructions
    runtime     compiling kernels and launching them

An operation has one launcher, `launcher(device, operands...) -> Launch`, which `backends.cuda`, tests and benchmarks
call alike; it chooses among the operation's kernels. An operation imports `operands`, `ptx` and `runtime`, and no other
operation.
"""
