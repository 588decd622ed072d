"""Loading a model: its files, the choice of a backend, and what is told where one cannot run."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

import bitnet_numba as bn
from bitnet_numba.backends.reference import reference_backend
from bitnet_numba.checkpoint.packed import PackedCheckpoint, open_packed
from bitnet_numba.engine import loading
from bitnet_numba.errors import (
    BackendError,
    BitNetError,
    CheckpointError,
    RequestError,
    TokenizerError,
)
from bitnet_numba.sampling import SamplingParams, read_sampling
from bitnet_numba.text import tokenizer_files


@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is limited on Linux")
def test_a_tokenizer_that_ends_its_process_is_refused(
    tiny_packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a folder that somebody else converted: one that makes a text so long that it takes all memory there is."""
    monkeypatch.setenv("BITNET_NUMBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenizer_files, "_TRIAL", tokenizer_files._TRIAL.replace("1 << 32", "1 << 30"))  # bytes
    folder = Path(shutil.copytree(tiny_packed, tmp_path / "model"))
    bn.load(folder, backend="reference").close()
    raw = json.loads((folder / "tokenizer.json").read_text())
    longer = {"type": "Replace", "pattern": {"String": "x"}, "content": "x" * 100_000}
    raw["normalizer"] = {"type": "Sequence", "normalizers": [longer, longer]}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    for _ in range(2):
        with pytest.raises(bn.TokenizerError, match=r"tokenizer.json is damaged: .*exit code -6") as caught:
            bn.load(folder, backend="reference")
        assert "\n" not in str(caught.value)
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 1, "only what has passed is noted"


def test_a_converted_folder_answers(tiny_packed: Path) -> None:
    llm = bn.load(tiny_packed, backend="reference", context=64)
    assert llm.backend == "reference" and llm.context == 64
    ids = llm.tokenizer.encode("hello there")
    np.testing.assert_array_equal(
        llm.logits(ids), reference_backend(open_packed(tiny_packed)).new_context(len(ids)).logits(ids)
    )
    greedy = llm.generate("hello there", max_new_tokens=4)
    assert greedy.token_ids[0] == int(llm.logits(ids)[-1].argmax())
    assert "".join(llm.stream("hello there", max_new_tokens=4)) == greedy.text
    full = llm.generate("hello there", temperature=1.0, seed=1)
    assert full.finish_reason in ("stop", "context")
    assert llm.memory()["weights"] > 0


@pytest.mark.parametrize("reason", ["CUDA cannot be used: no NVIDIA driver", "CUDA cannot run this model: too wide"])
def test_without_cuda_auto_says_why_and_goes_on(
    tiny_packed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    def refuse(checkpoint: PackedCheckpoint, kv_dtype: str | None) -> NoReturn:
        raise BackendError(reason)

    monkeypatch.setattr(loading, "_open_cuda", refuse)
    monkeypatch.setattr(loading, "_has_nvidia_driver", lambda: True)
    with caplog.at_level(logging.WARNING, "bitnet_numba"):
        assert bn.load(tiny_packed).backend == "cpu"
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(reason)
    with pytest.raises(BackendError, match=reason):
        bn.load(tiny_packed, backend="cuda")


def test_without_an_nvidia_gpu_auto_takes_the_cpu(
    tiny_packed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "_has_nvidia_driver", lambda: False)
    with caplog.at_level(logging.WARNING, "bitnet_numba"):
        assert bn.load(tiny_packed).backend == "cpu"
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ({}, None),
        ({"eos_token_id": 1, "max_length": 9}, None),
        (
            {
                "do_sample": True,
                "temperature": 0.7,
                "top_p": 0.8,
                "top_k": 20,
                "min_p": 0.01,
                "repetition_penalty": 1.1,
            },
            SamplingParams(0.7, 0.8, 20, 0.01, 1.1),
        ),
        ({"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1}, SamplingParams(repetition_penalty=1.1)),
        ({"do_sample": None, "top_k": 5}, SamplingParams()),
        ({"do_sample": False}, SamplingParams()),
        ({"do_sample": True}, SamplingParams(1.0)),
        ({"do_sample": True, "top_p": 0.5, "top_k": None}, SamplingParams(1.0, 0.5)),
        ({"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.2}, SamplingParams(repetition_penalty=1.2)),
    ],
    ids=str,
)
def test_sampling_that_a_model_asks_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stored: dict[str, Any], wanted: SamplingParams | None
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(stored))
    assert read_sampling(tmp_path) == wanted and caplog.messages == []


@pytest.mark.parametrize(
    ("text", "wanted", "key"),
    [
        ('{"do_sample": true, "temperature": 0.7, "top_p": 3}', SamplingParams(0.7), "top_p"),
        ('{"do_sample": true, "temperature": 1%s}' % ("0" * 400), SamplingParams(1.0), "temperature"),  # noqa: UP031
        ('{"do_sample": true, "min_p": NaN}', SamplingParams(1.0), "min_p"),
        ('{"do_sample": "yes", "temperature": 0.7}', SamplingParams(), "do_sample"),
        ('{"do_sample": 1}', None, "do_sample"),
        ('{"top_k": "\\u001b[2J"}', None, "top_k"),
        ("[]", None, "JSON object"),
        ("{", None, "readable JSON"),
    ],
)
def test_a_damaged_recommendation_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, wanted: SamplingParams | None, key: str
) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(text)
    assert read_sampling(tmp_path) == wanted
    (line,) = caplog.messages
    assert line.startswith(str(path)) and key in line and line.endswith("; ignored")
    assert line.isprintable() and len(line) < len(str(path)) + 200


def test_without_the_cuda_packages(tiny_packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain install has Numba's own shell of numba.cuda; the kernels must not be imported on it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert bn.load(tiny_packed).backend == "cpu"
    with pytest.raises(BackendError, match="packages are not installed"):
        bn.load(tiny_packed, backend="cuda")


def dlopen_failed() -> NoReturn:
    try:
        raise OSError("libllvmlite.so: failed to map segment from shared object")
    except OSError:
        raise OSError("Could not find/load shared object file; this could mean " + "this or that " * 20)  # noqa: B904


def error_without_exception() -> NoReturn:
    raise SystemError("error return without exception set")


def version_mismatch() -> NoReturn:
    raise ImportError("Numba needs NumPy 2.3 or less.\nGot NumPy 2.9.")


@pytest.mark.parametrize(
    ("fail", "told"),
    [
        (dlopen_failed, "libllvmlite.so: failed to map segment from shared object; memory may be too short"),
        (error_without_exception, "error return without exception set; memory may be too short"),
        (version_mismatch, "Numba needs NumPy 2.3 or less. Got NumPy 2.9."),
    ],
)
def test_a_numba_that_fails_is_told_in_one_line(
    tiny_packed: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[[], NoReturn], told: str
) -> None:
    monkeypatch.setattr("bitnet_numba.backends.cpu.backend.cpu_backend", lambda *_: fail())
    monkeypatch.setattr(loading, "_open_cuda", lambda *_: fail())
    monkeypatch.setattr(loading, "_has_nvidia_driver", lambda: False)
    for backend, what in (
        ("cpu", "the CPU backend cannot start"),
        ("auto", "the CPU"),
        ("cuda", "CUDA cannot be used"),
    ):
        with pytest.raises(BackendError) as caught:
            bn.load(tiny_packed, backend=backend)
        assert str(caught.value).startswith(what) and str(caught.value).endswith(f": {told}")
    assert bn.load(tiny_packed, backend="reference").backend == "reference"


def test_without_numba_the_reference_runs(tiny_packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_has_nvidia_driver", lambda: False)
    monkeypatch.delitem(sys.modules, "bitnet_numba.backends.cpu.backend", raising=False)
    monkeypatch.setitem(sys.modules, "bitnet_numba.backends.cpu.backend", None)  # which importing it refuses
    with pytest.raises(BackendError, match=r"^the CPU backend cannot start: "):
        bn.load(tiny_packed)
    assert bn.load(tiny_packed, backend="reference").generate([5], max_new_tokens=2).token_ids


def test_loading_mistakes(
    tiny_packed: Path, tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendError, match="no backend 'tpu': choose one of auto, cuda, cpu, reference"):
        bn.load(tiny_packed, backend="tpu")
    with pytest.raises(CheckpointError, match=r"not a packed checkpoint.*bitnet-numba convert"):
        bn.load(tiny_source, backend="reference")
    with pytest.raises(CheckpointError, match="does not exist"):
        bn.load(tmp_path / "nowhere", backend="reference")
    assert bn.load(tiny_packed, backend="reference", context=np.int64(7)).context == 7  # type: ignore[arg-type]
    for context in (0, -1, 10**9, 2.5, True):
        with pytest.raises(RequestError, match="context must be between 1 and"):
            bn.load(tiny_packed, backend="reference", context=context)  # type: ignore[arg-type]
    monkeypatch.setattr(loading, "DEMO", tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"no built-in model"):
        bn.load()
    folder = Path(shutil.copytree(tiny_packed, tmp_path / "copy"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        bn.load(folder, backend="reference")


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, bitnet_numba as bn; heavy = {'numpy', 'tokenizers', 'jinja2', 'numba'} & set(sys.modules);"
        "assert not heavy, heavy; assert bn.packing.pack_ternary; assert issubclass(bn.BitNetError, Exception);"
        "assert all(hasattr(bn, name) for name in bn.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_public_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        bn.nonsense  # noqa: B018
    assert issubclass(bn.errors.RequestError, BitNetError)


def test_what_keys_and_values_are_held_as(tiny_packed: Path) -> None:
    ids = [5, 6, 7, 8]
    with bn.load(tiny_packed, "reference", kv_dtype="float32") as llm:
        expected = llm.logits(ids)
    errors = {}
    for kv_dtype in ("bfloat16", "float32"):
        with bn.load(tiny_packed, "cpu", kv_dtype=kv_dtype) as llm:
            errors[kv_dtype] = np.sqrt(np.mean((llm.logits(ids) - expected) ** 2)) / expected.std()
    assert errors["float32"] < 0.02 and 1e-3 < errors["bfloat16"] < 0.2  # rounding shows; a flip may
    for backend, kv_dtype, says in (
        ("cpu", "float16", "the backend cpu holds keys and values as bfloat16 or float32, not as float16"),
        ("reference", "bfloat16", "the backend reference holds keys and values as float32, not as bfloat16"),
        ("auto", "int4", "kv_dtype must be one of float16, bfloat16, float8, float32, not 'int4'"),
        ("auto", 16, "kv_dtype must be one of .*, not 16"),
    ):
        with pytest.raises(RequestError, match=says):
            bn.load(tiny_packed, backend, kv_dtype=kv_dtype)  # type: ignore[arg-type]


def test_what_linears_read(tiny_packed: Path) -> None:
    with bn.load(tiny_packed, "reference", activations="int8") as llm:
        assert llm.config.activation_planes == 1
    for activations, says in (
        ("int8x2", "activations int8x2 are for models with group scales; this one was trained with int8"),
        ("int4", "activations must be one of int8, int8x2, not 'int4'"),
        (8, "activations must be one of .*, not 8"),
    ):
        with pytest.raises(RequestError, match=says):
            bn.load(tiny_packed, "reference", activations=activations)  # type: ignore[arg-type]
