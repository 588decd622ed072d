"""`ptx` has every instruction as a flat name, and each says which architecture it needs."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from bitnet_numba.kernels import ptx

MODULES = sorted(path.stem for path in Path(str(ptx.__file__)).parent.glob("*.py") if path.stem != "__init__")
NO_INSTRUCTIONS = {
    "base": {"device_function", "instruction", "as_intrinsic", "element_address"},
    "wgmma": {"array_asm", "descriptor", "swizzled_rows", "bf16_rows"},
}


def instructions(module: str) -> dict[str, str]:
    """The public functions of a file of `ptx` and their docstrings. Where a file has one definition for the simulator
    and one for devices, the docstring is that of the first."""
    source = (Path(str(ptx.__file__)).parent / f"{module}.py").read_text()
    found: dict[str, str] = {}

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.If):
                visit(node.body)
                visit(node.orelse)
            elif isinstance(node, ast.FunctionDef) and not node.name.startswith(("_", "simulated_")):
                found.setdefault(node.name, ast.get_docstring(node) or "")

    visit(ast.parse(source).body)
    return {name: text for name, text in found.items() if name not in NO_INSTRUCTIONS.get(module, ())}


@pytest.mark.parametrize("module", MODULES)
def test_every_instruction_is_a_name_of_ptx(module: str) -> None:
    found = instructions(module)
    assert found
    home = importlib.import_module(f"bitnet_numba.kernels.ptx.{module}")
    for name, text in found.items():
        assert getattr(ptx, name, None) is getattr(home, name), f"ptx.{name} is missing"
        assert re.search(r"Any\s+architecture|sm_\d\d", text), f"{name} does not say which architecture it needs"


def test_ptx_has_nothing_else() -> None:
    public = {name for name in vars(ptx) if not name.startswith("_")} - set(MODULES)
    assert public == {name for module in MODULES for name in instructions(module)}
