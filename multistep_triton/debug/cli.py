"""The command line: ``python -m multistep_triton demo``, ``doctor`` or ``explain``.

Owns the arguments and the exit status. May import ``backends``, ``checks`` and, inside the function that runs it, each
command, which may need a package that is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from multistep_triton import __version__
from multistep_triton.backends import BACKENDS, check_backend, resolve_backend
from multistep_triton.checks import check_gamma, check_positive_int

MAX_SEED = 2**32 - 1
DEFAULT = " (default: %(default)s)"
REQUIREMENTS = ("gymnasium", "matplotlib", "tqdm")


class _Parser(argparse.ArgumentParser):
    """A parser that prints an error as one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that ``arguments`` (default: ``sys.argv[1:]``) name, or exits with 2 and a one-line error.

    Returns:
        The exit status: 1 if the demo or the doctor finds a difference, if the doctor finds a device on which ``auto``
        cannot run, or if the doctor finds an entry of its FILE that cannot be kept once; else 0.
    """
    parser = _Parser(prog="python -m multistep_triton", description="n-step replay for torchrl.")
    parser.add_argument("--version", action="version", version=f"multistep_triton {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_demo, _add_doctor, _add_explain):
        add(commands)
    options = parser.parse_args(arguments)
    parser = options.parser
    try:
        status: int = options.run(parser, options)
        sys.stdout.flush()
    except BrokenPipeError:  # as with "| head"; Python would report the error again when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in REQUIREMENTS:
            raise
        extra = "demo" if options.command == "demo" else "debug"
        parser.error(f'this needs {package}: pip install "multistep_triton[{extra}]"')
    return status


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="compare with torchrl's MultiStepTransform on CartPole",
        description="Rolls out two CartPole environments, extends a replay buffer with this package's "
        "MultiStepTransform and one with torchrl's, and compares every frame stored.",
    )
    parser.set_defaults(run=_demo, parser=parser)
    _add_n_steps_and_gamma(parser)
    _add_positive_int(parser, "frames-per-chunk", 50, "frames of each environment in one extend")
    _add_positive_int(parser, "chunks", 100, "number of extends")
    text = "frames that a buffer holds, at least one chunk and at most all of both environments"
    _add_positive_int(parser, "capacity", 100, text)
    _add_seed(parser, "seed of the environments and the actions")
    parser.add_argument("--save", metavar="FILE", type=Path, help="save the rollout, to be looked at with explain")
    backend, text = _argument(str, check_backend), f"one of {', '.join(BACKENDS)}{DEFAULT}"
    parser.add_argument("--backend", type=backend, default="auto", metavar="NAME", help=text)


def _demo(parser: _Parser, options: argparse.Namespace) -> int:
    frames = options.chunks * options.frames_per_chunk
    if options.n_steps >= frames:
        parser.error(
            f"argument --n-steps: must be less than the {frames} frames that each environment yields (chunks * frames "
            f"per chunk), got {options.n_steps}"
        )
    try:
        backend = resolve_backend(options.backend, [torch.empty(0)])  # the environments are on the CPU
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    from multistep_triton.debug import demo

    smallest = demo.ENVIRONMENTS * options.frames_per_chunk
    if options.capacity < smallest:
        parser.error(
            f"argument --capacity: must be at least {smallest}, the frames of one chunk "
            f"({demo.ENVIRONMENTS} environments * {options.frames_per_chunk}), got {options.capacity}"
        )
    if options.save:
        try:
            options.save.open("wb").close()
        except OSError as error:
            parser.error(f"argument --save: must be a file that can be written, got {error}")
    print(f"backend: {backend} (asked for: {options.backend})")
    return demo.run(
        n_steps=options.n_steps,
        gamma=options.gamma,
        frames_per_chunk=options.frames_per_chunk,
        chunks=options.chunks,
        capacity=min(options.capacity, smallest * options.chunks),
        seed=options.seed,
        backend=options.backend,
        save=options.save,
    )


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="say what runs on this machine, and check that it computes the same",
        description="Prints versions, devices, and which backend runs where and why. Then runs random streams: the "
        "kernels beside the reference, compiled on every GPU and interpreted on the CPU, and the reference beside "
        "torchrl's transform, where that is right. Exits with 1 if any differ. Of a FILE it says instead which "
        "observations an NStepReplayBuffer can keep once, with compact=True, and exits with 1 if any cannot be. Keys "
        "are the buffer's, nested names joined by dots.",
    )
    parser.set_defaults(run=_doctor, parser=parser)
    text = "a rollout of 1-step transitions [*B, T], saved with torch.save"
    parser.add_argument("file", nargs="?", metavar="FILE", type=Path, help=text)
    _add_keys(parser)
    _add_positive_int(parser, "streams", 200, "random streams in each comparison")
    _add_seed(parser, "seed of the first stream")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def _doctor(parser: _Parser, options: argparse.Namespace) -> int:
    if options.file is not None:
        if options.json:
            parser.error("argument --json: must be left out with FILE, of which no table is made")
        from multistep_triton.debug import kept_once

        with _one_line_errors(parser, options.file):
            return kept_once.run(options.file, _keys_in(options))
    from multistep_triton.debug import doctor

    return doctor.run(streams=options.streams, seed=options.seed, as_json=options.json)


def _add_explain(commands: Any) -> None:
    parser = commands.add_parser(
        "explain",
        help="show the window of one frame of a saved rollout",
        description="Loads a rollout of 1-step transitions [*B, T] that torch.save wrote, and shows the n-step window "
        "of one frame: its frames, where it ends and why, and its return as a sum. Windows are cut at the rollout's "
        "last frame. Keys are those of the transform, nested names joined by dots.",
    )
    parser.set_defaults(run=_explain, parser=parser)
    parser.add_argument("file", metavar="FILE", type=Path, help="a tensordict, saved with torch.save")
    text = "the row: an index for each dimension of *B, as in 0 or 3,1"
    parser.add_argument("--env", metavar="I,..", type=_indices, default=[], help=text)
    parser.add_argument("--t", metavar="T", type=int, required=True, help="the frame, from 0 on")
    parser.add_argument("--agent", metavar="I", type=int, help="which one, where each has a done flag")
    _add_n_steps_and_gamma(parser)
    _add_keys(parser)
    parser.add_argument("--plot", metavar="PNG", type=Path, help="draw the windows around it, and the first reward")


def _explain(parser: _Parser, options: argparse.Namespace) -> int:
    from multistep_triton.debug.explain import Windows, load_rollout
    from multistep_triton.postproc import MultiStep

    if options.plot:
        if not options.plot.suffix:
            parser.error(f"argument --plot: must end in .png or another picture's suffix, got {options.plot}")
        from multistep_triton.debug.plot import draw_windows
    with _one_line_errors(parser, options.file):
        multistep = MultiStep(options.gamma, options.n_steps, **_keys_in(options), backend="reference")
        windows = Windows(load_rollout(options.file), options.env, options.agent, multistep)
        title = f"{options.file.name}{windows.where}: n_steps = {options.n_steps}, gamma = {options.gamma:g}"
        text = windows.explain(options.t)
        if options.plot:
            draw_windows(windows, options.t, title).savefig(options.plot, dpi=120)
    print(f"{title}\n{text}")
    return 0


def _add_keys(parser: argparse.ArgumentParser) -> None:
    key = partial(parser.add_argument, metavar="KEY", type=_key)
    keys = partial(parser.add_argument, metavar="KEY,..", type=_keys)
    keys("--reward-keys", default="reward", help=f'rewards, under "next"{DEFAULT}')
    key("--done-key", default="done", help=f'the flag under "next" that ends trajectories{DEFAULT}')
    keys("--done-keys", help='flags under "next" (default: done,truncated,terminated)')
    key("--mask-key", default="mask", help=f"the entry that is False where a frame is padding{DEFAULT}")
    key("--traj-key", default="auto", help=f"the entry of trajectory ids, or none{DEFAULT}")


def _keys_in(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the keyword arguments of ``MultiStep`` that the options of :func:`_add_keys` give."""
    names = ("reward_keys", "done_key", "done_keys", "mask_key")
    traj_key = None if options.traj_key == "none" else options.traj_key
    return {**{name: getattr(options, name) for name in names}, "traj_key": traj_key}


@contextmanager
def _one_line_errors(parser: argparse.ArgumentParser, file: Path) -> Iterator[None]:
    """Exits with 2 and a one-line error for whatever a file of unknown content raises."""
    try:
        yield
    except Exception as error:
        message = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
        expected = isinstance(error, KeyError | OSError | TypeError | ValueError)
        parser.error(message if expected else f"{file} cannot be explained: {type(error).__name__}: {message}")


def _add_n_steps_and_gamma(parser: argparse.ArgumentParser) -> None:
    _add_positive_int(parser, "n-steps", 3, "frames in a full window")
    gamma, text = _argument(float, check_gamma), f"discount per step, in [0, 1]{DEFAULT}"
    parser.add_argument("--gamma", type=gamma, default=0.95, metavar="G", help=text)


def _add_positive_int(parser: argparse.ArgumentParser, name: str, default: int, text: str) -> None:
    check = partial(check_positive_int, name.replace("-", "_"))
    parser.add_argument(f"--{name}", type=_argument(int, check), default=default, metavar="N", help=text + DEFAULT)


def _add_seed(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--seed", type=_argument(int, _check_seed), default=0, metavar="N", help=text + DEFAULT)


def _argument(parse: Callable[[str], Any], check: Callable[[Any], Any]) -> Callable[[str], Any]:
    """Returns an argparse ``type`` that parses and checks a text; its error is the message of ``check``."""

    def convert(text: str) -> Any:
        value: Any = text  # a text that cannot be parsed stays a str, which check refuses
        with suppress(ValueError):
            value = parse(text)
        try:
            return check(value)
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _check_seed(value: int) -> int:
    if not isinstance(value, int) or not 0 <= value <= MAX_SEED:
        raise ValueError(f"seed must be an int in [0, {MAX_SEED}], got {value!r}")
    return value


def _indices(text: str) -> list[int]:
    try:
        return [int(index) for index in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be one index or several, as in 3,1, got {text!r}") from None


def _keys(text: str) -> list[str | tuple[str, ...]]:
    return [_key(each) for each in text.split(",")]


def _key(text: str) -> str | tuple[str, ...]:
    names = tuple(text.split("."))
    return names if len(names) > 1 else text
