"""What is wrong is said at once, in words, and nothing is stored."""

import copy
import gc
import pickle
from functools import partial

import pytest
import torch
from paths import EITHER
from rings import TRAJ_KEY, Drawn, Ring, assert_every_frame, everything, make_buffer, make_stream
from rollouts import extend, frames, make_rollout
from tensordict import LazyStackedTensorDict, NonTensorStack, TensorDict, UnbatchedTensor
from torchrl.data import (
    HERReplayBuffer,
    ImmutableDatasetWriter,
    LazyTensorStorage,
    ListStorage,
    ReplayBuffer,
    ReplayBufferEnsemble,
    SamplerWithoutReplacement,
    TensorDictReplayBuffer,
)
from torchrl.envs.transforms import Compose, ObservationNorm, SignTransform, Transform

from multistep_triton import MultiStep, MultiStepTransform, NStepReplayBuffer
from multistep_triton import carry as carry_module
from multistep_triton import frames as frames_module

REWARD, NEXT, DONE = ("next", "reward"), ("next", "observation"), ("next", "done")


# Time or agents


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("shape", [(2, 5), (5, 1), (1, 1)], ids=str)
def test_rollouts_of_environments_need_a_storage_of_two_dimensions(shape, filled):
    buffer = make_buffer(20)
    if filled:
        buffer.extend(make_rollout((), 4))
    before = len(buffer)
    message = r"got \[\d, \d\]: for several environments use a storage of ndim=2 and data \[num_envs, T\]"
    with pytest.raises(ValueError, match=message):
        buffer.extend(make_rollout(shape[:-1], shape[-1]))
    assert len(buffer) == before
    both = make_buffer(20, shape[:-1])
    both.extend(make_rollout(shape[:-1], shape[-1]))
    assert len(both) == torch.Size(shape).numel()


@pytest.mark.parametrize("kind", [ReplayBuffer, TensorDictReplayBuffer])
def test_a_single_frame_is_added_and_not_extended_with(kind):
    frame, transform = make_rollout((), 1)[0], MultiStepTransform(2, 0.9)
    buffer = kind(storage=LazyTensorStorage(8), transform=transform)
    for _ in range(3):
        with pytest.raises(ValueError, match=r"must be of batch size \[\*B, T\] to extend a buffer, got \[\]"):
            buffer.extend(frame)
        assert transform.frames_held == 0
    buffer.extend(frame.unsqueeze(-1))
    assert transform.frames_held == 1


# Trajectory ids


def flat_batches(envs=2, count=4, calls=3):
    """Batches of a collector, flattened as torchrl's scripts do: frames of one environment, then of the next one."""
    t = torch.arange(float(count * calls)).expand(envs, -1) + 100 * torch.arange(envs).view(-1, 1)
    next_ = {"observation": t + 1, "reward": t, "done": torch.zeros(envs, count * calls, dtype=torch.bool)}
    ids = torch.arange(envs).view(-1, 1).expand(envs, count * calls).clone()
    data = TensorDict({"observation": t, "next": next_, "collector": {"traj_ids": ids}}, [envs, count * calls])
    return [part.reshape(-1) for part in data.split(count, 1)]


def assert_no_window_crosses(sample):
    """The next observation is as many frames ahead as the window has."""
    assert torch.equal(sample[NEXT] - sample["observation"], sample["steps_to_next_obs"].float())


@EITHER
@pytest.mark.usefixtures("where")
def test_ids_that_collectors_write_are_found():
    stored = ReplayBuffer(
        storage=LazyTensorStorage(40),
        sampler=SamplerWithoutReplacement(shuffle=False),
        transform=MultiStepTransform(3, 1.0),
    )
    sampled = make_buffer(40, gamma=1.0)
    for batch in flat_batches():
        stored.extend(batch), sampled.extend(batch)
        assert_no_window_crosses(MultiStep(1.0, 3)(batch))
    stored.transform[0].flush_into(stored)
    for buffer in (stored, sampled):
        sample = buffer.sample(24)
        assert_no_window_crosses(sample)
        assert sample["steps_to_next_obs"].tolist() == [3, 3, 2, 1] * 6
        assert sample["collector", "traj_ids"].tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4


def test_ids_can_be_left_alone():
    for kind in (lambda **keys: MultiStepTransform(3, 1.0, **keys), lambda **keys: make_buffer(40, **keys)):
        assert kind().traj_key == "auto"
        assert kind(traj_key=None).traj_key is None
    out = MultiStep(1.0, 3, traj_key=None)(flat_batches()[0])
    assert out["steps_to_next_obs"].tolist() == [3, 3, 3, 3, 3, 3, 2, 1]
    # an entry of that name is found as a key
    data = frames([1.0] * 4, [False] * 4, auto=torch.tensor([1, 1, 2, 2]))
    assert MultiStep(1.0, 3, traj_key=("auto",))(data)["steps_to_next_obs"].tolist() == [2, 1, 2, 1]


def test_ids_that_are_no_integers():
    data = frames([1.0] * 4, [False] * 4, collector={"traj_ids": torch.zeros(4)})
    for use in (MultiStep(1.0, 3), make_buffer(8).extend, MultiStepTransform(3, 1.0).inv):
        with pytest.raises(
            TypeError, match=r"trajectory ids \('collector', 'traj_ids'\), named by traj_key, must be int"
        ):
            use(data)
    assert MultiStep(1.0, 3, traj_key=None)(data)["steps_to_next_obs"].tolist() == [3, 3, 2, 1]


# One stream, one owner


def numbered(begin, end):
    t = torch.arange(float(begin), end).view(-1, 1)
    done = torch.zeros(end - begin, 1, dtype=torch.bool)
    return TensorDict({"observation": t, "next": {"observation": t + 1, "reward": t, "done": done}}, [end - begin])


def buffer_with(transform):
    return ReplayBuffer(storage=LazyTensorStorage(32), transform=transform)


OWN = "a MultiStepTransform must belong to one replay buffer, as it holds back frames of one stream"


@pytest.mark.parametrize(
    "give", [lambda each: each, Compose, lambda each: Compose(Compose(each))], ids=["bare", "in", "deep"]
)
@pytest.mark.parametrize("held", [False, True], ids=["nothing held back", "frames held back"])
def test_one_transform_in_two_buffers(give, held):
    transform = MultiStepTransform(3, 1.0)
    given = give(transform)
    demos = buffer_with(given)
    if held:
        demos.extend(numbered(0, 6))
    for into in (given, transform, lambda: None):
        if into is transform or into is given:
            with pytest.raises(ValueError, match=OWN):
                buffer_with(into)
    for add in ("append_transform", "insert_transform"):
        own, arguments = buffer_with(None), [0] if add == "insert_transform" else []
        with pytest.raises(ValueError, match=OWN):
            getattr(own, add)(*arguments, transform)
        own.extend(numbered(100, 106))
        assert own[:]["observation"].flatten().tolist() == [100, 101, 102, 103, 104, 105]
    # the first one goes on
    demos.extend(numbered(6, 10) if held else numbered(0, 10))
    assert demos[:]["observation"].flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]
    own = buffer_with(transform.clone())
    own.transform[0].clear()
    own.extend(numbered(100, 106))
    assert own[:]["observation"].flatten().tolist() == [100, 101, 102]


def test_a_transform_whose_buffer_is_gone():
    transform = MultiStepTransform(3, 1.0)
    first = buffer_with(transform)
    first.extend(numbered(0, 6))
    del first
    with pytest.raises(ValueError, match=OWN):
        buffer_with(transform)
    transform.clear()
    gc.collect()
    second = buffer_with(transform)
    second.extend(numbered(100, 106))
    assert second[:]["observation"].flatten().tolist() == [100, 101, 102]
    # what is asked of it besides changes no owner
    second.transform.eval(), second.transform.train(), transform.eval()
    second.extend(numbered(106, 107))
    assert len(second) == 4


@pytest.mark.parametrize("add", ["append_transform", "insert_transform"])
@pytest.mark.parametrize("how", ["loaded", "copied", "put back"])
def test_a_transform_that_holds_frames_is_added_to_a_buffer(add, how):
    """Torchrl asks it twice before it is in the buffer's list."""
    transform = MultiStepTransform(3, 1.0)
    first = buffer_with(transform)
    first.extend(numbered(0, 6))
    if how == "loaded":
        given, buffer = MultiStepTransform(3, 1.0), buffer_with(None)
        given.load_state_dict(transform.state_dict())
    elif how == "copied":
        given, buffer = copy.deepcopy(transform), buffer_with(None)
    else:
        given, buffer = transform, first
        del buffer.transform.transforms[0]
    getattr(buffer, add)(*([0] if add == "insert_transform" else []), given)
    buffer.extend(numbered(6, 9))
    assert buffer[:]["observation"].flatten().tolist()[-3:] == [3, 4, 5]


def test_copies_belong_to_copies():
    buffer = buffer_with(MultiStepTransform(3, 1.0))
    buffer.extend(numbered(0, 6))
    twin = copy.deepcopy(buffer)
    for each in (buffer, twin):
        each.extend(numbered(6, 10))
        assert each[:]["observation"].flatten().tolist() == list(range(7))


def test_a_transform_that_gets_into_another_buffer_unseen():
    """Lists of transforms tell nobody what is appended to them."""
    transform, shared = MultiStepTransform(3, 1.0), Compose()
    first, second, third, fourth = (buffer_with(each) for each in (transform, None, shared, shared))
    second.transform.append(transform)
    shared.append(MultiStepTransform(3, 1.0))
    for own, other in ((first, second), (third, fourth)):
        own.extend(numbered(0, 10))
        with pytest.raises(ValueError, match=OWN):
            other.extend(numbered(100, 110))
        assert not len(other)
        own.extend(numbered(10, 12))
        assert own[:]["observation"].flatten().tolist() == list(range(9))


def test_a_transform_that_is_in_a_list_twice():
    transform = MultiStepTransform(3, 1.0)
    buffer = buffer_with(transform)
    buffer.append_transform(transform)
    with pytest.raises(ValueError, match="must be in a buffer's list once, got it twice: leave one of them out"):
        buffer.extend(numbered(0, 10))
    assert transform._buffer is None


def test_a_transform_that_its_buffer_has_no_more():
    transform = MultiStepTransform(3, 1.0)
    with pytest.raises(ValueError, match="predictable batch-size") as failed:
        ReplayBuffer(
            storage=LazyTensorStorage(8), sampler=SamplerWithoutReplacement(drop_last=True), transform=transform
        )
    assert failed.tb  # in which the buffer that could not be made lives on
    first = buffer_with(transform)
    first.transform.pop(0)
    second = buffer_with(transform)
    second.extend(numbered(0, 6))
    second.transform.pop(0)
    with pytest.raises(ValueError, match=rf"{OWN}.+: clear\(\) it"):
        first.append_transform(transform)


OTHER_STORES = {
    "overwriting": (lambda buffer: buffer.__setitem__(slice(0, 2), numbered(0, 2)), "frames that are overwritten"),
    "writing all": (lambda buffer: buffer.write_all(numbered(0, 5)), "frames that are overwritten"),
    "an ensemble": (
        lambda buffer: ReplayBufferEnsemble(buffer, buffer_with(None), routing_dim=0).extend(
            torch.stack([numbered(0, 10), numbered(0, 10)])
        ),
        "a ReplayBufferEnsemble must not store",
    ),
}


@pytest.mark.parametrize("way", OTHER_STORES)
def test_frames_that_do_not_follow_the_others(way):
    store, message = OTHER_STORES[way]
    buffer = buffer_with(MultiStepTransform(3, 1.0))
    buffer.extend(numbered(0, 8))
    with pytest.raises(TypeError, match=message):
        store(buffer)
    buffer.extend(numbered(8, 10))
    assert buffer[:]["observation"].flatten().tolist() == list(range(7))


@pytest.mark.parametrize("kind", [ReplayBuffer, TensorDictReplayBuffer])
def test_time_is_what_a_buffer_is_extended_along(kind):
    rollout = make_rollout((2,), 10)
    message = r"data must have time where the buffer is extended, .+: for several environments use a storage of ndim=2"
    for arguments in ({"storage": LazyTensorStorage(40)}, {"storage": LazyTensorStorage(40, ndim=2), "dim_extend": 0}):
        buffer = kind(transform=MultiStepTransform(3, 1.0), **arguments)
        with pytest.raises(ValueError, match=message):
            buffer.extend(rollout)
        assert not len(buffer) and buffer.transform[0]._buffer is None
    # a list may have rows of any length
    assert len(kind(storage=ListStorage(40), transform=MultiStepTransform(3, 1.0)).extend(rollout)) == 2


@pytest.mark.filterwarnings("ignore:Using `add:UserWarning")
@pytest.mark.parametrize("kind", [ReplayBuffer, TensorDictReplayBuffer])
def test_add_takes_a_frame_of_every_environment(kind):
    buffer = kind(storage=ListStorage(40), transform=MultiStepTransform(2, 1.0))
    for t in range(6):
        buffer.add(torch.stack([numbered(t, t + 1)[0], numbered(100 + t, 101 + t)[0]]))
    assert buffer[1]["observation"].flatten().tolist() == [1, 101]
    assert buffer[1][REWARD].flatten().tolist() == [3, 203]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_look_around_them(copied):
    """A worker's buffer was told of nothing."""
    twin = copied(buffer_with(Compose(MultiStepTransform(3, 1.0), SignTransform(in_keys=[REWARD]))))
    with pytest.raises(ValueError, match=r"transform must leave rewards .+ got SignTransform"):
        twin.extend(numbered(0, 6))
    assert not len(twin)


def test_what_was_refused_belongs_to_nobody():
    transform = MultiStepTransform(3, 1.0)
    relabelled = HERReplayBuffer(lambda data: data[REWARD], storage=LazyTensorStorage(8))
    with pytest.raises(ValueError, match="must not be in a HERReplayBuffer"):
        relabelled.append_transform(transform)
    assert len(buffer_with(transform).extend(numbered(0, 6))) == 3


@pytest.mark.filterwarnings("ignore:Loading the storage:UserWarning")
def test_a_storage_that_holds_single_steps():
    single, late = buffer_with(None), buffer_with(None)
    for buffer in (single, late):
        buffer.extend(numbered(0, 6))
    late.append_transform(MultiStepTransform(3, 1.0))
    loaded = buffer_with(MultiStepTransform(3, 1.0))
    loaded.extend(numbered(0, 2))
    loaded.storage.load_state_dict(single.storage.state_dict())
    for buffer in (late, loaded):
        for use in (lambda buffer: buffer.extend(numbered(6, 12)), lambda buffer: buffer.sample(4)):
            with pytest.raises(ValueError, match="storage must hold n-step transitions alone, got single steps"):
                use(buffer)
        assert len(buffer) == 6
    transform = MultiStepTransform(3, 1.0)
    transform.inv(numbered(0, 6))
    with pytest.raises(ValueError, match="storage must hold n-step transitions alone, got single steps"):
        transform.flush_into(single)
    assert len(single) == 6 and transform._buffer.batch_size == (3,)


@pytest.mark.parametrize("kind", [ReplayBuffer, TensorDictReplayBuffer])
def test_add_stores_a_single_frame(kind):
    """After ``n_steps`` was made smaller, several come out."""
    buffer = kind(storage=LazyTensorStorage(32), transform=MultiStepTransform(5, 1.0))
    for t in range(5):
        buffer.add(numbered(t, t + 1)[0])
    buffer.transform[0].n_steps = 3
    with pytest.raises(ValueError, match="a single frame must find at most n_steps = 3 frames held back, got 5"):
        buffer.add(numbered(5, 6)[0])
    assert not len(buffer)
    buffer.extend(numbered(5, 6))
    buffer.add(numbered(6, 7)[0])
    assert buffer[:]["observation"].flatten().tolist() == [0, 1, 2, 3]


def test_a_transform_that_is_inverted():
    for add, arguments in (("append_transform", []), ("insert_transform", [0])):
        with pytest.raises(ValueError, match="invert must be False for an n-step transform"):
            getattr(buffer_with(None), add)(*arguments, MultiStepTransform(3, 1.0), invert=True)


TWICE = "data must hold single steps, got n-step transitions, which hold 'steps_to_next_obs'"


def test_data_that_is_n_step_already():
    once = MultiStep(gamma=1.0, n_steps=3)(numbered(0, 10))
    stored, sampled = buffer_with(MultiStepTransform(3, 1.0)), make_buffer(16)
    for use in (stored.extend, sampled.extend, MultiStep(1.0, 3), MultiStepTransform(3, 1.0).inv):
        with pytest.raises(ValueError, match=TWICE):
            use(once)
    with pytest.raises(ValueError, match=TWICE):
        sampled.add(once[0])
    assert not len(stored) and not len(sampled)
    # the frames held back stay
    transform = MultiStepTransform(3, 1.0)
    transform.inv(numbered(0, 6))
    with pytest.raises(ValueError, match=TWICE):
        transform.inv(once)
    assert transform.inv(numbered(6, 8))["observation"].flatten().tolist() == [3, 4]
    twice = buffer_with(Compose(MultiStepTransform(2, 1.0), MultiStepTransform(3, 1.0)))
    with pytest.raises(ValueError, match="got MultiStepTransform, which makes n-step transitions of what it gets"):
        twice.extend(numbered(0, 6))
    assert not len(twice)


# Entries that come late


ROLES = {
    "mask": lambda count: torch.ones(count, dtype=torch.bool),
    TRAJ_KEY: lambda count: torch.zeros(count, dtype=torch.int64),
    ("next", "truncated"): lambda count: torch.zeros(count, 1, dtype=torch.bool),
    ("next", "cats", "done"): lambda count: torch.zeros(count, 1, dtype=torch.bool),
}


@pytest.mark.parametrize("cuts", [(4,), (8, 3)], ids=["not full", "full"])
@pytest.mark.parametrize("key", ROLES, ids=str)
def test_a_role_that_comes_late_or_goes(key, cuts):
    stream = make_stream((), 40)
    if key == ("next", "truncated"):
        stream = stream.exclude(key)
    with_role = stream.clone().set(key, ROLES[key](40))
    for before, after, error, message in (
        (stream, with_role, ValueError, "data must not hold .+, which windows read and the frames stored before lack"),
        (with_role, stream, KeyError, "data must hold"),
    ):
        ring, buffer = Ring(before, 8), make_buffer(8)
        for cut in cuts:
            buffer.extend(ring.take(cut))
        dones = [each for each in ("done", "terminated", "truncated") if ("next", each) in before.keys(True)]
        for _ in range(2):
            with pytest.raises(error, match=message):
                buffer.extend(after[ring.written : ring.written + 2])
            assert_every_frame(buffer, ring, done_keys=dones)
        buffer.extend(ring.take(3))
        assert_every_frame(buffer, ring, done_keys=dones)
        # in an empty buffer it may come
        buffer.empty()
        if after is with_role:
            ring.empty()
            ring.stream = after
            buffer.extend(ring.take(5))
            dones = [each for each in ("done", "terminated", "truncated") if ("next", each) in after.keys(True)]
            assert_every_frame(buffer, ring, done_keys=dones)


@pytest.mark.parametrize("key", [NEXT, "action", ("next", "late"), "name"], ids=str)
@pytest.mark.parametrize("of", [lambda each: each, lambda each: each[0]], ids=["extend", "add"])
def test_an_entry_that_is_stored_may_not_be_missing(of, key):
    """Its slot would keep the frame before."""
    stream = make_stream((), 40).set(("next", "late"), torch.zeros(40, dtype=torch.bool))
    if key == "name":
        stream = make_stream((), 40).set("name", NonTensorStack(*map(str, range(40))))
    ring, buffer = Ring(stream, 8), make_buffer(8)
    buffer.extend(ring.take(5))
    data = of(stream[5:9].exclude(key))
    store = buffer.extend if data.ndim else buffer.add
    with pytest.raises(KeyError, match=r"data must hold .+; the storage has .+ give it a new one \(set_storage\)"):
        store(data)
    if key == "name":
        assert everything(buffer).get("name").tolist() == list("01234")
        return
    assert_every_frame(buffer, ring)


ODD = {
    "without a flag": (lambda frame: frame.exclude(("next", "truncated")), r"the same entries in all .+ in some alone"),
    "with a mask": (lambda frame: frame.set("mask", torch.tensor(True)), r"the same entries in all .+\('mask',\)"),
    "of another dtype": (lambda frame: frame.set(REWARD, frame[REWARD].double()), r"must be torch.float32 .+float64"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("filled", [0, 5])
def test_frames_of_a_lazy_stack_must_be_alike(filled, kind):
    stream = make_stream((), 40)
    ring, buffer = Ring(stream, 8), make_buffer(8)
    if filled:
        buffer.extend(ring.take(filled))
    spoil, message = ODD[kind]
    elements = [frame.clone() for frame in stream[filled : filled + 4].unbind(0)]
    good = LazyStackedTensorDict(*(frame.clone() for frame in elements))
    elements[2] = spoil(elements[2])
    with pytest.raises(ValueError, match=message):
        buffer.extend(LazyStackedTensorDict(*elements))
    assert len(buffer) == filled
    buffer.extend(good)
    ring.take(4)
    assert_every_frame(buffer, ring)


def test_nothing_to_store():
    buffer = make_buffer(8, (2,))
    for shape in ((2, 0), (0, 3)):
        assert buffer.extend(make_rollout(shape[:-1], shape[-1])).shape == (0, 2)
        assert not len(buffer)


@pytest.mark.parametrize("index", [torch.ones(8, dtype=torch.bool), torch.zeros(8)], ids=["bool", "float"])
def test_what_a_sampler_draws_must_be_integers(index):
    buffer = make_buffer(8)
    buffer.extend(make_stream((), 8))
    buffer.set_sampler(Drawn(index))
    with pytest.raises(TypeError, match="sampler must draw integers, got indices of torch"):
        buffer.sample(8)


def test_what_plays_no_role_may_come_late():
    buffer = make_buffer(8)
    buffer.extend(make_stream((), 4))
    buffer.extend(make_stream((), 2).set("extra", torch.ones(2)))
    assert everything(buffer)["extra"].tolist() == [0, 0, 0, 0, 1, 1]


# Wrong at once, not when it is sampled


WRONG = {
    "done is an integer": (
        DONE,
        lambda done: done.long(),
        TypeError,
        r"done \('next', 'done'\) must be bool, got torch.int64",
    ),
    "done is a float": (DONE, lambda done: done.float(), TypeError, r"done \('next', 'done'\) must be bool"),
    "another flag is an integer": (
        ("next", "truncated"),
        lambda done: done.int(),
        TypeError,
        r"must be bool, got torch.int32",
    ),
    "done of another shape": (
        DONE,
        lambda done: done.expand(*done.shape[:-1], 3).clone(),
        ValueError,
        r"done \('next', 'done'\) must have shape",
    ),
    "a complex reward": (
        REWARD,
        lambda reward: reward.to(torch.complex64),
        TypeError,
        "must be floating point, integer or bool",
    ),
    "a mask of numbers": (
        "mask",
        lambda mask: torch.ones(mask.shape),
        TypeError,
        "mask .+ must be bool, got torch.float32",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_a_role_that_is_wrong_is_not_stored(kind, batch):
    key, spoil, error, message = WRONG[kind]
    stream = make_stream(batch, 20, mask=True)
    buffer, wrong = make_buffer(8, batch), stream[..., :4].clone()
    wrong[key] = spoil(wrong[key])
    for use in (lambda: buffer.extend(wrong), lambda: buffer.add(wrong[..., 0])):
        with pytest.raises(error, match=message):
            use()
        assert not len(buffer)
    ring = Ring(stream, 8)
    for cut in (3, 4, 6):
        buffer.extend(ring.take(cut))
        assert_every_frame(buffer, ring)


@pytest.mark.parametrize("kind", ["done is a float", "a complex reward", "a mask of numbers"])
@pytest.mark.parametrize(
    "renew", [lambda buffer: buffer.set_storage(LazyTensorStorage(8)), NStepReplayBuffer.empty], ids=["new", "emptied"]
)
def test_roles_are_looked_at_whenever_the_storage_is_empty(renew, kind):
    key, spoil, error, message = WRONG[kind]
    stream, buffer = make_stream((), 20, mask=True), make_buffer(8)
    wrong = stream[:4].clone()
    wrong[key] = spoil(wrong[key])
    buffer.extend(stream[:4].exclude("mask"))
    renew(buffer)
    with pytest.raises(error, match=message):
        buffer.extend(wrong)
    assert not len(buffer)


def test_a_window_must_find_room():
    message = r"storage must have at least n_steps = 3 slots per environment, got max_size = 2: 2 slots"
    with pytest.raises(ValueError, match=message):
        make_buffer(2)
    with pytest.raises(ValueError, match="at least n_steps = 5 slots"):
        make_buffer(4, n_steps=(1, 5))
    # of several environments, slots are known when data comes
    buffer = NStepReplayBuffer(n_steps=3, gamma=1.0, storage=LazyTensorStorage(8, ndim=2), batch_size=4)
    message = r"at least n_steps = 3 slots per environment, got max_size = 8 for all 4 of them: 2 slots"
    for count in (1, 5):
        with pytest.raises(ValueError, match=message):
            buffer.extend(make_rollout((4,), count))
        assert not len(buffer)
    buffer.extend(make_rollout((2,), 5))
    with pytest.raises(
        ValueError, match=r"at least n_steps = 9 slots per environment, got max_size = 8 for all 2 of them: 4"
    ):
        buffer.n_steps = 9
    assert buffer.n_steps == 3
    buffer.n_steps = 4
    # as far as there are frames
    assert buffer.sample(n_steps=100)["steps_to_next_obs"].max() <= 4
    # what nobody writes into has as many frames as it has
    short = NStepReplayBuffer(
        n_steps=10,
        gamma=1.0,
        storage=buffer.storage,
        writer=ImmutableDatasetWriter(),
        sampler=SamplerWithoutReplacement(),
    )
    assert short.sample(8)["steps_to_next_obs"].max() <= 4


def test_a_storage_must_be_given():
    for kind in ({}, {"storage": None}):
        with pytest.raises(
            TypeError, match=r"storage must be a TensorStorage, such as LazyTensorStorage\(max_size\), got None"
        ):
            NStepReplayBuffer(n_steps=3, gamma=1.0, **kind)


def test_a_buffer_that_is_put_together_late_is_refused_every_time():
    buffer = NStepReplayBuffer(
        n_steps=30, gamma=1.0, storage=lambda: LazyTensorStorage(8), delayed_init=True, batch_size=4
    )
    with pytest.raises(ValueError, match="at least n_steps = 30 slots"):
        buffer.extend(make_rollout((), 4))
    late = NStepReplayBuffer(
        n_steps=3, gamma=1.0, storage=LazyTensorStorage(8), transform_factory=lambda: MultiStepTransform(3, 1.0)
    )
    for _ in range(2):
        with pytest.raises((ValueError, TypeError), match="must"):
            late.extend(make_rollout((), 4))


def test_sample_takes_what_torchrls_takes(monkeypatch):
    """A version to come has other arguments."""
    taken = []

    def sample(self, batch_size=None, return_info=False, *, wait=False, timeout=None, cancel_event=None):
        taken.append((batch_size, return_info, wait, timeout, cancel_event))
        return self._read({"index": torch.arange(4)}, self._order.position())

    buffer = make_buffer(8)
    buffer.extend(make_stream((), 5))
    monkeypatch.setattr(TensorDictReplayBuffer, "sample", sample)
    out = buffer.sample(4, wait=True, timeout=1.5, cancel_event="event", n_steps=1)
    assert out["steps_to_next_obs"].tolist() == [1, 1, 1, 1]
    buffer.sample(4, True)
    assert taken == [(4, False, True, 1.5, "event"), (4, True, False, None, None)]


# Streams and graphs of a GPU, as far as they can be seen without one


class Stream:
    def __init__(self):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)

    def __reduce__(self):
        raise TypeError("cannot pickle 'torch.Stream' object")


@EITHER
@pytest.mark.usefixtures("where")
def test_a_window_that_goes_on_on_another_stream(monkeypatch):
    """The frames held back are of the one before: their memory is kept until what reads them is through.

    And that of the ring which takes turns with theirs.
    """
    one, other = Stream(), Stream()
    current, recorded = [one], []
    for module in (carry_module, frames_module):
        monkeypatch.setattr(module, "current_stream", lambda leaves: current[0])
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda leaf, stream: recorded.append((leaf.data_ptr(), stream)))
    transform, data = MultiStepTransform(3, 1.0), make_rollout((), 40)
    transform.inv(data[:10])
    transform.inv(data[10:20])
    assert not recorded and not one.waited

    def pickled():
        return pickle.loads(pickle.dumps(transform))

    copies = [transform.clone, partial(copy.deepcopy, transform), pickled]
    for use in (lambda: transform.inv(data[20:22]), *copies, transform.get_extra_state, transform.flush):
        carry, stream = transform._carry, transform._carry.stream
        held = [*carry.leaves.values(), *carry.spare.values()]
        current[0] = other if stream is one else one
        used = use()
        assert {*current[0].waited} == {stream}
        assert {*recorded} == {(leaf.data_ptr(), current[0]) for leaf in held}
        current[0].waited.clear(), recorded.clear()
        if use in copies:
            # What was copied was written where the copy was made.
            assert used._carry.stream is current[0]
            assert (used.inv(data[20:22]) == copy.deepcopy(transform).inv(data[20:22])).all()
            current[0].waited.clear(), recorded.clear()


def test_while_a_graph_is_captured(monkeypatch):
    transform, buffer, data = MultiStepTransform(3, 1.0), make_buffer(16), make_rollout((), 10)
    for each in (transform.inv, buffer.extend):
        each(data)
    held, count = transform._buffer, len(buffer)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for call in (lambda: transform.inv(data), lambda: buffer.extend(data), lambda: buffer.sample(4)):
            with pytest.raises(RuntimeError, match="must be called outside of the capture of a CUDA graph: how far"):
                call()
        # what holds nothing back may be captured
        MultiStep(1.0, 3)(data)
    assert (transform._buffer == held).all() and len(buffer) == count
    assert extend(transform, data, [10]).batch_size == (10,)


# Entries that have no value of every frame


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        (lambda: torch.eye(10).to_sparse(), "one of torch.sparse_coo"),
        (lambda: torch.eye(10).to_sparse_csr(), "one of torch.sparse_csr"),
        (lambda: torch.nested.nested_tensor([torch.ones(2)] * 10), "a nested one"),
        (lambda: UnbatchedTensor(torch.arange(10)), "an UnbatchedTensor"),
    ],
    ids=["sparse", "csr", "nested", "unbatched"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
def test_what_is_not_dense_is_refused_though_a_dense_one_came_before(entry, kind):
    for call in (MultiStepTransform(3, 1.0).inv, MultiStep(1.0, 3)):
        data = frames([1.0] * 10, [False] * 10)
        data["entry"] = torch.eye(10)
        call(data)
        odd = data.copy()
        odd._tensordict["entry"] = entry()
        with pytest.raises(TypeError, match=rf"entry \('entry',\) must be a dense tensor, got {kind}"):
            call(odd)


def test_windows_that_do_not_fit_the_group_that_they_are_written_to():
    flags, rewards = torch.zeros(2, 6, 1, dtype=torch.bool), torch.ones(2, 6, 1)
    group = TensorDict({"observation": torch.zeros(2, 6, 3)}, [2, 6, 3])
    after = {"observation": torch.zeros(2, 6, 3), "done": flags.clone(), "reward": rewards.clone()}
    data = TensorDict({"group": group, "next": {"reward": rewards, "done": flags, "group": after}}, [2, 6])
    keys = {"reward_keys": ["reward", ("group", "reward")], "done_keys": ["done", ("group", "done")]}
    with pytest.raises(ValueError, match=r"must have a batch size of its windows, \[2, 6\], got \[2, 6, 3\]"):
        MultiStep(1.0, 3, **keys)(data)


# Buffers in the transforms of buffers


def test_a_buffer_that_another_one_extends_while_frames_are_added_to_it():
    inner = buffer_with(MultiStepTransform(2, 1.0))

    class Tee(Transform):
        def _inv_call(self, tensordict):
            inner.extend(tensordict)
            return tensordict

    outer = TensorDictReplayBuffer(storage=ListStorage(100), transform=Tee())
    for begin in (0, 5, 10):
        outer.add(numbered(begin, begin + 5))
    assert inner[:]["observation"].flatten().tolist() == list(range(13))
    sampled, overwritten = make_buffer(40), ReplayBuffer(storage=LazyTensorStorage(40))
    overwritten.extend(numbered(0, 5))
    inner = sampled
    overwritten.append_transform(Tee())
    for begin in (0, 5, 10):
        overwritten[0:5] = numbered(begin, begin + 5)
    assert sampled[:]["observation"].flatten().tolist() == list(range(15))


def test_norms_that_were_made_in_inference_mode():
    buffer, sampled = buffer_with(MultiStepTransform(3, 1.0)), make_buffer(16)
    for each in (buffer, sampled):
        with torch.inference_mode():
            each.append_transform(ObservationNorm(loc=0.0, scale=2.0, in_keys=["observation"]))
        each.extend(numbered(0, 6))
        each.extend(numbered(6, 9))
    assert (len(buffer), len(sampled)) == (6, 9)
