"""Beside stable-baselines3's n-step replay buffer, on the same stream."""

import numpy as np
import pytest
import torch
from baselines import Peers, without_both
from rollouts import make_rollout

from multistep_triton import MultiStepTransform

GAMMA = 0.9


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n_steps", [1, 3, 7])
def test_stable_baselines3_agrees(n_steps, seed):
    frames, envs = 120, 3
    rollout = without_both(make_rollout((envs,), frames, seed=seed))
    transform = MultiStepTransform(n_steps, GAMMA, done_at="end")
    ours = torch.cat([transform.inv(part) for part in rollout.split(40, 1)] + [transform.flush()], 1)
    assert ours.batch_size == (envs, frames)
    peers = Peers(envs, buffer_size=frames + 1, n_steps=n_steps, gamma=GAMMA)
    peers.add(rollout)
    for env in range(envs):
        peers.assert_agrees(env, np.arange(frames), ours[env], rollout["next", "reward"].abs().max())
