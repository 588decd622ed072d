"""The wheel holds every module: pyproject.toml names its packages one by one, since two of them stand outside
bitnet_numba/."""

import os
import subprocess
import sys
from pathlib import Path

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
