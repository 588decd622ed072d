"""Packed codes as signed bytes, for products with group scales.

A group's sum of codes times q would need the group's sum of q to become one of weights (see `packing`). In these
products that would cost more than it spares elsewhere, so the codes become signed: shifted to the upper bits of a byte,
a code w + 2 has the bits of 64 (w + 2), and with the highest bit flipped those of 64 w as int8. That takes as many
instructions as a code on its own, and what multiplies the sums takes the 64 off without rounding.
"""

from bitnet_numba.kernels import ptx
from bitnet_numba.kernels.ptx.base import device_function
from bitnet_numba.packing import CODE_BITS

SHIFT = 8 - CODE_BITS  # a code's place in a byte
WEIGHT = 1 << SHIFT  # what a weight is multiplied by


@device_function
def signed(word, i):
    """Columns 4 i .. 4 i + 3 of a packed word, i = 0 .. 3: four bytes WEIGHT * w."""
    return ptx.shifted_weights(word, SHIFT - CODE_BITS * i)
