"""What entries may be that the n-step buffer samples: dtypes, shapes, names, agents; and arguments that change."""

import inspect
from typing import get_type_hints

import pytest
import torch
from paths import kernels
from rings import (
    TRAJ_KEY,
    WINDOW_KEYS,
    Ring,
    as_bytes,
    assert_every_frame,
    assert_returns,
    assert_same_bytes,
    assert_sampled,
    assert_windows,
    everything,
    make_buffer,
    make_stream,
)
from rollouts import make_rollout
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer
from typing_extensions import Unpack

from multistep_triton import NStepReplayBuffer
from multistep_triton.arguments import TorchRLArguments
from multistep_triton.kernels.windows import INTERPRETED

REWARD = ("next", "reward")


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool],
    ids=str,
)
def test_reward_dtypes(dtype, size):
    stream = make_stream((2,), 9)
    reward = stream["next", "reward"] * 3
    stream["next", "reward"] = reward > 0 if dtype == torch.bool else reward.abs().to(dtype)
    ring, buffer = Ring(stream, 6), make_buffer(6, (2,), gamma=0.99, n_steps=4)
    buffer.extend(ring.take(5)), buffer.extend(ring.take(4))
    assert_every_frame(buffer, ring, size=size)


def test_integer_rewards_take_the_default_dtype():
    stream = make_stream((), 9)
    stream["next", "reward"] = torch.arange(9).unsqueeze(-1)
    ring, buffer = Ring(stream, 6), make_buffer(6)
    buffer.extend(ring.take(9))
    torch.set_default_dtype(torch.float64)
    try:
        assert everything(buffer)[REWARD].dtype == torch.float64
        assert_every_frame(buffer, ring)
    finally:
        torch.set_default_dtype(torch.float32)


def test_other_entries_keep_their_bits(size):
    stream = make_stream((2,), 9)
    payloads = torch.tensor([0x7FC00001, 0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    stream["next", "nan"] = payloads[torch.randint(3, (2, 9))]
    stream["next", "half"] = torch.randn(2, 9, 5).half()
    stream["next", "flags"] = torch.rand(2, 9, 2, 3) < 0.5
    stream["next", "deep", "complex"] = torch.randn(2, 9, dtype=torch.complex64)
    stream["image"] = torch.randint(256, (2, 9, 3, 4), dtype=torch.uint8)
    stream["next", "image"] = torch.randint(256, (2, 9, 3, 4), dtype=torch.uint8)
    ring, buffer = Ring(stream, 6), make_buffer(6, (2,))
    buffer.extend(ring.take(5)), buffer.extend(ring.take(4))
    assert_every_frame(buffer, ring, size=size)


@pytest.mark.parametrize("features", [(), (1,), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("matched", [False, True])
def test_rewards_of_any_shape(features, matched, size):
    stream = make_stream((2,), 9)
    stream["next", "reward"] = torch.randn(2, 9, *features)
    ring, buffer = Ring(stream, 6), make_buffer(6, (2,), match_reward_shape=matched)
    buffer.extend(ring.take(5)), buffer.extend(ring.take(4))
    sample = everything(buffer, size)
    for key in WINDOW_KEYS:
        assert sample[key].shape == ((12, *features) if matched else (12,))
        if matched:
            # every element of a reward is of the same window
            first = sample[key].flatten(1)[:, 0] if features else sample[key]
            assert torch.equal(sample[key], first[(..., *[None] * len(features))].expand(12, *features))
            sample[key] = first.clone()
    assert_sampled(sample, ring)


@pytest.mark.parametrize("flat", [False, True])
def test_done_of_either_shape(flat):
    stream = make_stream((2,), 9)
    if flat:
        for key in ("done", "terminated", "truncated"):
            stream["next", key] = stream["next", key].squeeze(-1)
    ring, buffer = Ring(stream, 6), make_buffer(6, (2,))
    buffer.extend(ring.take(5)), buffer.extend(ring.take(4))
    assert_every_frame(buffer, ring)


def test_several_rewards(size):
    stream = make_stream((2,), 9)
    stream["next", "cost"] = torch.randn(2, 9, 3, dtype=torch.float64)
    ring, buffer = Ring(stream, 6), make_buffer(6, (2,), reward_keys=["reward", "cost"])
    buffer.extend(ring.take(5)), buffer.extend(ring.take(4))
    assert_every_frame(buffer, ring, reward_keys=("reward", "cost"), size=size)


def test_nested_rewards_and_flags_of_other_names():
    stream = make_stream((2,), 9)
    reward, done = stream["next"].pop("reward"), stream["next"].pop("done")
    stream["next", "team", "reward"] = reward
    stream["next", "ended"] = done
    stream["valid"] = torch.rand(2, 9) < 0.8
    ring = Ring(stream, 6, done_keys=("ended",), mask_key="valid")
    buffer = make_buffer(
        6, (2,), reward_keys=[("team", "reward")], done_key="ended", done_keys=["terminated"], mask_key="valid"
    )
    buffer.extend(ring.take(5)), buffer.extend(ring.take(4))
    sample = everything(buffer)
    windows = assert_windows(sample, ring, 3, 0.9)
    flat, own = stream.flatten(), sample["number"]
    ends = torch.tensor([window[-1] for window in windows])
    assert_returns(sample["next", "team", "reward"], flat["next", "team", "reward"], windows, 0.9)
    assert_same_bytes(sample["next", "team", "reward_orig"], flat["next", "team", "reward"][own])
    assert_same_bytes(sample["next", "original_reward"], flat["next", "team", "reward"][own])
    for key in ("ended", "terminated"):
        assert_same_bytes(sample["next", key], flat["next", key][ends])
        assert_same_bytes(sample["next", f"{key}_orig"], flat["next", key][own])
    # named by neither, and so an entry like any other
    assert_same_bytes(sample["next", "truncated"], flat["next", "truncated"][ends])
    assert ("next", "truncated_orig") not in sample.keys(True)


@pytest.mark.parametrize("unsqueezed", [True, False])
def test_every_agent_has_its_own_windows(unsqueezed, size):
    envs, agents, length = 2, 3, 11
    alone = make_stream((envs, agents), length, p_done=0.4)
    shared = make_stream((envs,), length, seed=1)
    together = alone["next"].apply(lambda leaf: leaf.movedim(1, 2).contiguous(), batch_size=[envs, length])
    shared["next", "done"] = together["done"].any(2)
    data = shared.clone()
    data["agents"] = TensorDict({"number": alone["number"].movedim(1, 2).contiguous()}, [envs, length])
    data["next", "agents"] = together.select("number", "observation", "reward", "done", "terminated")
    if not unsqueezed:
        for key in ("reward", "done", "terminated"):
            data["next", "agents", key] = together[key].squeeze(-1)
    del data["next", "reward"]
    buffer = make_buffer(
        6,
        (envs,),
        reward_keys=[("agents", "reward")],
        done_key=("agents", "done"),
        done_keys=[("agents", "done"), ("agents", "terminated"), "done"],
    )
    # A flag that is called as one of the done keys is ends what is in its group.
    of_agents, of_all = Ring(alone, 6), Ring(shared, 6, done_keys=("done", "terminated"))
    for cut in (4, 7):
        of_agents.take(cut), of_all.take(cut)
        buffer.extend(data[:, of_all.written - cut : of_all.written].clone())
    sample = everything(buffer, size)
    for key in WINDOW_KEYS:
        assert sample[key].shape == sample["next", "agents", "done"].shape == (12, agents, *[1] * unsqueezed)

    # a sample of every agent, as if it were an environment
    numbers = sample["agents", "number"].flatten()
    each = TensorDict({key: sample[key].flatten() for key in WINDOW_KEYS}, [12 * agents])
    each["number"] = numbers
    windows, flat = assert_windows(each, of_agents, 3, 0.9), alone.flatten()
    ends = torch.tensor([window[-1] for window in windows])
    following = sample["next", "agents"]
    assert_returns(following["reward"].reshape(-1, 1), flat["next", "reward"], windows, 0.9)
    assert torch.equal(following["reward_orig"].reshape(-1, 1), flat["next", "reward"][numbers])
    for key in ("number", "observation", "done", "terminated"):
        expected = flat["next", key][ends]
        assert torch.equal(following[key].reshape(expected.shape), expected), key
    for key in ("done", "terminated"):
        assert torch.equal(following[f"{key}_orig"].reshape(-1, 1), flat["next", key][numbers]), key

    # what is no agent's ends where any agent's does
    ends = torch.tensor([of_all.window(number, 3)[-1] for number in sample["number"].tolist()])
    flat = shared.flatten()
    for key in ("number", "observation", "done", "terminated"):
        assert_same_bytes(sample["next", key], flat["next", key][ends], key)
    assert_same_bytes(sample["next", "done_orig"], flat["next", "done"][sample["number"]])
    assert_same_bytes(sample["observation"], flat["observation"][sample["number"]])


def test_a_sample_shares_no_memory_and_what_is_stored_stays_as_it_is():
    stream = make_stream((2,), 9)
    before = stream.clone()
    ring, buffer = Ring(stream, 6), make_buffer(6, (2,))
    buffer.extend(ring.take(5)), buffer.extend(ring.take(4))
    assert (stream == before).all()
    stored = buffer.storage[:].clone()
    everything(buffer).zero_()
    again = buffer.storage[:]
    assert set(again.keys(True, True)) == set(stored.keys(True, True))
    for key in stored.keys(True, True):
        assert torch.equal(as_bytes(again[key]), as_bytes(stored[key])), key
    assert_every_frame(buffer, ring)


# Changes while it runs


def test_n_steps_and_gamma_annealed_over_a_run():
    """As BBF does: n from 10 to 3 and gamma from 0.97 to 0.997, exponentially."""
    stream, points = make_stream((2,), 130, p_done=0.05), 13
    ring, buffer = Ring(stream, 24), make_buffer(24, (2,), n_steps=10, gamma=0.97)
    storage, seen = buffer.storage, []
    for i in range(points):
        part = i / (points - 1)
        buffer.n_steps = round(10 * (3 / 10) ** part)
        buffer.gamma = 1 - 0.03 * (0.003 / 0.03) ** part
        seen.append((buffer.n_steps, round(buffer.gamma, 6)))
        buffer.extend(ring.take(10))
        assert_every_frame(buffer, ring)
    assert seen[0] == (10, 0.97) and seen[-1] == (3, 0.997)
    assert sorted(seen, reverse=True, key=lambda each: each[0]) == seen and len({n for n, _ in seen}) == 8
    assert buffer.storage is storage


def test_every_argument_can_be_set():
    stream = make_stream((2,), 20, traj=True)
    stream["next", "cost"] = torch.randn(2, 20, 1)
    stream["next", "ended"] = torch.rand(2, 20, 1) < 0.2
    stream["valid"] = torch.rand(2, 20) < 0.8
    ring, buffer = Ring(stream, 12), make_buffer(12, (2,), traj_key=None)
    buffer.extend(ring.take(20))

    def check(ring, **keywords):
        ring.written = 20
        assert_every_frame(buffer, ring, **keywords)

    check(ring)
    buffer.n_steps, buffer.gamma = (2, 6), 0.5
    assert (buffer.n_steps, buffer.gamma) == ((2, 6), 0.5)
    check(ring)
    buffer.done_at = "start"
    check(ring, done_at="start")
    buffer.traj_key = TRAJ_KEY
    check(Ring(stream, 12, traj_key=TRAJ_KEY), done_at="start")
    buffer.traj_key, buffer.mask_key = None, "valid"
    check(Ring(stream, 12, mask_key="valid"), done_at="start")
    buffer.mask_key, buffer.done_at, buffer.done_key = None, "end", "ended"
    dones = ("done", "terminated", "truncated", "ended")
    check(Ring(stream, 12, done_keys=dones), done_keys=dones)
    buffer.done_keys = ["terminated"]
    check(Ring(stream, 12, done_keys=("ended", "terminated")), done_keys=("terminated", "ended"))
    buffer.done_key, buffer.done_keys, buffer.reward_keys = None, None, ["cost"]
    check(ring, reward_keys=("cost",))
    buffer.reward_keys, buffer.match_reward_shape = None, True
    assert everything(buffer)["gamma"].shape == (24, 1)
    buffer.match_reward_shape = False
    with kernels():
        buffer.backend = "triton"
        if INTERPRETED:
            check(ring)
        else:
            # All of them at once, as what a sampler has drawn is not drawn again.
            with pytest.raises(RuntimeError, match="a tensor is on cpu, and Triton drives"):
                everything(buffer)
    buffer.backend = "reference"
    check(ring)


def test_torchrls_arguments_are_those_that_an_editor_lists():
    torchrls = {
        each.name
        for owner in (TensorDictReplayBuffer, ReplayBuffer)
        for each in inspect.signature(owner.__init__).parameters.values()
        if each.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert "priority_key" in torchrls and "storage" in torchrls
    assert get_type_hints(TorchRLArguments).keys() == torchrls
    assert get_type_hints(NStepReplayBuffer.__init__)["kwargs"] == Unpack[TorchRLArguments]


def test_an_argument_that_nobody_takes_is_named():
    with pytest.raises(TypeError, match="unexpected keyword argument 'batchsize'"):
        NStepReplayBuffer(n_steps=3, gamma=0.9, storage=LazyTensorStorage(8), batchsize=4)


def test_a_slice_holds_single_steps():
    stream, buffer = make_stream((), 8), make_buffer(8)
    buffer.extend(stream)
    assert torch.equal(buffer[:][REWARD], stream[REWARD])
    assert "steps_to_next_obs" not in buffer[:].keys()  # noqa: SIM118  # of a tensordict


def test_n_steps_of_one_call():
    stream = make_stream((2,), 20)
    ring, buffer = Ring(stream, 12), make_buffer(12, (2,), n_steps=2)
    buffer.extend(ring.take(20))
    assert_sampled(everything(buffer, n_steps=5), ring, 5)
    assert_sampled(everything(buffer, n_steps=(3, 7)), ring, (3, 7))
    assert buffer.n_steps == 2
    assert_sampled(everything(buffer), ring, 2)
    sample, info = buffer.sample(24, n_steps=4, return_info=True)
    assert_sampled(sample, ring, 4)
    assert torch.equal(torch.stack(tuple(info["index"]), -1), sample["index"])


def test_a_rollout_is_sampled_as_it_came():
    # not a stream of this file: keys, shapes and dtypes as an environment gives them
    rollout = make_rollout((2,), 30)
    buffer = make_buffer(20, (2,), n_steps=1)
    buffer.extend(rollout.clone())
    sample = everything(buffer)
    time, env = sample["index"].unbind(-1)
    expected = rollout[env, torch.where(time < 10, time + 20, time)]
    for key in rollout.keys(True, True):
        assert_same_bytes(sample[key], expected[key], key)
