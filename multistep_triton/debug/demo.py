"""The demo: runs the example of torchrl's MultiStepTransform with torchrl's class and this package's, and compares.

Owns the environment, two buffers and a table. May import the package, ``parity``, ``tables``, torchrl, gymnasium, tqdm.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import gymnasium  # noqa: F401  # fails here if missing, and not only when torchrl makes the environment
import torch
import torchrl
from tensordict import TensorDictBase
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import GymEnv, SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.transforms import MultiStepTransform as TorchRLMultiStepTransform
from tqdm import tqdm

from multistep_triton import MultiStepTransform
from multistep_triton.backends import Backend
from multistep_triton.debug.parity import INEXACT_KEYS, find_difference, leaf_keys, ulps
from multistep_triton.debug.tables import layout, number

ENVIRONMENTS = 2
ENVIRONMENT = "CartPole-v1"
FRAMES = 5  # in the printed table
COLUMNS = {
    "step_count": "step_count",
    "next step_count": ("next", "step_count"),
    "steps": "steps_to_next_obs",
    "reward": ("next", "original_reward"),
    "n-step reward": ("next", "reward"),
    "done": ("next", "done"),
}


def run(
    *,
    n_steps: int,
    gamma: float,
    frames_per_chunk: int,
    chunks: int,
    capacity: int,
    seed: int,
    backend: Backend,
    save: Path | None,
) -> int:
    """Extends both buffers chunk by chunk and compares the frames of each extend before the next overwrites them.

    ``capacity`` must be at least one chunk, ``ENVIRONMENTS * frames_per_chunk`` frames. ``save`` names the file for the
    whole rollout of 1-step transitions, ``[ENVIRONMENTS, chunks * frames_per_chunk]``; None saves nothing.

    Returns:
        0 if all stored frames are equal, else 1.
    """
    logging.getLogger("torchrl").setLevel(logging.WARNING)  # torchrl logs the allocation of every storage to stdout
    transforms = MultiStepTransform(n_steps, gamma, backend=backend), TorchRLMultiStepTransform(n_steps, gamma)
    buffers = [ReplayBuffer(storage=LazyTensorStorage(capacity, ndim=2), transform=each) for each in transforms]
    rollouts: Iterable[TensorDictBase] = _rollouts(chunks, frames_per_chunk, seed)
    if save:
        rollouts = list(rollouts)
        torch.save(torch.cat(rollouts, -1), save)
    stored, expected = 0, chunks * frames_per_chunk - n_steps
    # disable=None shows the bar only if stderr is a terminal.
    for rollout in tqdm(rollouts, total=chunks, unit="chunk", leave=False, disable=None):
        frames, difference = _extend(buffers, rollout, n_steps, stored)
        if difference:
            print(f"different: {difference}")
            return 1
        stored += frames
    if stored != expected:
        print(f"different: stored {stored} frames of each environment, not {expected}")
        return 1

    held = buffers[0][:]
    print(_table(held[0], stored))
    print(f"stored: {ENVIRONMENTS * stored} frames in {chunks} extends, of which the buffer holds {len(buffers[0])}")
    if n_steps == 1:
        print("nonterminal: compared with not done, as torchrl's is False everywhere for n_steps=1")
    keys, inexact = len(leaf_keys(held)), len(INEXACT_KEYS)
    print(
        f"compared with torchrl {torchrl.__version__}: {ENVIRONMENTS * stored} frames, {keys} keys each "
        f"({keys - inexact} exactly, {inexact} within {ulps(n_steps)} float32 ulps): all equal"
    )
    return 0


def _table(held: TensorDictBase, stored: int) -> str:
    """Tabulates the frames around a ring's first done, else its newest; ``stored`` frames were ever written to it."""
    slots = len(held)
    frames = held.roll(-stored % slots, 0)
    done = frames["next", "done"].flatten().tolist()
    first = done.index(True) if True in done else slots
    begin = max(min(first + 2, slots) - FRAMES, 0)
    rows = [
        [str(stored - slots + i), *(number(frames[key][i].item()) for key in COLUMNS.values())]
        for i in range(begin, min(begin + FRAMES, slots))
    ]
    return f"environment 0, as it is stored:\n{layout(['t', *COLUMNS], rows)}"


def _rollouts(chunks: int, frames: int, seed: int) -> Iterator[TensorDictBase]:
    """Yields rollouts ``[ENVIRONMENTS, frames]`` of random actions; each continues where the one before stopped."""
    env = TransformedEnv(SerialEnv(ENVIRONMENTS, lambda: GymEnv(ENVIRONMENT)), StepCounter())
    try:
        env.set_seed(seed)
        torch.manual_seed(seed)
        start = env.reset()
        for _ in range(chunks):
            rollout = env.rollout(frames, break_when_any_done=False, auto_reset=False, tensordict=start)
            yield rollout
            # Otherwise every chunk of a single frame but the first would hold the reward at the root, too.
            start = rollout[..., -1]["next"].exclude("reward")
    finally:
        env.close()


def _extend(buffers: list[ReplayBuffer], rollout: TensorDictBase, n_steps: int, stored: int) -> tuple[int, str | None]:
    """Extends both buffers; returns the number of frames that each environment stored, and a difference or None."""
    # The index of an extend names each slot once per environment; this takes each slot once, in order of time.
    ours, theirs = (buffer.extend(rollout.clone())[::ENVIRONMENTS, 0] for buffer in buffers)
    if not torch.equal(ours, theirs):
        return 0, f"extend wrote rows {ours.tolist()}, torchrl's rows {theirs.tolist()}"
    if not len(ours):
        return 0, None
    difference = find_difference(buffers[0].storage[ours], buffers[1].storage[theirs], n_steps)
    if difference is None:
        return len(ours), None
    where = ""
    if difference.frame:
        frame, environment = difference.frame
        where = f", frame {stored + frame} of environment {environment}"
    return 0, f"{difference.what}{where}: {difference.values}"
