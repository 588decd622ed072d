"""Machine code needs no device; the disk cache has one entry for each spec, architecture and state of the source."""

import ast
import errno
import importlib
import os
import re
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from bitnet_numba.errors import BackendError
from bitnet_numba.kernels.embedding import advance_spec
from bitnet_numba.kernels.runtime import compiler, disk_cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty disk cache."""
    monkeypatch.setenv("BITNET_NUMBA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_machine_code_is_kept_on_disk(cache: Path) -> None:
    spec = advance_spec(90)
    assert not compiler.is_cached(spec, 90)
    code, compiled = compiler.machine_code(spec, 90)
    assert compiled and code[:4] == b"\x7fELF"
    assert compiler.is_cached(spec, 90)
    assert compiler.machine_code(spec, 90) == (code, False)
    # Another architecture, bound or name is another entry.
    assert compiler.machine_code(advance_spec(80), 80)[1]
    assert compiler.machine_code(spec._replace(threads=64), 90)[1]
    assert compiler.machine_code(spec._replace(name="other"), 90)[1]
    assert compiler.machine_code(spec._replace(registers=40), 90)[1]
    assert len(list(cache.iterdir())) == 5


def test_a_bound_of_registers_replaces_that_of_blocks() -> None:
    spec = advance_spec(90)
    bounds = spec.kernel, spec.signature, 90, spec.threads, 1
    assert ".minnctapersm 1" in compiler.compile_ptx(*bounds)
    bounded = compiler.compile_ptx(*bounds, registers=40)
    assert ".maxnreg 40" in bounded and ".minnctapersm" not in bounded


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("BITNET_NUMBA_CACHE", str(tmp_path / "cache"))
    assert not disk_cache.is_writable()
    assert compiler.machine_code(advance_spec(90), 90)[1]


def test_a_cache_that_is_a_file_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("BITNET_NUMBA_CACHE", str(tmp_path / "cache"))
    assert not disk_cache.is_writable()
    for _ in range(2):
        assert compiler.machine_code(advance_spec(90), 90)[1]


def test_a_full_disk_is_no_error_and_keeps_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*names: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk_cache.os, "replace", full)
    assert compiler.machine_code(advance_spec(90), 90)[1]
    assert list(cache.iterdir()) == []


def test_what_does_not_assemble_gives_one_line() -> None:
    with pytest.raises(BackendError, match="does not assemble for sm_90: ") as caught:
        compiler.link_cubin(".version 8.0\n.target sm_90\n.address_size 64\n.entry kernel() { nonsense; }", 90)
    assert "\n" not in str(caught.value)


def target_of(ptx: str) -> int:
    """The architecture that PTX is for, which must not be for it alone (sm_90a)."""
    found = re.search(r"\.target sm_(\d+)\b", ptx)
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("arch", [87, 103, 121])
def test_architectures_beside_those_of_the_tables(arch: int) -> None:
    spec = advance_spec(arch)
    ptx = compiler.compile_ptx(spec.kernel, spec.signature, arch, spec.threads)
    code = compiler.link_cubin(ptx, arch)
    if code[:4] == b"\x7fELF":
        assert target_of(ptx) == arch
    else:  # the installed packages are older
        assert target_of(ptx) < arch and code == ptx.encode() + b"\0"


def test_the_driver_assembles_for_gpus_newer_than_the_assembler(cache: Path) -> None:
    arch = 990
    code, compiled = compiler.machine_code(advance_spec(arch), arch)
    assert compiled and code.endswith(b"\0") and code.count(b"\0") == 1
    assert 90 < target_of(code.decode()) < arch, "the PTX of an earlier architecture, which later ones run"
    assert compiler.machine_code(advance_spec(arch), arch) == (code, False)


def test_gpus_that_the_compiler_has_left_behind_give_one_line() -> None:
    spec = advance_spec(35)
    with pytest.raises(BackendError, match="do not compile for sm_35: ") as caught:
        compiler.compile_ptx(spec.kernel, spec.signature, 35, spec.threads)
    assert "\n" not in str(caught.value)


# ---- What the cache depends on -------------------------------------------------------------------------------------


def digest() -> bytes:
    """The digest now, not that of the first call."""
    disk_cache.toolchain_digest.cache_clear()
    return disk_cache.toolchain_digest()


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the folder kernels/, which the digest is then taken of."""
    copy = tmp_path / "kernels"
    shutil.copytree(disk_cache.KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(disk_cache, "KERNELS", copy)
    yield copy
    disk_cache.toolchain_digest.cache_clear()


def test_a_change_of_any_source_file_is_another_entry(kernels: Path, cache: Path) -> None:
    before = digest()
    spec = advance_spec(90)
    path = compiler._cache_path(spec, 90)
    sources = sorted(kernels.rglob("*.py"))
    folders = {source.parent.relative_to(kernels).as_posix() for source in sources}
    assert folders >= {".", "attention", "linear", "lm_head", "sampling", "ptx", "runtime"}
    for source in sources:
        text = source.read_bytes()
        source.write_bytes(text + b"\n")
        assert digest() != before, f"{source} is not looked at"
        assert compiler._cache_path(spec, 90) != path
        source.write_bytes(text)
    assert digest() == before
    (kernels / "README.md").write_text("Not source.")
    assert digest() == before


def test_a_new_or_renamed_source_file_is_another_entry(kernels: Path) -> None:
    before = digest()
    deep = kernels / "linear" / "more"
    deep.mkdir()
    (deep / "new.py").write_text("")
    assert digest() != before
    (deep / "new.py").unlink()
    assert digest() == before
    (kernels / "embedding.py").rename(kernels / "lookup.py")
    assert digest() != before


@pytest.mark.parametrize("name", disk_cache.CONSTANTS)
def test_a_change_of_constants_elsewhere_is_another_entry(
    name: str, kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest()
    module = importlib.import_module(name)
    copy = tmp_path / "copy.py"
    copy.write_bytes(Path(str(module.__file__)).read_bytes() + b"\n")
    monkeypatch.setattr(module, "__file__", str(copy))
    assert digest() != before


@pytest.mark.parametrize("name", disk_cache.COMPILERS)
def test_another_version_of_a_compiler_is_another_entry(
    name: str, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, version = digest(), metadata.version

    def other_version(asked: str) -> str:
        return "0.0" if asked == name else version(asked)

    monkeypatch.setattr(metadata, "version", other_version)
    assert digest() != before


def test_compilers_of_every_cuda_version_are_listed() -> None:
    needed = {re.split(r"[^\w-]", requirement)[0] for requirement in metadata.requires("numba-cuda") or ()}
    compilers = {name for name in needed if "nvjitlink" in name}
    assert len(compilers) == 2 and compilers <= set(disk_cache.COMPILERS)


def imported(source: Path) -> set[str]:
    """The modules of bitnet_numba that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "bitnet_numba":
                found |= {f"bitnet_numba.{alias.name}" for alias in node.names}
            else:
                found.add(str(node.module))
    return {name for name in found if name.startswith("bitnet_numba.")}


def test_all_constants_from_elsewhere_are_listed() -> None:
    no_constants = {f"bitnet_numba.{name}" for name in ("errors", "grammar", "json_file", "model_folder")}
    found = {name for source in disk_cache.KERNELS.rglob("*.py") for name in imported(source)} - no_constants
    elsewhere = {name for name in found if not name.startswith("bitnet_numba.kernels")}
    assert elsewhere == set(disk_cache.CONSTANTS)
    for name in disk_cache.CONSTANTS:  # what these are made of
        assert imported(Path(str(importlib.import_module(name).__file__))) <= elsewhere | no_constants


def test_without_a_home_nothing_is_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def homeless() -> Path:
        raise RuntimeError("no home")

    for variable in ("BITNET_NUMBA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert not disk_cache.is_writable()
    disk_cache.write(disk_cache.folder() / "entry", b"code")  # is lost without a word
    assert not (disk_cache.folder() / "entry").exists()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert disk_cache.is_writable() and disk_cache.folder() == tmp_path / "bitnet-numba"
