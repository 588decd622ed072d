"""The demo model for training: BitNet b1.58 with the 2B4T architecture, in PyTorch, and its Hugging Face folder.

Every linear quantises as inference does and lets gradients straight through: ternary weights (absmean, per matrix),
8-bit activations (absmax, per token). The inference side of the same arithmetic is `bitnet_numba/reference/model.py`.

Letters: B rows, T tokens, H hidden size, D head size, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tools.demo.size import BOS, CONTEXT, END, EOT, VOCAB, Size

EPS = 1e-5
ROPE_THETA = 10000.0
SHARD_BYTES = 15_000_000


def straight_through(value: Tensor, quantised: Tensor) -> Tensor:
    """`quantised` going forward, the gradient of `value` going backward."""
    return value + (quantised - value).detach()


class BitLinear(nn.Module):
    """y = (q @ t.T) * m / s, with q 8-bit activations, t ternary weights, and s, m their scales."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs).normal_(std=0.02))

    def forward(self, x: Tensor) -> Tensor:  # [..., inputs] -> [..., outputs]
        s = 127 / x.detach().abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
        q = straight_through(x * s, (x * s).round().clamp(-128, 127))
        stored = self.weight.detach().bfloat16().float()  # the master is kept as bf16, so that is what is ternarised
        m = stored.abs().mean().clamp(min=1e-5)
        t = straight_through(self.weight / m, (stored * (1 / m)).round().clamp(-1, 1))
        # Both operands are small integers, exact in bf16; the sum is kept in float32 inside the matrix product.
        return F.linear(q, t) * (m / s)


class RMSNorm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [B, heads, T, D]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        self.size = size
        self.q_proj = BitLinear(size.hidden, size.heads * size.head_dim)
        self.k_proj = BitLinear(size.hidden, size.kv_heads * size.head_dim)
        self.v_proj = BitLinear(size.hidden, size.kv_heads * size.head_dim)
        self.o_proj = BitLinear(size.heads * size.head_dim, size.hidden)
        self.attn_sub_norm = RMSNorm(size.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:  # [B, T, heads * D] -> [B, heads, T, D]
            return y.unflatten(-1, (-1, self.size.head_dim)).transpose(1, 2)

        q = rotate(split(self.q_proj(x)), cos, sin)
        k = rotate(split(self.k_proj(x)), cos, sin)
        v = split(self.v_proj(x))
        y = F.scaled_dot_product_attention(q, k, v.float(), is_causal=True, enable_gqa=True)
        return self.o_proj(self.attn_sub_norm(y.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        self.gate_proj = BitLinear(size.hidden, size.ffn)
        self.up_proj = BitLinear(size.hidden, size.ffn)
        self.down_proj = BitLinear(size.ffn, size.hidden)
        self.ffn_sub_norm = RMSNorm(size.ffn)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.ffn_sub_norm(F.relu(self.gate_proj(x)).square() * self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        self.input_layernorm = RMSNorm(size.hidden)
        self.self_attn = Attention(size)
        self.post_attention_layernorm = RMSNorm(size.hidden)
        self.mlp = FeedForward(size)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), cos, sin)
        return h + self.mlp(self.post_attention_layernorm(h))


class BitNet(nn.Module):
    def __init__(self, size: Size, int8_rows: bool = True):
        super().__init__()
        self.size = size
        self.int8_rows = int8_rows
        self.embed_tokens = nn.Parameter(torch.empty(VOCAB, size.hidden).normal_(std=0.02))
        self.layers = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = RMSNorm(size.hidden)
        frequencies = ROPE_THETA ** (-torch.arange(0, size.head_dim, 2).float() / size.head_dim)
        angles = torch.outer(torch.arange(CONTEXT).float(), frequencies)  # [T, D / 2]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, T, H]; `head` gives the logits
        h = F.embedding(ids, self.rows())
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            h = layer(h, cos, sin)
        return self.norm(h)

    def rows(self) -> Tensor:
        """The embedding as its int8 rows give it back (the packed model stores those)."""
        if not self.int8_rows:
            return self.embed_tokens
        stored = self.embed_tokens.detach().bfloat16().float()
        scale = stored.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        return straight_through(self.embed_tokens, (stored / scale).round() * scale)

    def head(self, h: Tensor) -> Tensor:
        return F.linear(h, self.rows())

    def loss(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Cross-entropy of each next token, averaged with `weights` [B, T]."""
        logits = self.head(self(rows[:, :-1]))
        losses = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none")
        weight = weights[:, 1:].flatten().float()
        return (losses * weight).sum() / weight.sum()


def hugging_face_config(size: Size) -> dict:
    return {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "hidden_act": "relu2",
        "hidden_size": size.hidden,
        "intermediate_size": size.ffn,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": CONTEXT,
        "vocab_size": VOCAB,
        "rms_norm_eps": EPS,
        "rope_theta": ROPE_THETA,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": END,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "online",
        },
    }


def tensor_name(parameter: str) -> str:
    return "model.embed_tokens.weight" if parameter == "embed_tokens" else f"model.{parameter}"


def write_folder(model: BitNet, folder: Path) -> None:
    """The bf16 master as a Hugging Face folder, in shards of less than 15 MB."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().to("cpu", torch.bfloat16).contiguous()
        if filled + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][tensor_name(name)] = tensor
        filled += tensor.nbytes
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.nbytes for shard in shards for t in shard.values())},
        "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(hugging_face_config(model.size), indent=2) + "\n")
    # Sampled so, stories have as many plots as the world, and words that are copied are not misspelt: min_p leaves many
    # likely names to choose from, and nothing beside the one likely letter.
    generation = {"bos_token_id": BOS, "eos_token_id": [END, EOT], "do_sample": True, "temperature": 1.0, "min_p": 0.1}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def read_folder(model: BitNet, folder: Path) -> None:
    tensors = {k: v for file in sorted(folder.glob("model-*.safetensors")) for k, v in load_file(file).items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[tensor_name(name)])
