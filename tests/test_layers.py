"""Imports go downwards only, no kernel operation imports another, and every public launcher has a caller in the
product."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
OPERATIONS = tuple(
    f"bitnet_numba.kernels.{name}" for name in ("linear", "attention", "lm_head", "sampling", "embedding", "cpu")
)
# From the ground up. A module may import from lower floors and from its own room; rooms of one floor are apart.
FLOORS: list[tuple[str, ...]] = [
    tuple(f"bitnet_numba.{name}" for name in ("errors", "bfloat16", "packing")),
    (
        "bitnet_numba.quantize",
        "bitnet_numba.commands",
        "bitnet_numba.model_folder",
        "bitnet_numba.config_keys",
        "bitnet_numba.module_patterns",
    ),
    ("bitnet_numba.json_file", "bitnet_numba.config_rope"),
    ("bitnet_numba.config",),
    ("bitnet_numba.grammar",),
    ("bitnet_numba.sampling_params",),
    ("bitnet_numba.sampling",),
    ("bitnet_numba.text", "bitnet_numba.kernels.ptx"),
    ("bitnet_numba.checkpoint",),
    ("bitnet_numba.hub",),
    ("bitnet_numba.reference", "bitnet_numba.kernels.runtime"),
    ("bitnet_numba.kernels.operands",),
    OPERATIONS,
    ("bitnet_numba.backends",),
    ("bitnet_numba.engine",),
    ("bitnet_numba.model_options",),
    ("bitnet_numba.chat", "bitnet_numba.server"),
    ("bitnet_numba.cli",),
    ("bitnet_numba.__main__",),
    ("tools",),
]


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the product, by the name that it is imported by."""
    files = [
        path for folder in ("bitnet_numba", "kernels", "reference", "tools") for path in (ROOT / folder).rglob("*.py")
    ]
    found = {}
    for path in files:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name if name.startswith(("bitnet_numba", "tools")) else f"bitnet_numba.{name}"] = ast.parse(
            path.read_text()
        )
    return found


def place(module: str) -> tuple[int, str]:
    """Floor and room of a module; the packages themselves stand in the basement."""
    rooms = [
        (floor, room) for floor, names in enumerate(FLOORS) for room in names if f"{module}.".startswith(f"{room}.")
    ]
    return max(rooms, key=lambda found: len(found[1]), default=(-1, module))


def imported(tree: ast.Module) -> set[str]:
    """The product's modules and names that a module imports when it is imported or used."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(("bitnet_numba", "tools")):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith(("bitnet_numba.", "tools."))}
    return names


def test_imports_go_down() -> None:
    for module, tree in modules().items():
        floor, room = place(module)
        if floor < 0:
            continue  # the package's own __init__ re-exports
        for name in imported(tree):
            other_floor, other_room = place(name)
            assert other_room == room or other_floor < floor, f"{module} imports {name}, which is not below it"


def test_every_launcher_has_a_caller() -> None:
    everything = modules()
    used = {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for module, tree in everything.items()
        if module.startswith("bitnet_numba.backends")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name)
    }
    launchers = {
        node.name
        for module, tree in everything.items()
        if place(module)[1] in OPERATIONS
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.args.args[:1] and node.args.args[0].arg == "device"
        and not node.name.startswith("_") and "Launch" in ast.dump(node.returns or ast.Constant(None))
    }  # fmt: skip
    assert len(launchers) >= 14
    assert launchers <= used, f"no backend calls {sorted(launchers - used)}"
