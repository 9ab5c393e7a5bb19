"""A pendulum to swing up, after Gymnasium's Pendulum-v1: thousands of them in one tensor, on any device.

Owns the environment. May import torch, tensordict and torchrl.
"""

from __future__ import annotations

import math

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

GRAVITY, MASS, LENGTH = 10.0, 1.0, 1.0
SECONDS = 0.05
MAX_TORQUE, MAX_SPEED = 2.0, 8.0
MAX_STEPS = 200


class PendulumEnv(EnvBase):
    """Pendulums that step together and are reset one by one.

    With the angle ``a`` (0 is upright), the speed ``v`` and the torque ``u``:

    .. math::
        reward = -(wrap(a)^2 + 0.1 v^2 + 0.001 u^2), \\quad
        v' = clip(v + (\\tfrac{3 g}{2 l} sin(a) + \\tfrac{3}{m l^2} u) dt, -8, 8), \\quad a' = a + v' dt

    An episode never terminates; after ``max_steps`` steps it is truncated. A reset draws the angle from [-pi, pi) and
    the speed from [-1, 1). The host is not needed for any of it: torchrl alone asks, once per step, whether any
    environment is done.

    Args:
        num_envs: the batch size is ``[num_envs]``.

    Keyword Args:
        max_steps: the time limit of an episode.
        staggered: whether a reset of all environments draws how many steps each has behind it, so that they do not
            come to their time limit all at once. Defaults to False.
        seed: of the resets; None takes it from torch's default generator.
        device: of all tensors; an environment stays on the device that it was made for.
        dtype: of the state, observations, actions and rewards.

    Attributes:
        angle, speed: the state, ``[num_envs]``.
        steps: how many steps of its episode each environment has behind it, int64 ``[num_envs]``.
    """

    def __init__(
        self,
        num_envs: int,
        *,
        max_steps: int = MAX_STEPS,
        staggered: bool = False,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(device=device, batch_size=[num_envs])
        self.max_steps = max_steps
        self.staggered = staggered
        one = torch.ones(num_envs, 1, device=self.device, dtype=dtype)
        most = torch.tensor([1.0, 1.0, MAX_SPEED], device=self.device, dtype=dtype).expand(num_envs, 3)
        self.observation_spec = Composite(
            observation=Bounded(-most, most, device=self.device, dtype=dtype), shape=[num_envs], device=self.device
        )
        self.action_spec = Bounded(-MAX_TORQUE * one, MAX_TORQUE * one, device=self.device, dtype=dtype)
        self.reward_spec = Unbounded([num_envs, 1], device=self.device, dtype=dtype)
        flags = {
            name: Binary(1, shape=[num_envs, 1], device=self.device, dtype=torch.bool)
            for name in ("done", "terminated", "truncated")
        }
        self.done_spec = Composite(flags, shape=[num_envs], device=self.device)
        self.angle, self.speed = torch.zeros(2, num_envs, device=self.device, dtype=dtype)
        self.steps = torch.zeros(num_envs, device=self.device, dtype=torch.int64)
        self.set_seed(seed)

    def _set_seed(self, seed: int | None) -> None:
        seed = int(torch.randint(1 << 62, ())) if seed is None else seed
        self._generator = torch.Generator(self.device).manual_seed(seed)

    def _reset(self, tensordict: TensorDictBase | None = None) -> TensorDict:
        chosen = None if tensordict is None else tensordict.get("_reset", None)
        unit = 2 * torch.rand(2, *self.batch_size, generator=self._generator, **self._kind()) - 1
        angle, speed, steps = math.pi * unit[0], unit[1], torch.zeros_like(self.steps)
        if chosen is not None:
            chosen = chosen.squeeze(-1)
            angle = torch.where(chosen, angle, self.angle)
            speed = torch.where(chosen, speed, self.speed)
            steps = torch.where(chosen, steps, self.steps)
        elif self.staggered:
            steps = torch.randint(self.max_steps, steps.shape, generator=self._generator, device=self.device)
        self.angle, self.speed, self.steps = angle, speed, steps
        return self._tensordict(truncated=torch.zeros_like(steps, dtype=torch.bool))

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        angle, speed = self.angle, self.speed
        torque = tensordict["action"].squeeze(-1).clamp(-MAX_TORQUE, MAX_TORQUE)
        wrapped = (angle + math.pi) % (2 * math.pi) - math.pi
        reward = -(wrapped**2 + 0.1 * speed**2 + 0.001 * torque**2)
        acceleration = 3 * GRAVITY / (2 * LENGTH) * angle.sin() + 3 / (MASS * LENGTH**2) * torque
        self.speed = (speed + acceleration * SECONDS).clamp(-MAX_SPEED, MAX_SPEED)
        self.angle = angle + self.speed * SECONDS
        self.steps = self.steps + 1
        return self._tensordict(truncated=self.steps >= self.max_steps).set("reward", reward.unsqueeze(-1))

    def _tensordict(self, truncated: Tensor) -> TensorDict:
        truncated = truncated.unsqueeze(-1)
        return TensorDict(
            {
                "observation": torch.stack([self.angle.cos(), self.angle.sin(), self.speed], -1),
                "done": truncated,
                "terminated": torch.zeros_like(truncated),
                "truncated": truncated.clone(),
            },
            batch_size=self.batch_size,
            device=self.device,
        )

    def _kind(self) -> dict[str, torch.device | torch.dtype]:
        return {"device": self.angle.device, "dtype": self.angle.dtype}
