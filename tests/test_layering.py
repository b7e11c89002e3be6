"""Direction of imports inside the package, as docs/architecture.md states it."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ddpm_fast"
# Entries of a package import from the lines above their own; those of one line not from each other.
ORDER = {
    "ddpm_fast": """
        utils
        ops
        diffusion
        models sampling
        engine training verify
        diffusers
        _accelerate
        __init__
        bench
        cli
        __main__""",
    "ddpm_fast.diffusion": """
        model_call model_output schedule_values timesteps
        gaussian schedule thresholding
        forward parameterization
        noise_levels variance
        bound_terms
        likelihood""",
    "ddpm_fast.sampling": """
        labels progress solvers
        step_table
        noise_source reverse_step
        step_loop
        loop_cache
        sampler
        codec""",
    "ddpm_fast.engine": """
        autotune graphed_model specs stand_in weight_watch
        choice convolution
        fuse_modules plan
        unet_engine
        accelerated_unet
        __init__""",
}
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


@pytest.mark.parametrize("package", ORDER)
def test_imports_run_in_one_direction(package):
    lines = enumerate(ORDER[package].splitlines())
    rank = {name: number for number, line in lines for name in line.split()}
    entry = {
        module: [*module.removeprefix(package).split("."), "__init__"][1]
        for module in MODULES
        if f"{module}.".startswith(f"{package}.")
    }
    pairs = [(a, b) for a in entry for b in IMPORTS[a] & entry.keys() if entry[a] != entry[b]]
    assert not [f"{a} imports {b}" for a, b in pairs if rank[entry[a]] <= rank[entry[b]]]


def test_imports_have_no_circle():
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names the circle


def test_top_of_the_package_is_small():
    names = {path.name for path in PACKAGE.iterdir() if path.suffix != ".so"} - {"__pycache__"}
    assert len(names) <= 18, names


def test_files_have_at_most_400_lines():
    files = [*MODULES.values(), *(PACKAGE.parent / "csrc").glob("**/*.*")]
    assert not [str(path) for path in files if len(path.read_text().splitlines()) > 400]
