"""What is in a GGUF file: its metadata and its tensors; nothing of them is read into memory.

python examples/inspect_gguf.py FILE.gguf
"""

import collections
import sys

import bitnet_numba as bn
from bitnet_numba.checkpoint.gguf_file import GgufFile, Numbers
from bitnet_numba.checkpoint.gguf_types import kind_and_nbytes, type_name

if len(sys.argv) != 2:
    sys.exit("usage: python examples/inspect_gguf.py FILE.gguf")
try:
    file = GgufFile(sys.argv[1], kind_and_nbytes)
except bn.CheckpointError as error:  # a damaged file is refused with one line
    sys.exit(str(error))

for key, value in file.metadata.items():
    many = value.values if isinstance(value, Numbers) else value if isinstance(value, list) else None
    print(f"{key:45} {str(value)[:60]!r}" if many is None else f"{key:45} {len(many)} values")

by_type: collections.Counter[str] = collections.Counter()
for name, tensor in file.tensors.items():
    by_type[type_name(tensor.type)] += tensor.nbytes or 0
    print(f"{name:45} {type_name(tensor.type):6} {list(tensor.shape)}")
for kind, nbytes in by_type.most_common():
    print(f"{kind}: {nbytes / 1e6:.2f} MB")
