"""stable-baselines3's n-step replay buffer, fed with the same stream as ours and compared with it."""

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer


def without_both(stream):
    """Both flags at once are a termination to torchrl, and a timeout to stable-baselines3."""
    stream["next", "truncated"] &= ~stream["next", "terminated"]
    return stream


class Peers:
    """A buffer for every environment, as theirs samples environments at random."""

    def __init__(self, envs, **arguments):
        box, actions = spaces.Box(-np.inf, np.inf, (3,)), spaces.Discrete(5)
        self.of = [
            NStepReplayBuffer(observation_space=box, action_space=actions, device="cpu", n_envs=1, **arguments)
            for _ in range(envs)
        ]

    def add(self, data):
        for peer, row in zip(self.of, data, strict=True):
            for frame in row:
                following = frame["next"]
                peer.add(
                    frame["observation"].numpy(),
                    following["observation"].numpy(),
                    frame["action"].numpy(),
                    following["reward"].numpy(),
                    following["done"].numpy(),
                    [{"TimeLimit.truncated": following["truncated"].item()}],
                )

    def assert_agrees(self, env, places, ours, largest):
        """What lies at these places is what ours says, of rewards no larger than the largest."""
        peer = self.of[env]
        theirs = peer._get_samples(places)
        eps, n_steps = torch.finfo(torch.float32).eps, peer.n_steps
        assert torch.equal(theirs.observations, ours["observation"])
        assert torch.equal(theirs.actions.flatten(), ours["action"])
        # Both sum in float32, perhaps in different orders.
        assert ((theirs.rewards - ours["next", "reward"]).abs() <= 3 * n_steps * eps * n_steps * largest).all()
        assert torch.equal(theirs.next_observations, ours["next", "observation"])
        assert torch.equal(theirs.dones.bool(), ours["next", "terminated"])
        # stable-baselines3 rounds gamma to float32 before it raises it.
        steps = ours["steps_to_next_obs"].unsqueeze(-1)
        assert ((theirs.discounts - ours["gamma"].unsqueeze(-1)).abs() <= (steps + 1) * eps).all()
