"""What may share an SM when the launches of a decode step overlap, on an H200 with 2B4T. No device is needed.

Each product has a block for each of the 132 SMs. A launch's blocks start while those of the launch before still run,
and must find room beside them; but no two of the same launch may go to one SM, for then another has none.
"""

import pytest

from bitnet_numba.backends.cuda.forward import CudaModel, DecodePass
from bitnet_numba.backends.cuda.state import SequenceState
from bitnet_numba.backends.cuda.weights import RowFormats
from bitnet_numba.config import ModelConfig
from bitnet_numba.kernels.attention.decode import DecodeScratch
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.kernels.runtime.spec import CARVEOUT_BYTES, RESERVED_BYTES, KernelSpec
from tools.make_checkpoint import PRESETS, QUANTIZATION

REGISTERS, MAX_REGISTERS, SMS = 65536, 255, 132
STATIC_SHARED = 40 * 1024  # of a block, at most
LAYER = ("qkv", "attention", "o", "gate_up", "down")


def registers(spec: KernelSpec) -> int:
    """Of a block, at most."""
    each = spec.registers or min(MAX_REGISTERS + 1, REGISTERS // (spec.threads * spec.blocks_per_sm) // 8 * 8)
    return spec.threads * each


def layer_specs(arch: int, long: bool) -> dict[str, KernelSpec]:
    """The kernels of a layer of a decode step."""
    config = ModelConfig.from_hf(PRESETS["2b-4t"][1] | {"quantization_config": QUANTIZATION["offline"]})
    device = DryRunDevice(arch, SMS)
    model = CudaModel.dry_run(config, RowFormats("bf16", "bf16"), device)
    state = SequenceState(device, config, 4096)
    forward = DecodePass(model, state, DecodeScratch.allocate(device, model.heads), long)
    return {name: launch.spec for name, launch in zip(LAYER, forward.layer(0), strict=True)}


@pytest.mark.parametrize("long", [False, True])
def test_blocks_of_neighbours_share_an_sm_and_those_of_one_launch_do_not(long: bool) -> None:
    specs = layer_specs(90, long)
    pairs = [("qkv", "attention"), ("attention", "o"), ("o", "gate_up"), ("gate_up", "down"), ("down", "qkv")]
    for pair in pairs:
        one, other = (specs[name] for name in pair)
        assert registers(one) + registers(other) <= REGISTERS, pair
        shared = one.dynamic_shared + other.dynamic_shared + STATIC_SHARED + 2 * RESERVED_BYTES
        assert shared <= CARVEOUT_BYTES, pair
    for name in ("qkv", "o"):
        assert 2 * (specs[name].dynamic_shared + RESERVED_BYTES) > CARVEOUT_BYTES, name
    # These start beside the other one, which every SM has one of.
    assert registers(specs["gate_up"]) + 2 * registers(specs["down"]) > REGISTERS
    assert registers(specs["o"]) + 2 * registers(specs["gate_up"]) > REGISTERS


def test_only_the_measured_architecture_spreads_blocks() -> None:
    assert not any(spec.one_per_sm for arch in (75, 80, 89, 100, 120) for spec in layer_specs(arch, False).values())
