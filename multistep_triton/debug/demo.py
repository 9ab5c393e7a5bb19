"""The demo: the example of torchrl's MultiStepTransform, stored by ours and by torchrl's, and compared.

Owns the environment and the two buffers. May import the package, torchrl, gymnasium and tqdm.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import gymnasium  # noqa: F401  # torchrl looks for it only when it makes the environment, which is late to miss it
import torch
import torchrl
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import GymEnv, SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.transforms import MultiStepTransform as TorchRLMultiStepTransform
from torchrl.envs.transforms import Transform
from tqdm import tqdm

from multistep_triton import MultiStepTransform
from multistep_triton.debug.parity import INEXACT_KEYS, find_difference, leaf_keys, ulps

ENVIRONMENTS = 2
ENVIRONMENT = "CartPole-v1"


def run(
    *,
    n_steps: int,
    gamma: float,
    frames_per_chunk: int,
    chunks: int,
    capacity: int,
    seed: int,
    backend: str,
    save: Path | None,
) -> int:
    """Extends both buffers chunk by chunk and compares what each extend stored.

    Keyword Args:
        n_steps: frames in a full window, less than ``chunks * frames_per_chunk``.
        gamma: discount per step.
        frames_per_chunk: frames of each environment in one extend.
        chunks: number of extends.
        capacity: frames that each buffer holds, at least ``ENVIRONMENTS * frames_per_chunk``: what an extend stored
            is read back before a later one overwrites it.
        seed: of the environments and the actions.
        backend: backend of our transform.
        save: where to save the rollouts, as one of 1-step transitions ``[ENVIRONMENTS, chunks * frames_per_chunk]``.

    Returns:
        0 if all stored frames are equal, else 1.
    """
    logging.getLogger("torchrl").setLevel(logging.WARNING)  # it logs to stdout what each storage allocates
    ours = _buffer(MultiStepTransform(n_steps, gamma, backend=backend), capacity)
    theirs = _buffer(TorchRLMultiStepTransform(n_steps, gamma), capacity)
    keys: list[NestedKey] = []
    stored = 0
    rollouts: Iterable[TensorDictBase] = _rollouts(chunks, frames_per_chunk, seed)
    if save:
        rollouts = list(rollouts)
        torch.save(torch.cat(rollouts, -1), save)
    # disable=None: only where stderr is a terminal.
    for rollout in tqdm(rollouts, total=chunks, unit="chunk", leave=False, disable=None):
        our_rows, their_rows = _store(ours, rollout), _store(theirs, rollout)
        if not torch.equal(our_rows, their_rows):
            print(f"different: extend wrote rows {our_rows.tolist()}, torchrl's rows {their_rows.tolist()}")
            return 1
        if len(our_rows):
            our_frames, their_frames = ours.storage[our_rows], theirs.storage[their_rows]
            if difference := find_difference(our_frames, their_frames, n_steps):
                where = ""
                if difference.frame:
                    frame, environment = difference.frame
                    where = f", frame {stored + frame} of environment {environment}"
                print(f"different: {difference.what}{where}: {difference.values}")
                return 1
            keys = leaf_keys(our_frames)
            stored += len(our_rows)
    if stored != chunks * frames_per_chunk - n_steps:
        print(f"different: stored {stored} frames of each environment, not {chunks * frames_per_chunk - n_steps}")
        return 1

    print("step_count", ours[:]["step_count"][:, :5])
    print("next step_count", ours[:]["next", "step_count"][:, :5])
    print(f"stored: {ENVIRONMENTS * stored} frames in {chunks} extends, of which the buffer holds {len(ours)}")
    if n_steps == 1:
        print("nonterminal: compared with not done, as torchrl's is False everywhere for n_steps=1")
    inexact = len(INEXACT_KEYS)
    print(
        f"compared with torchrl {torchrl.__version__}: {ENVIRONMENTS * stored} frames, {len(keys)} keys each "
        f"({len(keys) - inexact} exactly, {inexact} within {ulps(n_steps)} float32 ulps): all equal"
    )
    return 0


def _buffer(transform: Transform, capacity: int) -> ReplayBuffer:
    return ReplayBuffer(storage=LazyTensorStorage(capacity, ndim=2), transform=transform)


def _rollouts(chunks: int, frames: int, seed: int) -> Iterator[TensorDictBase]:
    """Rollouts ``[ENVIRONMENTS, frames]`` under random actions, each going on where the last one stopped."""
    env = TransformedEnv(SerialEnv(ENVIRONMENTS, lambda: GymEnv(ENVIRONMENT)), StepCounter())
    try:
        env.set_seed(seed)
        torch.manual_seed(seed)
        start = env.reset()
        for _ in range(chunks):
            rollout = env.rollout(frames, break_when_any_done=False, auto_reset=False, tensordict=start)
            yield rollout
            # The reward is no part of a first frame: chunks of one frame would store it at the root, all but the first.
            start = rollout[..., -1]["next"].exclude("reward")
    finally:
        env.close()


def _store(buffer: ReplayBuffer, rollout: TensorDictBase) -> Tensor:
    """Extends the buffer; returns the rows that were written, one per time step, in the order of time."""
    indices: Tensor = buffer.extend(rollout.clone())
    return indices[::ENVIRONMENTS, 0]
