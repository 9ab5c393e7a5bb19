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


def imported(path):
    """The modules of this package that a file imports when it is imported, and those it imports in a function."""
    at_once, later = set(), set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("multistep_triton"):
            names = [f"{node.module}.{each.name}".split(".")[1:] for each in node.names]
            folders = {"buffer", "debug"}
            parts = {part for first, *more in names for part in (first, *more[: first in folders])}
            parts -= {"__version__", *multistep_triton.__all__}
            (at_once if node in tree.body else later).update(parts)
    return at_once, later


CORE = {path.stem: path for path in (ROOT / "multistep_triton").rglob("*.py") if not path.stem.startswith("__")}


def may_import(module):
    """The modules that a module's docstring says it may import, and those that they may where it says so."""
    doc = ast.get_docstring(ast.parse(CORE[module].read_text()))
    said = " ".join(doc[doc.index("May import") :].split())
    allowed = {*CORE} if "the package" in said else {*re.findall(r"``(\w+)``", said)}
    for names, pronoun in re.findall(r"((?:``\w+``(?:, | and )?)+) and what (it|they) may", said):
        others = re.findall(r"``(\w+)``", names)
        allowed.update(*map(may_import, others if pronoun == "they" else others[-1:]))
    return allowed


@pytest.mark.parametrize("module", CORE)
def test_a_module_imports_what_its_docstring_says(module):
    at_once, _ = imported(CORE[module])
    assert at_once - {"buffer", "debug"} <= may_import(module)


def test_the_core_imports_the_kernels_and_the_tools_where_they_run_alone():
    core = ROOT / "multistep_triton"
    for path in [*core.glob("*.py"), *(core / "buffer").glob("*.py")]:
        at_once, later = imported(path)
        assert not at_once & {"kernels", "debug"} or path.stem == "__main__", path
        allowed = {"engine": {"kernels", "debug"}, "backends": {"kernels"}, "__main__": {"debug"}}.get(path.stem, set())
        assert later & {"kernels", "debug"} <= allowed, path


@pytest.mark.parametrize(
    "module",
    ["spec", "spec_ring", "eager", "eager_ring", "ends", "carry", "task", "samples", "windows"],
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
