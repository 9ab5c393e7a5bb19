"""What a transition takes of memory: bytes that filled replay buffers hold, this package's beside others.

Usage: ``python -m benchmarks.memory --out DIR``; takes seconds, on the CPU, and is the same on every machine. Buffers
are made and filled, and the tensors and arrays that they then hold are counted. Widths of observations and actions are
those of training runs; there are as many slots of an environment as there, as what comes after its newest frame is one
row, and few environments, which all take the same.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from gymnasium import spaces
from stable_baselines3.common import buffers as sb3
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import LazyTensorStorage, ReplayBuffer

from benchmarks.cases import GAMMA, PIXELS
from benchmarks.machine import PACKAGES, installed
from benchmarks.measure import set_up
from benchmarks.report import table
from multistep_triton import NStepReplayBuffer

SLOTS = 1024
"""Frames of an environment that a buffer holds."""
TRAINED = (4096, 1024)
"""Environments and slots of a training run, of which the memory is given, too."""
FULL, COMPACT, BFLOAT16 = "NStepReplayBuffer", "NStepReplayBuffer, compact", "NStepReplayBuffer, compact, bfloat16"
TORCHRL, FASTTD3 = "torchrl's ReplayBuffer", "FastTD3's tensors"
SB3, SB3_ONCE = "stable-baselines3", "stable-baselines3, optimize_memory_usage: no n-step"
STORE_AS = dict.fromkeys(("observation", "critic_observation", "action"), torch.bfloat16)


class Case(NamedTuple):
    """What is stored, of how many environments."""

    name: str
    envs: int
    observations: dict[str, tuple[int, ...]]
    """Their shapes."""
    actions: int
    """Width of the action, float32; 0: it is one of a number of them, int64."""
    dtype: torch.dtype = torch.float32
    """Of observations."""


CASES = [
    Case("FastTD3, humanoid", 8, {"observation": (98,), "critic_observation": (286,)}, 29),
    # Sizes as of https://github.com/Motphys/MotrixLab/issues/68, where 4096 x 1024 transitions take 137 GB.
    Case("MotrixLab", 2, {"observation": (2412,), "critic_observation": (1645,)}, 29),
    Case("Atari", 2, {"observation": PIXELS}, 0, torch.uint8),
]


def frames(case: Case) -> TensorDict:
    """As many as fill the slots, of zeros, in which what comes after a frame is what the next one holds."""
    shape = (case.envs, SLOTS)
    action = torch.zeros(*shape, case.actions) if case.actions else torch.zeros(shape, dtype=torch.int64)
    observed = {key: torch.zeros(*shape, *feature, dtype=case.dtype) for key, feature in case.observations.items()}
    flags = {flag: torch.zeros(*shape, 1, dtype=torch.bool) for flag in ("done", "terminated", "truncated")}
    return TensorDict(
        {**observed, "action": action, "next": {**observed, "reward": torch.zeros(*shape, 1), **flags}}, shape
    )


def of_storage(storage: LazyTensorStorage) -> list[Tensor]:
    return list(storage._storage.values(include_nested=True, leaves_only=True))


def ours(case: Case, **arguments: Any) -> list[Tensor]:
    storage = LazyTensorStorage(case.envs * SLOTS, ndim=2)
    buffer = NStepReplayBuffer(n_steps=3, gamma=GAMMA, storage=storage, **arguments)
    buffer.extend(frames(case))
    ends = buffer._order.ends
    return of_storage(storage) + ([] if ends is None else [ends.count, *ends.rows.values()])


def torchrl(case: Case) -> list[Tensor]:
    storage = LazyTensorStorage(case.envs * SLOTS, ndim=2)
    ReplayBuffer(storage=storage).extend(frames(case))
    return of_storage(storage)


def fasttd3(case: Case) -> list[Tensor]:
    """What its ``SimpleReplayBuffer`` allocates (https://github.com/younggyoseo/FastTD3), which is of vectors."""
    shape = (case.envs, SLOTS)
    widths = [width for (width,) in case.observations.values()]
    floats = [torch.zeros(*shape, width) for width in (*widths, *widths, case.actions)]
    # rewards; dones and truncations
    return [*floats, torch.zeros(shape), *(torch.zeros(shape, dtype=torch.int64) for _ in range(2))]


def spaces_of(case: Case) -> tuple[spaces.Space, spaces.Space]:
    """Those of stable-baselines3, to which several vectors of observations are one."""
    shapes = list(case.observations.values())
    if case.dtype == torch.uint8:
        observation = spaces.Box(0, 255, *shapes, np.uint8)
    else:
        observation = spaces.Box(-np.inf, np.inf, (sum(width for (width,) in shapes),))
    return observation, spaces.Box(-1, 1, (case.actions,)) if case.actions else spaces.Discrete(18)


def arrays_of(buffer: sb3.ReplayBuffer) -> list[np.ndarray]:
    return [array for array in vars(buffer).values() if isinstance(array, np.ndarray)]


def stable_baselines3(case: Case) -> list[np.ndarray]:
    return arrays_of(sb3.NStepReplayBuffer(case.envs * SLOTS, *spaces_of(case), n_envs=case.envs))


def stable_baselines3_once(case: Case) -> list[np.ndarray]:
    options = {"optimize_memory_usage": True, "handle_timeout_termination": False}
    return arrays_of(sb3.ReplayBuffer(case.envs * SLOTS, *spaces_of(case), n_envs=case.envs, **options))


def refusal() -> str:
    """What stable-baselines3 says to observations that are kept once and of which n steps are asked."""
    try:
        sb3.NStepReplayBuffer(8, *spaces_of(CASES[0]), optimize_memory_usage=True, handle_timeout_termination=False)
    except NotImplementedError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def buffers_of(case: Case) -> dict[str, Callable[[Case], Iterable[Any]]]:
    """What makes and fills each, and returns what it then holds."""
    found: dict[str, Callable[[Case], Iterable[Any]]] = {
        FULL: ours,
        COMPACT: partial(ours, compact=True),
        BFLOAT16: partial(ours, compact=True, store_as=STORE_AS),
        TORCHRL: torchrl,
        SB3: stable_baselines3,
        SB3_ONCE: stable_baselines3_once,
        FASTTD3: fasttd3,
    }
    of_vectors = case.dtype.is_floating_point
    return {name: make for name, make in found.items() if of_vectors or name not in (BFLOAT16, FASTTD3)}


def bytes_of(held: Iterable[Tensor | np.ndarray]) -> int:
    """Those that are allocated; memory that several tensors share counts once."""
    blocks = {}
    for each in held:
        if isinstance(each, Tensor):
            block = each.untyped_storage()
            blocks[block.data_ptr()] = block.nbytes()
        else:
            blocks[each.ctypes.data] = each.nbytes
    return sum(blocks.values())


def rows_of(case: Case) -> list[dict[str, Any]]:
    """One row per buffer."""
    found = {name: bytes_of(make(case)) / (case.envs * SLOTS) for name, make in buffers_of(case).items()}
    return [
        {
            "case": case.name,
            "buffer": name,
            "bytes per transition": each,
            "this / NStepReplayBuffer": each / found[FULL],
            f"GB of {TRAINED[0]} x {TRAINED[1]}": each * TRAINED[0] * TRAINED[1] / 1e9,
        }
        for name, each in found.items()
    ]


def measure() -> pd.DataFrame:
    """One row per case and buffer."""
    return pd.DataFrame([row for case in CASES for row in rows_of(case)])


def report(rows: pd.DataFrame) -> str:
    versions = ", ".join(f"{name} {installed(name)}" for name in PACKAGES if installed(name))
    return "\n\n".join(
        (
            "# Memory",
            f"Python {platform.python_version()}, {versions}.",
            f"Bytes of all that a full buffer of {SLOTS} slots per environment holds, over its transitions, and GB "
            f"(1e9 bytes) of as many as a training run stores. `compact` has the default `end_slots`, a row of what "
            f"comes after an end for every 16 slots; bfloat16: observations and actions, by `store_as`. Pictures have "
            f"no row of it, as they are no floats, and none of FastTD3, which stores vectors of float32; with its "
            f"`playground_mode`, where critics observe what actors do and more, it stores of theirs what is more. "
            f"stable-baselines3 holds both observations in one vector; its NStepReplayBuffer says to "
            f'`optimize_memory_usage`: "{refusal()}".',
            table(rows),
        )
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(".benchmarks"), metavar="DIR")
    options = parser.parse_args(arguments)
    set_up()
    text = report(measure())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "memory.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
