"""Which flags end which windows: all done keys beside one another, and those of every group for itself."""

import pytest
import torch
from rings import everything, make_buffer
from rollouts import extend, frames
from tensordict import NonTensorData, NonTensorStack, TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer

from multistep_triton import MultiStep, MultiStepTransform

pytestmark = pytest.mark.usefixtures("path")

T, F = True, False
# A time limit after frame 3, which ``done`` does not hold.
LIMIT = [F, F, F, T, F, F, F, F]
RETURNS, AHEAD, STEPS = [3, 6, 5, 3, 15, 18, 13, 7], [3, 4, 4, 4, 7, 8, 8, 8], [3, 3, 2, 1, 3, 3, 2, 1]


def flags(values, shape=(-1, 1)):
    return torch.tensor(values).view(shape)


def timed_out(done=None, **others):
    data = frames([float(t) for t in range(8)], [F] * 8 if done is None else done)
    data["next"].update({key: flags(value) for key, value in others.items()})
    return data


# How a time limit may be written.
ENDS = {
    "truncated alone": {"truncated": LIMIT, "terminated": [F] * 8},
    "terminated alone": {"terminated": LIMIT},
    "all agree": {"done": LIMIT, "truncated": LIMIT},
    "done alone": {"done": LIMIT},
}


@pytest.mark.parametrize("ends", ENDS)
def test_any_done_key_ends_windows(ends):
    data = timed_out(**ENDS[ends])
    out = MultiStep(1.0, 3)(data)
    sample = make_buffer(8, n_steps=3, gamma=1.0)
    sample.extend(data)
    for each in (out, everything(sample)):
        assert each["next", "reward"].flatten().tolist() == RETURNS
        assert each["next", "observation"].tolist() == AHEAD
        assert each["steps_to_next_obs"].tolist() == STEPS
        assert each["nonterminal"].tolist() == [not end for end in LIMIT[:-1]] + [F]


def test_any_done_key_ends_windows_at_the_seam_of_calls():
    data = timed_out(truncated=LIMIT)
    for cuts in ([4, 4], [1] * 8, [2, 3, 3]):
        transform = MultiStepTransform(3, 1.0, done_at="end")
        out = torch.cat([part for part in (extend(transform, data, cuts), transform.flush()) if part is not None])
        assert out["next", "reward"].flatten().tolist() == RETURNS
        assert out["next", "truncated"].flatten().tolist() == [F, T, T, T, F, F, F, F]
        assert out["next", "truncated_orig"].flatten().tolist() == LIMIT
        assert not out["next", "done"].any()


def test_what_is_no_done_key_or_of_another_shape_ends_nothing():
    full = [3, 6, 9, 12, 15, 18, 13, 7]
    data = timed_out(truncated=LIMIT)
    assert MultiStep(1.0, 3, done_keys=["done"])(data)["next", "reward"].flatten().tolist() == full
    data["next", "truncated"] = data["next", "truncated"].squeeze(-1)
    assert MultiStep(1.0, 3)(data)["next", "reward"].flatten().tolist() == full


def test_a_done_key_that_is_no_flag():
    data = timed_out(truncated=LIMIT)
    data["next", "truncated"] = data["next", "truncated"].float()
    for build in (lambda: MultiStep(1.0, 3)(data), lambda: make_buffer(8).extend(data)):
        with pytest.raises(TypeError, match=r"done \('next', 'truncated'\) must be bool, got torch.float32"):
            build()
    data["next", "truncated"] = NonTensorStack(*(NonTensorData("no") for _ in range(8)))
    with pytest.raises(TypeError, match=r"\('next', 'truncated'\), named by done_keys, must be a tensor"):
        MultiStep(1.0, 3)(data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_what_is_called_like_a_flag_and_is_none(dtype):
    """Brax's state has a ``done`` of floats, which ends nothing and comes from the window's end."""
    data, t = timed_out(truncated=LIMIT), torch.arange(8, dtype=dtype)
    data["next", "state"] = TensorDict({"done": t, "pipeline": {"terminated": t.view(8, 1)}}, [8])
    buffer = make_buffer(8, n_steps=3, gamma=1.0)
    buffer.extend(data)
    for out in (MultiStep(1.0, 3)(data), everything(buffer)):
        assert out["next", "reward"].flatten().tolist() == RETURNS
        assert out["next", "state", "done"].tolist() == [t - 1 for t in AHEAD]
        assert out["next", "state", "pipeline", "terminated"].flatten().tolist() == [t - 1 for t in AHEAD]
    # and may come late
    buffer.extend(timed_out(truncated=LIMIT).set(("next", "state"), data["next", "state"].clone()))


# Groups


def lives(end):
    """One of two groups, whose life ends at frame ``end`` and begins anew."""
    t = torch.arange(6.0).view(6, 1, 1)
    return TensorDict({"observation": t + 1, "reward": t + 1, "done": t == end, "terminated": t == end}, [6, 1])


def cats_and_mice(**more):
    never = torch.zeros(6, 1, dtype=torch.bool)
    group = {"cats": lives(2), "mice": lives(3)}
    return TensorDict({"next": {**group, "done": never, "terminated": never.clone(), **more}}, [6])


REWARDS = [("cats", "reward"), ("mice", "reward")]
DONES = ["done", "terminated", *((group, key) for group in ("cats", "mice") for key in ("done", "terminated"))]
EXPECTED = {
    "cats": ([6, 5, 3, 15, 11, 6], [3, 3, 3, 6, 6, 6], [3, 2, 1, 3, 2, 1]),
    "mice": ([6, 9, 7, 4, 11, 6], [3, 4, 4, 4, 6, 6], [3, 3, 2, 1, 2, 1]),
}


@pytest.mark.parametrize("done_keys", [DONES, None], ids=["named", "by default"])
@pytest.mark.parametrize("done_key", ["done", ("cats", "done"), ("mice", "done")], ids=str)
def test_two_groups_with_flags_of_their_own(done_key, done_keys):
    keys = {"reward_keys": REWARDS, "done_key": done_key, "done_keys": done_keys, "done_at": "end"}
    buffer = make_buffer(6, n_steps=3, gamma=1.0, **keys)
    buffer.extend(cats_and_mice())
    transform = MultiStepTransform(3, 1.0, **keys)
    stored = torch.cat([transform.inv(part) for part in cats_and_mice().split([4, 1, 1])] + [transform.flush()])
    for out in (MultiStep(1.0, 3, **keys)(cats_and_mice()), everything(buffer), stored):
        for group, (returns, ahead, steps) in EXPECTED.items():
            assert out["next", group, "reward"].flatten().tolist() == returns
            assert out["next", group, "observation"].flatten().tolist() == ahead
            own = out if done_key == (group, "done") else out[group]
            assert own["steps_to_next_obs"].flatten().tolist() == steps
            assert own["gamma"].flatten().tolist() == [1.0] * 6
            ends = [s == 1 for s in steps]
            assert own["nonterminal"].flatten().tolist() == [not end for end in ends]
            if done_keys is not None:
                at_end = out["next", group, "done"].flatten().tolist()
                assert at_end == [t + s - 1 == {"cats": 2, "mice": 3}[group] for t, s in enumerate(steps)]
        if done_key == "done":
            assert out["steps_to_next_obs"].tolist() == [3, 3, 3, 3, 2, 1]
        named = {key for key in ("cats", "mice") if out.get(key, None) is not None}
        assert named == {"cats", "mice"} - {done_key[0]}


def test_an_entry_is_governed_by_the_nearest_flags_above():
    t = torch.arange(6)
    deep = {"paws": {"observation": t + 1}, "tail": {"done": flags([F, F, F, F, T, F]), "observation": t + 1}}
    data = cats_and_mice(observation=t + 1)
    data["next", "cats"].auto_batch_size_(1)
    data["next", "cats"].update(deep)
    out = MultiStep(1.0, 3, reward_keys=REWARDS)(data)["next"]
    assert out["observation"].tolist() == [3, 4, 5, 6, 6, 6]
    assert out["cats", "paws", "observation"].tolist() == EXPECTED["cats"][1]
    assert out["cats", "tail", "observation"].tolist() == [3, 4, 5, 5, 5, 6]


def test_where_windows_of_a_group_are_written():
    data = cats_and_mice()
    data["cats"] = TensorDict({"observation": torch.arange(6.0).view(6, 1, 1)}, [6, 1])
    keys = {"reward_keys": REWARDS, "match_reward_shape": True}
    out = MultiStep(0.5, 3, **keys)(data)
    assert {*out.keys()} == {"cats", "mice", "next", "steps_to_next_obs", "gamma", "nonterminal"}
    assert {*out["cats"].keys()} == {"observation", "steps_to_next_obs", "gamma", "nonterminal"}
    assert out["cats"].batch_size == (6, 1) and out["mice"].batch_size == (6,)
    assert out["cats", "gamma"].shape == out["next", "cats", "reward"].shape
    # a group without a reward needs none
    del data["next", "mice", "reward"]
    out = MultiStep(0.5, 3, reward_keys=[("cats", "reward")])(data)
    assert out.get("mice", None) is None
    assert out["next", "mice", "observation"].flatten().tolist() == EXPECTED["mice"][1]
    buffer = ReplayBuffer(storage=LazyTensorStorage(6), transform=MultiStepTransform(3, 0.5, reward_keys=REWARDS))
    buffer.extend(cats_and_mice())
    assert buffer[:]["mice", "steps_to_next_obs"].flatten().tolist() == EXPECTED["mice"][2][:3]


def test_in_the_shape_of_the_first_reward_are_the_windows_of_its_group():
    """torchrl's losses read them at the root, with that reward."""
    for rewards in (REWARDS, REWARDS[::-1]):
        keys = {"reward_keys": rewards, "match_reward_shape": True}
        buffer = make_buffer(6, n_steps=3, gamma=1.0, **keys)
        buffer.extend(cats_and_mice())
        for out in (MultiStep(1.0, 3, **keys)(cats_and_mice()), everything(buffer)):
            assert out["steps_to_next_obs"].flatten().tolist() == EXPECTED[rewards[0][0]][2]
            assert out["steps_to_next_obs"].shape == out["next", rewards[0]].shape
            for group in ("cats", "mice"):
                assert out[group, "steps_to_next_obs"].flatten().tolist() == EXPECTED[group][2]


def test_where_windows_of_a_reward_that_agents_share_are_written():
    ends = torch.zeros(6, 2, 1, dtype=torch.bool)
    ends[1, 0] = True
    team = {"done": ends, "team": torch.ones(6, 1)}
    data = TensorDict({"next": {"done": torch.zeros(6, 1, dtype=torch.bool), "agents": team}}, [6])
    steps = [2, 1, 3, 3, 2, 1]
    for match in (False, True):
        keys = {"reward_keys": [("agents", "team")], "match_reward_shape": match}
        buffer = make_buffer(6, n_steps=3, gamma=1.0, **keys)
        buffer.extend(data)
        for out in (MultiStep(1.0, 3, **keys)(data), everything(buffer)):
            assert out["next", "agents", "team"].flatten().tolist() == steps
            assert out["agents", "steps_to_next_obs"].shape == ((6, 1) if match else (6,))
            assert out["agents", "steps_to_next_obs"].flatten().tolist() == steps
            assert out["steps_to_next_obs"].flatten().tolist() == (steps if match else [3, 3, 3, 3, 2, 1])


def test_where_windows_are_written_must_be_no_tensor():
    data = cats_and_mice()
    data["mice"] = torch.zeros(6)
    buffer, transform = make_buffer(6, reward_keys=REWARDS), MultiStepTransform(3, 1.0, reward_keys=REWARDS)
    for use in (transform.inv, MultiStep(1.0, 3, reward_keys=REWARDS), buffer.extend):
        with pytest.raises(ValueError, match=r"data must not hold a tensor at \('mice',\), where the windows"):
            use(data)
    assert transform._buffer is None and not len(buffer)


def test_objects_of_a_group_are_those_of_its_windows():
    data = cats_and_mice()
    for group in ("cats", "mice"):
        data["next", group].auto_batch_size_(1)
        data["next", group].set("name", NonTensorStack(*(NonTensorData(f"{group} {t + 1}") for t in range(6))))
    keys = {"reward_keys": REWARDS}
    buffer = make_buffer(6, n_steps=3, gamma=1.0, **keys)
    buffer.extend(data)
    for out in (MultiStep(1.0, 3, **keys)(data), everything(buffer)):
        for group, (_, ahead, _) in EXPECTED.items():
            assert out["next", group].get("name").tolist() == [f"{group} {t}" for t in ahead]
