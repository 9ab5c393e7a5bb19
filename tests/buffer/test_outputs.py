"""``outputs``: what nobody asks for is left out of a sample, and what is there is what it would be."""

import pytest
import torch
from paths import EITHER
from rings import Drawn, make_buffer, make_stream
from tensordict import NonTensorStack, TensorDict
from torchrl.data import RandomSampler, SamplerWithoutReplacement

WINDOWS = ["steps_to_next_obs", "gamma", "nonterminal"]
ASKED = [
    ["observation"],
    [("next", "reward")],
    [("next", "reward_orig")],
    [("next", "original_reward")],
    ["gamma", ("next", "terminated_orig"), ("next", "terminated")],
    ["next", "index"],
    [*WINDOWS, "number", ("next", "number")],
    [("collector", "traj_ids"), ("next", "reward"), "index"],
    ["collector"],
]


def in_order():
    return SamplerWithoutReplacement(shuffle=False)


def two_buffers(outputs, sampler, batch=(3,), **arguments):
    stream = make_stream(batch, 30, traj=True)
    buffers = [make_buffer(8, batch, sampler=sampler(), outputs=each, **arguments) for each in (None, outputs)]
    for part in stream.split([5, 6, 1, 8, 10], -1):
        for buffer in buffers:
            buffer.extend(part)
    return buffers


def names(sample):
    return set(sample.keys(True, True))


@EITHER
@pytest.mark.parametrize("outputs", ASKED, ids=str)
@pytest.mark.parametrize(
    "sampler", [RandomSampler, lambda: SamplerWithoutReplacement(shuffle=False)], ids=["drawn", "in order"]
)
def test_what_is_asked_for_is_what_it_would_be(where, outputs, sampler):
    with where():
        samples = []
        for buffer in two_buffers(outputs, sampler):
            torch.manual_seed(0)
            samples.append(buffer.sample(24))
        everything, sample = samples
        asked = [key if isinstance(key, tuple) else (key,) for key in outputs]
        paths = {key: key if isinstance(key, tuple) else (key,) for key in names(everything)}
        assert names(sample) == {key for key, path in paths.items() if any(path[: len(a)] == a for a in asked)}
        for key in names(sample):
            assert torch.equal(sample[key], everything[key]), key
        groups = {key for key in sample.keys(True) if key not in names(sample)}
        assert groups == {path[0] for path in map(paths.get, names(sample)) if len(path) > 1}


@pytest.mark.parametrize("arguments", [{}, {"prefetch": 2, "batch_size": 12}], ids=str)
def test_per_call_n_with_info_and_prefetch(arguments):
    stream = make_stream((3,), 30)
    buffer = make_buffer(8, (3,), sampler=RandomSampler(), outputs=["gamma"], **arguments)
    buffer.extend(stream[:, :8]), buffer.extend(stream[:, 8:12])
    sample, info = buffer.sample(12, return_info=True, n_steps=1)
    assert names(sample) == {"gamma"} and (sample["gamma"] == sample["gamma"][0]).all()
    assert torch.stack(tuple(info["index"]), -1).shape == (12, 2)


def test_match_reward_shape_needs_no_reward():
    everything, sample = (buffer.sample(24) for buffer in two_buffers(["gamma"], in_order, match_reward_shape=True))
    assert names(sample) == {"gamma"} and torch.equal(sample["gamma"], everything["gamma"])
    assert sample["gamma"].shape == (24, 1)


OF_AGENTS = [["gamma"], ["index"], [("next", "reward")], ["agents"], [("agents", "gamma")]]


@EITHER
@pytest.mark.parametrize("outputs", OF_AGENTS, ids=str)
def test_flags_of_agents_that_are_left_out(where, outputs):
    with where():
        stream = make_stream((3,), 20)
        stream["next", "agents"] = TensorDict(
            {
                "reward": torch.randn(3, 20, 2, 1),
                "done": torch.rand(3, 20, 2, 1) < 0.2,
                "terminated": torch.zeros(3, 20, 2, 1, dtype=torch.bool),
            },
            batch_size=[3, 20],
        )
        samples = []
        for each in (None, outputs):
            buffer = make_buffer(8, (3,), outputs=each, reward_keys=["reward", ("agents", "reward")])
            buffer.extend(stream[:, :8]), buffer.extend(stream[:, 8:12])
            samples.append(buffer.sample(24))
        everything, sample = samples
        asked = [key if isinstance(key, tuple) else (key,) for key in outputs]
        assert all((key if isinstance(key, tuple) else (key,))[: len(asked[0])] == asked[0] for key in names(sample))
        assert names(sample) and all(torch.equal(sample[key], everything[key]) for key in names(sample))


def test_what_is_no_tensor():
    stream = make_stream((), 12)
    for data in (stream, stream["next"]):
        data["name"] = NonTensorStack(*map(str, range(12)))
    samples = []
    for outputs in (None, [("next", "name"), "number"]):
        buffer = make_buffer(8, outputs=outputs, sampler=Drawn(torch.arange(8)))
        buffer.extend(stream[:8])
        samples.append(buffer.sample(8))
    everything, sample = samples
    assert set(sample.keys()) == {"number", "next"} and set(sample["next"].keys()) == {"name"}
    assert list(sample["next", "name"]) == list(everything["next", "name"])


def test_verified_on_every_call():
    _, buffer = two_buffers(["gamma", ("next", "observation")], RandomSampler, backend="verify")
    assert names(buffer.sample(16)) == {"gamma", ("next", "observation")}


@pytest.mark.parametrize(
    ("outputs", "error", "message"),
    [
        (["observations"], KeyError, r"outputs must name entries of a sample, got \[\('observations',\)\]"),
        (["reward"], KeyError, r"got \[\('reward',\)\], which are none of .*\('next', 'reward'\)"),
        ([("next", "reward", "x")], KeyError, "outputs must name entries"),
        ([3], TypeError, "outputs must be a key, a string or a tuple of strings, got 3"),
        ([], ValueError, r"outputs must name entries of a sample, or be None for all, got \[\]"),
        (3, TypeError, "outputs must be a sequence of keys, got 3"),
    ],
    ids=str,
)
def test_wrong_outputs(outputs, error, message):
    with pytest.raises(error, match=message):
        buffer = make_buffer(8, outputs=outputs)
        buffer.extend(make_stream((), 8))
        buffer.sample(4)


def test_they_are_told():
    assert make_buffer(8).outputs is None
    assert make_buffer(8, outputs=["gamma", ("next", "reward")]).outputs == ["gamma", ("next", "reward")]
    assert make_buffer(8, outputs="gamma").outputs == ["gamma"]
