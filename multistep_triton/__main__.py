"""The command line: ``python -m multistep_triton demo``.

Owns the arguments and the exit status; the demo itself is imported once the arguments are right. May import
``backends``, ``functional`` and, inside the branch that runs it, ``demo``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from multistep_triton.backends import BACKENDS, check_backend, resolve_backend
from multistep_triton.checks import check_gamma, check_positive_int

MAX_SEED = 2**32 - 1
DEMO_REQUIREMENTS = ("gymnasium", "tqdm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: what follows ``python -m multistep_triton``; None reads ``sys.argv``.

    Returns:
        The exit status: 0, or 1 if the demo found a difference, or 2 if the demo cannot run here. Wrong arguments
        exit with 2 at once.
    """
    parser = argparse.ArgumentParser(prog="python -m multistep_triton", description="n-step replay for torchrl.")
    demo_parser = _add_demo(parser.add_subparsers(dest="command", required=True))
    options = parser.parse_args(arguments)
    if options.n_steps >= options.chunks * options.frames_per_chunk:
        demo_parser.error(
            f"argument --n-steps: must be less than the {options.chunks * options.frames_per_chunk} frames that each "
            f"environment yields (chunks * frames per chunk), got {options.n_steps}"
        )
    try:
        backend = resolve_backend(options.backend, [torch.empty(0)])  # the environments are on the CPU
    except (RuntimeError, ValueError) as error:
        return _refuse(demo_parser, str(error))
    try:
        from multistep_triton import demo
    except ModuleNotFoundError as error:
        if error.name not in DEMO_REQUIREMENTS:
            raise
        return _refuse(demo_parser, f'the demo needs {error.name}: pip install "multistep_triton[demo]"')
    smallest = demo.ENVIRONMENTS * options.frames_per_chunk
    if options.capacity < smallest:
        demo_parser.error(
            f"argument --capacity: must be at least {smallest}, the frames of one chunk "
            f"({demo.ENVIRONMENTS} environments * {options.frames_per_chunk}), got {options.capacity}"
        )
    print(f"backend: {backend} (asked for: {options.backend})")
    return demo.run(
        n_steps=options.n_steps,
        gamma=options.gamma,
        frames_per_chunk=options.frames_per_chunk,
        chunks=options.chunks,
        capacity=min(options.capacity, smallest * options.chunks),
        seed=options.seed,
        backend=options.backend,
    )


def _add_demo(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="compare with torchrl's MultiStepTransform on CartPole",
        description="Rolls out two CartPole environments, extends a replay buffer with this package's "
        "MultiStepTransform and one with torchrl's, and compares every frame stored.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = partial(parser.add_argument, metavar="N")
    add(
        "--n-steps",
        type=_argument(int, partial(check_positive_int, "n_steps")),
        default=3,
        help="frames in a full window",
    )
    add("--gamma", type=_argument(float, check_gamma), default=0.95, metavar="G", help="discount per step, in [0, 1]")
    for name, default, text in (
        ("frames-per-chunk", 50, "frames of each environment in one extend"),
        ("chunks", 100, "number of extends"),
        ("capacity", 100, "frames that a buffer holds, at least one chunk and at most all of both environments"),
    ):
        add(f"--{name}", type=_argument(int, partial(check_positive_int, name)), default=default, help=text)
    add("--seed", type=_argument(int, _check_seed), default=0, help="seed of the environments and the actions")
    add(
        "--backend",
        type=_argument(str, check_backend),
        default="auto",
        metavar="NAME",
        help=f"one of {', '.join(BACKENDS)}",
    )
    return parser


def _argument(parse: Callable[[str], Any], check: Callable[[Any], Any]) -> Callable[[str], Any]:
    """An argparse ``type`` whose error is the message of ``check``."""

    def convert(text: str) -> Any:
        try:
            value = parse(text)
        except ValueError:
            value = text
        try:
            return check(value)
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _check_seed(value: int) -> int:
    if not isinstance(value, int) or not 0 <= value <= MAX_SEED:
        raise ValueError(f"seed must be an int in [0, {MAX_SEED}], got {value!r}")
    return value


def _refuse(parser: argparse.ArgumentParser, message: str) -> int:
    print(f"{parser.prog}: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
