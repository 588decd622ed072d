"""Absmean weight and absmax activation quantisation: the definition.

Source: "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits" (Ma et al., 2024), section 2, in the order
of float32 operations that the published checkpoints were trained with.
"""

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.packing import GROUP_COLS, num_groups

EPSILON = np.float32(1e-5)  # lower limit of absmean and absmax, so that all-zero input stays finite
INT8_MAX = np.float32(127)
INT8_MIN = np.float32(-128)
ONE = np.float32(1)
FINER = np.float32(254)  # steps of the second int8 plane in one of the first
SECOND_STEP = ONE / FINER


def absmean_scale(w: NDArray[np.floating]) -> np.float32:
    """m = max(mean(|w|), 1e-5): the one float32 scale of a weight matrix, any shape.

    Raises ValueError for an empty matrix, NaN or infinity.
    """
    if w.size == 0:
        raise ValueError("cannot take the absmean of an empty matrix")
    # Summed in float64, so that the float32 result does not depend on the order of summation.
    mean = np.abs(w).mean(dtype=np.float64)
    if not np.isfinite(mean):
        raise ValueError("weights hold NaN or infinity")
    return np.maximum(np.float32(mean), EPSILON)


def ternarize(w: NDArray[np.floating]) -> tuple[NDArray[np.int8], np.float32]:
    """Absmean quantisation t = clamp(rint(w * (1 / m)), -1, 1), so that w is about t * m.

    Takes weights [N, K] (float16, float32 or float64; computed in float32), returns t int8 [N, K] and m float32.
    Raises ValueError for an empty matrix, NaN or infinity.
    """
    m = absmean_scale(w)
    t = np.rint(w.astype(np.float32) * (ONE / m))
    return np.clip(t, -1, 1, out=t).astype(np.int8), m


def quantize_activations(x: NDArray[np.floating]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Absmax quantisation of each token: s = 127 / max(max|x|, 1e-5), q = clamp(rint(x * s), -128, 127), half to even.

    Takes activations [..., K] (computed in float32), returns q int8 [..., K] and s float32 [..., 1]; x is about q / s.
    Raises ValueError for K = 0, NaN or infinity.
    """
    x = np.asarray(x, np.float32)
    if x.shape[-1] == 0:
        raise ValueError("cannot quantise activations without columns")
    absmax = np.abs(x).max(axis=-1, keepdims=True)
    if not np.isfinite(absmax).all():
        raise ValueError("activations hold NaN or infinity")
    s = (ONE / np.maximum(absmax, EPSILON)) * INT8_MAX  # reciprocal first, as in the published models' code
    q = np.rint(x * s)
    return np.clip(q, INT8_MIN, INT8_MAX, out=q).astype(np.int8), s


def quantize_groups(x: NDArray[np.floating]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """`quantize_activations` of each group of 128 columns by itself, for weights with group scales.

    Takes activations [M, K] (computed in float32), returns q int8 [M, K] and steps d = 1 / s float32 [M, groups]; x is
    about q * d. Raises ValueError for K = 0, NaN or infinity.
    """
    q, s = quantize_activations(_grouped(x))
    return _ungrouped(q, x.shape), ONE / s[..., 0]


def quantize_groups_twice(
    x: NDArray[np.floating],
) -> tuple[NDArray[np.int8], NDArray[np.int8], NDArray[np.float32]]:
    """`quantize_groups`, and what it rounds off as a second int8 plane: q2 = rint((x * s - q) * 254), half to even.

    Takes activations [M, K] (computed in float32), returns q and q2 int8 [M, K] and d = 1 / s float32 [M, groups]; x is
    about (q + q2 / 254) * d. Raises ValueError as `quantize_groups` does.
    """
    groups = _grouped(x)
    q, s = quantize_activations(groups)
    q2 = np.rint((groups * s - q) * FINER).astype(np.int8)
    return _ungrouped(q, x.shape), _ungrouped(q2, x.shape), ONE / s[..., 0]


def _grouped(x: NDArray[np.floating]) -> NDArray[np.float32]:
    """[M, K] -> [M, groups, 128], with zeros after K."""
    M, K = x.shape
    padded = np.zeros((M, num_groups(K) * GROUP_COLS), np.float32)
    padded[:, :K] = x
    return padded.reshape(M, num_groups(K), -1)


def _ungrouped(q: NDArray[np.int8], shape: tuple[int, ...]) -> NDArray[np.int8]:
    """[M, groups, 128] -> [M, K]"""
    M, K = shape
    return np.ascontiguousarray(q.reshape(M, -1)[:, :K])


def find_group_scales(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]] | None:
    """Weights that are ternary times a scale for each row and group of 128 columns, taken apart.

    Takes float32 [N, K], returns t int8 [N, K] and the scales float32 [N, groups], 0 for a group of zeros, so that
    t * scale is every value exactly; None if the weights are not of this kind, or not finite.
    """
    N, K = values.shape
    padded = np.zeros((N, num_groups(K) * GROUP_COLS), np.float32)
    np.abs(values, out=padded[:, :K])
    sizes = padded.reshape(N, num_groups(K), -1)
    scales: NDArray[np.float32] = sizes.max(axis=2)
    if not np.isfinite(scales).all() or not ((sizes == scales[..., None]) | (sizes == 0)).all():
        return None
    return np.sign(values).astype(np.int8), scales
