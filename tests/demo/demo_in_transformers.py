"""The built-in model as a folder that transformers runs: for a live test, and for what tests/golden/record.py records.

The shipped model holds ternary weights with float32 scales and an embedding of int8 rows, not the bf16 master that was
trained: ternarising `t * m` again would give another scale. So it is handed to transformers in the stored form that
keeps ternary weights and scale apart (`autobitlinear`, `offline`), with everything else in float32.
"""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from bitnet_numba.checkpoint.packed import open_packed
from bitnet_numba.config import GROUPS
from bitnet_numba.engine.loading import DEMO
from bitnet_numba.text.tokenizer import Tokenizer

GOLDEN_DEMO = Path(__file__).parent.parent / "golden" / "demo" / "golden.npz"
CONVERSATIONS = {
    "story": [{"role": "user", "content": "Tell me a story about a dog and a kite."}],
    "help": [{"role": "user", "content": "What can you do?"}],
}


def prompt_ids(name: str) -> list[int]:
    return Tokenizer.open(DEMO).encode_chat(CONVERSATIONS[name])


def write_hugging_face(folder: Path) -> None:
    """The shipped weights as a Hugging Face folder, exactly."""
    checkpoint = open_packed(DEMO)
    config = checkpoint.config
    tensors: dict[str, NDArray] = {}
    rows, scale = checkpoint.tensor("embed.weight"), checkpoint.tensor("embed.scale")
    tensors["model.embed_tokens.weight"] = rows.astype(np.float32) * scale[:, None]
    tensors["model.norm.weight"] = np.array(checkpoint.tensor("norm.weight"))
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        for norm, module in (
            ("input_norm", "input_layernorm"),
            ("post_attention_norm", "post_attention_layernorm"),
            ("attn_sub_norm", "self_attn.attn_sub_norm"),
            ("ffn_sub_norm", "mlp.ffn_sub_norm"),
        ):
            tensors[f"{theirs}.{module}.weight"] = np.array(checkpoint.tensor(f"{ours}.{norm}.weight"))
        for group, modules in GROUPS.items():
            segments, columns = config.group_shape(group)
            t = checkpoint.ternary(f"{ours}.{group}.words", sum(segments), columns)
            scales = checkpoint.tensor(f"{ours}.{group}.scales")
            for module, part, m in zip(modules, np.split(t, np.cumsum(segments)[:-1]), scales, strict=True):
                # Four rows to a byte, in planes: bits 2j, 2j + 1 of row r hold row j * N / 4 + r as t + 1.
                planes = (part + 1).astype(np.uint8).reshape(4, -1, columns)
                tensors[f"{theirs}.{module}.weight"] = sum(planes[j] << (2 * j) for j in range(4)).astype(np.uint8)
                tensors[f"{theirs}.{module}.weight_scale"] = np.array([m], np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((DEMO / "config.json").read_text())
    del settings["bitnet_numba"]
    settings["torch_dtype"] = "float32"
    settings["quantization_config"]["quantization_mode"] = "offline"
    (folder / "config.json").write_text(json.dumps(settings))
