"""Targets and losses of torchrl's own that bootstrap from n-step transitions."""

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.modules import DistributionalQValueActor
from torchrl.objectives import DistributionalDQNLoss, HardUpdate
from torchrl.objectives.value import TD0Estimator

GAMMA = 0.9
ATOMS = 11


class Constant(torch.nn.Module):
    """A value of 100, or another, for everything."""

    def __init__(self, features, value=100.0):
        super().__init__()
        self.value = torch.nn.Parameter(torch.full((features,), value))

    def forward(self, observation, *others):
        return self.value.expand(*observation.shape[: observation.ndim - 1], -1)


def td0_targets(
    data, *, reward="reward", done="done", terminated="terminated", observation="observation", value="value"
):
    network = TensorDictModule(Constant(1), in_keys=[observation], out_keys=[value])
    estimator = TD0Estimator(gamma=GAMMA, value_network=network)
    estimator.set_keys(reward=reward, done=done, terminated=terminated, value=value)
    return estimator.value_estimate(data)


def row(count, *, terminated=(), truncated=()):
    ends = {
        name: torch.tensor([t in frames for t in range(count)]).unsqueeze(-1)
        for name, frames in (("terminated", terminated), ("truncated", truncated))
    }
    return TensorDict(
        {
            "observation": torch.zeros(count, 3),
            "next": {
                "observation": torch.zeros(count, 3),
                "reward": torch.ones(count, 1),
                "done": ends["terminated"] | ends["truncated"],
                **ends,
            },
        },
        [count],
    )


def distributional_loss(actions=2):
    network = torch.nn.Sequential(torch.nn.Linear(3, ATOMS * actions), torch.nn.Unflatten(-1, (ATOMS, actions)))
    support = torch.linspace(-10, 10, ATOMS)
    module = TensorDictModule(network, in_keys=["observation"], out_keys=["action_value"])
    actor = DistributionalQValueActor(module, spec=None, support=support, action_space="categorical")
    loss = DistributionalDQNLoss(actor, gamma=GAMMA, delay_value=True)
    HardUpdate(loss, value_network_update_interval=1)
    return loss


def assert_every_frame_has_its_own_discount(loss, data):
    """The loss of all is the mean of each one's: among its like, a frame can only have its own discount."""
    whole = loss(data)["loss"]
    each = [loss(torch.stack([frame] * ATOMS))["loss"] for frame in data]
    torch.testing.assert_close(whole, torch.stack(each).mean())
