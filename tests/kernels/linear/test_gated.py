"""Gated activations by themselves, against the reference's.

Tolerance: exp of an argument that is off by its own rounding, 2^-22 of at most 88 before it overflows, and four more
operations; GELU by its sigmoid differs from the reference's 1 + tanh by 2^-24 of 1 where that is near 0.
"""

import numpy as np
import pytest

from bitnet_numba.kernels.linear.gated import gate
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.reference.model import ACTIVATIONS
from tests.kernels.harness import SIMULATED, HarnessDevice, Out, assert_close, needs_gpu, simulated


def check_gate(activation: str, size: int, seed: int) -> None:
    """One launch against the reference."""
    rng = np.random.default_rng(seed)
    x, up = (rng.standard_normal(size).astype(np.float32) * 4 for _ in range(2))
    far = 12 if SIMULATED else 50  # Python's exp overflows where the GPU's is infinite
    x[:3] = 0, -far, far
    device, out = HarnessDevice(1), Out(size, np.float32, x)
    gate(device, device.operand(out), device.operand(up), size, activation)
    device.run()
    expected = ACTIVATIONS[activation](x) * up
    bound = 2.0**-19 * np.abs(expected) + 2.0**-23 * np.abs(x * up)
    assert_close(out.array, expected, bound, activation)


@simulated
@pytest.mark.parametrize("activation", ["relu2", "silu", "gelu"])
def test_simulated_gate(activation: str) -> None:
    check_gate(activation, 1032, 5)


@needs_gpu
@pytest.mark.parametrize("activation", ["relu2", "silu", "gelu"])
def test_gate_on_gpu(activation: str) -> None:
    check_gate(activation, 100_004, 5)


def test_launcher_refuses_what_does_not_fit() -> None:
    device = DryRunDevice(90, 132)
    x = device.empty(64, np.float32)
    gate(device, x, x, 64, "gelu")
    with pytest.raises(ValueError, match="gate: gate holds 64 elements, 68 elements takes 68"):
        gate(device, x, x, 68, "gelu")
    with pytest.raises(ValueError, match="a multiple of 4 elements is needed, not 62"):
        gate(device, x, x, 62, "silu")
