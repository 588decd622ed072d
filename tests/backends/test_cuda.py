"""The whole CUDA backend against the reference model, transformers' recorded logits, and itself.

Tolerance. Against a reference whose keys and values are rounded to the cache's type, only float32 rounding differs, and
through it now and then one q by one: at most 0.3 of the logits' spread, 0.05 in the mean square. Against recorded
float32 logits: 0.8 and 0.12 with bfloat16, half of that with float16.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bitnet_numba
from bitnet_numba.backends.protocol import Context
from bitnet_numba.backends.reference import reference_backend
from bitnet_numba.checkpoint.convert import convert
from bitnet_numba.checkpoint.packed import PackedCheckpoint, open_packed
from bitnet_numba.checkpoint.rows import HeadFormat
from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.attention.kv_dtype import DEFAULT, KV_DTYPES, KVDtype
from bitnet_numba.reference import model as reference_model
from bitnet_numba.sampling import SamplingParams, sample
from tests.checkpoint.test_gguf import FILES as GGUF_FILES
from tests.checkpoint.test_gguf import FOLDER as GGUF
from tests.checkpoint.test_group_scales import FOLDER as GROUPS
from tests.checkpoint.test_group_scales import SOURCES
from tests.conftest import GoldenCase
from tests.kernels.harness import ROOT, needs_gpu
from tools.make_checkpoint import LLAMA3_ROPE, PRESETS, make_checkpoint

GREEDY = SamplingParams()
GOLDEN_BOUNDS = {"bfloat16": (0.8, 0.12), "float16": (0.4, 0.06), "float8": (2.5, 0.4), "float32": (0.3, 0.05)}


@pytest.fixture
def rounded_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the reference attend to keys and values rounded to float16."""
    attend = reference_model.attend

    def rounded(q: np.ndarray, keys: np.ndarray, values: np.ndarray, window: int | None) -> np.ndarray:
        return attend(q, *(x.astype(np.float16).astype(np.float32) for x in (keys, values)), window)

    monkeypatch.setattr(reference_model, "attend", rounded)


def on_gpu(checkpoint: PackedCheckpoint, capacity: int, kv_dtype: KVDtype = DEFAULT) -> Any:
    from bitnet_numba.backends.cuda.backend import CudaBackend

    return CudaBackend(checkpoint, kv_dtype).new_context(capacity)


def make_large_attention(folder: Path, preset: str, name: str, sizes: dict[str, Any] | None = None) -> None:
    """A small model with keys, or values, of about a million."""
    spec, config = PRESETS[preset]
    source = folder.parent / "source"
    make_checkpoint(source, config | (sizes or {}), spec, seed=3, dtype="fp32")
    file = source / "model.safetensors"
    tensors = load_file(file)
    packed = f"model.layers.0.self_attn.{name}.weight_scale" in tensors  # by whose inverse weights are multiplied
    ending, factor = (".weight_scale", 1e-6) if packed else (".weight", 1e6)
    changed = {key: x * np.float32(factor) for key, x in tensors.items() if key.endswith(name + ending)}
    save_file(tensors | changed, file)
    convert(source, folder)


def random_ids(checkpoint: PackedCheckpoint, count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, checkpoint.config.vocab_size, count).tolist()


def check_close(logits: np.ndarray, expected: np.ndarray, most: float, rms: float) -> None:
    error = np.abs(logits - expected) / expected.std()
    worst = np.unravel_index(int(error.argmax()), error.shape)
    assert error.max() <= most, f"worst at {worst}: {logits[worst]}, expected {expected[worst]}"
    assert np.sqrt(np.mean(error**2)) <= rms


def one_by_one(context: Context, ids: list[int]) -> np.ndarray:
    """Logits of tokens that are fed one at a time."""
    return np.concatenate([context.logits([token]) for token in ids])


def check_against_reference(checkpoint: PackedCheckpoint, ids: list[int]) -> None:
    """Logits on the GPU, by a pass over a prompt and by decode steps."""
    expected = reference_backend(checkpoint).new_context(len(ids)).logits(ids)
    context = on_gpu(checkpoint, len(ids))
    check_close(context.logits(ids), expected, 0.3, 0.05)
    context.truncate(0)
    check_close(one_by_one(context, ids), expected, 0.3, 0.05)


def take(context: Context, ids: list[int], params: SamplingParams, count: int) -> list[int]:
    """The first tokens of a decoding, which is then closed; the context holds ids and what was taken but the last."""
    before = len(context.ids)
    steps = context.decode(ids, params)
    tokens = [token for _, token in zip(range(count), steps, strict=False)]
    steps.close()
    context.truncate(before + len(ids) + count - 1)
    return tokens


@needs_gpu
@pytest.mark.parametrize("prompt", ["bos1", "text7", "text33"])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_golden_logits(golden: GoldenCase, prompt: str, kv_dtype: KVDtype) -> None:
    ids = golden.recorded[f"ids/{prompt}"].tolist()
    logits = on_gpu(golden.packed, len(ids), kv_dtype).logits(ids)
    error = np.abs(logits - golden.recorded[f"logits/{prompt}"]) / golden.recorded[f"std/{prompt}"]
    most, rms = GOLDEN_BOUNDS[kv_dtype]
    assert error.max() < most
    assert np.sqrt(np.mean(error**2)) < rms


@needs_gpu
@pytest.mark.parametrize("prompt", ["text7", "text33"])
def test_golden_greedy_continuation(golden: GoldenCase, prompt: str) -> None:
    """Equal tokens wherever the two best logits are 0.3 apart; the recorded tokens are fed back."""
    ids, expected = golden.recorded[f"ids/{prompt}"].tolist(), golden.recorded[f"greedy/{prompt}"]
    context = on_gpu(golden.packed, len(ids) + len(expected))
    logits = context.logits(ids)[-1]
    compared = 0
    for token, margin in zip(expected.tolist(), golden.recorded[f"greedy_margin/{prompt}"], strict=True):
        if margin >= 0.3:
            assert logits.argmax() == token
            compared += 1
        logits = context.logits([token])[-1]
    assert compared >= 4


@needs_gpu
@pytest.mark.parametrize("preset", ["tiny", "tiny-llama"])  # with a norm before attention's product, and without
@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
def test_what_float16_cannot_hold_ends_with_an_error(preset: str, name: str, tmp_path: Path) -> None:
    make_large_attention(tmp_path / "packed", preset, name)
    with bitnet_numba.load(tmp_path / "packed", "cuda", kv_dtype="bfloat16") as llm:
        assert np.isfinite(llm.logits([5, 6, 7])).all()
        assert len(llm.generate([5, 6, 7], max_new_tokens=4).token_ids) == 4
    with bitnet_numba.load(tmp_path / "packed", "cuda", kv_dtype="float16") as llm:
        for ids in ([5], [5, 6, 7]):
            with pytest.raises(BackendError, match="beyond 65504, the largest float16: kv_dtype bfloat16 holds it"):
                llm.generate(ids, max_new_tokens=4)
            with pytest.raises(BackendError, match="not finite"):
                llm.logits(ids)
            with pytest.raises(BackendError, match="kv_dtype bfloat16 holds it"):
                llm.generate_batch([ids], max_new_tokens=4)


MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {  # preset, head, changes to its config.json
    "silu, untied": ("tiny-llama", "bf16", {}),
    "silu, sub-norms, int8 rows": ("tiny-1bitllm", "int8", {}),
    "biases": ("tiny-llama", "bf16", {"attention_bias": True, "mlp_bias": True}),
    "llama3 rope, tied, int8 rows": ("tiny-llama", "int8", {"rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "linear rope": ("tiny-llama", "bf16", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "head_dim 256": ("tiny-llama", "bf16", {"head_dim": 256}),
    "head_dim 100": ("tiny", "bf16", {"head_dim": 100}),
}


@needs_gpu
@pytest.mark.usefixtures("rounded_cache")
@pytest.mark.parametrize(
    ("preset", "dtype", "kept_as"),
    [("tiny-1bitllm", "fp16", "f16"), ("tiny", "fp32", "f32"), ("tiny-llama", "fp16", "f16")],
)
def test_rows_of_other_floats(preset: str, dtype: str, kept_as: str, tmp_path: Path) -> None:
    spec, config = PRESETS[preset]
    make_checkpoint(tmp_path / "source", config, spec, seed=4, dtype=dtype)
    convert(tmp_path / "source", tmp_path / "packed")
    checkpoint = open_packed(tmp_path / "packed")
    assert checkpoint.embed == checkpoint.head == kept_as
    ids = random_ids(checkpoint, 24, 6)
    check_against_reference(checkpoint, ids)


@needs_gpu
@pytest.mark.usefixtures("rounded_cache")
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model(name: str, tmp_path: Path) -> None:
    preset, head, changes = MODELS[name]
    spec, config = PRESETS[preset]
    make_checkpoint(tmp_path / "source", config | changes, spec, seed=3)
    convert(tmp_path / "source", tmp_path / "packed", head=head)
    checkpoint = open_packed(tmp_path / "packed")
    ids = random_ids(checkpoint, 24, 5)
    check_against_reference(checkpoint, ids)


@needs_gpu
@pytest.mark.usefixtures("rounded_cache")
@pytest.mark.parametrize("head", ["source", "bf16"])  # as they are: ternary, or floats
@pytest.mark.parametrize("file", SOURCES)
def test_models_with_group_scales_agree_with_the_reference(file: str, head: HeadFormat, tmp_path: Path) -> None:
    """Qwen3 blocks with YaRN and tied, TriLM."""
    convert(GROUPS / file, tmp_path / "packed", head=head)
    checkpoint = open_packed(tmp_path / "packed")
    assert checkpoint.config.group_scales
    ids = np.random.default_rng(4).integers(0, 260, 40).tolist()
    check_against_reference(checkpoint, ids)


@needs_gpu
@pytest.mark.usefixtures("rounded_cache")
@pytest.mark.parametrize("name", GGUF_FILES)
def test_files_of_other_programs_agree_with_the_reference(name: str, tmp_path: Path) -> None:
    """The first BitNet release, 2B4T, and Llama with rows of the embedding that were Q4_K."""
    convert(GGUF / f"{name}.gguf", tmp_path / "packed")
    checkpoint = open_packed(tmp_path / "packed")
    ids = np.random.default_rng(5).integers(0, 260, 40).tolist()
    check_against_reference(checkpoint, ids)


@needs_gpu
@pytest.mark.golden
@pytest.mark.parametrize("file", SOURCES)
def test_two_planes_of_activations_are_as_good_as_floats(file: str, tmp_path: Path) -> None:
    """Against transformers, which rounds no activations: what is left is keys and values in float16."""
    convert(GROUPS / file, tmp_path / "packed")
    checkpoint = open_packed(tmp_path / "packed")
    checkpoint = replace(checkpoint, config=replace(checkpoint.config, activation_planes=2))
    with np.load(GROUPS / "golden.npz") as golden:
        for prompt in (1, 3):
            ids = golden[f"{SOURCES[file]}/prompt_{prompt}"].tolist()
            expected = golden[f"{SOURCES[file]}/logits_{prompt}"]
            context = on_gpu(checkpoint, len(ids))
            check_close(context.logits(ids), expected, 0.05, 0.012)  # a pass over a prompt
            context.truncate(0)
            check_close(one_by_one(context, ids), expected, 0.05, 0.012)  # decode steps
    with bitnet_numba.load(tmp_path / "packed", "cuda", activations="int8x2") as llm:
        prompts = [ids[:9], ids[:5]]
        answers = llm.generate_batch(prompts, max_new_tokens=8, temperature=0, ignore_eos=True)
        for given, answer in zip(prompts, answers, strict=True):
            whole = [*given, *answer.token_ids]
            logits = reference_backend(checkpoint).new_context(len(whole)).logits(whole[:-1])[len(given) - 1 :]
            behind = logits.max(axis=1) - logits[np.arange(8), answer.token_ids]
            assert behind.max() < 0.05 * logits.std()


@needs_gpu
@pytest.mark.usefixtures("rounded_cache")
def test_long_contexts_take_the_other_spec(demo: PackedCheckpoint) -> None:
    from bitnet_numba.kernels.attention.decode import LONG_CONTEXT

    ids = random_ids(demo, LONG_CONTEXT + 40, 6)
    expected = reference_backend(demo).new_context(len(ids)).logits(ids)
    context = on_gpu(demo, len(ids))
    context.logits(ids[:-80])
    check_close(one_by_one(context, ids[-80:]), expected[-80:], 0.8, 0.12)  # flips add up over hundreds of positions


@needs_gpu
@pytest.mark.usefixtures("rounded_cache")
def test_greedy_tokens_equal_the_reference_up_to_ties(demo: PackedCheckpoint) -> None:
    llm = bitnet_numba.load(None, backend="reference")
    for request in ("Tell me a story about a fox and a lantern.", "Tell me a story about a dog and a kite."):
        ids = llm.tokenizer.encode_chat([{"role": "user", "content": request}])
        ours = take(on_gpu(demo, 400), ids, GREEDY, 120)
        logits = reference_backend(demo).new_context(400).logits([*ids, *ours[:-1]])[len(ids) - 1 :]
        # Given the same tokens before it, each is the reference's choice, or as good as.
        behind = logits.max(axis=1) - logits[np.arange(len(ours)), ours]
        assert behind.max() < 0.1 * logits.std(), f"token {behind.argmax()} of {request!r}"
        assert (behind == 0).mean() > 0.95


@needs_gpu
def test_tokens_are_the_definitions_choice(demo: PackedCheckpoint) -> None:
    """The device's sampler, given the device's logits; the seed decides, and nothing else."""
    context = on_gpu(demo, 64)
    ids = random_ids(demo, 20, 7)
    rng = np.random.default_rng(8)
    for seed in range(25):
        params = SamplingParams(
            float(rng.choice([0.0, 0.7, 1.0, 2.0])), float(rng.choice([0.5, 0.9, 1.0])), int(rng.choice([0, 1, 40])),
            float(rng.choice([0.0, 0.05])), float(rng.choice([1.0, 1.3])), seed,
        )  # fmt: skip
        context.truncate(0)
        context.logits(ids[:-1])
        logits = context.logits(ids[-1:])[0]
        context.truncate(19)
        tokens = take(context, ids[-1:], params, 3)
        assert tokens[0] == sample(logits, ids, params), params
        context.truncate(19)
        assert take(context, ids[-1:], params, 3) == tokens


@needs_gpu
def test_what_was_cut_leaves_no_trace(demo: PackedCheckpoint) -> None:
    """Logits after a cut and other tokens are, to the bit, those of a fresh context; so are penalties."""
    ids, others = random_ids(demo, 40, 9), random_ids(demo, 10, 10)
    context, fresh = on_gpu(demo, 80), on_gpu(demo, 80)
    penalized = SamplingParams(repetition_penalty=3.0)
    take(context, ids, GREEDY, 20)
    context.truncate(15)
    assert context.ids == ids[:15]
    assert context.logits(others).tobytes() == fresh.logits(ids[:15] + others)[15:].tobytes()
    for one in (context, fresh):
        one.truncate(15)
    assert take(context, others, penalized, 20) == take(fresh, others, penalized, 20)


@needs_gpu
def test_decoding_ends_with_the_context(demo: PackedCheckpoint) -> None:
    context = on_gpu(demo, 30)
    tokens = list(context.decode(random_ids(demo, 12, 11), GREEDY))
    assert len(tokens) == 30 - 12 + 1
    assert len(context.ids) == 30
    with pytest.raises(ValueError, match="1 tokens do not fit 0 free places"):
        context.logits([1])


@needs_gpu
@pytest.mark.alone
def test_ten_thousand_steps_leave_memory_as_it_was(demo: PackedCheckpoint) -> None:
    from bitnet_numba.backends.cuda.backend import CudaBackend
    from bitnet_numba.kernels.runtime.device import usable_device

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    backend = CudaBackend(demo)
    for turn in range(11):
        context = backend.new_context(1000)
        tokens = list(context.decode([1], GREEDY))
        assert len(tokens) == 1000
        context.close()
        if turn == 0:
            first, free, held = tokens, usable_device().memory_info()[0], resident()
        assert tokens == first
    assert usable_device().memory_info()[0] >= free - (4 << 20)
    assert resident() < held + (32 << 20)
    assert backend.memory()["kv_cache"] == 0


@needs_gpu
def test_too_large_a_context_says_what_would_fit(demo: PackedCheckpoint) -> None:
    from bitnet_numba.backends.cuda.backend import CudaBackend

    with pytest.raises(BackendError, match=r"takes .* GB of device memory and .* GB are free: --context \d+ would fit"):
        CudaBackend(demo).new_context(1 << 31)


@needs_gpu
def test_refuses_what_runs_on_the_cpu_only(tmp_path: Path) -> None:
    from bitnet_numba.backends.cuda.backend import CudaBackend

    spec, config = PRESETS["tiny-llama"]
    make_checkpoint(tmp_path / "source", config | {"quantization_config": {"use_rms_norm": True}}, spec)
    convert(tmp_path / "source", tmp_path / "packed")
    with pytest.raises(BackendError, match="use_rms_norm"):
        CudaBackend(open_packed(tmp_path / "packed"))
    assert bitnet_numba.load(tmp_path / "packed").backend == "cpu"


@needs_gpu
def test_the_built_in_model_answers_as_well_as_on_the_cpu() -> None:
    from tools.demo.cases import question_cases
    from tools.demo.evaluate import FIRST_SEED, answers

    cases, right = question_cases(12, FIRST_SEED), {}
    for backend in ("cuda", "cpu"):
        with bitnet_numba.load(None, backend=backend) as llm:
            assert llm.backend == backend
            told = answers(llm, cases)
        right[backend] = np.mean([case.turn.right(reply) for case, reply in told])
    assert right["cuda"] >= right["cpu"] - 0.05 > 0.5


@needs_gpu
def test_chat_streams_from_the_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bitnet_numba.chat", "--backend", "cuda", "--json", "--prompt", "Hello!"]
    env = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["text"]
