"""Rotary embedding (Su et al., 2021) and its scalings: the definition of cosines and sines."""

import math

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.config import ModelConfig
from bitnet_numba.config_rope import RopeScaling

Floats = NDArray[np.float32]
ONE = np.float32(1)


def rope_tables(config: ModelConfig, positions: NDArray[np.int64], local: bool = False) -> tuple[Floats, Floats]:
    """Cosines and sines of positions [M], float32 [M, D]: the angles of the first half of a head, twice.

    local: of layers whose attention has a window, which have a base of their own.
    """
    scaling, theta = config.rope_scaling, config.rope_theta
    if local and config.local is not None:
        theta = config.local.rope_theta
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies: Floats = ONE / np.float32(theta) ** exponents  # [D / 2]
    if scaling is not None:
        frequencies = scaled(frequencies, scaling, theta)
    angles = positions.astype(np.float32)[:, None] * frequencies  # [M, D / 2]
    angles = np.concatenate([angles, angles], axis=-1)  # [M, D]
    if scaling is None or scaling.kind != "yarn":
        return np.cos(angles), np.sin(angles)
    factor = np.float32(scaling.attention_factor)
    return np.cos(angles) * factor, np.sin(angles) * factor


def scaled(frequencies: Floats, scaling: RopeScaling, theta: float) -> Floats:
    """The frequencies [D / 2] of a model whose context was lengthened.

    Low ones are divided by the factor, high ones kept, those between interpolated.
    """
    factor = np.float32(scaling.factor)
    if scaling.kind == "linear":
        return frequencies / factor
    if scaling.kind == "yarn":
        kept = yarn_kept(len(frequencies), scaling, theta)
    else:
        rotations = np.float32(scaling.original_context) * frequencies / np.float32(2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((rotations - np.float32(low)) / np.float32(high - low), 0, 1)
    return (ONE - kept) * frequencies / factor + kept * frequencies


def yarn_kept(count: int, scaling: RopeScaling, theta: float) -> Floats:
    """How much of each of `count` frequencies YaRN keeps (Peng et al., 2023): all where a head turns `beta_fast` times
    over the original context, nothing where it turns `beta_slow` times, linear in the dimension between."""

    def dimension(rotations: float) -> float:
        return count * math.log(scaling.original_context / (rotations * 2 * math.pi)) / math.log(theta)

    first = max(math.floor(dimension(scaling.beta_fast)), 0)
    last: float = min(math.ceil(dimension(scaling.beta_slow)), 2 * count - 1)
    if first == last:
        last += 0.001
    ramp = (np.arange(count, dtype=np.float32) - np.float32(first)) / np.float32(last - first)
    return ONE - np.clip(ramp, 0, 1)
