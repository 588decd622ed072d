"""The wheel holds every module: pyproject.toml names its packages one by one, since two of them stand outside
bitnet_numba/."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import bitnet_numba
from tests.demo.demo_in_transformers import write_hugging_face
from tests.server.helpers import free_port
from tests.server.test_deployment import dockerfile

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


def test_every_extra_is_documented() -> None:
    text = (ROOT / "docs" / "install.md").read_text()
    for extra in PYPROJECT["project"]["optional-dependencies"]:
        assert re.search(rf"^\| .*`{extra}`.* \|", text, re.MULTILINE), extra


def test_the_version_stands_in_one_place() -> None:
    assert "version" in PYPROJECT["project"]["dynamic"] and "version" not in PYPROJECT["project"]
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "bitnet_numba.__version__"}
    assert bitnet_numba.__version__[0].isdigit()


def test_the_changelog_begins_with_this_version() -> None:
    """A version that is out has its date there; one with .dev in it is the next one, which has none yet."""
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    version, development, _ = bitnet_numba.__version__.partition(".dev")
    number, _, when = headings[0].partition(" ")
    assert number == version
    assert when == "(not released yet)" if development else date.fromisoformat(when.strip("()"))
    assert len({heading.split()[0] for heading in headings}) == len(headings)


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


try:
    SETUPTOOLS_VERSION = metadata.version("setuptools")
except metadata.PackageNotFoundError:
    SETUPTOOLS_VERSION = "0"
COPIED = ("bitnet_numba", "docs", "examples", "kernels", "reference", "tests", "tools")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without a network, and unpacked."""
    if int(SETUPTOOLS_VERSION.partition(".")[0]) < 77:
        pytest.skip(f"needs setuptools 77 to build; this is {SETUPTOOLS_VERSION}")
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    for name in COPIED:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source)
    archive = build(source, "sdist")
    with tarfile.open(archive) as tar:
        if sys.version_info >= (3, 12):
            tar.extractall(folder, filter="data")
        else:
            tar.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Built of the sdist, as pip does it."""
    return build(sdist, "wheel")


def build(source: Path, kind: str) -> Path:
    """An sdist or a wheel of a folder."""
    code = f"import setuptools.build_meta as backend; print(backend.build_{kind}('dist'))"
    built = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "would be ignored" not in built.stderr
    return source / "dist" / built.stdout.splitlines()[-1]


def test_the_sdist_can_be_tested_and_documented(sdist: Path) -> None:
    for folder in COPIED:
        original = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()}
        missing = {path for path in original if not (sdist / path).exists() and "__pycache__" not in path.parts}
        assert not missing
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "SECURITY.md", "mkdocs.yml"):
        assert (sdist / name).exists(), name


def test_a_wheel_runs_by_itself(wheel: Path, tmp_path: Path) -> None:
    """Unpacked, and used from outside the repository, whose tools/ it lacks."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    (information,) = site.glob("*.dist-info")
    assert {path.name for path in site.iterdir()} == {"bitnet_numba", information.name}
    found = metadata.PathDistribution(information)
    assert found.version == bitnet_numba.__version__
    assert {"cuda12", "cuda13", "bench"} <= set(found.metadata.get_all("Provides-Extra") or [])
    assert len(found.metadata.get_all("Classifier") or []) > 5 and found.metadata.get_all("Project-URL")
    assert found.metadata["License-Expression"] == "MIT"

    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    report = use(sys.executable, tmp_path, env)
    assert report["software"]["location"] == str(site / "bitnet_numba")


def use(python: str, folder: Path, env: dict[str, str]) -> Any:
    """Asks what is installed for its version, an answer and what runs; returns the last."""

    def run(*arguments: str) -> str:
        command = [python, "-m", "bitnet_numba", *arguments]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--version") == f"bitnet-numba {bitnet_numba.__version__}\n"
    assert run("chat", "--backend", "reference", "--prompt", "Hello!", "--temperature", "0").startswith("H")
    report = json.loads(run("doctor", "--json"))
    assert "problem" not in report["cpu"] and report["runs"]["cpu"]["tokens_per_second"] > 0
    return report


def test_two_commands_from_a_hub_id(wheel: Path, tmp_path: Path) -> None:
    """To a conversation, and to a client of OpenAI's: of the wheel, with what a download has left, and no network."""
    openai = pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    site, hub = tmp_path / "site", tmp_path / "huggingface" / "hub" / "models--microsoft--bitnet-b1.58-2B-4T"
    zipfile.ZipFile(wheel).extractall(site)
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = hub / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(commit)
    write_hugging_face(snapshot)
    for path in (ROOT / "bitnet_numba" / "demo").iterdir():
        if not (snapshot / path.name).exists():
            shutil.copy(path, snapshot)
    places = {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    places |= {"HF_HOME": str(tmp_path / "huggingface"), "HF_HUB_OFFLINE": "1"}
    places |= {"BITNET_NUMBA_MODELS": str(tmp_path / "models"), "BITNET_NUMBA_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "bitnet_numba"]

    ask = [*command, "chat", "2b4t", "--backend", "reference", "--prompt", "Hello!", "--temperature", "0"]
    said = subprocess.run(ask, cwd=tmp_path, env=os.environ | places, capture_output=True, text=True)
    expected = bitnet_numba.load(None, "reference").chat("Hello!", temperature=0).text
    assert said.returncode == 0 and said.stdout == expected + "\n", said.stderr
    assert "offline" in said.stderr and "converting microsoft/bitnet-b1.58-2B-4T" in said.stderr

    serve = [*command, "serve", "2b4t", "--backend", "reference", "--port", "0"]
    with subprocess.Popen(serve, cwd=tmp_path, env=os.environ | places, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            lines = [server.stderr.readline(), server.stderr.readline()]
            found = re.search(r"2b4t answers at (http://[\d.:]+)", lines[1])
            assert found, lines
            client = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="none")
            chat = [{"role": "user", "content": "Hello!"}]
            stream = client.chat.completions.create(model="2b4t", messages=chat, temperature=0, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == said.stdout.strip()
        finally:
            server.terminate()


@pytest.mark.slow
@pytest.mark.parametrize("minor", [10, 11, 12, 13])
def test_a_wheel_installs(wheel: Path, minor: int, tmp_path: Path) -> None:
    """In a fresh environment of each Python that is here, with the dependencies that pip chooses today."""
    python = find_python(minor)
    if python is None:
        pytest.skip(f"there is no Python 3.{minor} here")
    fresh = tmp_path / "fresh"
    subprocess.run([python, "-m", "venv", fresh], check=True)
    inside = str(fresh / "bin" / "python")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["BITNET_NUMBA_CACHE"] = str(tmp_path / "cache")
    install = [inside, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", str(wheel)]
    subprocess.run(install, check=True, env=env)
    subprocess.run([inside, "-m", "pip", "check"], check=True, env=env, stdout=subprocess.DEVNULL)
    use(inside, tmp_path, env)
    everything = "import bitnet_numba as bn; [getattr(bn, name) for name in bn.__all__ if 'w2a8' not in name]"
    subprocess.run([inside, "-W", "error", "-c", everything], check=True, env=env, cwd=tmp_path)


@pytest.mark.slow
def test_what_the_image_runs(wheel: Path, tmp_path: Path) -> None:
    """The Dockerfile's installation in an environment instead of an image; what it starts becomes healthy, and ends."""
    steps, folder = dockerfile(), tmp_path / "copied"
    folder.mkdir()
    shutil.copy(wheel, folder)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "image"], check=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"PATH": f"{tmp_path}/image/bin{os.pathsep}{env['PATH']}", "HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    copied = dict(steps)["COPY"].split()[1]
    subprocess.run(["sh", "-ec", steps[2][1].replace(copied, f"{folder}/")], check=True, env=env, cwd=tmp_path)
    port, given = str(free_port()), dict(steps)
    command = [*json.loads(given["ENTRYPOINT"]), "--port", port, "--threads", "1"]
    health = json.loads(given["HEALTHCHECK"].partition(" CMD ")[2].replace(given["EXPOSE"], port))
    with subprocess.Popen(command, env=env, cwd=tmp_path) as server:
        until = time.monotonic() + 300
        try:
            while subprocess.run(health, env=env, cwd=tmp_path, capture_output=True).returncode:
                assert server.poll() is None and time.monotonic() < until
                time.sleep(1)
        finally:
            server.terminate()
        assert server.wait(60) == 0


def find_python(minor: int) -> str | None:
    """Python 3.`minor`, on the path or of pyenv; None if there is none."""
    name = f"python3.{minor}"
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    candidates = [shutil.which(name), *map(str, sorted(pyenv.glob(f"versions/3.{minor}.*/bin/{name}"), reverse=True))]
    works = "import sys, ensurepip; sys.exit(sys.version_info[:2] != (3, " + str(minor) + "))"
    for python in filter(None, candidates):
        if subprocess.run([python, "-c", works], capture_output=True).returncode == 0:
            return python
    return None
