"""The compiled model on the CPU: the reference's numbers, the same bits on any instruction set and number of threads.

Both models compute with the same int8 activations (see tests/int8_activations.py): those of the compiled model are
recorded and put in place of the reference's, which checks that each lies within float32 noise of its own.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import bitnet_numba as bn
from bitnet_numba.backends.cpu.backend import CpuModel
from bitnet_numba.backends.protocol import NO_TOKEN
from bitnet_numba.checkpoint.convert import convert
from bitnet_numba.checkpoint.packed import PackedCheckpoint, open_packed
from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.cpu import isa, layout
from bitnet_numba.reference.model import Cache, Model
from bitnet_numba.sampling import SamplingParams
from tests.checkpoint.test_group_scales import FOLDER as GROUPS
from tests.checkpoint.test_group_scales import SOURCES
from tests.conftest import GoldenCase
from tests.int8_activations import check_logits, imposed, per_linear, recorded_groups
from tests.reference.test_model import VARIANTS
from tools.make_checkpoint import PRESETS, make_checkpoint

SEGMENTS = (3, 1, 2, 1)  # linears of each group


def recorded(model: CpuModel, ids: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits of a prompt of up to MAX_TOKENS tokens, and the int8 inputs of all linears, in order."""
    c, job = model.config, model._buffers.job[0]
    shape = (4 * c.num_layers + 1, layout.SEGMENTS, layout.MAX_TOKENS, int(job["q_stride"]))
    record = np.zeros(shape, np.int8)
    job["record"] = record.ctypes.data
    logits = model.logits(model.forward(ids.tolist(), model.new_cache(len(ids))))
    job["record"] = 0
    widths = [c.group_shape(group)[1] for group in ("qkv", "o", "gate_up", "down")]
    linears = []
    for place in range(4 * c.num_layers):
        layer = model._weights.layers[place // 4]
        group = ("qkv", "o", "gate_up", "down")[place % 4]
        if layer[group]["words"]:
            own = bool(layer[group]["norms"])
            for segment in range(SEGMENTS[place % 4]):
                linears.append(record[place, segment if own else 0, : len(ids), : widths[place % 4]])
    if model._weights.model[0]["head"]["words"]:
        linears.append(record[-1, 0, : len(ids), : c.hidden_size])
    return logits, linears


def check_against_reference(model: CpuModel, checkpoint: PackedCheckpoint, ids: np.ndarray) -> None:
    logits, linears = recorded(model, ids)
    reference = Model(checkpoint)
    with imposed(linears):
        expected = reference.logits(reference.forward(ids, Cache(reference.config, len(ids))))
    check_logits(logits, expected, expected.std())


@pytest.fixture
def closing() -> Iterator[list[CpuModel]]:
    """Models that are closed at the end."""
    models: list[CpuModel] = []
    yield models
    for model in models:
        model.close()


@pytest.mark.parametrize("variant", ["2b4t", *VARIANTS])
@pytest.mark.parametrize("head", ["bf16", "int8"])
def test_every_supported_class_agrees_with_the_reference(
    variant: str, head: str, tmp_path: Path, closing: list[CpuModel]
) -> None:
    name, form, changes = {"2b4t": ("tiny", "online", {})}.get(variant, VARIANTS.get(variant))
    make_checkpoint(tmp_path / "source", PRESETS[name][1] | changes, form, seed=3)
    convert(tmp_path / "source", tmp_path / "packed", head)
    checkpoint = open_packed(tmp_path / "packed")
    closing.append(model := CpuModel(checkpoint, 2, kv_dtype="float32"))
    for length in (1, 40):
        check_against_reference(model, checkpoint, np.random.default_rng(length).integers(0, 2000, length))


@pytest.mark.parametrize("file", SOURCES)
def test_models_with_group_scales_agree_with_the_reference(file: str, tmp_path: Path, closing: list[CpuModel]) -> None:
    """Qwen3 blocks, with YaRN and tied, embedding and head ternary; TriLM. A token's bits do not depend on others."""
    convert(GROUPS / file, tmp_path / "packed")
    checkpoint = open_packed(tmp_path / "packed")
    closing.append(model := CpuModel(checkpoint, 2, kv_dtype="float32"))
    for length in (1, 2, 40):
        check_against_reference(model, checkpoint, np.random.default_rng(length).integers(0, 260, length))
    ids = np.random.default_rng(9).integers(0, 260, 9).tolist()
    one_by_one, whole = hidden_of(model, ids, 1), hidden_of(model, ids, 9)
    np.testing.assert_array_equal(one_by_one, whole)
    np.testing.assert_array_equal(model.logits(whole), np.concatenate([model.logits(h[None]) for h in whole]))


@pytest.mark.parametrize("file", SOURCES)
def test_two_planes_of_activations_agree_with_the_reference(file: str, tmp_path: Path, closing: list[CpuModel]) -> None:
    """What rounds the other way in the first plane, the second evens out: 1e-4 of the logits' spread was seen."""
    convert(GROUPS / file, tmp_path / "packed")
    checkpoint = open_packed(tmp_path / "packed")
    checkpoint = replace(checkpoint, config=replace(checkpoint.config, activation_planes=2))
    closing.append(model := CpuModel(checkpoint, 2, kv_dtype="float32"))
    reference = Model(checkpoint)
    for length in (1, 2, 40):
        ids = np.random.default_rng(length).integers(0, 260, length)
        expected = reference.logits(reference.forward(ids, Cache(reference.config, length)))
        hidden = hidden_of(model, ids.tolist(), length)
        assert np.abs(model.logits(hidden) - expected).max() < 0.005 * expected.std()
    one_by_one = hidden_of(model, ids.tolist(), 1)
    np.testing.assert_array_equal(one_by_one, hidden)
    np.testing.assert_array_equal(model.logits(hidden), np.concatenate([model.logits(h[None]) for h in hidden]))


# The kernels are tested on each; of the model, the two that differ most are compared, and with `make slow-test` all.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "portable" else pytest.mark.slow) for name in isa.available()[1:]]
)
def test_group_scales_on_every_instruction_set(name: str, tmp_path: Path, closing: list[CpuModel]) -> None:
    convert(GROUPS / "qwen3-q2_0.gguf", tmp_path / "packed")
    models = [CpuModel(open_packed(tmp_path / "packed"), 2, each) for each in (None, name)]
    closing += models
    ids = np.random.default_rng(1).integers(0, 260, 20).tolist()
    one, other = (hidden_of(model, ids, 20) for model in models)
    np.testing.assert_array_equal(other, one)
    np.testing.assert_array_equal(models[1].logits(one), models[0].logits(one))


@pytest.mark.parametrize(("dtype", "kept_as"), [("fp16", "f16"), ("fp32", "f32")])
def test_rows_of_other_floats_agree_with_the_reference(
    dtype: str, kept_as: str, tmp_path: Path, closing: list[CpuModel]
) -> None:
    for i, changes in enumerate(({}, {"hidden_size": 136, "tie_word_embeddings": False})):  # not whole steps of columns
        make_checkpoint(tmp_path / f"{i}", PRESETS["tiny-1bitllm"][1] | changes, "online", seed=3, dtype=dtype)
        convert(tmp_path / f"{i}", tmp_path / f"packed{i}")
        checkpoint = open_packed(tmp_path / f"packed{i}")
        assert checkpoint.embed == checkpoint.head == kept_as
        closing.append(model := CpuModel(checkpoint, 2, kv_dtype="float32"))
        check_against_reference(model, checkpoint, np.random.default_rng(i).integers(0, 2000, 7))


@pytest.mark.golden
@pytest.mark.parametrize("prompt", ["bos1", "text7", "text33"])
def test_logits_of_transformers(golden: GoldenCase, prompt: str, closing: list[CpuModel]) -> None:
    """The reference, given the compiled model's int8 activations, has its logits; given transformers' own, theirs. What
    is left between the two are flips at borders."""
    closing.append(model := CpuModel(golden.packed, 2, kv_dtype="float32"))
    ids = golden.recorded[f"ids/{prompt}"]
    check_against_reference(model, golden.packed, ids)
    logits, linears = recorded(model, ids)
    theirs = per_linear(recorded_groups(golden.recorded, prompt))
    same = all((own == q[: len(ids)]).all() for own, q in zip(linears, theirs, strict=True))
    if same:
        check_logits(logits, golden.recorded[f"logits/{prompt}"], golden.recorded[f"std/{prompt}"])


@pytest.fixture(scope="module")
def packed(tiny_packed: Path) -> PackedCheckpoint:
    return open_packed(tiny_packed)


@pytest.fixture(scope="module")
def model(packed: PackedCheckpoint) -> Iterator[CpuModel]:
    model = CpuModel(packed, 2)
    yield model
    model.close()


def hidden_of(model: CpuModel, ids: list[int], pieces: int) -> np.ndarray:
    cache = model.new_cache(len(ids))
    return np.concatenate([model.forward(ids[i : i + pieces], cache) for i in range(0, len(ids), pieces)])


def some_ids(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, 2000, length).tolist()


@pytest.mark.parametrize("name", isa.available()[1:])
def test_every_instruction_set_gives_the_same_bits(
    name: str, model: CpuModel, packed: PackedCheckpoint, closing: list[CpuModel]
) -> None:
    closing.append(other := CpuModel(packed, 2, name))
    ids = some_ids(70)
    np.testing.assert_array_equal(hidden_of(other, ids, 64), hidden_of(model, ids, 64))
    np.testing.assert_array_equal(hidden_of(other, ids[:9], 1), hidden_of(model, ids[:9], 9))


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_tokens_do_not_depend_on_the_number_of_threads(
    threads: int, model: CpuModel, packed: PackedCheckpoint, closing: list[CpuModel]
) -> None:
    closing.append(other := CpuModel(packed, threads))
    ids = some_ids(70)
    np.testing.assert_array_equal(hidden_of(other, ids, 64), hidden_of(model, ids, 64))
    np.testing.assert_array_equal(hidden_of(other, ids[:9], 1), hidden_of(model, ids[:9], 1))
    params = [SamplingParams(temperature, seed=5) for temperature in (0.0, 1.0, 0.7)]
    hidden = hidden_of(model, ids, 64)[-3:]
    assert other.sample(hidden, [ids] * 3, params, [2] * 3) == model.sample(hidden, [ids] * 3, params, [2] * 3)


def test_long_contexts_split_over_threads_give_the_same_bits(packed: PackedCheckpoint, closing: list[CpuModel]) -> None:
    """Past 512 tokens a token alone is attended to in splits, tokens of a prompt are not."""
    models = [CpuModel(packed, threads) for threads in (1, 4)]
    closing += models
    one, four = models
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(four._buffers, "_longest", 0)
        four._buffers.hold_positions(2000)
    ids = some_ids(500) * 3
    whole = hidden_of(one, ids, 64)
    cache = four.new_cache(len(ids))
    four.forward(ids[:-1], cache)
    np.testing.assert_array_equal(four.forward(ids[-1:], cache), whole[-1:])


def test_logits_and_sampling_in_turn(model: CpuModel, packed: PackedCheckpoint, closing: list[CpuModel]) -> None:
    """Late members of a job must not see the next one: with 3 members on fewer cores, some are late."""
    closing.append(late := CpuModel(packed, 3))
    hidden, params = hidden_of(model, [1, 2, 3], 3), [SamplingParams()] * 3
    logits = model.logits(hidden)
    for _ in range(40):
        np.testing.assert_array_equal(late.logits(hidden), logits)
        assert late.sample(hidden, [[1]] * 3, params, [1] * 3) == logits.argmax(1).tolist()


def test_many_sequences_at_once_are_as_alone(model: CpuModel) -> None:
    lengths = [1, 5, 63, 64, 65, 100, 130] * 10  # more than a pass holds
    pool = model.new_pool(4 * len(lengths))
    caches = []
    for i, length in enumerate(lengths):
        caches.append(pool.cache([4 * i + 3, 4 * i, 4 * i + 2], 0))
        model.forward(some_ids(length), caches[-1])
    together = model.step([7] * len(lengths), caches)
    for i in (0, 3, 6, 64, 69):
        alone = model.new_cache(200)
        model.forward(some_ids(lengths[i]), alone)
        np.testing.assert_array_equal(model.forward([7], alone)[0], together[i])
    assert [cache.length for cache in caches] == [length + 1 for length in lengths]


def test_numbers_that_are_not_finite_end_in_no_token(packed: PackedCheckpoint, closing: list[CpuModel]) -> None:
    closing.append(model := CpuModel(packed, 2))
    rows = np.array(packed.tensor("embed.weight"))
    rows[77] = 0x7F80  # infinity in bfloat16
    model._weights.model["embed"] = rows.ctypes.data  # the head keeps its own
    cache = model.new_cache(100)
    good = model.sample(model.forward([5, 6], cache)[-1:], [[5, 6]], [SamplingParams()], [2])
    bad = model.sample(model.forward([77, 8], cache)[-1:], [[5, 6, 77, 8]], [SamplingParams(1.0, seed=1)], [4])
    assert good != [NO_TOKEN] and bad == [NO_TOKEN]
    cache.length = 2  # what failed is forgotten
    assert np.isfinite(model.forward([8], cache)).all()


def test_calls_from_several_threads(model: CpuModel) -> None:
    expected = hidden_of(model, some_ids(30), 30)
    results: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: results.append(hidden_of(model, some_ids(30), 3)), daemon=True)
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 4
    for result in results:
        np.testing.assert_array_equal(result, expected)


def test_a_closed_model_ends_its_threads_and_starts_again(packed: PackedCheckpoint) -> None:
    before = threading.active_count()
    model = CpuModel(packed, 3)
    expected = hidden_of(model, [1, 2], 2)
    assert threading.active_count() == before + 2
    model.close()
    assert threading.active_count() == before
    np.testing.assert_array_equal(hidden_of(model, [1, 2], 2), expected)
    del model
    assert threading.active_count() == before


def test_what_lies_beyond_weights_or_pages_is_refused(model: CpuModel) -> None:
    cache = model.new_pool(1).cache([0], 0)
    for ids in ([1, -1], [2048], [2**40]):
        with pytest.raises(ValueError, match="token ids must be between 0 and 2047"):
            model.forward(ids, cache)
    model.forward(some_ids(64), cache)
    with pytest.raises(ValueError, match="more tokens than its pages hold"):
        model.step([1], [cache])


def test_threads_that_cannot_be_had(packed: PackedCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    model = CpuModel(packed, 3)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(BackendError, match="3 threads cannot be started .*: fewer may do"):
            hidden_of(model, [1], 1)
    hidden_of(model, [1], 1)
    model.close()


def test_a_signal_handler_amid_a_pass_is_refused(model: CpuModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def handler(_length: int) -> None:
        hidden_of(model, [1], 1)

    with monkeypatch.context() as patch:
        patch.setattr(model._buffers, "hold_positions", handler)
        with pytest.raises(BackendError, match="called by a signal handler"):
            hidden_of(model, [1], 1)
    hidden_of(model, [1], 1)


def test_a_fork_amid_a_pass_of_another_thread(model: CpuModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model.close()
    with model._turn():
        monkeypatch.setattr(os, "getpid", lambda: -1)  # as in the child
        hidden_of(model, [1], 1)
        model.close()


FORKING = """
import os, sys
import bitnet_numba as bn
llm, other = bn.load(None, "cpu", threads=2), bn.load(None, "cpu", threads=3)
expected = llm.generate("a", max_new_tokens=5).token_ids
assert other.generate("a", max_new_tokens=5).token_ids == expected
child = os.fork()
if child == 0:
    os._exit(any(model.generate("a", max_new_tokens=5).token_ids != expected for model in (llm, other)))
assert os.waitpid(child, 0)[1] == 0
assert llm.generate("a", max_new_tokens=5).token_ids == expected
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_processes_and_two_engines() -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_an_instruction_set_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in isa.available():
        monkeypatch.setenv("BITNET_NUMBA_ISA", name)
        assert isa.choose().name == name
    monkeypatch.setenv("BITNET_NUMBA_ISA", "")
    assert isa.choose().name == isa.available()[0]
    monkeypatch.setenv("BITNET_NUMBA_ISA", "avx9")
    with pytest.raises(BackendError, match="'avx9' is not one of this machine's"):
        bn.load(None, "cpu")


def test_what_this_machine_lacks_is_refused(packed: PackedCheckpoint) -> None:
    with pytest.raises(BackendError, match="instruction set 'avx9' is not one of this machine's: .*portable"):
        CpuModel(packed, 1, "avx9")
    lacking = next(name for name in isa.NAMES if name not in isa.available())
    with pytest.raises(BackendError, match=lacking):
        CpuModel(packed, 1, lacking)


@pytest.mark.parametrize("threads", [0, -1, 1025, 2.5, "2", True])
def test_numbers_of_threads_that_make_no_sense(threads: object) -> None:
    with pytest.raises(bn.BitNetError, match="threads must be between 1 and 1024, not"):
        bn.load(None, "cpu", threads=threads)  # type: ignore[arg-type]


def test_threads_are_no_option_of_cuda() -> None:
    with pytest.raises(bn.BitNetError, match="threads are an option of the backends cpu and reference, not of cuda"):
        bn.load(None, "cuda", threads=2)


def test_answers_are_as_likely_as_the_reference_finds_them() -> None:
    # Sampled answers themselves may part where two tokens are nearly as likely: int8 activations round either way.
    question = [{"role": "user", "content": "Tell me a story about a fox and a lantern."}]
    llm, reference = bn.load(None, "cpu"), bn.load(None, "reference")
    prompt = llm.tokenizer.encode_chat(question)
    for params in (SamplingParams(), SamplingParams(0.8, 0.9, seed=1)):
        answer = llm.generate(question, params, max_new_tokens=60).token_ids
        ours, theirs = (
            np.array([entry.logprob for entry in scorer.score([*prompt, *answer]).logprobs[-len(answer) :]])
            for scorer in (llm, reference)
        )
        assert len(ours) == 60
        assert np.abs(ours - theirs).max() < 0.3  # 0.02 where it was seen; another token would be off by several


def test_numba_without_its_compiler_is_told_in_one_line() -> None:
    command = [
        sys.executable,
        "-c",
        "import bitnet_numba as bn\ntry: bn.load(None, 'cpu')\nexcept bn.BitNetError as e: print(e)",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, env=os.environ | {"NUMBA_DISABLE_JIT": "1"}
    )
    assert done.stdout.startswith("the CPU backend needs Numba's compiler: unset NUMBA_DISABLE_JIT"), done.stderr
