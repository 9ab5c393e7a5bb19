"""The machine on what Triton compiles, in processes without the interpreter, and what it refuses there."""

import fresh
import pytest
from paths import GCC

CHECKS = {
    "ptx_kernels": ["casts", "roundings", "arithmetic", "long_division", "products"],
    "ptx_tile_kernels": ["reductions", "gathers", "rows", "control", "faults"],
}


def run(how: str, module: str, *checks: str) -> None:
    calls = "".join(f"{module}.{each}()\n" for each in checks)
    done = fresh.run(f"import ptx_driver\nptx_driver.install_as({how!r})\nimport {module}\n{calls}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", CHECKS)
def test_small_kernels_compute_what_numpy_does(module):
    run("machine", module, *CHECKS[module])


@GCC
@pytest.mark.parametrize(("module", "checks"), [("ptx_kernels", ["casts"]), ("ptx_tile_kernels", ["rows", "faults"])])
def test_through_tritons_own_driver_and_launcher(module, checks):
    run("recorded", module, *checks)


PLUGIN = """
import os, sys, pytest
os.environ["COMPILED_ON_CPU"] = {how!r}
os.environ.pop("MULTISTEP_TRITON_BACKEND", None)
sys.exit(pytest.main(["-q", "-p", "compiled_on_cpu", "-p", "no:cacheprovider", {test!r}]))
"""


@pytest.mark.parametrize("how", ["machine", pytest.param("recorded", marks=GCC)])
def test_a_test_of_the_kernels_runs_on_compiled_ones(how):
    test = "tests/spec/test_hand_computed.py::test_n_step_return_stops_at_done"
    done = fresh.run(PLUGIN.format(how=how, test=test))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
    assert "1 launch was executed from PTX" in done.stdout
