"""The package as it is installed, imported and run."""

import ast
import importlib
import re
import sys
from pathlib import Path

import mutate
import pytest

import multistep_triton
from multistep_triton import __version__

ROOT = Path(__file__).parent.parent


def test_kernels_are_a_subpackage():
    assert importlib.import_module("multistep_triton.kernels").__name__ == "multistep_triton.kernels"


def test_versions_agree():
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_mutation_alters_a_line_that_is_there():
    assert all(mutate.line_number(mutation) > 0 for mutation in mutate.MUTATIONS)


# What a module of the core may import of the core, besides what those may; see ARCHITECTURE.md.
IMPORTS = {
    "checks": (),
    "carry": (),
    "task": ("carry",),
    "ends": ("task", "windows"),
    "samples": ("ends", "task"),
    "windows": ("task",),
    "spec": ("carry", "samples", "spec_ring", "task"),
    "spec_ring": ("samples", "task"),
    "eager": ("carry", "eager_ring", "task", "windows"),
    "eager_ends": ("ends", "samples", "task", "windows"),
    "eager_ring": ("eager_ends", "ends", "samples", "task", "windows"),
    "backends": ("checks",),
    "engine": ("backends", "carry", "eager", "ends", "samples", "task"),
    "functional": ("backends", "checks", "engine", "task"),
    "layouts": ("task",),
    "frames": ("carry", "layouts"),
    "roles": ("layouts",),
    "groups": ("carry", "checks", "engine", "frames", "layouts", "roles", "samples", "task"),
}


def imported(path):
    """The modules of this package that a file imports when it is imported, and those it imports in a function."""
    at_once, later = set(), set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("multistep_triton"):
            names = [f"{node.module}.{each.name}" for each in node.names]
            parts = {name.split(".")[1] for name in names} - set(multistep_triton.__all__)
            (at_once if node in tree.body else later).update(parts)
    return at_once, later


@pytest.mark.parametrize("module", IMPORTS)
def test_a_module_imports_what_it_may(module):
    at_once, _ = imported(ROOT / "multistep_triton" / f"{module}.py")
    assert at_once <= set(IMPORTS[module])


def test_the_core_imports_the_kernels_and_the_tools_where_they_run_alone():
    core = ROOT / "multistep_triton"
    for path in [*core.glob("*.py"), *(core / "buffer").glob("*.py")]:
        at_once, later = imported(path)
        assert not at_once & {"kernels", "debug"} or path.stem == "__main__", path
        allowed = {"engine": {"kernels", "debug"}, "backends": {"kernels"}, "__main__": {"debug"}}.get(path.stem, set())
        assert later & {"kernels", "debug"} <= allowed, path


@pytest.mark.parametrize(
    "module",
    ["spec", "spec_ring", "eager", "eager_ring", "eager_ends", "ends", "carry", "task", "samples", "windows"],
)
def test_what_computes_knows_tensors_alone(module):
    source = (ROOT / "multistep_triton" / f"{module}.py").read_text()
    modules = re.findall(r"^(?:from|import) (\S+)", source, re.MULTILINE)
    packages = {name.split(".")[0] for name in modules} - sys.stdlib_module_names
    assert packages <= {"torch", "multistep_triton"}


def test_files_and_functions_are_short():
    for path in [*(ROOT / "multistep_triton").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        source = path.read_text()
        assert source.count("\n") <= 300, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = node.end_lineno - (body[0].lineno if body else node.end_lineno) + 1
                assert lines <= 60, (path, node.name, lines)
    assert (ROOT / "multistep_triton" / "spec.py").read_text().count("\n") <= 100
