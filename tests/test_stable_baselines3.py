"""Beside stable-baselines3's n-step replay buffer, on the same stream."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from rollouts import make_rollout
from stable_baselines3.common.buffers import NStepReplayBuffer

from multistep_triton import MultiStepTransform

GAMMA = 0.9


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n_steps", [1, 3, 7])
def test_stable_baselines3_agrees(n_steps, seed):
    frames, envs = 120, 3
    rollout = make_rollout((envs,), frames, seed=seed)
    # both at once is a termination to torchrl, and a timeout to stable-baselines3
    rollout["next", "truncated"] &= ~rollout["next", "terminated"]
    transform = MultiStepTransform(n_steps, GAMMA, done_at="end")
    ours = torch.cat([transform.inv(part) for part in rollout.split(40, 1)] + [transform.flush()], 1)
    assert ours.batch_size == (envs, frames)
    for env in range(envs):
        peer = NStepReplayBuffer(
            frames + 1,
            spaces.Box(-np.inf, np.inf, (3,)),
            spaces.Discrete(5),
            device="cpu",
            n_envs=1,
            n_steps=n_steps,
            gamma=GAMMA,
        )
        for frame in rollout[env]:
            following = frame["next"]
            peer.add(
                frame["observation"].numpy(),
                following["observation"].numpy(),
                frame["action"].numpy(),
                following["reward"].numpy(),
                following["done"].numpy(),
                [{"TimeLimit.truncated": following["truncated"].item()}],
            )
        samples, mine = peer._get_samples(np.arange(frames)), ours[env]
        eps = torch.finfo(torch.float32).eps
        # both sum in float32, in different orders
        magnitude = n_steps * rollout["next", "reward"].abs().max()
        assert ((samples.rewards - mine["next", "reward"]).abs() <= 3 * n_steps * eps * magnitude).all()
        assert torch.equal(samples.next_observations, mine["next", "observation"])
        assert torch.equal(samples.observations, mine["observation"])
        assert torch.equal(samples.actions.flatten(), mine["action"])
        assert torch.equal(samples.dones.bool(), mine["next", "terminated"])
        # stable-baselines3 rounds gamma to float32 before it raises it
        steps = mine["steps_to_next_obs"].unsqueeze(-1)
        assert ((samples.discounts - mine["gamma"].unsqueeze(-1)).abs() <= (steps + 1) * eps).all()
