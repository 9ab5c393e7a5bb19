"""torchrl's storages below the n-step buffer."""

from functools import partial

import pytest
from rings import Ring, assert_every_frame, assert_sampled, make_buffer, make_stream, wrapped
from torchrl.data import (
    ImmutableDatasetWriter,
    LazyMemmapStorage,
    LazyTensorStorage,
    SamplerWithoutReplacement,
    TensorStorage,
)

from multistep_triton import NStepReplayBuffer


def test_a_storage_that_another_buffer_fills():
    ring, filled = Ring(make_stream((2,), 20), 8), make_buffer(8, (2,))
    filled.extend(ring.take(5))
    sampler = SamplerWithoutReplacement(shuffle=False)
    reader = NStepReplayBuffer(
        n_steps=3, gamma=0.9, storage=filled.storage, writer=ImmutableDatasetWriter(), sampler=sampler
    )
    assert_every_frame(reader, ring)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_memory_mapped(batch, tmp_path):
    storage = partial(LazyMemmapStorage, scratch_dir=tmp_path)
    buffer, ring = wrapped(8, batch, storage=storage, frames=[])
    for part in (5, 6, 3):
        buffer.extend(ring.take(part))
        assert_every_frame(buffer, ring)


def test_data_that_was_there_before():
    """A storage that is given its data is full from the start."""
    ring = Ring(make_stream((), 20), 8)
    data = ring.take(8).clone()

    def storage(size, **arguments):
        return TensorStorage(data.clone(), **arguments)

    assert_every_frame(make_buffer(8, storage=storage, writer=ImmutableDatasetWriter()), ring)
    buffer = make_buffer(8, storage=storage)
    assert_every_frame(buffer, ring)
    buffer.extend(ring.take(3))
    assert_every_frame(buffer, ring)
    buffer.extend(ring.take(7))
    assert_every_frame(buffer, ring)


def test_a_storage_that_is_made_by_the_buffer():
    buffer = NStepReplayBuffer(n_steps=3, gamma=0.9, storage=partial(LazyTensorStorage, 8), batch_size=16)
    ring = Ring(make_stream((), 11), 8)
    buffer.extend(ring.take(11))
    assert_sampled(buffer.sample(), ring)


def test_a_size_that_environments_do_not_divide():
    # which torchrl rounds up, to 4 slots of 2
    buffer = NStepReplayBuffer(
        n_steps=3, gamma=0.9, storage=LazyTensorStorage(7, ndim=2), sampler=SamplerWithoutReplacement(shuffle=False)
    )
    ring = Ring(make_stream((2,), 20), 4)
    for part in (3, 2, 4):
        buffer.extend(ring.take(part))
        assert_every_frame(buffer, ring)


def test_annealing_keeps_what_is_mapped_where_it_is(tmp_path):
    buffer, ring = wrapped(storage=partial(LazyMemmapStorage, scratch_dir=tmp_path))
    storage, files = buffer.storage, sorted(tmp_path.rglob("*.memmap"))
    for n_steps in (5, 4, 3):
        buffer.n_steps = n_steps
        assert_every_frame(buffer, ring)
    assert buffer.storage is storage
    assert files and sorted(tmp_path.rglob("*.memmap")) == files
