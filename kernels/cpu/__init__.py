"""The model's operations on a CPU, compiled by Numba: vectors as values, one LLVM instruction a function."""
