"""The n-step buffer with torchrl's samplers, storages, transforms, prefetching and checkpoints."""

import copy
import itertools
import re
import threading
from functools import partial

import numpy as np
import pytest
import torch
from paths import no_collection
from rings import (
    TRAJ_KEY,
    Drawn,
    Ring,
    assert_every_frame,
    assert_returns,
    assert_same_bytes,
    assert_sampled,
    assert_windows,
    everything,
    make_buffer,
    make_stream,
)
from rollouts import frames, make_rollout
from saving import EVERY_WAY, WAYS, loading_is_told
from tensordict import NonTensorStack, TensorDict
from torchrl.data import (
    ImmutableDatasetWriter,
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    RandomSampler,
    SamplerWithoutReplacement,
    TensorDictMaxValueWriter,
    TensorDictReplayBuffer,
    TensorDictRoundRobinWriter,
    TensorStorage,
)
from torchrl.data.replay_buffers import Sequence
from torchrl.data.replay_buffers.samplers import ConsumingSampler, PrioritizedSampler, SliceSampler, prioritized
from torchrl.envs.transforms import Compose, DoubleToFloat, NextStateReconstructor, RewardScaling, Transform
from torchrl.envs.transforms import MultiStepTransform as TorchRLMultiStepTransform

from multistep_triton import MultiStepTransform, NStepReplayBuffer

REWARD, NEXT, DONE = ("next", "reward"), ("next", "observation"), ("next", "done")


def wrapped(capacity=16, batch=(2,), *, frames=None, **arguments):
    """A buffer whose ring is full and begins anew in the middle, and what must be sampled of it."""
    stream = make_stream(batch, 4 * capacity)
    ring = Ring(stream, capacity)
    buffer = make_buffer(capacity, batch, **arguments)
    for part in [capacity, capacity // 2 - 1] if frames is None else frames:
        buffer.extend(ring.take(part))
    return buffer, ring


# Writing


def test_it_is_a_tensordict_replay_buffer():
    buffer, _ = wrapped()
    assert isinstance(buffer, TensorDictReplayBuffer)
    assert len(buffer) == 32


def test_bytes_per_frame():
    """Beside what is stored when n-step transitions are made before: steps, gamma, nonterminal, two rewards."""
    buffer = make_buffer(8, (2,))
    made_before = TensorDictReplayBuffer(storage=LazyTensorStorage(16, ndim=2), transform=MultiStepTransform(3, 0.9))
    for each in (buffer, made_before):
        each.extend(make_rollout((2,), 20))
    of_ours, of_theirs = (
        sum(leaf.nbytes for leaf in each.storage[:].values(True, True)) / 16 for each in (buffer, made_before)
    )
    assert of_theirs - of_ours == 8 + 4 + 1 + 4 + 4 == 21


def test_add():
    ring, buffer = Ring(make_stream((), 40), 8), make_buffer(8)
    for i in range(20):
        assert buffer.add(ring.take(1)[0]) == i % 8
        assert_every_frame(buffer, ring)
    # and with calls of more
    buffer.extend(ring.take(5))
    buffer.add(ring.take(1)[0])
    assert_every_frame(buffer, ring)


@pytest.mark.parametrize("batch", [(2,), (2, 2), (2, 3), (2, 2, 2)], ids=str)
def test_add_of_several_environments(batch):
    """One frame of each; beside calls of more, each lies in its environment."""
    ring, buffer = Ring(make_stream(batch, 30), 8), make_buffer(8, batch)
    for _ in range(5):
        buffer.add(ring.take(1)[..., 0])
        assert_every_frame(buffer, ring)
        buffer.extend(ring.take(2))
        assert_every_frame(buffer, ring)


@pytest.mark.parametrize("envs", [1, 2, 3])
def test_one_frame_of_every_environment_at_a_time(envs):
    """As a loop over vectorized environments writes, where torchrl's own buffer raises once it has stored them."""
    ring, buffer = Ring(make_stream((envs,), 30), 8), make_buffer(8, (envs,))
    for i in range(20):
        assert len(buffer.extend(ring.take(1))) == envs
        assert len(buffer) == envs * min(i + 1, 8)
        assert_every_frame(buffer, ring)


def test_the_indices_of_what_was_written():
    ring, buffer = Ring(make_stream((2,), 30), 8), make_buffer(8, (2,))
    for frames_ in (3, 4, 5):
        part = ring.take(frames_)
        index = buffer.extend(part)
        stored = buffer.storage[tuple(index.unbind(-1))]
        assert torch.equal(stored["number"].view(frames_, 2), part["number"].T)


def test_empty():
    buffer, ring = wrapped()
    buffer.empty()
    ring.empty()
    assert len(buffer) == 0
    with pytest.raises(RuntimeError, match="Cannot sample from an empty storage"):
        buffer.sample(4)
    for part in (1, 4, 11, 3):
        buffer.extend(ring.take(part))
        assert_every_frame(buffer, ring)


def test_time_may_come_first():
    stream = make_stream((2,), 30)
    ring, buffer = Ring(stream, 8), make_buffer(8, (2,), dim_extend=0)
    for part in (5, 6, 3):
        buffer.extend(ring.take(part).transpose(0, 1))
        assert_every_frame(buffer, ring)


class OnceStorage(LazyTensorStorage):
    """Has every slot written once in a call: of several rows that are written into one, torch may keep any."""

    def set(self, cursor, data, **arguments):
        if isinstance(cursor, torch.Tensor):
            assert len(cursor.unique()) == len(cursor), "a slot is written several times in one call"
        super().set(cursor, data, **arguments)


@pytest.mark.parametrize("envs", [None, 2])
def test_a_call_that_is_longer_than_the_ring(envs):
    batch = () if envs is None else (envs,)
    ring, buffer = Ring(make_stream(batch, 60), 8), make_buffer(8, batch, storage=OnceStorage)
    for part in (3, 21, 8, 17):
        buffer.extend(ring.take(part))
        assert_every_frame(buffer, ring)


def test_a_call_that_is_so_long_that_torch_writes_it_with_several_threads():
    capacity, count = 2000, 100_000
    data = frames([0.0] * count, [False] * count)
    for _ in range(6):
        buffer = make_buffer(capacity)
        buffer.extend(data)
        assert torch.equal(buffer.storage[:]["observation"].sort().values, torch.arange(count - capacity, count))


def wrongly(kind):
    """Two frames that cannot go on from what is stored, and what is said of them."""
    data = make_stream((2,), 2)
    if kind == "dtype":
        data[REWARD] = data[REWARD].double()
        return data, ValueError, r"\('next', 'reward'\) must be torch.float32 \[1\], .+ got torch.float64 \[1\]"
    if kind == "shape":
        data["number"] = data["number"].unsqueeze(-1).expand(2, 2, 5)
        return data, ValueError, r"\('number',\) must be torch.int64 \[\], .+ got torch.int64 \[5\]"
    if kind == "rows":
        return make_stream((3,), 2), ValueError, r"data must be of \[2\] rows, as what is stored, got \[3\]"
    del data["next", kind]
    return data, KeyError, rf"data must hold \('next', '{kind}'\), got the entries"


@pytest.mark.parametrize("frames", [(3,), (16, 7)], ids=["not full", "wrapped"])
@pytest.mark.parametrize("kind", ["dtype", "shape", "rows", "reward", "done", "terminated"])
def test_what_is_wrong_is_not_stored(kind, frames):
    buffer, ring = wrapped(frames=frames)
    data, error, message = wrongly(kind)
    with pytest.raises(error, match=message):
        buffer.extend(data)
    assert_every_frame(buffer, ring)
    buffer.extend(ring.take(5))
    assert_every_frame(buffer, ring)


class FullDisk(LazyTensorStorage):
    full = False

    def set(self, cursor, data, **arguments):
        if self.full:
            # The writer has moved on by then, and the storage counts the frames.
            self._get_new_len(data, cursor)
            raise OSError("no space left on device")
        super().set(cursor, data, **arguments)


@pytest.mark.parametrize("frames", [(3,), (16, 7)], ids=["not full", "wrapped"])
def test_a_call_that_fails_moves_no_seam(frames):
    buffer, ring = wrapped(storage=FullDisk, frames=frames)
    count, buffer.storage.full = buffer.write_count, True
    with pytest.raises(OSError, match="no space left"):
        buffer.extend(make_stream((2,), 4))
    buffer.storage.full = False
    assert buffer.write_count == count
    assert_every_frame(buffer, ring)
    buffer.extend(ring.take(5))
    assert_every_frame(buffer, ring)


def test_what_is_missing_is_named_before_anything_is_stored():
    buffer = make_buffer(8, (2,), reward_keys=["reward", "profit"])
    with pytest.raises(KeyError, match=r"data must hold \('next', 'profit'\), got the entries"):
        buffer.extend(make_stream((2,), 4))
    assert not len(buffer)
    with pytest.raises(RuntimeError, match="empty"):
        buffer.sample(4)


def test_a_call_of_no_frames():
    buffer, ring = wrapped()
    assert not len(buffer.extend(ring.take(3)[:, :0]))
    flat, _ = wrapped(batch=())
    assert flat.extend(make_stream((), 3)[:0]).shape == (0,)


class EveryOther(Transform):
    """Stores every other frame of a call."""

    def _inv_call(self, data):
        return data[::2]

    def forward(self, data):
        return data


def test_a_transform_sees_a_call_as_it_is():
    buffer = make_buffer(8, transform=EveryOther())
    data = frames([float(t) for t in range(30)], [False] * 30)
    index = buffer.extend(data)
    assert index.tolist() == [t % 8 for t in range(15)]
    assert sorted(everything(buffer)["observation"].tolist()) == list(range(14, 30, 2))
    assert "index" not in set(data.keys())
    make_buffer(8).extend(data.lock_())


# Storages


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


# Samplers


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("n_steps", [1, 4, (2, 5)], ids=str)
@pytest.mark.parametrize("sampler", [None, RandomSampler()], ids=["default", "RandomSampler"])
def test_at_random(batch, n_steps, sampler):
    buffer, ring = wrapped(batch=batch, n_steps=n_steps, sampler=sampler, batch_size=64)
    for _ in range(3):
        sample = buffer.sample()
        assert sample.batch_size == (64,)
        assert_sampled(sample, ring, n_steps)
        index = sample["index"].unbind(-1) if batch else sample["index"]
        assert torch.equal(buffer.storage[index]["number"], sample["number"])


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_visits_every_frame_once(batch, drop_last):
    buffer, ring = wrapped(batch=batch, sampler=SamplerWithoutReplacement(drop_last=drop_last), batch_size=5)
    for _ in range(2):
        seen = []
        for sample in buffer:
            assert_sampled(sample, ring)
            seen += sample["number"].tolist()
        count = len(buffer) // 5 * 5 if drop_last else len(buffer)
        assert len(seen) == len(set(seen)) == count
        assert set(seen) <= set(ring.numbers())


def test_iteration_draws_on():
    buffer, ring = wrapped(sampler=RandomSampler(), batch_size=7, n_steps=(1, 4))
    samples = list(itertools.islice(buffer, 6))
    for sample in samples:
        assert_sampled(sample, ring, (1, 4))
    assert len({tuple(sample["number"].tolist()) for sample in samples}) == 6


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_a_generator_makes_a_sample_again(batch):
    samples = []
    for seed in (3, 3, 4):
        # whatever else is drawn
        torch.manual_seed(len(samples))
        buffer, ring = wrapped(batch=batch, sampler=None, n_steps=(2, 7), generator=torch.Generator().manual_seed(seed))
        samples.append(torch.cat([buffer.sample(40) for _ in range(3)]))
        assert_windows(samples[-1], ring, (2, 7), 0.9)
    one, again, other = samples
    for key in one.keys(True, True):
        assert_same_bytes(one[key], again[key], key)
    assert not torch.equal(one["number"], other["number"])


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_slices(batch):
    stream = make_stream(batch, 40, p_done=0.0, traj=True)
    ring = Ring(stream, 24, traj_key=TRAJ_KEY)
    sampler = SliceSampler(slice_len=4, traj_key=TRAJ_KEY, strict_length=False, truncated_key=None)
    buffer = make_buffer(24, batch, sampler=sampler, traj_key=TRAJ_KEY, batch_size=24)
    buffer.extend(ring.take(24)), buffer.extend(ring.take(9))
    sample = buffer.sample()
    assert_sampled(sample, ring)
    assert (sample["number"].diff() == 1).sum() >= len(sample) // 4


def test_a_sampler_that_writes_flags_of_its_own():
    """The ends of slices would stand where those of windows do, which targets bootstrap from."""
    message = r"sampler must .*, got SliceSampler.*'truncated'.*truncated_key must be None"
    with pytest.raises(TypeError, match=message):
        make_buffer(24, sampler=SliceSampler(slice_len=4))
    with pytest.raises(TypeError, match=message):
        make_buffer(24).set_sampler(SliceSampler(slice_len=4))


class Marking(RandomSampler):
    def sample(self, storage, batch_size):
        index, info = super().sample(storage, batch_size)
        return index, {**info, DONE: torch.ones(batch_size, 1, dtype=torch.bool)}


def test_a_sampler_of_ones_own_that_writes_flags():
    buffer, _ = wrapped(sampler=Marking())
    with pytest.raises(TypeError, match=r"sampler must leave the entries under 'next' to the windows, got Marking"):
        buffer.sample(4)


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_sequences_of_frames(batch):
    stream = make_stream(batch, 40)
    ring, buffer = Ring(stream, 16), make_buffer(16, batch, sampler=None, sample_unit=Sequence(length=4))
    buffer.extend(ring.take(16)), buffer.extend(ring.take(9))
    sample = buffer.sample(12)
    assert sample.batch_size == (48,)
    masks = ("sequence_id", "step_in_sequence", "learning_mask", "anchor_index", "validity_mask")
    assert_sampled(sample, ring, info=("index", *masks))
    number, valid = (sample[key].view(12, 4) for key in ("number", "validity_mask"))
    assert (number.diff() == 1)[valid[:, 1:]].all()


class Tree:
    """A segment tree's values, in an array: what torchrl's C++ extension gives its prioritized sampler."""

    neutral, reduce = 0.0, staticmethod(np.sum)

    def __init__(self, size):
        self.values = np.full(size, self.neutral, dtype=np.float64)

    def __getitem__(self, index):
        return torch.as_tensor(self.values[index]).float() if isinstance(index, torch.Tensor) else self.values[index]

    def __setitem__(self, index, value):
        self.values[index] = value

    def query(self, left, right):
        return float(self.reduce(self.values[left:right]))

    def scan_lower_bound(self, mass):
        """The first index up to which the values sum to ``mass`` at least."""
        return np.searchsorted(np.cumsum(self.values), mass)


class MinTree(Tree):
    neutral, reduce = np.inf, staticmethod(np.min)


@pytest.fixture
def trees(monkeypatch):
    for precision in ("32", "64"):
        monkeypatch.setattr(prioritized, f"SumSegmentTreeFp{precision}", Tree)
        monkeypatch.setattr(prioritized, f"MinSegmentTreeFp{precision}", MinTree)


# torchrl passes tensors to numpy in a way that numpy is about to give up
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.usefixtures("trees")
def test_priorities(batch):
    capacity, alpha, beta = 16, 0.7, 0.5
    size = torch.Size(batch).numel() * capacity
    sampler = PrioritizedSampler(size, alpha=alpha, beta=beta, eps=1e-12)
    buffer, ring = wrapped(capacity, batch, sampler=sampler, batch_size=400)
    info = ("index", "priority_weight")
    torch.manual_seed(0), np.random.seed(0)
    sample = buffer.sample()
    assert_sampled(sample, ring, info=info)
    # new frames are all alike
    assert set(sample["number"].tolist()) == set(ring.numbers())
    assert torch.equal(sample["priority_weight"], torch.ones(400))

    priority = 1 + (sample["number"] % 3).float()
    sample["td_error"] = priority
    buffer.update_tensordict_priority(sample)
    sample = buffer.sample(n_steps=5)
    assert_sampled(sample, ring, 5, info=info)
    kinds = sample["number"] % 3
    expected = ((1.0 + kinds) ** alpha) ** -beta
    torch.testing.assert_close(sample["priority_weight"], expected)
    # as often as their priorities say, within five standard deviations
    live = torch.tensor(ring.numbers()) % 3
    masses = torch.tensor([((1.0 + kind) ** alpha) * (live == kind).sum() for kind in range(3)])
    share = masses / masses.sum()
    counts = torch.bincount(kinds, minlength=3) / 400
    assert ((counts - share).abs() <= 5 * (share * (1 - share) / 400).sqrt()).all()

    # one frame alone, and what is written after that besides
    sample["td_error"] = torch.zeros(400)
    everywhere = torch.arange(size)
    buffer.update_priority(everywhere if not batch else torch.stack(torch.unravel_index(everywhere, (16, 2)), -1), 0.0)
    chosen = sample["number"][0].item()
    sample["td_error"] = (sample["number"] == chosen).float()
    buffer.update_tensordict_priority(sample)
    assert set(buffer.sample()["number"].tolist()) == {chosen}
    new = ring.take(2)
    buffer.extend(new)
    sample = buffer.sample()
    assert set(sample["number"].tolist()) <= {chosen, *new["number"].flatten().tolist()}
    assert set(sample["number"].tolist()) >= set(new["number"].flatten().tolist())
    assert_sampled(sample, ring, info=info)


@pytest.mark.usefixtures("trees")
def test_a_priority_that_comes_with_the_data():
    stream = make_stream((), 30)
    stream["td_error"] = (stream["number"] == 13).float()
    ring, buffer = Ring(stream, 16), make_buffer(16, sampler=PrioritizedSampler(16, alpha=1.0, beta=1.0))
    buffer.extend(ring.take(9)), buffer.extend(ring.take(10))
    sample = buffer.sample(20)
    assert set(sample["number"].tolist()) == {13}
    assert_sampled(sample, ring, info=("index", "priority_weight"))


def test_samples_are_pinned_once_transforms_are_through(monkeypatch):
    """What pinning does takes an accelerator (``test_gpu.py``)."""
    pinned = []
    monkeypatch.setattr(TensorDict, "pin_memory", lambda data: pinned.append(data.clone()) or pinned[-1])
    buffer, _ = wrapped(pin_memory=True, transform=Renamed())
    sample = buffer.sample(8)
    assert sample is pinned[0]
    assert "renamed" in set(sample.keys())
    assert len(pinned) == 1


class Renamed(Transform):
    def forward(self, data):
        return data.rename_key_("number", "renamed")


# Prefetching


def test_what_is_changed_takes_effect_though_samples_were_prefetched():
    buffer, ring = wrapped(sampler=None, batch_size=16, prefetch=3)
    assert_sampled(buffer.sample(), ring)
    for n_steps, gamma in [(5, 0.9), (5, 0.5), ((2, 4), 0.5), (1, 1.0), (9, 0.97)]:
        buffer.n_steps, buffer.gamma = n_steps, gamma
        for _ in range(5):
            assert_sampled(buffer.sample(), ring, n_steps, gamma)


def test_n_steps_of_one_call_though_samples_were_prefetched():
    buffer, ring = wrapped(sampler=None, batch_size=16, prefetch=3, n_steps=2)
    for n_steps in (2, 6, (1, 5), 2, 3):
        assert_sampled(buffer.sample(n_steps=n_steps), ring, n_steps)
        assert_sampled(buffer.sample(), ring, 2)


@pytest.mark.parametrize("prefetch", [1, 3])
@pytest.mark.parametrize("how", ["attribute", "call"])
def test_no_frame_of_an_epoch_is_lost_by_a_change(prefetch, how):
    sampler = SamplerWithoutReplacement()
    buffer, ring = wrapped(sampler=sampler, batch_size=5, prefetch=prefetch, n_steps=2)
    for _ in range(2):
        seen = []
        for n_steps in (2, 5, 5, (1, 3), 4, 2, 1):
            if how == "attribute":
                buffer.n_steps, buffer.gamma = n_steps, 0.8
                sample = buffer.sample()
            else:
                buffer.gamma = 0.8
                sample = buffer.sample(n_steps=n_steps)
            assert_sampled(sample, ring, n_steps, 0.8)
            seen += sample["number"].tolist()
        assert sorted(seen) == ring.numbers()
        assert len(seen) == 32


def test_no_frame_of_an_epoch_is_lost_while_iterating():
    buffer, ring = wrapped(sampler=SamplerWithoutReplacement(), batch_size=5, prefetch=2)
    for first in (1, 4):
        buffer.n_steps = first
        seen = []
        for sample in buffer:
            assert_sampled(sample, ring, buffer.n_steps)
            seen += sample["number"].tolist()
            buffer.n_steps += 1
        assert sorted(seen) == ring.numbers()


def test_a_call_that_is_refused_loses_no_prefetched_frame():
    buffer, ring = wrapped(sampler=SamplerWithoutReplacement(), batch_size=8, prefetch=2)
    seen = buffer.sample()["number"].tolist()
    for _ in range(3):
        with pytest.raises(ValueError, match="n_steps must be"):
            buffer.sample(n_steps=0)
        sample = buffer.sample()
        assert_sampled(sample, ring)
        seen += sample["number"].tolist()
    assert sorted(seen) == ring.numbers()


def test_prefetched_samples_are_of_one_moment():
    """What was sampled ahead is of the ring as it was then, or as it is now, and never of both."""
    buffer, ring = wrapped(8, sampler=None, batch_size=16, prefetch=2)
    moments = [copy.copy(ring)]
    for i in range(12):
        if i % 3 == 2:
            buffer.n_steps = 1 + i % 4
        sample = buffer.sample()
        assert any(is_of(sample, moment, buffer.n_steps) for moment in moments)
        buffer.extend(ring.take(1))
        moments.append(copy.copy(ring))


def test_what_was_prefetched_before_the_buffer_was_emptied():
    buffer, ring = wrapped(sampler=SamplerWithoutReplacement(), batch_size=4, prefetch=3)
    buffer.sample()
    before = copy.copy(ring)
    buffer.empty(), ring.empty()
    buffer.extend(ring.take(2))
    for n_steps in (5, 5, 2, 2, 3):
        buffer.n_steps = n_steps
        sample = buffer.sample()
        # torchrl keeps what it prefetched; what is read anew is there
        assert is_of(sample, before, n_steps) or is_of(sample, ring, n_steps)


class Gate(SamplerWithoutReplacement):
    """Lets one batch through, and those that follow when it is opened."""

    def __init__(self):
        super().__init__()
        self.opened, self.passed = threading.Event(), 0

    def sample(self, storage, batch_size):
        self.passed += 1
        assert self.passed == 1 or self.opened.wait(30)
        return super().sample(storage, batch_size)


def soon(function):
    """The result of a call that must return: a thread that waits for ever is left behind."""
    results = []

    def run():
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert results, "the call does not return"
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


@pytest.mark.parametrize("when", ["before it was prefetched", "after"])
def test_an_error_while_prefetching_is_over_when_its_cause_is(when):
    sampler = Gate() if when == "before it was prefetched" else SamplerWithoutReplacement()
    buffer, ring = wrapped(sampler=sampler, batch_size=4, prefetch=2)
    seen = soon(buffer.sample)["number"].tolist()
    if when == "after":
        buffer.synchronize()
    buffer.reward_keys = ["profit"]
    if when != "after":
        sampler.opened.set()
    for _ in range(2):
        with pytest.raises(KeyError, match="profit"):
            soon(buffer.sample)
    buffer.reward_keys = None
    for _ in range(7):
        sample = soon(buffer.sample)
        assert_sampled(sample, ring)
        seen += sample["number"].tolist()
    if when == "after":
        assert sorted(seen) == ring.numbers()


class Broken(Transform):
    """Fails on sample while it is told to."""

    fails = False

    def forward(self, tensordict):
        if self.fails:
            raise OSError("disk full")
        return tensordict


def test_a_transform_that_fails_while_a_prefetched_sample_is_made_anew():
    broken = Broken()
    buffer, ring = wrapped(sampler=SamplerWithoutReplacement(), batch_size=4, prefetch=2, transform=broken)
    seen = soon(buffer.sample)["number"].tolist()
    buffer.synchronize()
    buffer.n_steps, broken.fails = 5, True
    for _ in range(2):
        with pytest.raises(OSError, match="disk full"):
            soon(buffer.sample)
    broken.fails = False
    for _ in range(7):
        sample = soon(buffer.sample)
        assert_sampled(sample, ring, 5)
        seen += sample["number"].tolist()
    assert sorted(seen) == ring.numbers()


def is_of(sample, ring, n_steps):
    try:
        assert_sampled(sample, ring, n_steps)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("prefetch", [None, 2])
def test_sampling_while_another_thread_writes(prefetch):
    """Rewards are the frames' numbers and gamma is 1: each transition says of which frames it is."""
    count, errors, written, stop = 30_000, [], [32], threading.Event()
    data = frames([float(t) for t in range(count)], [False] * count)
    buffer = make_buffer(32, sampler=None, gamma=1.0, batch_size=32, prefetch=prefetch)
    buffer.extend(data[:32])

    def write():
        try:
            while not stop.is_set() and written[0] < count:
                buffer.extend(data[written[0] : written[0] + 3])
                written[0] += 3
        except Exception as error:
            errors.append(error)

    thread, samples = threading.Thread(target=write), []
    thread.start()
    try:
        while not errors and (len(samples) < 60 or written[0] < 300):
            samples.append(buffer.sample())
    finally:
        stop.set()
        thread.join()
    assert not errors
    sample = torch.cat(samples)
    first, steps = sample["observation"], sample["steps_to_next_obs"]
    assert torch.equal(sample[NEXT], first + steps)
    assert torch.equal(sample[REWARD].squeeze(-1).long(), first * steps + steps * (steps - 1) // 2)
    assert set(steps.tolist()) == {1, 2, 3}
    # a window is cut at the newest frame alone, which moves
    assert (steps == 3).double().mean() > 0.8


# Transforms


class Change(Transform):
    """Adds 1 to observations on extend, and doubles next observations on sample."""

    def __init__(self):
        super().__init__()
        self.extended, self.sampled = [], []

    def _inv_call(self, tensordict):
        self.extended.append(tensordict.numel())
        return tensordict.set("observation", tensordict["observation"] + 1)

    def forward(self, tensordict):
        self.sampled.append(tensordict.numel())
        # it is given what is sampled: the n-step transition
        assert {"steps_to_next_obs", "gamma", "nonterminal"} <= set(tensordict.keys())
        return tensordict.set(NEXT, tensordict[NEXT] * 2)


@pytest.mark.parametrize("how", ["argument", "append", "insert", "compose"])
@pytest.mark.parametrize("prefetch", [None, 2])
def test_transforms_are_applied_once(how, prefetch):
    change = Change()
    given = {"argument": change, "compose": Compose(change)}.get(how)
    # prefetched samples are as many as there are batches in an epoch
    sampler = SamplerWithoutReplacement(drop_last=True)
    stream = make_stream((2,), 30)
    buffer = make_buffer(8, (2,), transform=given, sampler=sampler, batch_size=8, prefetch=prefetch)
    if how == "append":
        buffer.append_transform(change)
    elif how == "insert":
        buffer.insert_transform(0, change)
    ring = Ring(stream, 8)
    buffer.extend(ring.take(8)), buffer.extend(ring.take(3))
    assert change.extended == [16, 6]
    ring.stream = stream.clone()
    ring.stream["observation"] += 1
    ring.stream[NEXT] *= 2
    for n_steps in (3, 5):
        buffer.n_steps = n_steps
        assert_sampled(buffer.sample(), ring, n_steps)
    if prefetch is None:
        assert change.sampled == [8, 8]


def test_rewards_are_scaled_as_they_were_summed():
    scaling = RewardScaling(loc=0.0, scale=10.0, in_keys=[REWARD])
    buffer, ring = wrapped(transform=scaling)
    sample = everything(buffer)
    calm = wrapped()[0]
    expected = everything(calm)
    torch.testing.assert_close(sample[REWARD], expected[REWARD] * 10)
    assert_same_bytes(sample["next", "reward_orig"], expected["next", "reward_orig"])
    assert_windows(sample, ring, 3, 0.9)


def test_a_transform_that_casts_on_extend():
    stream = make_stream((2,), 30)
    ring, buffer = Ring(stream.clone(), 8), make_buffer(8, (2,), transform=DoubleToFloat(in_keys_inv=["observation"]))
    for start, stop in ((0, 8), (8, 13)):
        part = stream[:, start:stop].clone()
        part["observation"] = part["observation"].double()
        buffer.extend(part)
    ring.take(13)
    sample = everything(buffer)
    assert sample["observation"].dtype == torch.float32
    assert_sampled(sample, ring)


# Checkpoints


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


# Indices


def test_how_old_a_frame_is_that_is_read_anew():
    buffer, ring = wrapped(
        8, (), frames=[8], sampler=Drawn(torch.arange(8)), batch_size=8, prefetch=1,
        writer=TensorDictRoundRobinWriter(track_generations=True),
    )  # fmt: skip
    assert buffer.sample()["index_generation"].tolist() == [0] * 8
    buffer.synchronize()
    buffer.extend(ring.take(5))
    sample = buffer.sample(n_steps=1)
    assert_sampled(sample, ring, 1, info=["index", "index_generation"])
    assert sample["index_generation"].tolist() == [1] * 5 + [0] * 3


# What is no tensor


def named(kind, numbers):
    """A name for every frame, by its number."""
    if isinstance(numbers, int):
        return f"{kind} {numbers}"
    return NonTensorStack(*(named(kind, each) for each in numbers))


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_objects(batch):
    stream = make_stream(batch, 14, p_done=0.3)
    for kind, data in (("frame", stream), ("after", stream["next"])):
        data["task"], data["name"] = "reach", named(kind, stream["number"].tolist())
    ring, buffer = Ring(stream, 8), make_buffer(8, batch)
    buffer.extend(ring.take(6)), buffer.extend(ring.take(8))
    sample = everything(buffer)
    assert sorted(sample["number"].tolist()) == ring.numbers()
    windows = assert_windows(sample, ring, 3, 0.9)
    assert list(sample["name"]) == [f"frame {window[0]}" for window in windows]
    assert list(sample["next", "name"]) == [f"after {window[-1]}" for window in windows]
    for key in ("task", ("next", "task")):
        value = sample[key]
        assert value == "reach" or list(value) == ["reach"] * len(buffer)
    assert_returns(sample[REWARD], stream.reshape(-1)[REWARD], windows, 0.9)


# Errors


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
        buffer.extend(stream), buffer.sample(4)


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
