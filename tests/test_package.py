"""The package as it is installed, imported and run."""

import importlib
import re
import sys
from pathlib import Path

import mutate
import pytest

from multistep_triton import __version__

ROOT = Path(__file__).parent.parent


def test_kernels_are_a_subpackage():
    assert importlib.import_module("multistep_triton.kernels").__name__ == "multistep_triton.kernels"


def test_versions_agree():
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_mutation_alters_a_line_that_is_there():
    assert all(mutate.line_number(mutation) > 0 for mutation in mutate.MUTATIONS)


@pytest.mark.parametrize(("module", "beside"), [("reference", {"multistep_triton.ring"}), ("ring", set())])
def test_reference_imports_torch_only(module, beside):
    source = (ROOT / "multistep_triton" / f"{module}.py").read_text()
    imported = re.findall(r"^(?:from|import) (\S+)", source, re.MULTILINE)
    standard = {name for name in imported if name.split(".")[0] in sys.stdlib_module_names}
    assert set(imported) - standard == {"torch", *beside}
