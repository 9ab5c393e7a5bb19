"""In torchrl's replay buffers, as a user puts it there."""

import pytest
import torch
from rollouts import extend, make_rollout
from tensordict import TensorDict
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    ReplayBuffer,
    RoundRobinWriter,
    SamplerWithoutReplacement,
    TensorDictReplayBuffer,
)
from torchrl.envs.transforms import Compose, DoubleToFloat, RewardScaling

from multistep_triton import MultiStepTransform

N_STEPS, GAMMA = 3, 0.9


def expected(rollout, cuts=(25, 25)):
    return extend(MultiStepTransform(N_STEPS, GAMMA), rollout, cuts)


def assert_stored(buffer, rollout):
    stored, wanted = buffer[:], expected(rollout)
    assert stored.batch_size == wanted.batch_size
    for key in wanted.keys(True, True):
        assert torch.equal(stored[key], wanted[key]), key


@pytest.mark.parametrize("make_buffer", [ReplayBuffer, TensorDictReplayBuffer])
@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_extend(make_buffer, storage, batch):
    rollout = make_rollout(batch, 50)
    buffer = make_buffer(
        storage=storage(1000, ndim=rollout.ndim),
        transform=MultiStepTransform(N_STEPS, GAMMA),
        batch_size=16,
    )
    for part in rollout.split(25, -1):
        buffer.extend(part)
    assert_stored(buffer, rollout)
    assert buffer.sample()["steps_to_next_obs"].shape == (16,)


@pytest.mark.parametrize("make_buffer", [ReplayBuffer, TensorDictReplayBuffer])
def test_add(make_buffer):
    rollout = make_rollout((), 50)
    buffer = make_buffer(storage=LazyTensorStorage(100), transform=MultiStepTransform(N_STEPS, GAMMA))
    for i, frame in enumerate(rollout):
        index = buffer.add(frame)
        assert len(buffer) == max(i + 1 - N_STEPS, 0)
        if i < N_STEPS:
            assert torch.as_tensor(index).numel() == 0
    assert_stored(buffer, rollout)


@pytest.mark.parametrize("how", ["argument", "append", "insert", "compose"])
def test_ways_to_attach(how):
    rollout = make_rollout((2,), 50)
    ours = MultiStepTransform(N_STEPS, GAMMA)
    given = {"argument": ours, "compose": Compose(ours)}.get(how)
    buffer = ReplayBuffer(storage=LazyTensorStorage(100, ndim=2), transform=given)
    if how == "append":
        buffer.append_transform(ours)
    elif how == "insert":
        buffer.insert_transform(0, ours)
    for part in rollout.split(25, -1):
        buffer.extend(part)
    assert_stored(buffer, rollout)


def test_composed_with_other_transforms():
    # the inverse runs from last to first: frames are cast to float32 before they reach ours
    rollout = make_rollout((2,), 50)
    double = rollout.clone()
    double["observation"] = double["observation"].double()
    cast = DoubleToFloat(in_keys_inv=["observation"])
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(100, ndim=2),
        transform=Compose(
            MultiStepTransform(N_STEPS, GAMMA), cast, RewardScaling(0.0, 10.0, in_keys=[("next", "reward")])
        ),
    )
    for part in double.split(25, -1):
        buffer.extend(part)
    stored, wanted = buffer[:], expected(rollout)
    assert stored["observation"].dtype == torch.float32
    assert torch.equal(stored["observation"], wanted["observation"])
    # and the forward of the others runs on what was stored
    assert torch.equal(stored["next", "reward"], wanted["next", "reward"] * 10.0)


def test_a_full_ring_keeps_the_newest():
    rollout = make_rollout((2,), 200)
    buffer = ReplayBuffer(storage=LazyTensorStorage(2 * 30, ndim=2), transform=MultiStepTransform(N_STEPS, GAMMA))
    for part in rollout.split(20, -1):
        buffer.extend(part)
    stored, wanted = buffer[:], expected(rollout, [20] * 10)[:, -30:]
    by_time = stored["observation"][0, :, 0].sort().indices
    wanted_by_time = wanted["observation"][0, :, 0].sort().indices
    assert torch.equal(stored["next", "reward"][:, by_time], wanted["next", "reward"][:, wanted_by_time])


def test_samplers_and_writers():
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(200, ndim=2),
        sampler=SamplerWithoutReplacement(),
        writer=RoundRobinWriter(),
        transform=MultiStepTransform(N_STEPS, GAMMA),
        batch_size=94,
    )
    rollout = make_rollout((2,), 50)
    buffer.extend(rollout)
    sample = buffer.sample()
    wanted = expected(rollout, [50])
    assert torch.equal(
        sample["next", "reward"].flatten().sort().values, wanted["next", "reward"].flatten().sort().values
    )


def test_list_storage():
    rollout = make_rollout((), 50)
    buffer = ReplayBuffer(
        storage=ListStorage(100),
        transform=MultiStepTransform(N_STEPS, GAMMA),
        collate_fn=lambda frames: torch.stack(frames),
    )
    buffer.extend(rollout)
    assert_stored(buffer, rollout)


def test_memmap_storage_can_feed_the_transform(tmp_path):
    rollout = make_rollout((2,), 50)
    out = MultiStepTransform(N_STEPS, GAMMA).inv(rollout.memmap(tmp_path))
    assert (out == expected(rollout, [50])).all()


def test_changing_n_steps_of_a_transform_in_a_buffer():
    rollout = make_rollout((), 60)
    transform = MultiStepTransform(2, GAMMA)
    buffer = ReplayBuffer(storage=LazyTensorStorage(100), transform=transform)
    for n_steps, part in zip([2, 5, 1], rollout.split(20, -1), strict=True):
        transform.n_steps = n_steps
        buffer.extend(part)
        assert len(buffer) == int(part["action"].numel() * [2, 5, 1].index(n_steps) + 20 - n_steps)
    assert torch.equal(buffer[:]["observation"], rollout["observation"][:59])


def test_data_without_terminated_and_truncated():
    data = TensorDict(
        {
            "steps": torch.arange(10),
            "next": {
                "steps": torch.arange(1, 11),
                "reward": torch.ones(10, 1),
                "done": torch.zeros(10, 1, dtype=torch.bool),
            },
        },
        batch_size=[10],
    )
    buffer = ReplayBuffer(storage=LazyTensorStorage(100), transform=MultiStepTransform(N_STEPS, GAMMA))
    buffer.extend(data)
    assert buffer[:]["next", "steps"].tolist() == [3, 4, 5, 6, 7, 8, 9]
