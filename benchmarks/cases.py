"""Cases: what is stored in a replay buffer, how much of it per call, and under which names.

A case is one call's worth of frames; its stream is that rollout again and again, each time rolled by one environment
and one frame, so that calls differ and need no memory of their own but for the frame they end with. What comes after a
frame is the observation of the next one, in a stream as in a rollout that follows itself, but at a done, where an
episode ends with an observation that no other frame has.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

try:
    import ale_py
except ImportError:
    ale_py = None

GAMMA = 0.99
ACTION_WIDTH = 6
PIXELS = (4, 84, 84)
PIXEL_SOURCE = "random bytes" if ale_py is None else "Pong"
"""What pixel observations show on this machine."""


class Case(NamedTuple):
    """One rollout ``[envs, frames]``; ``kind`` is the name of the set it belongs to."""

    kind: str
    envs: int
    frames: int
    p_done: float
    n_steps: int = 3
    width: int = 17
    """Elements of an observation: float32, of pixels uint8."""
    batch: int = 0
    """Transitions in a sample; 0: as many as the rollout has frames."""

    def __str__(self) -> str:
        batch = f"{self.batch} of " if self.batch else ""
        width = f"x{4 * self.width}B" if self.kind in ("rows", "sampling") else ""
        return f"{self.kind} {batch}{self.envs}x{self.frames}{width} p={self.p_done:g} n={self.n_steps}"

    def capacity(self, sampled: bool) -> int:
        """Frames per environment that a buffer holds.

        Two rollouts, and if windows are read there, no less than one; where ``batch`` is given, the rollout is as
        long as the ring.
        """
        if self.batch:
            return self.frames
        return max(2 * self.frames, self.n_steps + 1) if sampled else 2 * self.frames

    @property
    def sample_size(self) -> int:
        return self.batch or self.envs * self.frames

    @property
    def row_bytes(self) -> int:
        """Bytes of one observation."""
        return self.width * (1 if self.kind == "pixels" else 4)


P_DONE, N_STEPS = (0.0, 0.01, 0.1), (1, 3, 10, 50)
SHAPES = {
    "state": [(1, 64), (256, 64), (4096, 32), (1024, 128)],
    "streaming": [(4096, 1), (16384, 1)],
    "pixels": [(8, 64), (256, 16)],
}
ROW_WIDTHS = (1, 4, 16, 64, 256, 1024, 7056)
ROW_ELEMENTS = 1 << 22
"""Elements of all observations of a case of the row widths, 16 MiB."""
SAMPLED = [(1024, 64, 8192), (4096, 32, 32768)]
"""Environments, frames that a ring holds of each, and transitions in a sample."""

CASES = [
    Case(kind, *shape, p_done, n_steps, int(np.prod(PIXELS)) if kind == "pixels" else 17)
    for kind, shapes in SHAPES.items()
    for shape, n_steps, p_done in product(shapes, N_STEPS, P_DONE)
]
CASES += [Case("rows", max(ROW_ELEMENTS // (64 * width), 1), 64, 0.01, width=width) for width in ROW_WIDTHS]
CASES += [
    Case("sampling", envs, ring, 0.01, n_steps, width, batch)
    for (envs, ring, batch), width, n_steps in product(SAMPLED, (64, 100), (3, 8))
]

KINDS = tuple(dict.fromkeys(case.kind for case in CASES))

QUICK = [
    Case("state", 1, 64, 0.0),
    Case("state", 256, 64, 0.0),
    Case("state", 256, 64, 0.01),
    Case("state", 256, 64, 0.1),
    Case("state", 256, 64, 0.01, 1),
    Case("state", 256, 64, 0.01, 10),
    Case("streaming", 4096, 1, 0.01),
    Case("pixels", 8, 64, 0.01, width=int(np.prod(PIXELS))),
    Case("rows", 1024, 64, 0.01, width=1),
    Case("rows", 64, 64, 0.01, width=1024),
    Case("sampling", 256, 16, 0.01, 3, 64, 2048),
    Case("sampling", 256, 16, 0.01, 8, 100, 2048),
]
"""A few of every set, for a first look."""


def select(pattern: str, cases: list[Case]) -> list[Case]:
    """The cases whose name the regular expression is found in; "all" is all of them."""
    return [case for case in cases if pattern == "all" or re.search(pattern, str(case))]


@functools.cache
def pong_frames(count: int = 512) -> Tensor:
    """Screens of Pong under random actions, uint8 ``[count, 84, 84]``."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    game = ale_py.ALEInterface()
    game.setInt("random_seed", 0)
    game.loadROM(ale_py.roms.get_rom_path("pong"))
    actions, generator = game.getMinimalActionSet(), np.random.default_rng(0)
    screens = []
    for _ in range(count):
        game.act(generator.choice(actions))
        screens.append(torch.from_numpy(game.getScreenGrayscale()))
    resized = torch.nn.functional.interpolate(torch.stack(screens).float().unsqueeze(1), PIXELS[1:], mode="area")
    return resized.squeeze(1).byte()


def pixels(envs: int, frames: int, generator: torch.Generator) -> Tensor:
    """uint8 ``[envs, frames, 4, 84, 84]``: every environment plays on from another screen."""
    if ale_py is None:
        return torch.randint(256, (envs, frames, *PIXELS), dtype=torch.uint8, generator=generator)
    stacks = pong_frames().unfold(0, PIXELS[0], 1).movedim(-1, 1)
    start = torch.randint(len(stacks), (envs, 1), generator=generator)
    return stacks[(start + torch.arange(frames)) % len(stacks)]


def make_rollout(case: Case, device: torch.device | str = "cpu") -> TensorDict:
    """observation, action, next.observation, next.reward, done, terminated, truncated; one done in ten truncates."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.envs, case.frames)
    # One frame more is drawn, so that all that is drawn after it stays what it was.
    if case.kind == "pixels":
        observation = pixels(case.envs, case.frames + 1, generator)
    else:
        observation = torch.randn(case.envs, case.frames + 1, case.width, generator=generator)
    observation = observation[:, :-1].contiguous()
    done = torch.rand(*shape, 1, generator=generator) < case.p_done
    truncated = done & (torch.rand(*shape, 1, generator=generator) < 0.1)
    following = observation.roll(-1, 1)
    following[done[..., 0]] = -observation[done[..., 0]]
    return TensorDict(
        {
            "observation": observation,
            "action": torch.randn(*shape, ACTION_WIDTH, generator=generator),
            "next": {
                "observation": following,
                "reward": torch.randn(*shape, 1, generator=generator),
                "done": done,
                "terminated": done & ~truncated,
                "truncated": truncated,
            },
        },
        batch_size=shape,
    ).to(device)


class Stream:
    """Successive rollouts of a case, all different, whose first action element numbers the frames.

    Frame ``g`` of environment ``b`` has the number ``b * length + g``, a whole number that float32 holds. The last
    rollout is cut where the stream ends.
    """

    def __init__(self, rollout: TensorDict, length: int):
        self.length = length
        self.envs, self.frames = rollout.batch_size
        # Besides, of every environment, the frame with which each call ends: what comes after it is what the next call
        # begins with, elsewhere in the rollout.
        calls = torch.arange(-(-length // self.frames), device=rollout["action"].device)
        env = torch.arange(self.envs, device=calls.device).unsqueeze(-1)
        last = rollout[env, (-1 - calls) % self.frames]
        begin = rollout["observation"][(env - 1) % self.envs, (-1 - calls) % self.frames]
        following = last["next", "observation"]
        goes_on = ~last["next", "done"].view(*last.batch_size, *[1] * (begin.ndim - 2))
        last["next", "observation"] = torch.where(goes_on, begin, following)
        self.rollout = torch.cat((rollout, last), 1)

    def __iter__(self) -> Iterator[TensorDict]:
        rollout, last = self.rollout.split((self.frames, self.rollout.shape[1] - self.frames), 1)
        number = torch.arange(self.envs * self.length, dtype=torch.float32, device=rollout["action"].device)
        for call, numbers in enumerate(number.view(self.envs, self.length).split(self.frames, 1)):
            part = rollout.apply(lambda leaf, call=call: leaf.roll((call, call), (0, 1)))
            part[:, -1] = last[:, call].roll(call, 0)
            part = part[:, : numbers.shape[1]]
            part["action"][..., 0] = numbers
            yield part

    def source(self, env: np.ndarray, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in the rollout a frame of the stream lies."""
        call, frame = np.divmod(frame, self.frames)
        inside = (frame - call) % self.frames
        return (env - call) % self.envs, np.where(frame == self.frames - 1, self.frames + call, inside)
