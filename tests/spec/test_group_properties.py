"""Every group with flags of its own is what it would be alone, extended and sampled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import EITHER, kernels
from rings import everything, in_order, make_buffer
from rollouts import make_rollout
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement

from multistep_triton import MultiStep, MultiStepTransform, NStepReplayBuffer

GROUPS = {"red": (), "blue": (3,), "green": (2, 2)}


def herd(batch, count, names, seed):
    """A rollout of groups, each with flags of its own, and the rollouts that each would be alone."""
    data = make_rollout(batch, count, seed=seed)
    data["traj"] = (torch.rand(*batch, count) < 0.1).cumsum(-1)
    alone = {}
    for i, name in enumerate(names):
        agents = GROUPS[name]
        each = make_rollout((*batch, *agents), count, seed=seed + i + 1)
        alone[name] = each
        time_dim = len(batch) + len(agents)
        together = {key: leaf.movedim(time_dim, len(batch)).contiguous() for key, leaf in each["next"].items()}
        data["next", name] = TensorDict(together, [*batch, count])
        marks = data["traj"][(..., *[None] * len(agents), slice(None))]
        each["traj"] = marks.expand(*batch, *agents, count).clone()
    return data, alone


def compare(out, alone, names, dims, primary):
    for name in names:
        time_dim = dims + len(GROUPS[name])
        for key in ("observation", "reward_orig", "done", "done_orig", "truncated"):
            assert torch.equal(out["next", name, key], alone[name]["next", key].movedim(time_dim, dims)), (name, key)
        torch.testing.assert_close(out["next", name, "reward"], alone[name]["next", "reward"].movedim(time_dim, dims))
        windows = out if name == primary else out[name]
        for key in ("steps_to_next_obs", "gamma", "nonterminal"):
            expected = alone[name][key].movedim(time_dim, dims)
            assert torch.equal(windows[key].reshape(expected.shape), expected), (name, key)


HERDS = st.tuples(
    st.sampled_from([(), (2,), (2, 1)]),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(1, 5),
    st.sets(st.sampled_from([*GROUPS]), min_size=1),
    st.sampled_from([None, *GROUPS]),
    st.integers(0, 2**16),
)


def check_every_group_is_as_if_alone(batch, cuts, n_steps, names, primary, seed):
    names = sorted(names)
    primary = primary if primary in names else None
    data, alone = herd(batch, sum(cuts), names, seed)
    keys = {
        "reward_keys": ["reward", *((name, "reward") for name in names)],
        "done_keys": [key for name in [None, *names] for key in dones(name)],
        "done_key": dones(primary)[0],
        "done_at": "end",
        "traj_key": "traj",
    }

    def all_of(transform, rollout):
        out = [transform.inv(part) for part in rollout.split(cuts, len(batch))] + [transform.flush()]
        return torch.cat([part for part in out if part is not None], len(batch))

    out = all_of(MultiStepTransform(n_steps, 0.9, **keys), data)
    own = {"done_at": "end", "traj_key": "traj"}
    expected = {name: all_of_alone(n_steps, alone[name], cuts, own) for name in names}
    compare(out, expected, names, len(batch), primary)
    rest = all_of_alone(n_steps, data.exclude(*(("next", name) for name in names)), cuts, own)
    for key in ("observation", "reward_orig", "done", "done_orig"):
        assert torch.equal(out["next", key], rest["next", key]), key
    torch.testing.assert_close(out["next", "reward"], rest["next", "reward"])
    if primary is None:
        assert torch.equal(out["steps_to_next_obs"], rest["steps_to_next_obs"])


def dones(name):
    keys = ("done", "terminated", "truncated")
    return [key if name is None else (name, key) for key in keys]


def all_of_alone(n_steps, rollout, cuts, own):
    time_dim = rollout.ndim - 1
    transform = MultiStepTransform(n_steps, 0.9, backend="reference", **own)
    out = [transform.inv(part) for part in rollout.split(cuts, time_dim)] + [transform.flush()]
    return torch.cat([part for part in out if part is not None], time_dim)


@settings(max_examples=settings().max_examples // 4)
@given(HERDS)
def test_every_group_is_as_if_alone(herd):
    check_every_group_is_as_if_alone(*herd)


@settings(max_examples=settings().max_examples // 40)
@given(HERDS)
def test_every_group_is_as_if_alone_with_the_kernels(herd):
    with kernels():
        check_every_group_is_as_if_alone(*herd)


@EITHER
@pytest.mark.parametrize("primary", [None, "red", "blue"])
@pytest.mark.parametrize("n_steps", [1, 3, 9])
def test_groups_that_are_sampled(n_steps, primary, where):
    names = ["red", "blue"]
    data, alone = herd((2,), 20, names, 0)
    data["number"] = torch.arange(40).view(2, 20)
    keys = {
        "reward_keys": ["reward", *((name, "reward") for name in names)],
        "done_keys": [key for name in [None, *names] for key in dones(name)],
        "done_key": dones(primary)[0],
        "traj_key": "traj",
    }
    buffer = make_buffer(12, (2,), n_steps=n_steps, **keys)
    for part in data.split([12, 8], 1):
        buffer.extend(part)
    sample = in_order(everything(buffer))
    # the last frames of a rollout are those of a ring
    expected = {
        name: MultiStep(0.9, n_steps, traj_key="traj", done_at="end", backend="reference")(alone[name])
        for name in names
    }
    expected[None] = MultiStep(0.9, n_steps, traj_key="traj", done_at="end", backend="reference")(
        data.exclude(*(("next", name) for name in names))
    )
    for name in (None, *names):
        group, time_dim = (name,) if name else (), 1 + len(GROUPS.get(name, ()))
        theirs = (
            expected[name].movedim(time_dim, 1)[:, 8:].flatten(0, 1)
            if time_dim > 1
            else expected[name][:, 8:].flatten()
        )
        for key in ("observation", "done", "done_orig", "truncated"):
            assert torch.equal(sample[("next", *group, key)], theirs["next", key]), (name, key)
        torch.testing.assert_close(sample[("next", *group, "reward")], theirs["next", "reward"])
        if name == primary or name:
            windows = sample if name == primary else sample[name]
            for key in ("steps_to_next_obs", "gamma", "nonterminal"):
                assert torch.equal(windows[key].reshape(theirs[key].shape), theirs[key]), (name, key)


def test_groups_that_draw_their_own_n():
    data, _ = herd((2,), 20, ["blue"], 0)
    for key in dones(None) + dones("blue"):
        data[("next", *((key,) if isinstance(key, str) else key))].zero_()
    buffer = make_buffer(20, (2,), n_steps=(2, 4), reward_keys=["reward", ("blue", "reward")])
    buffer.extend(data)
    sample = everything(buffer)
    steps, own = sample["steps_to_next_obs"], sample["blue", "steps_to_next_obs"]
    assert set(steps.tolist()) == {1, 2, 3, 4}
    # a frame draws one n for all of its groups and agents
    assert torch.equal(own, steps.view(-1, 1, 1).expand_as(own))


BACKENDS = "triton", "reference"
MARKS = {
    "ids in a column": lambda mask, ids: (mask, torch.stack([ids, ids * 0], -1)[..., 0]),
    "every other mask": lambda mask, ids: (mask.repeat_interleave(2, -1)[..., ::2], ids),
    "a mask for all environments": lambda mask, ids: (mask[:1].expand_as(mask), ids),
    "a mask and ids for all of the outer ones": lambda mask, ids: tuple(
        each[:1].expand_as(each) for each in (mask, ids)
    ),
    "a mask and ids for all of the inner ones": lambda mask, ids: tuple(
        each[:, :1].expand_as(each) for each in (mask, ids)
    ),
}


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("lie", MARKS.values(), ids=MARKS)
@kernels()
def test_masks_and_ids_of_agents_that_lie_in_other_ways(lie, time_major):
    """Than each other, and than what they are beside: on the kernels, which read one for all agents where it lies."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(3)
    batch, agents, frames = (2, 3), 2, 8

    def lay(leaf):
        return leaf.movedim(2, 0).contiguous().movedim(0, 2) if time_major else leaf

    mask, ids = lie(torch.rand(*batch, frames, generator=generator) < 0.7, torch.arange(frames).expand(*batch, -1) // 3)
    group = {
        "reward": lay(torch.randint(9, (*batch, frames, agents, 1), generator=generator).float()),
        "done": lay(torch.rand(*batch, frames, agents, 1, generator=generator) < 0.1),
        "observation": lay(torch.rand(*batch, frames, agents, 5, generator=generator)),
    }
    data = {"mask": lay(mask) if time_major else mask, "next": {"agents": group}}
    data = TensorDict({**data, "collector": {"traj_ids": lay(ids) if time_major else ids}}, [*batch, frames])
    keys = {"reward_keys": [("agents", "reward")], "done_key": ("agents", "done"), "done_keys": [("agents", "done")]}
    out, expected = (MultiStep(0.5, 3, backend=each, mask_key="mask", **keys)(data) for each in BACKENDS)
    assert (out == expected).all()
    ours, others = (MultiStepTransform(3, 0.5, backend=each, **keys) for each in BACKENDS)
    for part in data.split([4, 1, 3], -1):
        out, expected = ours.inv(part), others.inv(part)
        assert (out is None) == (expected is None)
        assert out is None or (out == expected).all()


@pytest.mark.parametrize("backend", BACKENDS)
@kernels()
def test_what_agents_share_ends_where_any_does_when_it_is_sampled(backend):
    frames, done = 8, torch.zeros(8, 2, 1, dtype=torch.bool)
    done[3, 1] = True
    team = {"reward": torch.arange(8.0), "done": done, "observation": torch.arange(8)}
    mask = torch.ones(frames, dtype=torch.bool)
    mask[6] = False
    root = {"reward": torch.arange(8.0), "done": torch.zeros(8, dtype=torch.bool)}
    data = TensorDict({"mask": mask, "next": {**root, "team": team}}, [frames])
    keys = {"reward_keys": ["reward", ("team", "reward")], "done_keys": ["done", ("team", "done")]}
    buffer = NStepReplayBuffer(
        n_steps=3,
        gamma=0.5,
        storage=LazyTensorStorage(frames, device=torch.get_default_device()),
        sampler=SamplerWithoutReplacement(shuffle=False),
        backend=backend,
        **keys,
    )
    buffer.extend(data)
    out = buffer.sample(frames)["team"]
    # Frame 3 is done for an agent, frame 6 is padding, which follows frame 5, and frame 7 is the newest.
    assert out["nonterminal"].tolist() == [True, True, True, False, True, False, False, False]
    assert out["steps_to_next_obs"].tolist() == [3, 3, 2, 1, 2, 1, 1, 1]
    expected = MultiStep(0.5, 3, backend="reference", mask_key="mask", **keys)(data)["team"]
    assert torch.equal(out["nonterminal"], expected["nonterminal"])
    assert torch.equal(out["steps_to_next_obs"], expected["steps_to_next_obs"])
