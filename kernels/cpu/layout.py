"""What the compiled step is told, by addresses and sizes in 64-bit words: the model's weights, and the job to do."""

import numpy as np

MAX_TOKENS = 64  # of a pass
SEGMENTS = 3  # at most, of a linear: q, k and v
PIECES = 6  # of a region, for each member: the more, the better they share it, the fewer, the longer each stream
MIN_ROWS, MAX_ROWS = 32, 256  # of a piece
HEAD_ROWS = 256  # of the LM head in a piece
FORWARD, LOGITS = 1, 2  # kinds of jobs
RELU2, SILU, GELU = 0, 1, 2
ACTIVATIONS = {"relu2": RELU2, "silu": SILU, "gelu": GELU}
BF16, F16, F32, INT8, TERNARY = range(5)
ROW_FORMATS = {"bf16": BF16, "f16": F16, "f32": F32, "int8": INT8, "ternary": TERNARY}

_INT, _FLOAT = np.int64, np.float64
# A linear: addresses, 0 for what it does not have.
LINEAR = np.dtype(
    [
        ("segments", _INT),  # matrices that were joined: q, k and v, or gate and up
        ("words", _INT),  # packed ternary weights; or else
        ("rows", _INT),  # bfloat16 [N, K]
        ("scales", _INT),  # float32 [segments]
        ("group_scales", _INT),  # or float16, of each row and 128 columns, in storage order
        ("bias", _INT),  # float32 [N]
        ("norms", _INT),  # float32 [segments, K]: each linear's own RMSNorm
    ]
)
# Addresses of the machine code of kernels, see `kernels`.
KERNELS = np.dtype(
    [
        (name, _INT)
        for name in (
            "gemv",
            "gemm",
            "gemv_groups",
            "gemm_groups",
            "bf16_rows",
            "float_rows",
            "int8_rows",
            "prepare_int8",
            "store_kv",
            "attend",
            "sample",
        )
    ]
)
LAYER = np.dtype(
    # float32, or 0
    [
        (name, _INT)
        for name in (
            "input_norm",
            "post_attention_norm",
            "attn_sub_norm",
            "ffn_sub_norm",
            "attn_post_norm",
            "ffn_post_norm",
            "q_norm",
            "k_norm",
        )
    ]
    # Tokens that a query attends to, its own included, or 0 for all; if not 0, the layer takes the local rotary tables.
    + [("window", _INT)]
    + [(name, LINEAR) for name in ("qkv", "o", "gate_up", "down")]
)
MODEL = np.dtype(
    [
        (name, _INT)
        for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab", "activation")
    ]
    + [("eps", _FLOAT), ("linear_eps", _FLOAT)]
    + [("embedding_scale", _FLOAT)]  # of rows of the embedding
    + [("norm", _INT)]  # the last one, float32 [hidden]
    # Rows in a format of ROW_FORMATS; float32 scales of int8 rows; int32 sums of int8 rows of the head.
    + [("embed", _INT), ("embed_scale", _INT), ("embed_format", _INT)]
    + [("head_format", _INT), ("head_scale", _INT), ("head_sums", _INT), ("head", LINEAR)]
)
JOB = np.dtype(
    [("kind", _INT), ("tokens", _INT)]
    # Of each token: its id (int64), its position (int64), the address of its sequence's block table (int64).
    + [(name, _INT) for name in ("ids", "positions", "tables")]
    + [("cos", _INT), ("sin", _INT)]  # float32 [positions, head_dim / 2]
    + [("local_cos", _INT), ("local_sin", _INT)]  # the same, of layers with a window
    + [("cache", _INT), ("page_stride", _INT), ("layer_stride", _INT)]  # page 0, bytes to the next page and layer
    # Shared: float32 [M, ...] of the residual stream, the products' results, and the final hidden states.
    + [(name, _INT) for name in ("x", "qkv", "attn_out", "mlp_hidden", "final", "logits", "logits_stride")]
    + [("splits", _INT), ("partials", _INT)]  # of the longest context; partial outputs of attention
    # Quantised and prepared activations: MAX_TOKENS tokens that all share, or one token for each member.
    + [(name, _INT) for name in ("q_stride", "plane_stride", "shared")]
    # Bytes of the scales of all segments and tokens; of weights with group scales, groups of a token at most, and int8
    # planes of activations.
    + [("scale_bytes", _INT), ("groups", _INT), ("planes", _INT)]
    # Each member's own memory, and where in it are what.
    + [
        (name, _INT)
        for name in ("own", "own_stride", "h", "acc", "y", "unpacked", "scratch", "own_partials", "sampler")
    ]
    # Sampling after logits, if `settings` is not 0: of each token float64 settings (see `sampler.pack_settings`), the
    # address of its history (int64) and how long that is, the address of its edits (float64, see `sampler.pack_edits`)
    # and how many there are, the address of its mask (see `sampling.sample`) or 0; and the tokens sampled, int64.
    + [(name, _INT) for name in ("settings", "histories", "history_lengths", "edits", "num_edits", "masks", "sampled")]
    # For checking, or 0: all int8 activations of a pass, [4 * layers + 1, SEGMENTS, MAX_TOKENS, q_stride]; the last are
    # those of a ternary LM head.
    + [("record", _INT)]
    + [("kernels", KERNELS)]
)
