"""A plugin for pytest: compiled kernels, without a GPU, on CPU tensors.

Usage: ``PYTHONPATH=tests/support COMPILED_ON_CPU=machine python -m pytest -p compiled_on_cpu TESTS``. With ``machine``,
``ptx_driver.py`` executes launches; with ``recorded``, which needs gcc, they get there through Triton's own driver and
its launcher in C. ``COMPILED_ON_CPU_COUNTED=1`` counts what launches cost, too, which takes time.
"""

from __future__ import annotations

import os

# Triton takes "0" for unset, and the default that conftest.py gives the variable does not apply.
os.environ["TRITON_INTERPRET"] = "0"

import ptx_driver
import pytest

HOW = os.environ.get("COMPILED_ON_CPU", "machine")
driver = ptx_driver.install_as(HOW)
driver.counted = os.environ.get("COMPILED_ON_CPU_COUNTED", "0") != "0"
LAUNCHES = "launches executed from PTX"
launched: list[int] = []


def pytest_report_header() -> str:
    import triton

    return f"kernels compiled by Triton {triton.__version__} for {driver.get_current_target().arch}, executed: {HOW}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[LAUNCHES] = len(driver.launches)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """A worker of pytest-xdist is done."""
    launched.append(getattr(node, "workeroutput", {}).get(LAUNCHES, 0))


def pytest_terminal_summary(terminalreporter) -> None:
    """A run in which nothing was launched checks nothing."""
    count = len(driver.launches) + sum(launched)
    terminalreporter.write_line(f"{count} launch{'es were' if count != 1 else ' was'} executed from PTX")
