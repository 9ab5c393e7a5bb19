"""Collectors, with real worker processes: every frame is checked against what its worker is known to produce."""

import multiprocessing
import warnings
from functools import partial

import fresh
import pytest
import torch
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer
from torchrl.envs import EnvBase, SerialEnv
from torchrl.modules import RandomPolicy
from workers import GAMMA, Countdown, expected_rows, frames_of, rows_of, streams

from multistep_triton import MultiStep, MultiStepTransform, NStepReplayBuffer

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torchrl's own weight updaters
    from torchrl.collectors import Collector, MultiAsyncCollector, MultiSyncCollector

N = 3
BATCH, BATCHES = 14, 6
MULTI = [MultiSyncCollector, MultiAsyncCollector]


@pytest.fixture(autouse=True, scope="module")
def quick_workers():
    """torchrl would start each of them anew, and they would import all that they need."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(fresh.start().get_start_method(), force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def collect(kind, envs, **arguments):
    """What a collector yields; its workers are gone afterwards."""
    policy = RandomPolicy((envs if isinstance(envs, EnvBase) else Countdown(0)).action_spec)
    collector = kind(envs, policy, frames_per_batch=BATCH, total_frames=BATCH * BATCHES, **arguments)
    try:
        return [batch if batch is None else batch.clone() for batch in collector]
    finally:
        collector.shutdown()


def workers(count=2):
    return [partial(Countdown, worker) for worker in range(count)]


def transform(**arguments):
    return MultiStepTransform(N, GAMMA, **arguments)


def check_whole_streams(data, done_at="start"):
    """Every worker's frames are there without a gap, each with its own window, whatever lies between them."""
    where = {frame: row for row, frame in enumerate(frames_of(data))}
    assert len(where) == len(data)
    rows = rows_of(data)
    found = streams(frames_of(data))
    assert set(found) == {0, 1}
    for worker, times in found.items():
        assert sorted(times) == list(range(len(times)))
        known = [(worker, t) for t in range(len(times) + N)]
        expected = expected_rows(known, N, done_at)[: len(times)]
        assert [rows[where[frame]] for frame in known[: len(times)]] == expected


def check_interleaved(data, frames):
    """Stored are all frames but the last n, in the order they came in, and no window goes beyond its worker's."""
    assert frames_of(data) == frames[: len(data)]
    assert rows_of(data) == expected_rows(frames, N)[: len(data)]


@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
@pytest.mark.parametrize("kind", MULTI)
def test_workers_write_into_one_buffer(kind, storage):
    # shared_init: the first frames come out when a worker stores them, in its process.
    buffer = TensorDictReplayBuffer(
        storage=storage(1000, shared_init=True), transform=transform(done_at="end"), batch_size=8, shared=True
    )
    assert collect(kind, workers(), replay_buffer=buffer) == [None] * BATCHES
    assert BATCH * (BATCHES - 1) < len(buffer) <= BATCH * (BATCHES + 2) - 2 * N
    check_whole_streams(buffer[:], done_at="end")
    assert buffer.sample()["steps_to_next_obs"].max() <= N


def test_workers_begin_with_nothing_held_back():
    storage = LazyTensorStorage(1000, shared_init=True)
    before = transform()
    buffer = ReplayBuffer(storage=storage, transform=before, shared=True)
    first = collect(Collector, Countdown(7))[0]
    buffer.extend(first)
    collect(MultiSyncCollector, workers(), replay_buffer=buffer)
    stored = buffer[:]
    assert frames_of(stored[: BATCH - N]) == [(7, t) for t in range(BATCH - N)]
    check_whole_streams(stored[BATCH - N :])
    # The process they came in still holds them.
    assert frames_of(before.flush()) == [(7, t) for t in range(BATCH - N, BATCH)]


# torchrl's collector adds a frame of every environment as one item, so that there is no fourth.
@pytest.mark.parametrize("extend_buffer, batched", [(True, False), (True, True), (False, False)])
def test_a_collector_writes_into_a_buffer(extend_buffer, batched):
    envs = SerialEnv(2, workers()) if batched else Countdown(0)
    nstep = transform()
    buffer = ReplayBuffer(storage=LazyTensorStorage(1000, ndim=1 + batched), transform=nstep)
    collect(Collector, envs, replay_buffer=buffer, extend_buffer=extend_buffer)
    nstep.flush_into(buffer)
    for worker, data in enumerate(buffer[:].unbind(0) if batched else [buffer[:]]):
        frames = [(worker, t) for t in range(BATCH * BATCHES // (1 + batched))]
        check_interleaved(data, frames)


@pytest.mark.parametrize(
    "kind, how", [(MultiSyncCollector, 0), (MultiSyncCollector, "stack"), (MultiAsyncCollector, None)]
)
def test_batches_of_workers_are_interleaved(kind, how):
    batches = collect(kind, workers(), **({} if how is None else {"cat_results": how}))
    stacked = how == "stack"
    buffer = ReplayBuffer(storage=LazyTensorStorage(1000, ndim=1 + stacked), transform=transform())
    for batch in batches:
        buffer.extend(batch)
    streams_in = torch.cat(batches, -1)
    for each, data in zip(
        streams_in.unbind(0) if stacked else [streams_in], buffer[:].unbind(0) if stacked else [buffer[:]], strict=True
    ):
        check_interleaved(data, frames_of(each))


@pytest.mark.parametrize("kind", MULTI)
def test_postproc(kind):
    arguments = {"cat_results": 0} if kind is MultiSyncCollector else {}
    postproc = MultiStep(GAMMA, N)
    for batch in collect(kind, workers(), postproc=postproc, **arguments):
        assert rows_of(batch) == expected_rows(frames_of(batch), N)


def test_the_transform_in_the_workers():
    """As postproc of collectors that write into a buffer, each worker holds its own frames back."""
    buffer = ReplayBuffer(storage=LazyTensorStorage(1000, shared_init=True), shared=True)
    collect(MultiSyncCollector, workers(), replay_buffer=buffer, postproc=transform().inv)
    check_whole_streams(buffer[:])


@pytest.mark.parametrize("kind", MULTI)
def test_workers_write_into_a_buffer_that_is_sampled(kind):
    buffer = NStepReplayBuffer(
        n_steps=N,
        gamma=GAMMA,
        storage=LazyTensorStorage(1000, shared_init=True),
        batch_size=256,
        shared=True,
    )
    collect(kind, workers(), replay_buffer=buffer)
    batch, frames = buffer.sample(), frames_of(buffer[:])
    assert len(frames) >= BATCH * BATCHES
    expected = expected_rows(frames, N, "end")
    assert rows_of(batch) == [expected[row] for row in batch["index"].reshape(-1).tolist()]


def two_of(worker):
    return SerialEnv(2, [partial(Countdown, 2 * worker), partial(Countdown, 2 * worker + 1)])


def test_workers_of_several_environments_write_into_a_buffer_that_is_sampled():
    buffer = NStepReplayBuffer(
        n_steps=N,
        gamma=GAMMA,
        storage=LazyTensorStorage(1000, ndim=2, shared_init=True),
        batch_size=256,
        shared=True,
    )
    policy = RandomPolicy(two_of(0).action_spec)
    collector = MultiSyncCollector(
        [partial(two_of, worker) for worker in range(2)],
        policy,
        frames_per_batch=2 * BATCH,
        total_frames=2 * BATCH * BATCHES,
        replay_buffer=buffer,
    )
    try:
        for _ in collector:
            pass
    finally:
        collector.shutdown()
    batch, rows = buffer.sample(), buffer[:]
    expected = [expected_rows(frames_of(row), N, "end") for row in rows]
    assert {worker for worker, _ in frames_of(rows.flatten())} == {0, 1, 2, 3}
    assert rows_of(batch) == [expected[row][time] for time, row in batch["index"].tolist()]
