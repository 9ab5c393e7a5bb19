"""Other ways to n-step transitions: replay buffers that store single steps and look ahead when they are sampled."""

from __future__ import annotations

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from tensordict import TensorDict

from benchmarks.cases import ACTION_WIDTH, GAMMA, Case


class StableBaselines3:
    """stable-baselines3's buffer, which is filled frame by frame with NumPy arrays ``[envs, ...]``."""

    def __init__(self, case: Case):
        self.buffer = NStepReplayBuffer(
            case.capacity(True) * case.envs,
            spaces.Box(-np.inf, np.inf, (case.width,)),
            spaces.Box(-np.inf, np.inf, (ACTION_WIDTH,)),
            device="cpu",
            n_envs=case.envs,
            n_steps=case.n_steps,
            gamma=GAMMA,
        )

    def store_and_sample(self, rollout: TensorDict) -> ReplayBufferSamples:
        observation, action = rollout["observation"].numpy(), rollout["action"].numpy()
        following = rollout["next"]
        later, reward = following["observation"].numpy(), following["reward"].squeeze(-1).numpy()
        done, truncated = following["done"].squeeze(-1).numpy(), following["truncated"].squeeze(-1).t().tolist()
        for t, flags in enumerate(truncated):
            infos = [{"TimeLimit.truncated": flag} for flag in flags]
            self.buffer.add(observation[:, t], later[:, t], action[:, t], reward[:, t], done[:, t], infos)
        return self.buffer.sample(rollout.numel())

    @staticmethod
    def transitions(samples: ReplayBufferSamples) -> TensorDict:
        return TensorDict(
            {
                "observation": samples.observations,
                "action": samples.actions,
                "gamma": samples.discounts,
                "next": {
                    "observation": samples.next_observations,
                    "reward": samples.rewards,
                    "terminated": samples.dones.bool(),
                },
            },
            batch_size=len(samples.actions),
        )


class VectorizedRing:
    """A ring of single steps per environment, ``[envs, ring, ...]``, sampled with tensor operations alone.

    It samples as FastTD3's replay buffer is described to (https://arxiv.org/abs/2505.22642): of n consecutive frames,
    rewards count as long as no frame before them was done, and the next observation is that of the first done, or
    of the last frame. The newest frame counts as truncated, as the oldest one follows it in the ring. Unlike the
    original it stores a whole rollout per call.
    """

    def __init__(self, case: Case, device: torch.device):
        self.n_steps, self.size, self.stored = case.n_steps, case.capacity(True), 0
        self.frames: TensorDict | None = None
        self.offsets = torch.arange(case.n_steps, device=device)
        self.discounts = GAMMA ** self.offsets.float()

    def store(self, rollout: TensorDict) -> None:
        envs, frames = rollout.batch_size
        if self.frames is None:
            self.frames = rollout.new_zeros((envs, self.size))
        slot = self.stored % self.size
        length = min(frames, self.size - slot)
        self.frames[:, slot : slot + length] = rollout[:, :length]
        self.frames[:, : frames - length] = rollout[:, length:]
        self.stored += frames

    def sample(self, batch: int) -> TensorDict:
        ring = self.frames
        env = torch.randint(ring.shape[0], (batch,), device=self.offsets.device)
        start = torch.randint(min(self.stored, self.size), (batch,), device=self.offsets.device)
        slots = (start.unsqueeze(-1) + self.offsets) % self.size
        following = ring["next"]
        last = slots == (self.stored - 1) % self.size
        ended = following["done"].squeeze(-1)[env.unsqueeze(-1), slots] | last
        counts = (~ended).float().cumprod(-1).roll(1, -1)
        counts[:, 0] = 1.0
        rewards = following["reward"].squeeze(-1)[env.unsqueeze(-1), slots]
        steps = counts.sum(-1).long()
        end = (start + steps - 1) % self.size
        at_end = following.select("observation", "done", "truncated")[env, end]
        at_end["reward"] = (rewards * counts * self.discounts).sum(-1, keepdim=True)
        transitions = ring.select("observation", "action")[env, start]
        return transitions.update({"steps_to_next_obs": steps, "next": at_end})

    def store_and_sample(self, rollout: TensorDict) -> TensorDict:
        self.store(rollout)
        return self.sample(rollout.numel())
