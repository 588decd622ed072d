"""What is in a packed checkpoint, read with the safetensors library: the format is as simple as it looks.

python examples/read_packed.py [FOLDER]    what `bitnet-numba convert` wrote, or `bitnet-numba models path NAME` prints
"""

import json
import sys
from pathlib import Path

import safetensors

import bitnet_numba as bn

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(bn.__file__).parent / "demo"
config = bn.ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
with safetensors.safe_open(folder / "model.safetensors", framework="numpy") as file:
    for name in sorted(file.keys()):
        tensor = file.get_slice(name)
        print(f"{name:40} {tensor.get_dtype():5} {tensor.get_shape()}")

    # Rows and columns are not stored: they follow from the config.
    segments, K = config.group_shape("qkv")
    words = file.get_tensor("layers.0.qkv.words")
    scales = file.get_tensor("layers.0.qkv.scales")

ternary = bn.packing.unpack_ternary(words, sum(segments), K)  # int8 [q + k + v, hidden]
if config.group_scales:  # one for each row and 128 columns, instead of one for each segment
    scales = bn.packing.unpack_scales(scales, sum(segments), K)  # float16 [q + k + v, groups]
first = 0
for i, (name, rows) in enumerate(zip("qkv", segments, strict=True)):
    part = slice(first, first + rows)
    first += rows
    scale = scales[part].astype("float32").mean() if config.group_scales else scales[i]
    print(f"layer 0, {name}: {rows} x {K}, {(ternary[part] == 0).mean():.1%} zeros, scale {scale:.5f}")
