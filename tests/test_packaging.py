"""The wheel holds every module: pyproject.toml names its packages one by one, since two of them stand outside
bitnet_numba/."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import bitnet_numba

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of pytest there

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def package(folder: Path) -> str:
    """The name that a folder of modules is imported by."""
    name = ".".join(folder.relative_to(ROOT).parts)
    return name if name.startswith("bitnet_numba") else f"bitnet_numba.{name}"


def test_every_package_is_named() -> None:
    folders = [
        path.parent for top in ("bitnet_numba", "kernels", "reference") for path in (ROOT / top).rglob("__init__.py")
    ]
    assert sorted(SETUPTOOLS["packages"]) == sorted(package(folder) for folder in folders)


def test_every_module_is_in_a_package() -> None:
    for top in ("bitnet_numba", "kernels", "reference"):
        for path in (ROOT / top).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.parent} has modules but no __init__.py"


def test_package_data_covers_the_built_in_model() -> None:
    folder = ROOT / "bitnet_numba"
    covered = {path for pattern in SETUPTOOLS["package-data"]["bitnet_numba"] for path in folder.glob(pattern)}
    files = {path for path in folder.rglob("*") if path.is_file() and path.suffix != ".py"}
    assert {path for path in files if "__pycache__" not in path.parts} == covered


def test_the_version_stands_in_one_place() -> None:
    assert "version" in PYPROJECT["project"]["dynamic"] and "version" not in PYPROJECT["project"]
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "bitnet_numba.__version__"}
    assert bitnet_numba.__version__[0].isdigit()


def test_importing_a_package_is_light() -> None:
    """No heavy library is loaded before it is used."""
    code = (
        "import sys, bitnet_numba, bitnet_numba.chat, bitnet_numba.engine, bitnet_numba.backends.cuda\n"
        "heavy = {'numpy', 'numba', 'jinja2', 'tokenizers', 'rich', 'prompt_toolkit', 'huggingface_hub'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ)


def test_commands_lead_to_functions() -> None:
    scripts = PYPROJECT["project"]["scripts"]
    assert set(scripts) == {"bitnet-numba", "bitnet-chat"}
    for name, target in scripts.items():
        assert callable(metadata.EntryPoint(name, target, "console_scripts").load())


BUILD = """
import setuptools.build_meta as backend
backend.build_sdist("dist")
print(backend.build_wheel("dist"))
"""
try:
    RELEASE = metadata.version("setuptools")
except metadata.PackageNotFoundError:
    RELEASE = "0"


@pytest.mark.skipif(int(RELEASE.partition(".")[0]) < 77, reason=f"needs setuptools 77 to build; this is {RELEASE}")
def test_a_wheel_runs_by_itself(tmp_path: Path) -> None:
    """Built without a network, unpacked, and used from outside the repository, whose tools/ it lacks."""
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("bitnet_numba", "kernels", "reference"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    built = subprocess.run([sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "would be ignored" not in built.stderr
    wheel = source / "dist" / built.stdout.splitlines()[-1]
    assert len(list((source / "dist").glob("*.tar.gz"))) == 1
    zipfile.ZipFile(wheel).extractall(site)
    shutil.rmtree(source)

    (information,) = site.glob("*.dist-info")
    found = metadata.PathDistribution(information)
    assert found.version == bitnet_numba.__version__
    assert {"cuda12", "cuda13", "bench"} <= set(found.metadata.get_all("Provides-Extra") or [])
    assert len(found.metadata.get_all("Classifier") or []) > 5 and found.metadata.get_all("Project-URL")
    assert found.metadata["License-Expression"] == "MIT"

    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "bitnet_numba", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--version") == f"bitnet-numba {bitnet_numba.__version__}\n"
    assert run("chat", "--backend", "reference", "--prompt", "Hello!", "--temperature", "0").startswith("H")
    report = json.loads(run("doctor", "--json"))
    assert report["software"]["location"] == str(site / "bitnet_numba")
    assert "problem" not in report["cpu"] and report["runs"]["cpu"]["tokens_per_second"] > 0
