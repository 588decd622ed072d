"""BitNet b1.58 inference in pure Python: ternary weights, 8-bit activations, NumPy and Numba CUDA."""

import os

_here = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_here, "kernels")):
    # A checkout: kernels/ and reference/ stand beside this package, and are imported as its subpackages.
    __path__.append(os.path.dirname(_here))
