"""Shared set-up: Hypothesis profiles, golden cases and small converted checkpoints."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from bitnet_numba.checkpoint.convert import convert
from bitnet_numba.checkpoint.packed import PackedCheckpoint, open_packed
from bitnet_numba.checkpoint.safetensors_file import TensorFile, TensorSpec, write_tensors
from bitnet_numba.engine.loading import DEMO
from tools.make_checkpoint import PRESETS, make_checkpoint, write_tokenizer

# deadline=None: the first example of a kernel compiles it.
_quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("dev", deadline=None, max_examples=25, suppress_health_check=_quiet)
settings.register_profile("ci", deadline=None, max_examples=60, derandomize=True, suppress_health_check=_quiet)
settings.register_profile("nightly", deadline=None, max_examples=2000, suppress_health_check=_quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the hub
# Tests share the cores already.
os.environ.setdefault("BITNET_NUMBA_COMPILERS", "1")

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class GoldenCase:
    """What transformers computed for a small checkpoint, and that checkpoint converted."""

    source: Path
    packed: PackedCheckpoint
    recorded: dict[str, np.ndarray]


def load_golden(name: str, folder: Path) -> GoldenCase:
    """Converts a golden checkpoint into `folder`."""
    source = folder / name
    shutil.copytree(GOLDEN / name, source)
    config = json.loads((source / "config.json").read_text())
    write_tokenizer(source, config["vocab_size"], config["max_position_embeddings"])
    convert(source, folder / f"{name}-packed")
    with np.load(GOLDEN / name / "golden.npz") as recorded:
        return GoldenCase(source, open_packed(folder / f"{name}-packed"), dict(recorded))


@pytest.fixture(scope="session", params=["offline", "bitlinear"])
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GoldenCase:
    """Each golden case that has every layer and logits."""
    return load_golden(request.param, tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="session")
def demo() -> PackedCheckpoint:
    """The built-in model."""
    return open_packed(DEMO)


@pytest.fixture(scope="session")
def golden_online(tmp_path_factory: pytest.TempPathFactory) -> GoldenCase:
    """The golden case with bfloat16 master weights: one layer and the hidden states after it."""
    return load_golden("online", tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Hugging Face checkpoint of the 2B4T class. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    form, config = PRESETS["tiny"]
    make_checkpoint(folder, config, form, seed=7)
    return folder


@pytest.fixture(scope="session")
def tiny_packed(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, converted. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("packed") / "tiny"
    convert(tiny_source, folder)
    return folder


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts `long` tests first, each with another one behind it: to begin with, a worker takes two."""
    long = [item for item in items if item.get_closest_marker("long")]
    others = [item for item in items if not item.get_closest_marker("long")]
    pairs = [item for pair in zip(long, others, strict=False) for item in pair]
    items[:] = [*pairs, *long[len(others) :], *others[len(long) :]]


def edit_config(folder: Path, **changes: object) -> None:
    """Changes keys of a folder's config.json."""
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def rewrite(path: Path, change: Callable[[dict[str, np.ndarray], dict[str, TensorSpec]], None]) -> None:
    """Rewrites a safetensors file after `change` has edited its tensors and specs in place."""
    file = TensorFile(path)
    arrays, specs = {name: file.read(name) for name in file.specs}, dict(file.specs)
    change(arrays, specs)
    with open(path, "wb") as out:
        write_tensors(out, specs, arrays.items(), {})


def mutate(data: bytes, edits: list[tuple[float, bytes]], within: int) -> bytes:
    """`data` with each edit's bytes written over it, at a place given as a share of the first `within` bytes."""
    changed = bytearray(data)
    for place, new in edits:
        start = int(place * within)
        changed[start : start + len(new)] = new
    return bytes(changed)
