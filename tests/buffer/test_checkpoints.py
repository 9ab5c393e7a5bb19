"""The n-step buffer saved and resumed, pickled and copied."""

import copy

import pytest
import torch
from paths import no_collection
from rings import (
    Ring,
    assert_every_frame,
    assert_same_bytes,
    assert_sampled,
    kept_once,
    make_buffer,
    make_stream,
    wrapped,
)
from saving import EVERY_WAY, WAYS, loading_is_told
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, RandomSampler, ReplayBuffer, SamplerWithoutReplacement
from torchrl.envs.transforms import ObservationNorm


@pytest.fixture(scope="module")
def not_collected():
    with no_collection():
        yield


@loading_is_told
@pytest.mark.parametrize(("way", "storage"), EVERY_WAY)
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.parametrize("before", [[5], [8], [8, 5]], ids=str)
@pytest.mark.usefixtures("not_collected")
def test_a_buffer_that_is_resumed_goes_on_as_the_unbroken_one(way, storage, batch, before):
    def make():
        generator = torch.Generator().manual_seed(0)
        return make_buffer(8, batch, storage=storage, sampler=None, n_steps=(2, 5), generator=generator)

    ring, whole = Ring(make_stream(batch, 40), 8), make()
    for part in before:
        whole.extend(ring.take(part))
    whole.sample(10)
    resumed = WAYS[way](whole, make)
    assert len(resumed) == len(whole)
    for part in (None, 2, 5, 7):
        if part is not None:
            data = ring.take(part)
            whole.extend(data.clone()), resumed.extend(data.clone())
        one, other = whole.sample(30), resumed.sample(30)
        assert_sampled(other, ring, (2, 5))
        for key in one.keys(True, True):
            assert_same_bytes(one[key], other[key], key)


@loading_is_told
@pytest.mark.parametrize(("way", "storage"), [each for each in EVERY_WAY if each[0] != "dumps"])
@pytest.mark.parametrize("arguments", [{}, {"compact": True}, {"capturable": True}], ids=str)
@pytest.mark.usefixtures("not_collected")
def test_a_buffer_in_which_nothing_was_stored(way, storage, arguments):
    """torchrl makes a tensordict of nothing of its state."""

    def make():
        return make_buffer(8, (2,), storage=storage, sampler=RandomSampler(), batch_size=16, **arguments)

    ring, resumed = Ring(kept_once(make_stream((2,), 40)), 8), WAYS[way](make(), make)
    assert not len(resumed)
    with pytest.raises(RuntimeError, match="Cannot sample from an empty storage"):
        resumed.sample()
    resumed.n_steps = 2
    for frames in (3, 1, 7):
        resumed.extend(ring.take(frames))
        assert_sampled(resumed.sample(), ring, 2)


@loading_is_told
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prefetch", [None, 2])
@pytest.mark.usefixtures("not_collected")
def test_an_epoch_that_is_interrupted(way, prefetch):
    def make():
        sampler = SamplerWithoutReplacement()
        return make_buffer(16, (2,), sampler=sampler, batch_size=5, prefetch=prefetch)

    ring, buffer = Ring(make_stream((2,), 40), 16), make()
    buffer.extend(ring.take(16)), buffer.extend(ring.take(7))
    seen = [*buffer.sample()["number"].tolist(), *buffer.sample()["number"].tolist()]
    resumed = WAYS[way](buffer, make)
    resumed.n_steps = 5
    for _ in range(5):
        sample = resumed.sample()
        assert_sampled(sample, ring, 5)
        seen += sample["number"].tolist()
    assert sorted(seen) == ring.numbers()
    # and the one that was saved goes on by itself
    assert_sampled(buffer.sample(), ring, 3)


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
@pytest.mark.usefixtures("not_collected")
def test_a_copy_has_the_arguments_and_a_ring_of_its_own(way):
    buffer, ring = wrapped(8, n_steps=(2, 4), gamma=0.7, done_at="start", traj_key=None)
    buffer.n_steps, buffer.gamma = 4, 0.8
    resumed = WAYS[way](buffer, None)
    assert (resumed.n_steps, resumed.gamma, resumed.done_at) == (4, 0.8, "start")
    before = copy.copy(ring)
    buffer.extend(ring.take(5))
    buffer.n_steps = 2
    assert_every_frame(resumed, before, 4, 0.8, done_at="start")
    assert_every_frame(buffer, ring, 2, 0.8, done_at="start")


def test_a_buffer_that_is_made_late(tmp_path):
    def make():
        return make_buffer(8, (2,), transform_factory=lambda: ObservationNorm(0.0, 2.0, in_keys=["observation"]))

    source, stream = make(), make_stream((2,), 20)
    source.extend(stream[:, :5])
    source.dumps(tmp_path)
    for load in (lambda buffer: buffer.loads(tmp_path), lambda buffer: buffer.load_state_dict(source.state_dict())):
        resumed = make()
        load(resumed)
        assert torch.equal(resumed.sample(10)["number"], source.sample(10)["number"])
    for use in (make().empty, make().state_dict):
        use()
    assert make().ends_lost() == 0


@loading_is_told
def test_a_whole_buffer_is_loaded_after_a_batch_has_failed():
    source, buffer = (make_buffer(8, (2,), batch_size=4, prefetch=2, sampler=None) for _ in range(2))
    source.extend(make_stream((2,), 8))
    buffer.extend(make_stream((2,), 8))
    buffer.sample()
    buffer._order.broken = "it was told so"
    with pytest.raises(RuntimeError, match="it was told so"):
        for _ in range(5):
            buffer.sample()
    buffer.load_state_dict(source.state_dict())
    buffer.sample()


@loading_is_told
@pytest.mark.parametrize("filled", [0, 3])
@pytest.mark.parametrize("way", ["dumps", "state_dict", "a state of torchrl's"])
def test_a_checkpoint_of_another_size_changes_nothing(way, filled):
    ring, buffer = Ring(make_stream((2,), 40), 8), make_buffer(8, (2,))
    if filled:
        buffer.extend(ring.take(filled))
    source = make_buffer(4, (2,))
    if way.startswith("a state"):
        source = ReplayBuffer(storage=LazyTensorStorage(8, ndim=2), batch_size=4)
    source.extend(make_stream((2,), 4))
    with pytest.raises(ValueError, match=r"storage must count the frames of the one that was saved, \[4, 2\], got "):
        WAYS.get(way, WAYS["state_dict"])(source, lambda: buffer)
    assert len(buffer) == 2 * filled
    buffer.extend(ring.take(5))
    assert_every_frame(buffer, ring)


@loading_is_told
def test_a_state_of_other_stored_dtypes():
    stream = make_stream((2,), 8)
    usual, narrow = make_buffer(8, (2,)), make_buffer(8, (2,), store_as={"observation": torch.bfloat16})
    usual.extend(stream), narrow.extend(stream)
    with pytest.raises(ValueError, match="store_as must be that of what a buffer has saved"):
        narrow.load_state_dict(usual.state_dict())
    fresh = make_buffer(8, (2,), store_as={"observation": torch.bfloat16})
    of_nothing = fresh.state_dict()
    fresh.load_state_dict(narrow.state_dict())
    assert torch.equal(fresh.sample(16)["observation"], narrow.sample(16)["observation"])
    fresh.load_state_dict(of_nothing)
    fresh.extend(stream)
    assert torch.equal(fresh.sample(16)["observation"], narrow.sample(16)["observation"])


def test_a_writer_that_cannot_go_on_is_not_taken():
    buffer = make_buffer(8, (2,))
    buffer.extend(make_stream((2,), 8))
    writer, buffer._order.broken = buffer._writer, "it was told so"
    with pytest.raises(RuntimeError, match="it was told so"):
        buffer.set_writer(type(writer)())
    assert buffer._writer is writer


@loading_is_told
@pytest.mark.parametrize("way", ["dumps", "state_dict"])
def test_a_checkpoint_of_another_number_of_dimensions(way):
    for batch, other in (((2,), ()), ((), (2,))):
        source, buffer = make_buffer(8, batch), make_buffer(16 if batch else 4, other)
        source.extend(make_stream(batch, 4))
        assert source.storage.max_size == buffer.storage.max_size
        with pytest.raises(ValueError, match="storage must count the frames of the one that was saved"):
            WAYS[way](source, lambda: buffer)  # noqa: B023
        buffer.extend(make_stream(other, 4))
        assert buffer.sample(4).batch_size == (4,)


@loading_is_told
@pytest.mark.parametrize("way", ["dumps", "state_dict"])
def test_a_storage_stays_mapped(way):
    def make():
        return make_buffer(8, (2,), storage=LazyMemmapStorage)

    source = make()
    source.extend(make_stream((2,), 5))
    resumed = make()
    resumed.extend(make_stream((2,), 5))
    resumed = WAYS[way](source, lambda: resumed)
    assert resumed.storage._storage.is_memmap()
