"""Calls like one before, which are stored at once: whatever they hold, however it lies, and whoever writes between."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import EITHER, kernels
from rings import Ring, assert_every_frame, assert_sampled, kept_once, make_buffer, make_stream
from tensordict import LazyStackedTensorDict, TensorDict
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    RandomSampler,
    ReplayBuffer,
    RoundRobinWriter,
    TensorDictMaxValueWriter,
)

from multistep_triton import EquivalenceError, NStepReplayBuffer
from multistep_triton.kernels import store

LAYOUTS = {
    "in order": lambda leaf: leaf,
    "time first": lambda leaf: leaf.transpose(0, 1).contiguous().transpose(0, 1),
    "every other frame": lambda leaf: leaf.repeat_interleave(2, 1)[:, ::2],
    "a part of the features": lambda leaf: torch.cat((leaf, leaf), -1)[..., : leaf.shape[-1]],
    "expanded": lambda leaf: leaf[:1, :1].expand(leaf.shape),
    "an address that is no multiple": lambda leaf: torch.cat((leaf.flatten()[:1], leaf.flatten()))[1:].view(leaf.shape),
}


def stored_at_once(buffer):
    """Counts the calls that are."""
    calls, stores = [], buffer._store_at
    buffer._store_at = lambda *arguments: calls.append(1) or stores(*arguments)
    return calls


def assert_stored(buffer, parts, slots):
    """The newest frames lie where the index of a loop says, and each holds its slot."""
    for t, frame in enumerate(torch.cat(parts, -1).unbind(-1)):
        total = sum(part.shape[-1] for part in parts)
        if t >= total - slots:
            stored = buffer.storage[:][t % slots]
            for key, leaf in frame.items(True, True):
                where = stored[key] if frame.ndim < 2 else stored[key].transpose(0, 1)
                assert torch.equal(where, leaf), key
            assert (stored["index"] == t % slots).all()


@EITHER
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_data_that_lies_in_any_way(where, layout, batch):
    with where():
        buffer = make_buffer(6, batch)
        calls = stored_at_once(buffer)
        parts = []
        for seed, frames in enumerate((2, 1, 3, 6, 4)):
            part = make_stream(batch, frames, seed=seed)
            part["observation"] = torch.randn(*batch, frames, 3, 2)
            part["action"] = torch.randint(99, (*batch, frames, 5), dtype=torch.uint8)
            part["phase"] = torch.complex(*torch.randn(2, *batch, frames, 3))
            if batch:
                for key in ("observation", "action", "phase"):
                    part[key] = LAYOUTS[layout](part[key])
                part["conjugate"] = part["phase"].conj()
                part["negative"] = part["conjugate"].imag
            else:
                part["conjugate"], part["negative"] = part["phase"], part["phase"].imag.clone()
            index = buffer.extend(part)
            begin = sum(each.shape[-1] for each in parts)
            parts.append(part.clone())
            sizes = (frames, *reversed(batch)) if len(batch) > 1 else (frames, *batch)
            expected = torch.stack(torch.meshgrid(*map(torch.arange, sizes), indexing="ij"), -1).flatten(0, -2)
            expected[:, 0] = (expected[:, 0] + begin) % 6
            assert torch.equal(index, expected if batch else expected.squeeze(-1))
        assert len(calls) == 4
        assert_stored(buffer, parts, 6)


@settings(max_examples=30)
@given(
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    capacity=st.integers(3, 9),
    batch=st.sampled_from([(), (2,)]),
)
def test_calls_of_any_number_of_frames(cuts, capacity, batch):
    ring = Ring(make_stream(batch, sum(cuts)), capacity)
    buffer = make_buffer(capacity, batch)
    for frames in cuts:
        buffer.extend(ring.take(frames))
    assert_every_frame(buffer, ring)


@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
def test_storages_and_writers(storage):
    for writer in (None, RoundRobinWriter()):
        ring = Ring(make_stream((2,), 30), 8)
        size = {"storage": storage(16, ndim=2)}
        buffer = NStepReplayBuffer(n_steps=3, gamma=0.9, sampler=RandomSampler(), writer=writer, **size)
        calls = stored_at_once(buffer)
        for frames in (3, 4, 6, 1):
            buffer.extend(ring.take(frames))
        assert len(calls) == 3 and buffer.write_count == 14 and len(buffer) == 16
        assert sorted(set(buffer.sample(400)["number"].tolist())) == ring.numbers()


def test_who_writes_between_is_seen():
    """Another buffer that adds an entry, a checkpoint, and a copy: the next call is checked."""
    stream = make_stream((2,), 40)
    ring, buffer = Ring(stream, 8), make_buffer(8, (2,))
    calls = stored_at_once(buffer)
    for frames in (2, 3):
        buffer.extend(ring.take(frames))
    assert len(calls) == 1
    state = copy.deepcopy(buffer.state_dict())
    other = ReplayBuffer(storage=buffer.storage)
    other.extend(ring.take(2).transpose(0, 1).set("new", torch.zeros(2, 2)))
    with pytest.raises(KeyError, match=r"data must hold .*'new'"):
        buffer.extend(stream[:, 7:8])
    buffer = make_buffer(8, (2,))
    buffer.load_state_dict(state)
    ring = Ring(stream, 8)
    ring.take(5)
    for frames in (3, 1, 2):
        buffer.extend(ring.take(frames))
    assert_every_frame(buffer, ring)
    part = ring.take(2)
    for each in (copy.deepcopy(buffer), pickle.loads(pickle.dumps(buffer)), buffer):
        each.extend(part)
        assert_every_frame(each, ring)


class Told(RandomSampler):
    """Remembers what it is told of frames that were written."""

    def __init__(self):
        super().__init__()
        self.told = []

    def extend(self, index):
        self.told.append(("extend", index.clone()))

    def mark_update(self, index, *, storage=None):
        self.told.append(("mark_update", index.clone()))


def test_samplers_are_told_of_every_call():
    ring, sampler = Ring(make_stream((2,), 20), 8), Told()
    buffer = make_buffer(8, (2,), sampler=sampler)
    calls = stored_at_once(buffer)
    for frames in (2, 3, 5):
        sampler.told.clear()
        index = buffer.extend(ring.take(frames))
        assert [what for what, _ in sampler.told] == ["mark_update", "extend"]
        assert all(torch.equal(told, index) for _, told in sampler.told)
    assert len(calls) == 2


def test_a_lazy_group_whose_elements_differ_is_stored_or_refused_and_never_both():
    stream, buffer = make_stream((2,), 6), make_buffer(8, (2,))
    dense = stream.clone().set("info", TensorDict({"a": torch.zeros(2, 6)}, (2, 6)))
    some = [TensorDict({key: torch.zeros(3) for key in keys}, [3]) for keys in ("a", "ab")]
    uneven = stream[:, 1:4].clone().set("info", LazyStackedTensorDict(*some))
    buffer.add(dense[:, 0])
    count = len(buffer) + 6
    buffer.extend(uneven)
    assert len(buffer) == count
    buffer.extend(dense[:, 4:5])
    with pytest.raises(ValueError, match="must be in every element"):
        buffer.extend(uneven)
    assert (len(buffer), buffer.write_count) == (count + 2, 5)


def test_a_write_count_that_the_writer_was_given_is_counted_on():
    stream, buffer = make_stream((2,), 12), make_buffer(8, (2,))
    calls = stored_at_once(buffer)
    for begin in (0, 2):
        buffer.extend(stream[:, begin : begin + 2])
    state = buffer.writer.state_dict()
    buffer.extend(stream[:, 4:6])
    buffer.writer.load_state_dict(state)
    assert buffer.write_count == 4
    buffer.extend(stream[:, 6:8])
    assert buffer.write_count == 6
    assert len(calls) == 3


@EITHER
def test_frames_that_were_overwritten_and_not_counted_are_not_sampled(where, monkeypatch):
    with where():
        ring, buffer = Ring(make_stream((2,), 14), 8), make_buffer(8, (2,))
        buffer.extend(ring.take(4)), buffer.extend(ring.take(4))
        newest = ring.take(2)
        calls, advance = stored_at_once(buffer), buffer._order.advance

        def interrupted(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(buffer._order, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            buffer.extend(newest)
        assert calls == [1]
        assert buffer.write_count == 8
        with pytest.raises(RuntimeError, match="2 slots from 0 on"):
            buffer.sample(4)
        monkeypatch.setattr(buffer._order, "advance", advance)
        buffer.extend(newest)
        assert buffer.write_count == 10
        assert_every_frame(buffer, ring)


@EITHER
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("compact", [False, True])
def test_what_comes_after_the_newest_frame_is_not_that_of_one_which_was_not_counted(
    where, compact, capturable, monkeypatch
):
    with where():
        ring = Ring(kept_once(make_stream((2,), 30)), 8)
        buffer = make_buffer(8, (2,), sampler=RandomSampler(), compact=compact, capturable=capturable)
        for frames in (2, 1, 2) if compact else (4, 4, 1):
            buffer.extend(ring.take(frames))
        buffer.sample(4)

        def interrupted(*of):
            raise KeyboardInterrupt

        on_device = buffer.capturable and buffer._on_device([buffer._written])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(*(buffer._written, "add_") if on_device else (buffer._order, "advance"), interrupted)
            buffer.extend(ring.stream[:, 20:22])
        with pytest.raises(RuntimeError, match="of a write that failed.*: empty" if compact else "2 slots from 1 on"):
            buffer.sample(4)
        if compact:
            buffer.empty(), ring.empty()
        for frames in (2, 1):
            buffer.extend(ring.take(frames))
            assert_sampled(buffer.sample(16), ring)


def test_arguments_of_a_buffer_that_could_not_be_made():
    buffer = NStepReplayBuffer(
        n_steps=2,
        gamma=0.9,
        storage=lambda: LazyTensorStorage(10),
        writer=lambda: TensorDictMaxValueWriter(),
        delayed_init=True,
    )
    with pytest.raises(TypeError, match="writer must be a RoundRobinWriter"):
        buffer.extend(make_stream((), 3))
    buffer.n_steps = 3
    assert buffer.n_steps == 3


def test_data_that_is_not_alike_is_checked():
    stream = make_stream((2,), 20)
    buffer = make_buffer(8, (2,))
    buffer.extend(stream[:, :3]), buffer.extend(stream[:, 3:5])
    for data, message in [
        (stream[:, 5:6].clone().set("observation", stream[:, 5:6]["observation"].double()), "torch.float64"),
        (make_stream((3,), 1), "data must be of \\[2\\] rows"),
        (stream[:, 5:6].exclude("number"), "data must hold \\('number',\\)"),
        (stream[:, 5:6].clone().set("mask", torch.ones(2, 1, dtype=torch.bool)), "mask"),
    ]:
        with pytest.raises((ValueError, KeyError), match=message):
            buffer.extend(data)
    assert len(buffer) == 10
    # What keeps a graph is for torch to copy.
    data = stream[:, 5:6].clone()
    data["observation"].requires_grad_()
    calls = stored_at_once(buffer)
    buffer.extend(data)
    assert not calls and len(buffer) == 12


@pytest.mark.parametrize("fails_at", [0, 3])
def test_a_write_that_fails_on_the_way_is_undone(monkeypatch, fails_at):
    """Where it has overwritten some entries, frames are in parts until the next ones overwrite them wholly."""
    ring, buffer = Ring(make_stream((2,), 40), 8), make_buffer(8, (2,))
    for frames in (5, 4):
        buffer.extend(ring.take(frames))
    calls, write, count, done = stored_at_once(buffer), torch.Tensor.copy_, buffer.write_count, []

    def fail(self, *arguments):
        done.append(1)
        if len(done) > fails_at:
            raise MemoryError("no room")
        return write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", fail)
        with pytest.raises(MemoryError):
            buffer.extend(ring.stream[:, 9:11])
    assert buffer.write_count == count and len(buffer) == 16
    if fails_at:
        with pytest.raises(RuntimeError, match="overwritten frames in part"):
            buffer.sample(4)
    buffer.extend(ring.take(2))
    assert_every_frame(buffer, ring)
    assert len(calls) == 2


@pytest.mark.parametrize("priority_key", ["td_error", ("agents", "td_error")], ids=str)
def test_priorities_of_any_key(priority_key):
    """Data that has them is for torchrl to store, which asks the sampler."""
    ring, buffer = Ring(make_stream((2,), 20), 8), make_buffer(8, (2,), priority_key=priority_key)
    calls = stored_at_once(buffer)
    for frames in (2, 3):
        buffer.extend(ring.take(frames))
    assert len(calls) == 1
    assert_every_frame(buffer, ring)


def test_what_is_stored_with_a_graph_is_sampled_with_it():
    buffer, stream = make_buffer(8, (2,), sampler=RandomSampler()), make_stream((2,), 8)
    stream["observation"].requires_grad_()
    buffer.extend(stream)
    for _ in range(2):
        assert buffer.sample(4)["observation"].requires_grad


def test_a_sampler_of_ones_own_and_a_buffer_that_is_not_made_yet():
    buffer, stream = make_buffer(8, (2,), sampler=RandomSampler()), make_stream((2,), 8)
    buffer.extend(stream)
    buffer.sampler.sample = lambda storage, count: ((torch.arange(count), torch.zeros(count, dtype=torch.int64)), {})
    assert torch.equal(buffer.sample(4)["index"][:, 0], torch.arange(4))
    delayed = NStepReplayBuffer(
        n_steps=3, gamma=0.9, storage=lambda: LazyTensorStorage(16, ndim=2), batch_size=4, delayed_init=True
    )
    with pytest.raises(RuntimeError, match="empty"):
        delayed.sample()


def test_without_info_the_index_is_the_entry_that_is_stored():
    for writer, expected in ((None, (4,)), (RoundRobinWriter(), None)):
        buffer = make_buffer(8, (2,), sampler=RandomSampler(), writer=writer)
        buffer.extend(make_stream((2,), 8))
        with pytest.warns(match="include_info"):
            sample = buffer.sample(4, include_info=False)
        index = sample.get("index", None)
        assert (None if index is None else tuple(index.shape)) == expected
        assert buffer.sample(4)["index"].shape == (4, 2)


def test_verified():
    """``verify`` looks whether every frame lies where it belongs, and holds its slot."""

    def a_slot_on(data, ring, slot):
        return at(data, ring, slot + 1)

    def without_numbers(data, ring, slot):
        return at(data, ring._replace(numbers=ring.numbers.clone()), slot)

    at = store.store_frames
    for wrong, key, where in (
        (a_slot_on, "index", "where frames lie"),
        (without_numbers, "numbers", "slots of frames"),
    ):
        with kernels(), pytest.MonkeyPatch.context() as patch:
            buffer, stream = make_buffer(8, (2,), backend="verify"), make_stream((2,), 20)
            buffer.extend(stream[:, :3]), buffer.extend(stream[:, 3:7])
            patch.setattr("multistep_triton.kernels.launch.store_frames", wrong)
            with pytest.raises(EquivalenceError, match=f"differ at {where}") as raised:
                buffer.extend(stream[:, 7:10])
            assert raised.value.key == key


def test_a_tensordict_without_a_device_and_of_other_batch_sizes():
    buffer = make_buffer(8, (2,))
    for frames in (2, 3, 1):
        part = make_stream((2,), frames)
        after = TensorDict(dict(part["next"].items()), batch_size=[2])
        data = TensorDict({**dict(part.items()), "next": after}, batch_size=[2, frames])
        buffer.extend(data)
    assert len(buffer) == 12


@pytest.mark.parametrize("before", [2, 8], ids=["room", "a full ring"])
@pytest.mark.parametrize("where", ["extend", "mark_update"])
@pytest.mark.parametrize("kernel", [False, True])
def test_a_sampler_that_fails_leaves_no_frames(before, where, kernel, monkeypatch):
    def fail(*arguments, **more):
        raise ValueError("no room")

    with kernels() if kernel else nullcontext():
        sampler = RandomSampler()
        buffer, stream = make_buffer(8, (2,), sampler=sampler), make_stream((2,), 20)
        buffer.extend(stream[:, :before]), buffer.extend(stream[:, before : before + 2])
        held = len(buffer)
        with monkeypatch.context() as patch:
            patch.setattr(sampler, where, fail)
            with pytest.raises(ValueError, match="no room"):
                buffer.extend(stream[:, before + 2 : before + 4])
        assert len(buffer) == held
        if before == 8:
            with pytest.raises(RuntimeError, match="overwritten frames in part"):
                buffer.sample(4)
        buffer.extend(stream[:, before + 2 : before + 4])
        assert buffer.write_count == before + 4
        slots = (torch.arange(before + 4 - min(before + 4, 8), before + 4)) % 8
        numbers = buffer.storage[:]["number"].reshape(8, 2)[slots] if before == 8 else buffer[:]["number"]
        expected = stream["number"][:, : before + 4][:, -8:]
        assert torch.equal(numbers.flatten().sort().values, expected.flatten().sort().values)
        buffer.sample(4)


def test_what_was_torn_before_a_call_that_fails_stays_torn(monkeypatch):
    def fail(*arguments, **more):
        raise ValueError("no room")

    sampler = RandomSampler()
    buffer, stream = make_buffer(8, (2,), sampler=sampler), make_stream((2,), 40)
    buffer.extend(stream[:, :8]), buffer.extend(stream[:, 8:10])
    for frames in (5, 2):
        with monkeypatch.context() as patch:
            patch.setattr(sampler, "extend", fail)
            with pytest.raises(ValueError, match="no room"):
                buffer.extend(stream[:, 10 : 10 + frames])
    buffer.extend(stream[:, 10:12])
    with pytest.raises(RuntimeError, match=r"overwritten frames in part.*3 slots from 4 on"):
        buffer.sample(4)
    buffer.extend(stream[:, 12:15])
    assert len(buffer.sample(16)) == 16


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.parametrize("event", ["add", "empty", "an argument"])
def test_a_call_is_remembered_again(event, batch):
    stream, buffer = make_stream(batch, 20), make_buffer(8, batch)
    calls = stored_at_once(buffer)
    if event == "add":
        buffer.add(stream[..., 0])
    else:
        buffer.extend(stream[..., :3])
        buffer.empty() if event == "empty" else setattr(buffer, "done_at", "start")
    for t in range(3, 9, 2):
        buffer.extend(stream[..., t : t + 2])
    assert len(calls) == 2


def test_to_anneal_n_and_gamma_costs_no_checks():
    ring, buffer = Ring(make_stream((2,), 40), 8), make_buffer(8, (2,))
    calls = stored_at_once(buffer)
    for n_steps, gamma in ((2, 0.9), (3, 0.8), ((1, 4), 0.7), (1, 0.6)):
        buffer.n_steps, buffer.gamma = n_steps, gamma
        buffer.extend(ring.take(3))
        assert_sampled(buffer.sample(50), ring, n_steps, gamma=gamma)
    assert len(calls) == 3
