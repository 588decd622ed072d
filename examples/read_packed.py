"""What is in a packed checkpoint, read with the safetensors library: the format is as simple as it looks.

python examples/read_packed.py [FOLDER]    what `bitnet-numba convert` wrote, or `bitnet-numba models path NAME` prints
"""

import json
import sys
from pathlib import Path

import safetensors

import bitnet_numba as bn

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(bn.__file__).parent / "demo"
config = json.loads((folder / "config.json").read_text())
with safetensors.safe_open(folder / "model.safetensors", framework="numpy") as file:
    for name in sorted(file.keys()):
        tensor = file.get_slice(name)
        print(f"{name:40} {tensor.get_dtype():5} {tensor.get_shape()}")

    # Rows and columns are not stored: they follow from the config, as bn.ModelConfig works them out.
    segments, K = bn.ModelConfig.from_hf(config).group_shape("qkv")
    words = file.get_tensor("layers.0.qkv.words")
    scales = file.get_tensor("layers.0.qkv.scales")

ternary = bn.packing.unpack_ternary(words, sum(segments), K)  # int8 [q + k + v, hidden]
first = 0
for name, rows, scale in zip("qkv", segments, scales, strict=True):
    part = ternary[first : first + rows]
    first += rows
    print(f"layer 0, {name}: {rows} x {K}, {(part == 0).mean():.1%} zeros, scale {scale:.5f}")
