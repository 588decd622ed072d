"""Numba CUDA kernels, imported as `bitnet_numba.kernels`. Importing this touches no device."""
