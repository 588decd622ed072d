"""What the products take: a packed linear and quantised activations.

    y[m, n] = (sum_k q[m, k] * w[n, k]) * scales[segment of n] / scale[m]  (+ bias[n])

and with group scales, where the sum over k goes over the 128 columns of group g, from the first group on:

    y[m, n] = sum_g (sum_k q[m, k] * w[n, k]) * (scales[n, g] * step[g, m])  (+ bias[n])

Arrays are DeviceArrays, or anything else with `__cuda_array_interface__` (CuPy, PyTorch, Numba device arrays).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from bitnet_numba.kernels.ptx.tma import SPAN_INTS
from bitnet_numba.kernels.runtime.device import Device
from bitnet_numba.packing import BLOCK_ROWS, num_groups, packed_scales, packed_words, padded_shape

MAX_SEGMENTS = 3  # q, k and v


@dataclass(frozen=True)
class PackedLinear:
    """Ternary weights [N, K] in the packed layout (see `packing`), on a device. N is the sum of `segments`."""

    words: Any = field(repr=False)  # int32 [packed_words(N, K)]
    scales: Any = field(repr=False)  # float32 [segments]
    segments: tuple[int, ...]  # rows that share a scale, in order: (N,), (q, k, v) or (gate, up)
    K: int  # columns
    bias: Any = field(default=None, repr=False)  # float32 [N]

    @property
    def N(self) -> int:
        """Rows."""
        return sum(self.segments)

    @property
    def segment_ends(self) -> tuple[int, ...]:
        """The row after each segment's last."""
        return tuple(accumulate(self.segments))

    def sizes(self) -> dict[str, tuple[Any, int, str]]:
        """Operands for `kernels.operands.checked`."""
        return {
            "words": (self.words, packed_words(self.N, self.K), "int32"),
            "scales": (self.scales, len(self.segments), "float32"),
            "bias": (self.bias, self.N, "float32"),
        }


@dataclass(frozen=True)
class GroupedLinear:
    """Ternary weights [N, K] with group scales, both in the packed order (see `packing`), on a device."""

    words: Any  # int32 [packed_words(N, K)]
    scales: Any  # float16 [packed_scales(N, K)]
    segments: tuple[int, ...]  # N rows in all; for gated products (gate, up)
    K: int  # columns
    bias: Any = None  # float32 [N]

    @property
    def N(self) -> int:
        """Rows."""
        return sum(self.segments)

    def sizes(self) -> dict[str, tuple[Any, int, str]]:
        """Operands for `kernels.operands.checked`."""
        return {
            "words": (self.words, packed_words(self.N, self.K), "int32"),
            "scales": (self.scales, packed_scales(self.N, self.K), "float16"),
            "bias": (self.bias, self.N, "float32"),
        }


@dataclass(frozen=True)
class QuantizedActivations:
    """Activations of M tokens as int8: `q`, the scale `s` of `quantize_activations` per token, and each token's sum of
    q, which the codes' offset makes necessary (see `packing.CODE_OFFSET`)."""

    q: Any  # int8 [M, K rounded up to 32], zeros at the end of each row
    scale: Any  # float32 [M]
    q_sum: Any  # int32 [M]

    @staticmethod
    def empty(device: Device, num_tokens: int, K: int) -> "QuantizedActivations":
        """Room for so many tokens of up to K columns, all zeros."""
        q = device.zeros(QuantizedActivations.q_size(num_tokens, K), "int8")
        return QuantizedActivations(q, device.zeros(num_tokens, "float32"), device.zeros(num_tokens, "int32"))

    @staticmethod
    def q_size(num_tokens: int, K: int) -> int:
        """Elements of q that there is memory for: those of the tokens, and those that `gemm` reads behind the last one,
        as if columns were a multiple of 128."""
        columns = padded_shape(1, K)[1]
        return num_tokens * columns + -columns % (4 * SPAN_INTS)

    def sizes(self, num_tokens: int, K: int) -> dict[str, tuple[Any, int, str]]:
        """Operands for `kernels.operands.checked`."""
        return {
            "q": (self.q, num_tokens * padded_shape(1, K)[1], "int8"),
            "scale": (self.scale, num_tokens, "float32"),
            "q_sum": (self.q_sum, num_tokens, "int32"),
        }


@dataclass(frozen=True)
class GroupedActivations:
    """Activations of M tokens as int8, each group of 128 columns by itself: `q`, and of each group and token the step
    d = 1 / s of `quantize_groups`. (Sums of q are not needed: these kernels make signed weights of the codes.)"""

    q: Any  # int8 [M, K rounded up to 32], zeros at the end of each row
    steps: Any  # float32 [groups, M rounded up to 4]

    @staticmethod
    def empty(device: Device, num_tokens: int, K: int) -> "GroupedActivations":
        """Room for so many tokens of up to K columns, all zeros."""
        q, steps = _grouped_sizes(num_tokens, K)
        return GroupedActivations(device.zeros(q, "int8"), device.zeros(steps, "float32"))

    def sizes(self, num_tokens: int, K: int) -> dict[str, tuple[Any, int, str]]:
        """Operands for `kernels.operands.checked`."""
        q, steps = _grouped_sizes(num_tokens, K)
        return {"q": (self.q, q, "int8"), "steps": (self.steps, steps, "float32")}


def steps_stride(num_tokens: int) -> int:
    """Tokens of a group's row in `GroupedActivations.steps`, which is copied in pieces of 16 bytes."""
    return -(-num_tokens // 4) * 4


def _grouped_sizes(num_tokens: int, K: int) -> tuple[int, int]:
    return num_tokens * padded_shape(1, K)[1], num_groups(K) * steps_stride(num_tokens)


def check_segments(kernel: str, segments: Sequence[int], gated: bool) -> None:
    """Raises ValueError unless there are 1 to 3 segments, or for gated products two equal ones of whole row blocks."""
    if not 1 <= len(segments) <= MAX_SEGMENTS or min(segments) < 1:
        raise ValueError(f"{kernel}: rows come in 1 to {MAX_SEGMENTS} segments, not {tuple(segments)}")
    if gated and (len(segments) != 2 or segments[0] != segments[1] or segments[0] % BLOCK_ROWS):
        raise ValueError(f"{kernel}: {tuple(segments)} are no gate and up rows in blocks of {BLOCK_ROWS}")
