"""What the n-step buffer refuses, and in what words."""

import re

import pytest
import torch
from rings import TRAJ_KEY, Ring, assert_every_frame, everything, make_buffer, make_stream, wrapped
from rollouts import make_rollout
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ListStorage, TensorDictMaxValueWriter
from torchrl.data.replay_buffers.samplers import ConsumingSampler
from torchrl.envs.transforms import Compose, DoubleToFloat, NextStateReconstructor
from torchrl.envs.transforms import MultiStepTransform as TorchRLMultiStepTransform

from multistep_triton import MultiStepTransform, NStepReplayBuffer

WRONG_N_STEPS = [0, -1, True, 2.5, "3", (3, 1), (0, 2), (1, 2, 3), (2,), (), (True, 2), (1, 2.0)]


@pytest.mark.parametrize("value", WRONG_N_STEPS, ids=str)
def test_wrong_n_steps(value):
    message = rf"n_steps must be .+, got {re.escape(repr(value))}"
    with pytest.raises((ValueError, TypeError), match=message):
        make_buffer(8, n_steps=value)
    buffer, ring = wrapped()
    with pytest.raises((ValueError, TypeError), match=message):
        buffer.n_steps = value
    with pytest.raises((ValueError, TypeError), match=message):
        buffer.sample(4, n_steps=value)
    assert buffer.n_steps == 3
    assert_every_frame(buffer, ring)


@pytest.mark.parametrize("name", ["n_steps", "gamma"])
def test_none_is_no_value(name):
    with pytest.raises((ValueError, TypeError), match=rf"{name} must be .+, got None"):
        make_buffer(8, **{name: None})


WRONG = {
    "gamma": (2, r"gamma must be a finite number in \[0, 1\], got 2"),
    "backend": ("cuda", "backend must be one of 'auto', 'reference', 'triton', 'verify', got 'cuda'"),
    "done_at": ("middle", "done_at must be one of 'start', 'end', got 'middle'"),
    "match_reward_shape": (1, "match_reward_shape must be True or False, got 1"),
    "traj_key": (3, "traj_key must be .+, got 3"),
    "done_key": (3, "done_key must be .+, got 3"),
    "mask_key": (3, "mask_key must be .+, got 3"),
    "reward_keys": (3, "reward_keys must be .+, got 3"),
    "done_keys": (3, "done_keys must be .+, got 3"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    value, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        make_buffer(8, **{name: value})
    buffer, ring = wrapped()
    before = getattr(buffer, name)
    with pytest.raises((ValueError, TypeError), match=message):
        setattr(buffer, name, value)
    assert getattr(buffer, name) == before
    assert_every_frame(buffer, ring)


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("reward_keys", ["profit"], r"\('next', 'profit'\)"),
        ("done_key", "ended", r"\('next', 'ended'\)"),
        ("traj_key", TRAJ_KEY, r"\('collector', 'traj_ids'\)"),
    ],
)
def test_an_entry_that_is_not_there(name, value, key):
    # which may be said when it is written or when it is sampled
    with pytest.raises(KeyError, match=rf"{key}.*\('next', 'reward'\)"):
        wrapped(**{name: value})[0].sample(4)
    buffer, ring = wrapped()
    before = getattr(buffer, name)
    with pytest.raises(KeyError, match=rf"{key}.*\('next', 'reward'\)"):
        setattr(buffer, name, value), everything(buffer)
    setattr(buffer, name, before)
    assert_every_frame(buffer, ring)


def test_a_done_of_another_shape():
    stream = make_stream((2,), 8)
    stream["next", "done"] = torch.zeros(2, 8, 5, dtype=torch.bool)
    buffer = make_buffer(8, (2,))
    with pytest.raises(ValueError, match=r"done \('next', 'done'\) must have shape"):
        buffer.extend(stream)
    assert not len(buffer)


def test_a_reward_that_agents_share_whose_shape_is_not_that_of_windows():
    stream, done = make_stream((2,), 8), torch.zeros(2, 8, 5, dtype=torch.bool)
    stream["next", "agents"] = TensorDict({"done": done, "reward": done.float(), "of_all": torch.ones(2, 8)}, [2, 8])
    keys = {"done_key": ("agents", "done"), "reward_keys": [("agents", "of_all"), ("agents", "reward")]}
    buffer = make_buffer(8, (2,), match_reward_shape=True, **keys)
    with pytest.raises(ValueError, match=r"match_reward_shape must be False .* \[2, 8\] and windows \[2, 8, 5\]"):
        buffer.extend(stream)
    assert not len(buffer)


def test_storages_that_are_not_rings_of_frames():
    with pytest.raises(TypeError, match=r"storage must be .*got .*ListStorage"):
        NStepReplayBuffer(n_steps=3, gamma=0.9, storage=ListStorage(10))
    with pytest.raises(TypeError, match=r"storage must be a TensorStorage, such as LazyTensorStorage.+, got None"):
        NStepReplayBuffer(n_steps=3, gamma=0.9)


def test_a_writer_that_writes_in_no_order():
    with pytest.raises(TypeError, match=r"writer must be .*got .*TensorDictMaxValueWriter"):
        make_buffer(8, writer=TensorDictMaxValueWriter(rank_key="td_error"))


@pytest.mark.parametrize("arguments", [{"consume_after_n_samples": 1}, {"sampler": ConsumingSampler()}], ids=str)
def test_a_sampler_that_frees_slots_in_no_order(arguments):
    with pytest.raises(TypeError, match=r"sampler must .*got ConsumingSampler"):
        make_buffer(8, **{"sampler": None, **arguments})


PARTS = {
    "storage": ListStorage(10),
    "writer": TensorDictMaxValueWriter(rank_key="td_error"),
    "sampler": ConsumingSampler(),
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_that_are_exchanged_for_such(part):
    buffer, ring = wrapped(batch=())
    before = getattr(buffer, part)
    with pytest.raises(TypeError, match=rf"{part} must .*got {type(PARTS[part]).__name__}"):
        getattr(buffer, f"set_{part}")(PARTS[part]), buffer.sample(4)
    getattr(buffer, f"set_{part}")(before)
    assert_every_frame(buffer, ring)


def test_sampling_what_is_empty():
    buffer = make_buffer(8)
    for arguments in ({}, {"n_steps": 5}):
        with pytest.raises(RuntimeError, match="Cannot sample from an empty storage"):
            buffer.sample(4, **arguments)
    ring = Ring(make_stream((), 20), 8)
    buffer.extend(ring.take(5))
    assert_every_frame(buffer, ring)


def test_no_batch_size():
    buffer, _ = wrapped(sampler=None)
    with pytest.raises(RuntimeError, match="batch_size not specified"):
        buffer.sample()
    with pytest.raises(RuntimeError, match="batch_size not specified"):
        buffer.sample(n_steps=2)


REFUSED = {
    "it would make n-step transitions of n-step ones": lambda: MultiStepTransform(3, 0.9),
    "so would torchrl's": lambda: TorchRLMultiStepTransform(3, 0.9),
    "it fills in what is one step ahead, whatever the window": NextStateReconstructor,
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_transform_that_writes_what_windows_do_is_refused(why):
    message = "transform must leave rewards and the entries under 'next' to the windows"
    for transform in (REFUSED[why](), Compose(DoubleToFloat(), REFUSED[why]())):
        with pytest.raises(ValueError, match=message):
            make_buffer(8, (), transform=transform)
        buffer = make_buffer(8, ())
        with pytest.raises(ValueError, match=message):
            buffer.append_transform(transform)
        with pytest.raises(ValueError, match=message):
            buffer.insert_transform(0, transform)
        assert not len(buffer.transform)


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize(
    "ndim, method, shape, expected",
    [
        (1, "extend", [], "[*B, T] of 1"),
        (2, "extend", [5], "[*B, T] of 2"),
        (2, "extend", [2, 3, 5], "[*B, T] of 2"),
        (3, "extend", [2, 5], "[*B, T] of 3"),
        (2, "add", [], "[*B] of 1"),
        (2, "add", [2, 5], "[*B] of 1"),
    ],
)
def test_another_number_of_batch_dimensions_is_an_error_that_stores_nothing(ndim, method, shape, expected, filled):
    buffer = NStepReplayBuffer(n_steps=2, gamma=0.9, storage=LazyTensorStorage(60, ndim=ndim), batch_size=2)
    if filled:
        buffer.extend(make_rollout((2, 3)[: ndim - 1], 4))
    before = len(buffer)
    data = make_rollout(shape, 1).squeeze(-1)
    message = f"data must have a batch size {expected} dimensions, as the storage has ndim={ndim}, got {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(buffer, method)(data)
    assert len(buffer) == before
