"""The W2A8 product: ternary weights times int8 activations, for one token (GEMV) and for many (GEMM)."""
