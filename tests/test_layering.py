"""Direction of imports inside the package, as docs/architecture.md states it."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ddpm_fast"
# An entry imports from the lines above its own; entries of one line do not import each other.
LAYERS = """utils
ops
diffusion
models sampling
engine training verify
diffusers
_accelerate
__init__
bench
cli
__main__"""
RANK = {name: rank for rank, line in enumerate(LAYERS.split("\n")) for name in line.split()}
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(module: str) -> set[str]:
    """Modules of the package that `module` imports, in functions and TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {
                name if name in MODULES else node.module for name in names if "._C" not in name
            }
    return found & MODULES.keys()


IMPORTS = {module: imports(module) for module in MODULES}


def entry(module: str) -> str:
    """Entry of `ddpm_fast/` that holds `module`."""
    return [*module.split("."), "__init__"][1]


def test_imports_run_in_one_direction():
    pairs = [(a, b) for a in IMPORTS for b in IMPORTS[a] if entry(a) != entry(b)]
    assert not [f"{a} imports {b}" for a, b in pairs if RANK[entry(a)] <= RANK[entry(b)]]


def test_imports_have_no_circle():
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names the circle


def test_top_of_the_package_is_small():
    names = {path.name for path in PACKAGE.iterdir() if path.suffix != ".so"} - {"__pycache__"}
    assert len(names) <= 18, names


def test_files_have_at_most_400_lines():
    assert not [m for m, path in MODULES.items() if len(path.read_text().splitlines()) > 400]
