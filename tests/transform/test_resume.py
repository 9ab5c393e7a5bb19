"""A run that is interrupted and resumed stores what an unbroken one stores, to the byte."""

import copy
import pickle
import tempfile
from functools import partial

import numpy as np
import pytest
import torch
from bad import BAD_STATES
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import addresses
from paths import kernels, no_collection
from rollouts import make_rollout
from saving import (
    N_STEPS,
    TRANSFORMS,
    dumps_and_loads,
    load_transform,
    loading_is_told,
    make_transform,
    through_state_dict,
)
from tensordict import NonTensorData, NonTensorStack, TensorDict, tensorclass
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer
from torchrl.envs.transforms import Compose, DoubleToFloat
from torchrl.envs.transforms import MultiStepTransform as TorchRLMultiStepTransform


@tensorclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor


def make_buffer(storage=LazyTensorStorage):
    return ReplayBuffer(storage=storage(500, ndim=2), transform=Compose(make_transform(), DoubleToFloat()))


def buffer_dumps(buffer):
    return dumps_and_loads(buffer, partial(make_buffer, type(buffer.storage)))


def buffer_state_dict(buffer):
    return through_state_dict(buffer, partial(make_buffer, type(buffer.storage)))


BUFFERS = {"dumps": buffer_dumps, "state_dict": buffer_state_dict, "deepcopy": copy.deepcopy}


def make_data(count, seed=0):
    data = make_rollout((2,), count, seed=seed)
    data["mask"] = torch.rand(2, count, generator=torch.Generator().manual_seed(seed)) < 0.8
    return data


def assert_same_bytes(one, other):
    assert one.batch_size == other.batch_size
    assert set(one.keys(True, True)) == set(other.keys(True, True))
    for key in one.keys(True, True):
        if isinstance(one[key], torch.Tensor):
            assert one[key].dtype == other[key].dtype
            assert torch.equal(*(leaf[key].contiguous().view(torch.uint8) for leaf in (one, other))), key
        else:
            assert one[key] == other[key], key


@st.composite
def schedules(draw):
    """Calls of (frames, n_steps), and the point of interruption."""
    calls = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 7)), min_size=1, max_size=6))
    return calls, draw(st.integers(0, len(calls)))


@given(schedules(), st.sampled_from(sorted(TRANSFORMS)))
def test_a_transform_that_is_resumed(schedule, way):
    calls, point = schedule
    data = make_data(sum(frames for frames, _ in calls))
    whole, resumed, given = make_transform(), make_transform(), 0
    for i, (frames, n_steps) in enumerate(calls):
        if i == point:
            resumed = TRANSFORMS[way](resumed)
        part = data[:, given : given + frames]
        given += frames
        whole.n_steps = n_steps
        # n_steps is part of the state: it is set once for either
        resumed.n_steps = n_steps
        one, other = whole.inv(part), resumed.inv(part)
        assert (one is None) == (other is None)
        if one is not None:
            assert_same_bytes(one, other)
    if point == len(calls):
        resumed = TRANSFORMS[way](resumed)
    one, other = whole.flush(), resumed.flush()
    assert (one is None) == (other is None)
    if one is not None:
        assert_same_bytes(one, other)


@loading_is_told
@settings(max_examples=settings().max_examples // 4)
@given(schedules(), st.sampled_from(sorted(BUFFERS)), st.sampled_from([LazyTensorStorage, LazyMemmapStorage]))
def test_a_buffer_that_is_resumed(schedule, way, storage):
    calls, point = schedule
    data = make_data(sum(frames for frames, _ in calls) + 10)
    with no_collection():
        check_buffer(calls, point, way, storage, data)


def check_buffer(calls, point, way, storage, data, given=10):
    whole, resumed = make_buffer(storage), make_buffer(storage)
    whole.extend(data[:, :given]), resumed.extend(data[:, :given])
    for i, (frames, n_steps) in enumerate([*calls, (0, N_STEPS)]):
        if i == point:
            resumed = BUFFERS[way](resumed)
        for buffer in (whole, resumed):
            buffer.transform[0].n_steps = n_steps
            buffer.extend(data[:, given : given + frames])
        given += frames
    for buffer in (whole, resumed):
        buffer.transform[0].flush_into(buffer)
    assert len(whole) == len(resumed) == 2 * given
    assert_same_bytes(whole[:], resumed[:])


@loading_is_told
@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
@pytest.mark.parametrize("way", ["state_dict", "deepcopy"])
def test_a_buffer_that_is_resumed_before_anything_is_stored(way, storage):
    check_buffer([(1, N_STEPS), (9, N_STEPS)], 0, way, storage, make_data(12), given=2)


def test_torchrl_dumps_no_storage_that_is_empty():
    """Whatever its transform; with ours the frames held back stay."""
    ours, plain = make_buffer(), ReplayBuffer(storage=LazyTensorStorage(500, ndim=2))
    ours.extend(make_data(2))
    with tempfile.TemporaryDirectory() as folder:
        for buffer in (ours, plain):
            with pytest.raises(RuntimeError, match="Cannot save a non-initialized storage"):
                buffer.dumps(folder)
    assert ours.transform[0].flush().batch_size == (2, 2)


@pytest.mark.parametrize("way", TRANSFORMS)
def test_n_steps_and_gamma_go_with_the_state(way):
    transform = make_transform()
    transform.n_steps, transform.gamma = 5, 0.5
    resumed = TRANSFORMS[way](transform)
    assert (resumed.n_steps, resumed.gamma) == (5, 0.5)


@pytest.mark.parametrize("way", TRANSFORMS)
def test_what_is_saved_and_resumed_is_a_copy(way):
    data = make_data(20)
    transform, calm = make_transform(), make_transform()
    transform.inv(data[:, :10]), calm.inv(data[:, :10])
    resumed = TRANSFORMS[way](transform)
    # the one goes on, the other is as it was
    transform.inv(data[:, :7])
    assert_same_bytes(resumed.inv(data[:, 10:]), calm.inv(data[:, 10:]))


def test_a_state_shares_no_memory():
    transform = make_transform()
    transform.inv(make_data(10))
    state = transform.state_dict()
    resumed = make_transform()
    resumed.load_state_dict(state)
    carried = transform._carry.leaves, state["_extra_state"]["carry"]["leaves"], resumed._carry.leaves
    own = [addresses(leaves.values()) for leaves in carried]
    assert len(set.union(*own)) == sum(map(len, own)) == 3 * len(carried[0])


@pytest.mark.parametrize("way", TRANSFORMS)
def test_nested_data_names_tensorclasses_and_non_tensors(way):
    data = TensorDict(
        {
            "observation": torch.arange(20.0).view(2, 10),
            "pair": Pair(left=torch.arange(20).view(2, 10), right=torch.zeros(2, 10, 3), batch_size=[2, 10]),
            "deep": {"er": torch.arange(60).view(2, 10, 3)},
            "task": "reach",
            "names": NonTensorStack(*(NonTensorStack(*(f"{b}{t}" for t in range(10))) for b in range(2))),
            "next": {
                "pair": Pair(left=torch.arange(20).view(2, 10), right=torch.zeros(2, 10, 3), batch_size=[2, 10]),
                "reward": torch.ones(2, 10, 1),
                "done": torch.zeros(2, 10, 1, dtype=torch.bool),
            },
        },
        [2, 10],
        names=["env", "time"],
        device="cpu",
    )
    data["deep"].batch_size = [2, 10, 3]
    transform = make_transform()
    transform.inv(data)
    resumed = TRANSFORMS[way](transform)
    one, other = transform.flush(), resumed.flush()
    assert_same_bytes(one, other)
    for out in (one, other):
        assert out.names == ["env", "time"]
        assert out.device == torch.device("cpu")
        assert isinstance(out["next", "pair"], Pair)
        assert out["deep"].batch_size == (2, 3, 3)
        assert out["task"] == "reach"
        assert list(out["names"][1]) == ["17", "18", "19"]


def test_a_tensorclass_that_is_not_there():
    transform = make_transform()
    data = make_rollout((), 6)
    data["pair"] = Pair(left=torch.zeros(6), right=torch.zeros(6), batch_size=[6])
    transform.inv(data)
    state = transform.state_dict()
    state["_extra_state"]["carry"]["nodes"]["pair",]["tensorclass"] = ["elsewhere", "Gone"]
    with pytest.raises(ValueError, match="tensorclass Gone of the frames held back must be imported from elsewhere"):
        make_transform().load_state_dict(state)


def test_a_checkpoint_of_torchrls_class_is_one_without_frames():
    theirs = ReplayBuffer(
        storage=LazyTensorStorage(500, ndim=2),
        transform=Compose(TorchRLMultiStepTransform(N_STEPS, 0.9), DoubleToFloat()),
    )
    data = make_data(10)
    theirs.extend(data)
    buffer = make_buffer()
    buffer.load_state_dict(theirs.state_dict())
    assert len(buffer) == 2 * 7
    assert buffer.transform[0].flush() is None


@pytest.mark.parametrize("state", [{}, {"weight": torch.zeros(1)}], ids=["nothing", "another's"])
def test_a_state_without_the_entry_leaves_the_frames(state):
    transform = make_transform()
    data = make_data(10)
    transform.inv(data)
    with pytest.raises(RuntimeError, match=r"key.* in state_dict"):
        transform.load_state_dict(state)
    assert torch.equal(transform.flush()["observation"], data["observation"][:, 7:])


def test_objects_that_a_state_cannot_hold():
    data = make_rollout((), 6)
    data["info"] = NonTensorData(np.float64(1), batch_size=[6])
    transform = make_transform()
    transform.inv(data)
    with pytest.raises(TypeError, match=r"entry \('info',\) must hold what torch.load reads .*, got float64: allow it"):
        transform.state_dict()
    pickled = pickle.loads(pickle.dumps(transform)).flush()
    globals_ = [(np._core.multiarray.scalar, "numpy._core.multiarray.scalar"), np.dtype, np.dtypes.Float64DType]
    with torch.serialization.safe_globals(globals_):
        resumed = load_transform(transform).flush()
    for out in (pickled, resumed):
        assert out["info"] == 1
        assert torch.equal(out["observation"], data["observation"][3:])


@pytest.mark.parametrize("kind", BAD_STATES)
def test_a_bad_state_leaves_the_frames_and_the_rest(kind):
    state, message = BAD_STATES[kind]
    transform = make_transform()
    data = make_data(10)
    transform.inv(data)
    with pytest.raises(ValueError, match=message):
        transform.load_state_dict({"_extra_state": state})
    assert (transform.n_steps, transform.gamma) == (N_STEPS, 0.9)
    assert torch.equal(transform.flush()["observation"], data["observation"][:, 7:])


def test_to_moves_the_frames_and_keeps_their_dtypes():
    data = make_data(10)
    data.auto_device_()
    transform = make_transform()
    transform.inv(data)
    kinds = {path: (leaf.dtype, leaf.shape) for path, leaf in transform._carry.leaves.items()}
    for move in (lambda: transform.to(torch.float64), transform.half, lambda: transform.to("cpu", torch.bfloat16)):
        assert move() is transform
        assert {path: (leaf.dtype, leaf.shape) for path, leaf in transform._carry.leaves.items()} == kinds
    buffer = ReplayBuffer(storage=LazyTensorStorage(100, ndim=2), transform=transform)
    buffer.transform.to("meta")
    assert {leaf.device.type for leaf in transform._carry.leaves.values()} == {"meta"}
    assert transform._buffer.device == torch.device("meta")
    # which is where the data must be now
    with pytest.raises(ValueError, match=r"observation.* on meta, got .* on cpu"):
        transform.inv(data)
    assert transform.inv(data.to("meta")).batch_size == (2, 10)


def test_a_stream_goes_on_where_another_backend_ended():
    data = make_data(30)
    whole = make_transform().inv(data)
    with kernels():
        data = data.to(torch.get_default_device())
        transform = make_transform()
        first = transform.inv(data[:, :11])
    state = transform.state_dict()
    resumed = make_transform(backend="reference")
    resumed.load_state_dict(state)
    out = torch.cat([first, resumed.inv(data[:, 11:])], 1).to("cpu")
    assert torch.equal(out["next", "observation"], whole["next", "observation"])
    assert torch.equal(out["steps_to_next_obs"], whole["steps_to_next_obs"])
