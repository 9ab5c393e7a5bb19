"""Runs torchrl's own tests of its MultiStepTransform on ours.

Usage: python tests/run_torchrl_suite.py CHECKOUT, the root of a checkout of the pytorch/rl repository.

The tests stay in that checkout, unmodified; only the name they import is bound to our class.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torchrl.envs

from multistep_triton import MultiStepTransform


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="root of a checkout of pytorch/rl")
    tests = parser.parse_args().checkout / "test" / "transforms" / "test_compose_and_env.py"
    if not tests.is_file():
        parser.error(f"checkout must hold test/transforms/test_compose_and_env.py, got {tests}")
    torchrl.envs.MultiStepTransform = MultiStepTransform
    return pytest.main(
        [f"{tests}::TestMultiStepTransform", "-v", "-p", "no:cacheprovider", "--rootdir", str(tests.parent)]
    )


if __name__ == "__main__":
    sys.exit(main())
