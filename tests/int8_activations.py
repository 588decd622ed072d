"""Comparing two models whose activations are rounded to int8, in a way that is true on every machine.

Rounding to int8 is discontinuous. Matrix products, exponentials and sums differ in their last bit between CPUs, BLAS
libraries, numbers of threads and shapes; where a value lies at a rounding border, that bit decides which int8 it
becomes, and the flip grows to a tenth of the logits' spread within a few layers. No prompt is free of such values on
all machines. So the int8 values of one model, recorded, are put in place of the other's wherever it quantises:

- what is left of the logits' difference is float32 rounding, which does not grow (1e-5 of their spread was seen);
- every int8 value that differs is a flip of its own, no consequence of another, and must lie within BAND of its border.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.packing import GROUP_COLS
from bitnet_numba.quantize import quantize_activations, quantize_groups
from bitnet_numba.reference import model as reference

# A value is at most 127 steps of its int8 grid, so one float32 rounding moves it by at most 127 * 2^-24 of a step.
# From one quantisation to the next a value sees fewer than 64 roundings (rescaled sum, residual, norm, scale), and
# behind attention those of its scores, which the exponential turns from absolute to relative: 64 again for scores of
# up to 64. Twice, for there are two models: 1.9e-3 of a step. Seen: 1.3e-3 for any value, 7e-5 for one that flipped.
BAND = 2 * (64 + 64) * 127 * 2.0**-24
LOGITS_TOLERANCE = 1e-4  # of the logits' spread, given the same int8 values; 1e-5 was seen

# The linears of a layer in the order in which they quantise their input, by the group whose input they share.
LAYER = ("qkv", "qkv", "qkv", "o", "gate_up", "gate_up", "down")
GROUPS = tuple(dict.fromkeys(LAYER))

Int8 = NDArray[np.int8]
Floats = NDArray[np.float32]
Quantize = Callable[[Floats], tuple[Int8, Floats]]


def per_linear(groups: Sequence[Int8]) -> list[Int8]:
    """The int8 inputs [T, K] of all linears, in order, from those of all groups."""
    return [groups[first + GROUPS.index(name)] for first in range(0, len(groups), len(GROUPS)) for name in LAYER]


def recorded_groups(golden: dict[str, NDArray], prompt: str) -> list[Int8]:
    """The int8 inputs of all groups of linears that transformers had for a prompt."""
    start = f"q/{prompt}/"
    return [golden[f"{start}{i}"] for i in range(sum(name.startswith(start) for name in golden))]


@contextmanager
def collected() -> Iterator[list[Int8]]:
    """Fills a list with the int8 inputs [T, K] of all linears, in order, of the one forward call made meanwhile."""
    calls: list[Int8] = []

    def collect(definition: Quantize, x: Floats) -> tuple[Int8, Floats]:
        q, s = definition(x)
        calls.append(q)
        return q, s

    with _replaced(collect):
        yield calls


@contextmanager
def _replaced(quantize: Callable[[Quantize, Floats], tuple[Int8, Floats]]) -> Iterator[None]:
    """Puts `quantize`, given the definition, in the place of both definitions in the reference."""
    with (
        mock.patch.object(reference, "quantize_activations", lambda x: quantize(quantize_activations, x)),
        mock.patch.object(reference, "quantize_groups", lambda x: quantize(quantize_groups, x)),
    ):
        yield


def _in_steps(definition: Quantize, x: Floats, s: Floats) -> NDArray[np.float64]:
    """Activations in steps of their int8 grid, before they are rounded."""
    if definition is quantize_groups:
        return x / np.repeat(s.astype(np.float64), GROUP_COLS, axis=1)[:, : x.shape[1]]
    return x.astype(np.float64) * s


@contextmanager
def imposed(linears: Sequence[Int8]) -> Iterator[None]:
    """Makes the reference model compute with these int8 inputs [T, K] of all its linears, whatever it would have had.

    Forward calls made meanwhile take the tokens one after another. Raises AssertionError for a value of the model's own
    that differs by more than a flip at a border, or if tokens are left over.
    """
    done, turn = 0, 0  # tokens of past forward calls; linears of this one

    def quantize(definition: Quantize, x: Floats) -> tuple[Int8, Floats]:
        nonlocal done, turn
        own, s = definition(x)
        q = linears[turn][done : done + len(x)]
        assert q.shape == own.shape, f"linear {turn}: {own.shape} where {q.shape} was recorded"
        if (flipped := own != q).any():
            assert (np.abs(own.astype(int) - q) <= 1).all(), f"linear {turn}: off by more than one"
            value, border = _in_steps(definition, x, s)[flipped], ((own.astype(float) + q) / 2)[flipped]
            worst = np.abs(value - border).argmax()
            assert abs(value[worst] - border[worst]) <= BAND, (
                f"linear {turn}: {value[worst]} was rounded to {q[flipped][worst]} by the other model"
            )
        turn += 1
        if turn == len(linears):
            done, turn = done + len(x), 0
        return q, s

    with _replaced(quantize):
        yield
    assert turn == 0 and done == len(linears[0]), f"{done} of {len(linears[0])} tokens were computed"


def check_logits(logits: NDArray[np.float32], expected: NDArray[np.float32], spread: float) -> None:
    """Logits computed with the same int8 values."""
    error = np.abs(logits - expected) / spread
    worst = np.unravel_index(int(error.argmax()), error.shape)
    assert error[worst] < LOGITS_TOLERANCE, f"worst at {worst}: {logits[worst]}, expected {expected[worst]}"
