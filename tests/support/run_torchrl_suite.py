"""Runs torchrl's own tests of its MultiStepTransform and of its MultiStep on ours.

Usage: python tests/support/run_torchrl_suite.py CHECKOUT, the root of a checkout of the pytorch/rl repository.

The tests stay in that checkout, unmodified; only the names they import are bound to our classes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torchrl.data.postprocs.postprocs
import torchrl.envs

from multistep_triton import MultiStep, MultiStepTransform


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="root of a checkout of pytorch/rl")
    root = parser.parse_args().checkout / "test"
    suites = {
        root / "transforms" / "test_compose_and_env.py": "TestMultiStepTransform",
        root / "test_postprocs.py": "TestMultiStep",
    }
    for file in suites:
        if not file.is_file():
            parser.error(f"checkout must hold {file.relative_to(root.parent)}, got {root.parent}")
    torchrl.envs.MultiStepTransform = MultiStepTransform
    torchrl.data.postprocs.postprocs.MultiStep = MultiStep
    tests = [f"{file}::{name}" for file, name in suites.items()]
    return pytest.main([*tests, "-q", "-p", "no:cacheprovider", "--rootdir", str(root)])


if __name__ == "__main__":
    sys.exit(main())
