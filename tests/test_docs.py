"""The documents: links lead somewhere, the API page is complete, and the Python in them runs."""

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import bitnet_numba

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "kernels" / "README.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """A page without its code."""
    return FENCED.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """What can stand behind # in a link to a page: headings as code hosts and the site name them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_pages_of_the_site_link_to_nothing_outside_it() -> None:
    for page in ROOT.glob("docs/*.md"):
        assert not any(link.startswith("..") for link in LINK.findall(prose(page))), page


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"^  - .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in ROOT.glob("docs/*.md"))


def test_the_api_page_has_everything_public() -> None:
    documented = re.findall(r"^::: bitnet_numba\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    # The module errors stands there with its classes, each by itself.
    assert sorted(documented) == sorted(set(bitnet_numba.__all__) - {"__version__", "errors"})


def public_calls() -> Iterator[tuple[str, Callable[..., object]]]:
    """Each public function, and each public method of a public class."""
    for name in bitnet_numba.__all__:
        value = getattr(bitnet_numba, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            for method, function in inspect.getmembers(value, lambda member: inspect.isroutine(member)):
                if not method.startswith("_") and str(getattr(function, "__module__", "")).startswith("bitnet_numba"):
                    yield f"{name}.{method}", function


def test_every_argument_is_told_or_referred_to() -> None:
    """`generate` says "arguments as for `stream`"; whatever refers to nothing names its arguments itself."""
    calls = dict(public_calls())
    assert {"load", "Engine.stream", "Scheduler.add", "Tokenizer.encode", "Grammar.regex"} <= set(calls)
    for name, call in calls.items():
        text = call.__doc__ or ""
        assert text, name
        if not re.search(r"\b(as|[Ss]ee|of) (for )?`", text):
            arguments = set(inspect.signature(call).parameters) - {"self", "overrides"}
            told = {argument for argument in arguments if re.search(rf"\b{argument}\b", text)}
            assert told == arguments or len(arguments) == 1, (name, arguments - told)  # one is what the text is about


def test_every_example_is_listed() -> None:
    text = (ROOT / "docs" / "python.md").read_text()
    listed = re.findall(r"^\| `(\w+\.py)` \|", text, re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in ROOT.glob("examples/*.py"))


@pytest.mark.parametrize("name", ["README.md", "docs/index.md", "docs/python.md"])
def test_python_in_pages_runs(name: str) -> None:
    namespace: dict[str, object] = {}
    for language, code in FENCED.findall((ROOT / name).read_text()):
        if language == "python" and "torch" not in code and "openai" not in code:  # which need more than this package
            exec(compile(code, name, "exec"), namespace)
    assert "bn" in namespace
