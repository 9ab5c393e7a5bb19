"""A done flag for every agent: each agent's stream is what it would be alone."""

import pytest
import torch
from memory import addresses, storages
from rollouts import extend, make_rollout
from tensordict import NonTensorData, NonTensorStack, TensorDict

from multistep_triton import MultiStep, MultiStepTransform

pytestmark = pytest.mark.usefixtures("path")

FRAMES = 14
KEYS = {
    "reward_keys": [("agents", "reward")],
    "done_key": ("agents", "done"),
    "done_keys": [("agents", "done"), ("agents", "terminated"), "done"],
}


def rollout_of_agents(batch, agents, unsqueezed=True):
    """Rollouts ``[*batch, *agents, T]`` of single agents, and the same as one ``[*batch, T]`` of all."""
    alone = make_rollout((*batch, *agents), FRAMES)
    shared = make_rollout(batch, FRAMES, seed=1)
    shared["mask"] = torch.rand(*batch, FRAMES) < 0.9
    shared["traj"] = (torch.rand(*batch, FRAMES) < 0.1).cumsum(-1)
    for key in ("mask", "traj"):
        leaf = shared[key][(..., *[None] * len(agents), slice(None))]
        alone[key] = leaf.expand(*batch, *agents, FRAMES).clone()

    def together(leaf):
        return leaf.movedim(len(batch) + len(agents), len(batch)).contiguous()

    group = {key: together(alone["next", key]) for key in ("observation", "reward", "done", "terminated")}
    if not unsqueezed:
        group = {key: leaf if key == "observation" else leaf.squeeze(-1) for key, leaf in group.items()}
    data = shared.clone()
    del data["next", "reward"]
    data["agents"] = TensorDict({"observation": together(alone["observation"])}, [*batch, FRAMES])
    data["next", "agents"] = TensorDict(group, [*batch, FRAMES])
    return alone, data


@pytest.mark.parametrize(
    ("batch", "agents", "unsqueezed", "cuts", "n_steps"),
    [
        ((), (3,), True, [5, 1, 0, 8], 3),
        ((2,), (3,), False, [14], 1),
        ((2,), (1,), True, [7, 7], 2),
        ((2, 1), (2, 2), True, [12, 2], 3),
        ((2,), (2,), False, [12, 2], 9),
    ],
)
def test_every_agent_is_as_if_alone(batch, agents, unsqueezed, cuts, n_steps):
    alone, data = rollout_of_agents(batch, agents, unsqueezed)
    marks = {"traj_key": "traj", "done_at": "end"}
    out = extend(MultiStepTransform(n_steps, 0.9, **KEYS, **marks), data, cuts)
    expected = extend(MultiStepTransform(n_steps, 0.9, **marks), alone, cuts)

    def assert_agents(ours, of_each):
        together = of_each.movedim(len(batch) + len(agents), len(batch))
        assert torch.equal(ours.reshape(together.shape), together)

    for key in ("observation", "reward", "reward_orig", "done", "terminated", "done_orig", "terminated_orig"):
        assert_agents(out["next", "agents", key], expected["next", key])
    for key in ("steps_to_next_obs", "gamma", "nonterminal"):
        assert out[key].shape == out["next", "agents", "done"].shape
        assert_agents(out[key], expected[key])
    assert torch.equal(out["agents", "observation"], data["agents", "observation"].narrow(len(batch), 0, out.shape[-1]))
    # what is no agent's is governed by the flags above
    rest = data.exclude(("next", "agents"), "agents")
    rest["next", "reward"] = torch.zeros(*batch, FRAMES)
    dones = ["done", "terminated"]
    expected = extend(MultiStepTransform(n_steps, 0.9, done_keys=dones, **marks), rest, cuts)
    for key in ("observation", "done", "done_orig", "terminated"):
        assert torch.equal(out["next", key], expected["next", key]), key
    assert torch.equal(out["observation"], expected["observation"])


def test_what_no_flag_governs_ends_with_any_agent():
    _, data = rollout_of_agents((2,), (3,))
    for key in ("done", "terminated", "truncated"):
        del data["next", key]
    data["next", "agents", "shared"] = data["next", "observation"][..., :2].clone()
    out = MultiStep(0.9, 3, **KEYS, done_at="end")(data)
    alone = data.select("observation", ("next", "observation"))
    alone["next", "done"] = (data["next", "agents", "done"] | data["next", "agents", "terminated"]).flatten(2).any(-1)
    alone["next", "reward"] = torch.zeros(2, FRAMES)
    expected = MultiStep(0.9, 3)(alone)
    assert torch.equal(out["next", "observation"], expected["next", "observation"])
    assert torch.equal(out["next", "agents", "shared"], expected["next", "observation"][..., :2])


def test_memory_of_agents_is_compact_and_their_own():
    _, data = rollout_of_agents((2,), (3,))
    transform = MultiStepTransform(3, 0.9, **KEYS, traj_key="traj", match_reward_shape=True)
    outs = []
    for part in data.split(5, 1):
        part = part.clone()
        before = part.clone()
        outs.append(transform.inv(part))
        carry = transform._carry.leaves.values()
        assert all(leaf.untyped_storage().nbytes() == leaf.nbytes for leaf in carry)
        assert not addresses(carry) & storages(part, *outs)
        assert not storages(part) & storages(*outs)
        assert (part == before).all()
    outs.append(transform.flush())
    assert torch.equal(torch.cat(outs, 1)["observation"], data["observation"])


def test_a_postproc_of_agents():
    alone, data = rollout_of_agents((2,), (3,))
    out = MultiStep(0.9, 3, **KEYS, mask_key="mask", traj_key="traj", match_reward_shape=True)(data)
    expected = MultiStep(0.9, 3, mask_key="mask", traj_key="traj")(alone)
    assert torch.equal(out["next", "agents", "reward"], expected["next", "reward"].movedim(2, 1))
    assert torch.equal(out["steps_to_next_obs"].squeeze(-1), expected["steps_to_next_obs"].movedim(2, 1))
    assert out["observation"] is data["observation"]


def test_another_group_has_windows_of_its_own():
    def group(done):
        done = torch.tensor(done).t().unsqueeze(-1)
        number = torch.arange(1, 7).view(6, 1, 1).expand(6, 2, 1)
        return {"done": done, "reward": torch.ones(6, 2, 1), "observation": number}

    red = group([[False, True, False, False, False, False], [False] * 6])
    blue = group([[False] * 6] * 2)
    data = TensorDict({"next": {"red": red, "blue": blue}}, [6])
    rewards = [("red", "reward"), ("blue", "reward")]
    dones = [("red", "done"), ("blue", "done")]
    out = MultiStepTransform(3, 0.5, reward_keys=rewards, done_key=("red", "done"), done_keys=dones).inv(data)
    red, blue = (out["next", group] for group in ("red", "blue"))
    assert red["reward"].squeeze(-1).tolist() == [[1.5, 1.75], [1, 1.75], [1.75, 1.75]]
    assert blue["reward"].squeeze(-1).tolist() == [[1.75, 1.75]] * 3
    assert blue["observation"].squeeze(-1).tolist() == [[3, 3], [4, 4], [5, 5]]
    # of the done key's group at the root, of the other under its name
    assert out["steps_to_next_obs"].squeeze(-1).tolist() == [[2, 3], [1, 3], [3, 3]]
    assert out["blue", "steps_to_next_obs"].squeeze(-1).tolist() == [[3, 3]] * 3
    assert out["blue", "gamma"].squeeze(-1).tolist() == [[0.125, 0.125]] * 3
    assert out["blue", "nonterminal"].all() and out.get("red", None) is None


def test_non_tensors_of_agents():
    _, data = rollout_of_agents((2,), (3,))
    data["next", "agents"].batch_size = (2, FRAMES, 3)
    names = NonTensorStack(*(NonTensorData(str(i)) for i in range(2 * FRAMES * 3))).view(2, FRAMES, 3)
    data["next", "agents"].set("name", names)
    out = MultiStepTransform(3, 0.9, **KEYS).inv(data)
    ends = torch.arange(FRAMES - 3).view(-1, 1) + out["steps_to_next_obs"].squeeze(-1) - 1
    numbers = (torch.arange(2).view(2, 1, 1) * FRAMES + ends) * 3 + torch.arange(3)
    assert out["next", "agents"].get("name").tolist() == [
        [[str(i) for i in row] for row in env] for env in numbers.tolist()
    ]
