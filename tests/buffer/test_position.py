"""Where the newest frame of a storage is, whoever wrote it, and what a write that fails leaves behind."""

import copy
import pickle
from functools import partial

import pytest
import torch
from rings import Ring, assert_every_frame, assert_sampled, everything, make_buffer, make_stream
from rollouts import frames
from saving import dumps_and_loads, loading_is_told, through_state_dict
from tensordict import TensorDict
from torchrl.data import (
    ConsumingSampler,
    FlatStorageCheckpointer,
    ImmutableDatasetWriter,
    LazyMemmapStorage,
    LazyTensorStorage,
    NestedStorageCheckpointer,
    RandomSampler,
    ReplayBuffer,
    SamplerWithoutReplacement,
    TensorDictMaxValueWriter,
    TensorDictReplayBuffer,
    TensorDictRoundRobinWriter,
    TensorStorage,
)

from benchmarks.measure import Operators
from multistep_triton import NStepReplayBuffer

BATCHES = pytest.mark.parametrize("batch", [(), (2,)], ids=str)
# How a ring of 8 slots is filled: in part, just so, and past its end.
FILLED = pytest.mark.parametrize("cuts", [(5,), (8,), (6, 5), (8, 8, 1)], ids=str)


def reader_of(storage, n_steps=3, **arguments):
    sampler = SamplerWithoutReplacement(shuffle=False)
    return NStepReplayBuffer(n_steps=n_steps, gamma=0.9, storage=storage, sampler=sampler, **arguments)


def filled(batch, cuts, kind=None):
    """A buffer of ours or of torchrl's that wrote so many frames of a stream, and the ring that they are in."""
    ring = Ring(make_stream(batch, 60), 8)
    buffer = make_buffer(8, batch)
    if kind is not None:
        buffer = kind(
            storage=LazyTensorStorage(8 * torch.Size(batch).numel(), ndim=len(batch) + 1),
            sampler=SamplerWithoutReplacement(shuffle=False),
        )
    for cut in cuts:
        buffer.extend(ring.take(cut))
    return buffer, ring


def go_on(buffer, ring, cuts=(2, 5, 1)):
    for cut in cuts:
        buffer.extend(ring.take(cut))
        assert_every_frame(buffer, ring)


WRITERS = {
    "another": None,
    "none": ImmutableDatasetWriter,
    "one that counts": partial(TensorDictRoundRobinWriter, track_generations=True),
}


@FILLED
@BATCHES
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", [None, ReplayBuffer], ids=["ours", "torchrl's"])
def test_a_storage_that_another_buffer_filled(kind, writer, batch, cuts):
    theirs, ring = filled(batch, cuts, kind)
    arguments = {} if WRITERS[writer] is None else {"writer": WRITERS[writer]()}
    ours = reader_of(theirs.storage, **arguments)
    info = ["index", "index_generation"] if writer == "one that counts" else ["index"]
    assert_every_frame(ours, ring, info=info)
    # which goes on filling it
    for cut in (3, 7):
        theirs.extend(ring.take(cut))
        assert_every_frame(ours, ring, info=info)
    if writer == "another":
        go_on(ours, ring)


@FILLED
@BATCHES
def test_two_buffers_that_write_in_turn(batch, cuts):
    for kind in (None, ReplayBuffer):
        theirs, ring = filled(batch, cuts, kind)
        ours = reader_of(theirs.storage)
        for cut in (2, 5, 1):
            for each in (ours, theirs):
                each.extend(ring.take(cut))
                assert_every_frame(ours, ring)
                if kind is None:
                    assert_every_frame(theirs, ring)


@FILLED
@BATCHES
def test_another_writer(batch, cuts):
    buffer, ring = filled(batch, cuts)
    buffer.set_writer(TensorDictRoundRobinWriter())
    assert_every_frame(buffer, ring)
    go_on(buffer, ring)


@FILLED
@BATCHES
def test_another_storage(batch, cuts):
    theirs, ring = filled(batch, cuts)
    ours, other = filled(batch, (8, 3))
    before = ours.storage
    assert ours.set_storage(theirs.storage) is before
    assert_every_frame(ours, ring)
    go_on(ours, ring)
    # the one that it had is as it was, and nobody's writer any more
    assert_every_frame(reader_of(before), other)
    ours.set_storage(LazyTensorStorage(8 * torch.Size(batch).numel(), ndim=len(batch) + 1))
    assert not len(ours)
    ring.empty()
    go_on(ours, ring)


def test_another_storage_is_drawn_from_with_the_generator():
    draws = []
    for _ in range(2):
        buffer, _ = filled((), (8,))
        buffer.set_sampler(SamplerWithoutReplacement())
        buffer.set_rng(torch.Generator().manual_seed(0))
        other, _ = filled((), (8, 3))
        buffer.set_storage(other.storage)
        draws.append(buffer.sample(8)["number"].tolist())
    assert draws[0] == draws[1] != sorted(draws[0])


@pytest.mark.parametrize("slots", [8, 12])
def test_data_that_is_there_from_the_start(slots):
    ring = Ring(make_stream((), 60), slots)
    buffer = reader_of(TensorStorage(ring.take(slots).clone()))
    assert_every_frame(buffer, ring)
    # which may be edited before it is written to
    buffer.set_at_("action", torch.tensor(0), 3)
    ring.stream["action"][3] = 0
    assert_every_frame(buffer, ring)
    go_on(buffer, ring)


@FILLED
@BATCHES
@loading_is_told
@pytest.mark.parametrize("writer", [TensorDictRoundRobinWriter, ImmutableDatasetWriter])
@pytest.mark.parametrize("way", [dumps_and_loads, through_state_dict])
def test_a_buffer_that_is_loaded(way, writer, batch, cuts):
    theirs, ring = filled(batch, cuts)
    reader = reader_of(theirs.storage, writer=writer())
    size, ndim = theirs.storage.max_size, theirs.storage.ndim

    def make():
        return reader_of(LazyTensorStorage(size, ndim=ndim), writer=writer())

    assert_every_frame(way(reader, make), ring)

    def used():
        buffer = reader_of(LazyTensorStorage(size, ndim=ndim))
        buffer.extend(make_stream(batch, 11))
        return buffer

    loaded = way(theirs, used)
    assert_every_frame(loaded, ring)
    go_on(loaded, ring)


@FILLED
@loading_is_told
@pytest.mark.parametrize("way", [dumps_and_loads, through_state_dict])
def test_a_buffer_of_torchrls_that_is_loaded(way, cuts):
    theirs, ring = filled((2,), cuts, ReplayBuffer)
    loaded = way(theirs, lambda: make_buffer(8, (2,)))
    assert_every_frame(loaded, ring)
    go_on(loaded, ring)


@FILLED
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda buffer: pickle.loads(pickle.dumps(buffer))])
def test_a_copy_is_a_ring_of_its_own(copied, cuts):
    buffer, ring = filled((2,), cuts)
    twin, theirs = copied(buffer), copy.deepcopy(ring)
    go_on(buffer, ring)
    assert_every_frame(twin, theirs)
    go_on(twin, theirs, (3, 3))


@FILLED
@pytest.mark.parametrize("flags", [(), ("done", "terminated", "truncated")], ids=["", "flags at the root"])
@pytest.mark.parametrize("kind", [FlatStorageCheckpointer, NestedStorageCheckpointer])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_in_which_frames_are_in_order(kind, flags, cuts, tmp_path):
    """It leaves out next observations, which are the following frames' here, and adds flags at the root on loading."""
    stream = make_stream((), 60)
    stream["next", "observation"][:-1] = torch.where(
        stream["next", "done"][:-1], stream["next", "observation"][:-1], stream["observation"][1:]
    )
    for key in flags:
        stream[key] = torch.zeros(60, 1, dtype=torch.bool)
    stream = stream.exclude("number", "action", ("next", "number"))
    buffers = []
    for _ in range(2):
        buffers.append(reader_of(LazyTensorStorage(8), checkpointer=kind()))
    at = 0
    for cut in cuts:
        buffers[0].extend(stream[at : at + cut])
        at += cut
    buffers[0].dumps(tmp_path)
    buffers[1].loads(tmp_path)
    for _ in range(3):
        one, other = (everything(buffer) for buffer in buffers)
        assert set(one.keys(True, True)) == set(other.keys(True, True))
        for key in one.keys(True, True):
            assert torch.equal(one[key], other[key]), key
        for buffer in buffers:
            buffer.extend(stream[at : at + 3])
        at += 3


def test_a_checkpoint_beside_which_a_file_of_another_time_lies(tmp_path):
    ours, ring = filled((), (8, 3))
    ours.dumps(tmp_path)
    theirs = TensorDictReplayBuffer(storage=LazyTensorStorage(8))
    theirs.loads(tmp_path)
    theirs.extend(ring.take(2))
    theirs.dumps(tmp_path)
    loaded = make_buffer(8)
    loaded.loads(tmp_path)
    assert_every_frame(loaded, ring)
    go_on(loaded, ring)


def numbers(begin, count):
    t = torch.arange(begin, begin + count)
    rest = {"reward": t.float(), "done": torch.zeros(count, dtype=torch.bool)}
    return TensorDict({"observation": t, "next": {"observation": t + 1, **rest}}, [count])


def test_buffers_of_one_storage_take_turns():
    """Frames are sampled ahead by a thread while another buffer overwrites them."""
    ours = NStepReplayBuffer(n_steps=3, gamma=1.0, storage=LazyTensorStorage(64), batch_size=256, prefetch=3)
    theirs, at = TensorDictReplayBuffer(storage=ours.storage), 64
    ours.extend(numbers(0, at))
    for _ in range(100):
        sample = ours.sample()
        theirs.extend(numbers(at, 24))
        at += 24
        assert torch.equal(sample["next", "observation"], sample["observation"] + sample["steps_to_next_obs"])


def test_another_storage_of_other_dimensions():
    one, two = make_buffer(8), make_buffer(8, (2,))
    one.set_storage(LazyTensorStorage(16, ndim=2)), two.set_storage(LazyTensorStorage(8))
    for buffer, batch in ((one, (2,)), (two, ())):
        go_on(buffer, Ring(make_stream(batch, 60), 8), (4, 7, 3))
    with pytest.raises(ValueError, match="dim_extend must be below the storage's ndim=1, got 1"):
        make_buffer(8, dim_extend=1)


@pytest.mark.parametrize("counts", [True, False])
def test_what_was_sampled_ahead_of_frames_that_are_gone(counts):
    ours = NStepReplayBuffer(n_steps=3, gamma=1.0, storage=LazyTensorStorage(8), batch_size=8, prefetch=3)
    others = make_buffer(8, storage=lambda *_, **__: ours.storage), TensorDictReplayBuffer(storage=ours.storage)
    for begin, other in zip((100, 200), others, strict=True):
        ours.empty()
        ours.extend(numbers(begin - 50, 8))
        ours.sample(), ours.synchronize()
        other.empty(counts)
        other.extend(numbers(begin, 8))
        assert all(ours.sample()["observation"].min() >= begin for _ in range(5))


@pytest.mark.filterwarnings("ignore:Loading the storage:UserWarning")
@pytest.mark.parametrize("way", ["state_dict", "dumps"])
def test_a_checkpoint_that_is_loaded_in_part(way, tmp_path):
    """A sampler of another kind raises when the storage is loaded already."""
    source, ring = filled((), (8, 5))
    source.set_sampler(RandomSampler())
    source.dumps(tmp_path)
    ours, own = filled((), (8, 3))
    with pytest.raises((KeyError, FileNotFoundError)):
        ours.loads(tmp_path) if way == "dumps" else ours.load_state_dict(source.state_dict())
    with pytest.raises(RuntimeError, match="but a checkpoint was loaded in part"):
        ours.sample(4)
    ours.set_sampler(RandomSampler())
    ours.loads(tmp_path)
    ours.set_sampler(SamplerWithoutReplacement(shuffle=False))
    assert_every_frame(ours, ring)
    # where nothing was loaded, all is as it was
    ours, own = filled((), (8, 3))
    with pytest.raises(FileNotFoundError):
        ours.loads(tmp_path / "nowhere")
    assert_every_frame(ours, own)


def test_frames_that_are_altered_where_they_lie():
    """Which is no writer's doing: it breaks no order, and hides none that is broken later."""
    ours, ring = filled((), (8, 3))
    ours[3] = ours[3]
    ours.mark_update(3)
    ours.mark_update(torch.tensor([1, 2]))
    ours.writer.write_at(torch.tensor([5, 6]), ours.storage[5:7].clone())
    assert_every_frame(ours, ring)
    go_on(ours, ring)
    theirs = TensorDictReplayBuffer(storage=ours.storage)
    ours.set_at_(("next", "reward"), ours[:]["next", "reward"][4], torch.tensor(4))
    theirs._writer._cursor = 6
    theirs.extend(make_stream((), 2))
    with pytest.raises(RuntimeError, match="a writer went on elsewhere than after slot 2"):
        ours.sample(4)


@pytest.mark.parametrize("cut", [2, 8], ids=["in part", "wholly"])
@pytest.mark.parametrize("counts", [True, False])
def test_a_storage_that_another_buffer_empties(counts, cut):
    ours, ring = filled((), (8, 3))
    theirs = TensorDictReplayBuffer(storage=ours.storage)
    go_on(ours, ring, (1,))
    theirs.extend(ring.take(cut))
    for _ in range(2):
        theirs.empty(counts)
        ring.empty()
        theirs.extend(ring.take(cut))
        assert_every_frame(ours, ring)
    go_on(ours, ring)


# What cannot be told is refused


@loading_is_told
def test_a_full_storage_that_was_loaded_by_itself():
    theirs, ring = filled((), (8, 3))
    storage = LazyTensorStorage(8)
    storage.load_state_dict(theirs.storage.state_dict())
    with pytest.raises(RuntimeError, match=r"it does not say which frame is newest\. Load whole buffers"):
        reader_of(storage)
    # of one that is not full, the last frame is the newest
    theirs, ring = filled((), (5,))
    storage = LazyTensorStorage(8)
    storage.load_state_dict(theirs.storage.state_dict())
    ours = reader_of(storage)
    assert_every_frame(ours, ring)
    go_on(ours, ring)


@pytest.mark.parametrize("cuts", [(5,), (8, 3)], ids=str)
@pytest.mark.parametrize("kind", [ReplayBuffer, TensorDictReplayBuffer])
def test_a_buffer_that_writes_elsewhere(kind, cuts):
    """torchrl's begin at slot 0, whatever is there."""
    ours, ring = filled((), cuts)
    theirs = kind(storage=ours.storage)
    theirs.extend(make_stream((), 2))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"storage must hold frames in the order in which they came, but"):
            ours.sample(4)
        with pytest.raises(RuntimeError, match=r"empty.. begins anew"):
            ours.extend(ring.take(1))
    ours.empty()
    ring.empty()
    go_on(ours, ring)
    # with one writer they may
    theirs = kind(storage=ours.storage, writer=ours.writer)
    for cut in (2, 6):
        theirs.extend(ring.take(cut))
        assert_every_frame(ours, ring)


@loading_is_told
def test_a_buffer_on_the_storage_that_is_loaded():
    """torchrl's buffer puts its own cursor where that of the file was, and tells nobody."""
    source, _ = filled((), (8, 5), TensorDictReplayBuffer)
    theirs, _ = filled((), (8, 8, 1), TensorDictReplayBuffer)
    ours = reader_of(theirs.storage)
    ours.sample(4)
    theirs.load_state_dict(source.state_dict())
    with pytest.raises(RuntimeError, match="slot 0 was the last one written, and a writer goes on at slot 5"):
        ours.sample(4)


def test_a_writer_of_another_buffer_that_is_exchanged():
    """torchrl's begins at slot 0, and counts anew."""
    ours, ring = filled((), (8, 3))
    theirs = TensorDictReplayBuffer(storage=ours.storage)
    go_on(ours, ring, (1,))
    theirs.extend(ring.take(2))
    theirs.set_writer(TensorDictRoundRobinWriter())
    theirs.extend(make_stream((), 2))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a writer went on elsewhere than after slot 5"):
            ours.sample(4)


@pytest.mark.parametrize("again", [False, True])
def test_a_write_of_another_buffer_that_fails(again):
    """torchrl says that frames are there before it has written them."""
    ours, _ = filled((), (3,))
    theirs = TensorDictReplayBuffer(storage=ours.storage)
    ours.extend(make_stream((), 1))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        theirs.extend(make_stream((), 2).set(("next", "reward"), torch.zeros(2, 5)))
    if again:
        theirs.extend(make_stream((), 2))
    for use in (lambda: ours.sample(4), lambda: ours.extend(make_stream((), 1))):
        with pytest.raises(RuntimeError, match="storage must hold frames in the order in which they came, but"):
            use()
    theirs.empty()
    go_on(ours, Ring(make_stream((), 60), 8))


def test_a_frame_that_is_put_into_the_storage_by_hand():
    ours, _ = filled((), (8, 3))
    ours.storage.set(3, ours.storage.get(3))
    with pytest.raises(RuntimeError, match="slot 3 was the last one written, by a write that failed or past all"):
        ours.sample(4)


def test_a_storage_that_is_refused_changes_nothing():
    ours, ring = filled((), (8, 3))
    before, wrong = ours.storage, filled((), (5,), TensorDictReplayBuffer)[0].storage
    TensorDictReplayBuffer(storage=wrong).extend(make_stream((), 2))
    for storage, error in ((wrong, RuntimeError), (LazyTensorStorage(2), ValueError)):
        with pytest.raises(error):
            ours.set_storage(storage)
        assert ours.storage is before and ours not in storage._attached_entities
        assert_every_frame(ours, ring)
    # nor does a buffer that is refused stay with the storage
    count = len(before._attached_entities)
    with pytest.raises(ValueError, match="at least n_steps = 20 slots"):
        reader_of(before, n_steps=20)
    assert len(before._attached_entities) == count
    go_on(ours, ring)


def test_readers_take_turns_with_the_writer():
    ours = make_buffer(8)
    readers = [reader_of(ours.storage, writer=ImmutableDatasetWriter()) for _ in range(2)]
    for buffer in (*readers, ours):
        ours.extend(numbers(0, 4))
        buffer.sample(4)
        assert {id(each._replay_lock) for each in (*readers, ours)} == {id(ours._replay_lock)}


def test_buffers_that_are_gone_cost_little():
    """torchrl's storages keep those that were on them."""
    counted = []
    for dead in (0, 100):
        ours = make_buffer(8)
        for _ in range(dead):
            reader_of(ours.storage)
        with Operators() as operators:
            ours.extend(numbers(0, 4))
        counted.append(operators.names)
    assert counted[1] == counted[0]


def test_a_storage_that_several_buffers_filled():
    first, ring = filled((), (8, 3), TensorDictReplayBuffer)
    second = TensorDictReplayBuffer(storage=first.storage)
    second.extend(ring.take(3))
    with pytest.raises(RuntimeError, match="several buffers have written into it, each at a cursor of its own"):
        reader_of(first.storage)


def test_a_storage_whose_frames_another_buffer_consumes():
    theirs, _ = filled((), (5,), TensorDictReplayBuffer)
    theirs.set_sampler(ConsumingSampler())
    with pytest.raises(TypeError, match="sampler must leave frames where windows read them, got ConsumingSampler"):
        reader_of(theirs.storage)


def test_a_storage_that_is_filled_in_no_order():
    theirs = TensorDictReplayBuffer(
        storage=LazyTensorStorage(8), writer=TensorDictMaxValueWriter(rank_key=("next", "reward"))
    )
    theirs.extend(make_stream((), 5))
    with pytest.raises(
        TypeError, match="writer must be a RoundRobinWriter, which stores in order, got TensorDictMaxValueWriter"
    ):
        reader_of(theirs.storage)


def test_a_storage_whose_dimensions_are_not_those_of_its_frames():
    data = make_stream((2,), 8)
    theirs = ReplayBuffer(storage=LazyTensorStorage(8))
    theirs.extend(data)
    message = (
        r"storage must hold frames of batch size \[8\], as it has ndim=1, got \[8, 8\]: .+ndim=2 and data \[num_envs"
    )
    with pytest.raises(ValueError, match=message):
        reader_of(theirs.storage)
    with pytest.raises(
        ValueError, match=r"storage must count the frames of all its dimensions, got max_size = 2 for \[2, 8\]"
    ):
        reader_of(TensorStorage(data, ndim=2))
    with pytest.raises(TypeError, match="storage must hold a tensordict, got Tensor"):
        reader_of(TensorStorage(torch.zeros(8)))


def test_a_storage_of_n_step_transitions():
    theirs = TensorDictReplayBuffer(storage=LazyTensorStorage(8))
    data = frames([1.0] * 5, [False] * 5)
    theirs.extend(data.set("steps_to_next_obs", torch.ones(5, dtype=torch.int64)))
    with pytest.raises(ValueError, match="data must hold single steps, got n-step transitions"):
        reader_of(theirs.storage).sample(4)


# Writes that fail


class Torn(LazyTensorStorage):
    """Whose writes fail, once some leaves are written."""

    fails_after: int | None = None

    def set(self, cursor, data, **arguments):
        if self.fails_after is None:
            super().set(cursor, data, **arguments)
            return
        self._set_last_cursor(cursor)
        self._get_new_len(data, cursor)
        for key in [*data.keys(True, True)][: self.fails_after]:
            if key != "index":
                self._storage[key][cursor] = data[key]
        raise OSError("no space left on device")


class TornMemmap(Torn, LazyMemmapStorage):
    pass


@BATCHES
@pytest.mark.parametrize("storage", [Torn, TornMemmap])
@pytest.mark.parametrize("fails_after", [0, 1, 3])
@pytest.mark.parametrize("cuts, frames_", [((5,), 2), ((6,), 4), ((8, 3), 3), ((8, 6), 4), ((8,), 12)], ids=str)
def test_a_write_that_fails(cuts, frames_, fails_after, storage, batch):
    """What was overwritten in part is not sampled until it is overwritten wholly; all else is as it was."""
    ring, buffer = Ring(make_stream(batch, 80), 8), make_buffer(8, batch, storage=storage)
    for cut in cuts:
        buffer.extend(ring.take(cut))
    buffer.storage.fails_after, count = fails_after, buffer.write_count
    with pytest.raises(OSError, match="no space left"):
        buffer.extend(make_stream(batch, frames_, seed=5))
    buffer.storage.fails_after = None
    assert buffer.write_count == count
    free = 8 - min(sum(cuts), 8)
    torn = min(frames_ - free, sum(cuts), 8) if fails_after and frames_ > free else 0
    if torn:
        with pytest.raises(RuntimeError, match=rf"overwritten frames in part: extend the buffer.+\({torn} slots from"):
            buffer.sample(4)
    else:
        assert_every_frame(buffer, ring)
    # as many frames as were torn, a few at a time
    while torn:
        with pytest.raises(RuntimeError, match="overwritten frames in part"):
            buffer.sample(4)
        buffer.extend(ring.take(1))
        free, torn = max(free - 1, 0), torn - (not free)
    go_on(buffer, ring)


def test_every_buffer_of_a_storage_knows_what_is_torn():
    ring, buffer = Ring(make_stream((), 60), 8), make_buffer(8, storage=Torn)
    others = [make_buffer(8, storage=lambda *_, **__: buffer.storage), TensorDictReplayBuffer(storage=buffer.storage)]
    buffer.extend(ring.take(8)), buffer.extend(ring.take(3))
    for each in (*others, buffer):
        buffer.storage.fails_after = 1
        with pytest.raises(OSError, match="no space left"):
            buffer.extend(make_stream((), 2))
        buffer.storage.fails_after = None
        for own in (buffer, others[0]):
            with pytest.raises(RuntimeError, match="overwritten frames in part"):
                own.sample(4)
        each.extend(ring.take(2))
        for own in (buffer, others[0]):
            assert_every_frame(own, ring)


@loading_is_told
def test_a_torn_ring_is_saved_as_such(tmp_path):
    ring, buffer = Ring(make_stream((), 60), 8), make_buffer(8, storage=Torn)
    buffer.extend(ring.take(8)), buffer.extend(ring.take(3))
    buffer.storage.fails_after = 1
    with pytest.raises(OSError, match="no space left"):
        buffer.extend(make_stream((), 2))
    buffer.dumps(tmp_path)
    loaded, other = make_buffer(8), make_buffer(8)
    loaded.loads(tmp_path)
    other.load_state_dict(buffer.state_dict())
    for resumed in (loaded, other, copy.deepcopy(buffer)):
        resumed.storage.fails_after = None
        with pytest.raises(RuntimeError, match=r"overwritten frames in part: .+\(2 slots from 3 on\)"):
            resumed.sample(4)
        theirs = copy.deepcopy(ring)
        resumed.extend(theirs.take(2))
        assert_every_frame(resumed, theirs)
    buffer.empty()
    buffer.storage.fails_after = None
    ring.empty()
    go_on(buffer, ring)


@pytest.mark.filterwarnings("ignore:Loading the storage:UserWarning")
@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_prefetched_samples_are_of_before_a_write_that_failed(prefetch, saved, tmp_path):
    ring, arguments = Ring(make_stream((), 60), 8), {"batch_size": 8, "prefetch": prefetch, "sampler": None}
    buffer = make_buffer(8, storage=Torn, **arguments)
    buffer.extend(ring.take(8))
    buffer.sample()
    buffer.synchronize()
    buffer.storage.fails_after = 1
    with pytest.raises(OSError, match="no space left"):
        buffer.extend(make_stream((), 2))
    with pytest.raises(RuntimeError, match="overwritten frames in part"):
        for _ in range(5):
            buffer.sample()
    # those that failed while slots were torn are neither saved nor sampled
    if saved:
        buffer.dumps(tmp_path / "torn"), buffer.state_dict()
    buffer.storage.fails_after = None
    buffer.extend(ring.take(2))
    if saved:
        buffer.dumps(tmp_path / "whole"), buffer.state_dict()
    for _ in range(5):
        assert_sampled(buffer.sample(), ring)


def test_storages_of_inference_mode_keep_no_count():
    """Whether such a leaf was written to, nobody can tell."""
    ring, buffer = Ring(make_stream((), 60), 8), make_buffer(8, storage=Torn)
    with torch.inference_mode():
        buffer.extend(ring.take(8))
    buffer.storage.fails_after = 0
    with pytest.raises(OSError, match="no space left"):
        buffer.extend(make_stream((), 2))
    with pytest.raises(RuntimeError, match="overwritten frames in part"):
        buffer.sample(4)
