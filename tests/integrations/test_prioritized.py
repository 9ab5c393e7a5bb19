"""Prioritized replay of n-step transitions, over the segment trees of torchrl's C++ extension where that loads."""

import numpy as np
import pytest
import torch
from rings import TRAJ_KEY, Ring, assert_sampled, make_buffer, make_stream, wrapped
from rollouts import extend
from torchrl.data import LazyTensorStorage, TensorDictPrioritizedReplayBuffer, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import PrioritizedSampler, PrioritizedSliceSampler, prioritized

from multistep_triton import MultiStepTransform

# torchrl passes tensors to numpy in a way that numpy is about to give up
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

CAPACITY, ALPHA, BETA = 16, 0.7, 0.5
EXPONENTS = {"alpha": ALPHA, "beta": BETA, "eps": 1e-12}
INFO = ("index", "priority_weight")


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


EXTENSION_LOADS = prioritized.SumSegmentTreeFp32 is not None


@pytest.fixture(autouse=True, params=["trees of the extension" if EXTENSION_LOADS else "trees in Python"])
def trees(monkeypatch):
    """The extension's trees or, with a torch that it is not built for, trees in Python in their place."""
    torch.manual_seed(0), np.random.seed(0)
    if not EXTENSION_LOADS:
        for precision in ("32", "64"):
            monkeypatch.setattr(prioritized, f"SumSegmentTreeFp{precision}", Tree)
            monkeypatch.setattr(prioritized, f"MinSegmentTreeFp{precision}", MinTree)


class OfBuffer:
    """An ``NStepReplayBuffer`` whose ring is full, and what must be sampled of it."""

    def __init__(self, batch):
        sampler = PrioritizedSampler(torch.Size(batch).numel() * CAPACITY, **EXPONENTS)
        self.buffer, self.ring = wrapped(CAPACITY, batch, sampler=sampler, batch_size=400)

    def numbers(self):
        return self.ring.numbers()

    def write(self):
        """Two frames more of every environment; returns the numbers of those that are sampled from now on."""
        new = self.ring.take(2)
        self.buffer.extend(new)
        return set(new["number"].flatten().tolist())

    def check(self, sample, n_steps=3):
        assert_sampled(sample, self.ring, n_steps, info=INFO)


class OfTransform:
    """A buffer of torchrl's with a ``MultiStepTransform``, which holds back three frames of every environment."""

    def __init__(self, batch):
        self.stream = make_stream(batch, 4 * CAPACITY)
        self.expected = extend(MultiStepTransform(3, 0.9), self.stream, [4 * CAPACITY]).flatten()
        self.buffer, self.count = self.make(torch.Size(batch).numel() * CAPACITY, len(batch) + 1), 0
        for frames in (CAPACITY + 3, CAPACITY // 2 - 1):
            self.extend(frames)

    def make(self, size, ndim):
        return TensorDictReplayBuffer(
            storage=LazyTensorStorage(size, ndim=ndim),
            sampler=PrioritizedSampler(size, **EXPONENTS),
            transform=MultiStepTransform(3, 0.9),
            batch_size=400,
        )

    def extend(self, frames):
        self.buffer.extend(self.stream[..., self.count : self.count + frames])
        self.count += frames

    def numbers(self):
        return self.stream["number"][..., self.count - 3 - CAPACITY : self.count - 3].flatten().tolist()

    def write(self):
        before = set(self.numbers())
        self.extend(2)
        return set(self.numbers()) - before

    def check(self, sample):
        numbers = self.expected["number"].tolist()
        expected = self.expected[[numbers.index(number) for number in sample["number"].tolist()]]
        assert set(sample.keys(True, True)) == {*expected.keys(True, True), *INFO}
        assert (sample.exclude(*INFO) == expected).all()


class OfPrioritizedBuffer(OfTransform):
    def make(self, size, ndim):
        return TensorDictPrioritizedReplayBuffer(
            storage=LazyTensorStorage(size, ndim=ndim),
            transform=MultiStepTransform(3, 0.9),
            batch_size=400,
            **EXPONENTS,
        )


each = pytest.mark.parametrize("of", [OfBuffer, OfTransform, OfPrioritizedBuffer])


def prioritize(of, priority_of):
    """Gives every frame that is stored a priority by its number, as a learner does: of what it sampled."""
    sample = of.buffer.sample()
    assert set(sample["number"].tolist()) == set(of.numbers())
    sample["td_error"] = priority_of(sample["number"])
    of.buffer.update_tensordict_priority(sample)


@each
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_priorities(of, batch):
    of = of(batch)
    sample = of.buffer.sample()
    of.check(sample)
    # new frames are all alike
    assert torch.equal(sample["priority_weight"], torch.ones(400))

    prioritize(of, lambda number: 1 + (number % 3).float())
    sample = of.buffer.sample()
    of.check(sample)
    kinds = sample["number"] % 3
    torch.testing.assert_close(sample["priority_weight"], ((1.0 + kinds) ** ALPHA) ** -BETA)
    # as often as their priorities say, within five standard deviations
    there = torch.tensor(of.numbers()) % 3
    masses = torch.tensor([((1.0 + kind) ** ALPHA) * (there == kind).sum() for kind in range(3)])
    share = masses / masses.sum()
    counts = torch.bincount(kinds, minlength=3) / 400
    assert ((counts - share).abs() <= 5 * (share * (1 - share) / 400).sqrt()).all()


@each
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_one_frame_alone_and_what_is_written_after_that(of, batch):
    of = of(batch)
    chosen = of.numbers()[-CAPACITY // 2]
    prioritize(of, lambda number: (number == chosen).float())
    assert set(of.buffer.sample()["number"].tolist()) == {chosen}
    new = of.write()
    sample = of.buffer.sample()
    assert set(sample["number"].tolist()) == {chosen, *new}
    of.check(sample)


@each
@pytest.mark.parametrize("by", ["state_dict", "dumps"])
def test_priorities_are_saved_and_loaded(of, by, tmp_path):
    saved, loaded = of(()), of(())
    chosen = saved.numbers()[5]
    prioritize(saved, lambda number: (number == chosen).float())
    if by == "state_dict":
        loaded.buffer.load_state_dict(saved.buffer.state_dict())
    else:
        saved.buffer.dumps(tmp_path), loaded.buffer.loads(tmp_path)
    sample = loaded.buffer.sample()
    assert set(sample["number"].tolist()) == {chosen}
    loaded.check(sample)


def test_another_n_for_a_call_leaves_priorities_as_they_are():
    of = OfBuffer((2,))
    chosen = of.numbers()[9]
    prioritize(of, lambda number: (number == chosen).float())
    for n_steps in (5, 1, (2, 4)):
        sample = of.buffer.sample(n_steps=n_steps)
        assert set(sample["number"].tolist()) == {chosen}
        of.check(sample, n_steps)


def test_a_priority_that_comes_with_the_data():
    stream = make_stream((), 30)
    stream["td_error"] = (stream["number"] == 13).float()
    ring, buffer = Ring(stream, 16), make_buffer(16, sampler=PrioritizedSampler(16, alpha=1.0, beta=1.0))
    buffer.extend(ring.take(9)), buffer.extend(ring.take(10))
    sample = buffer.sample(20)
    assert set(sample["number"].tolist()) == {13}
    assert_sampled(sample, ring, info=INFO)


def test_a_priority_that_comes_with_frames_held_back():
    stream = make_stream((), 30)
    stream["td_error"] = ((stream["number"] == 13) | (stream["number"] == 28)).float()
    transform = MultiStepTransform(3, 0.9)
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(20),
        sampler=PrioritizedSampler(20, alpha=1.0, beta=1.0),
        transform=transform,
        batch_size=40,
    )
    for part in stream.split(6):
        buffer.extend(part)
    assert set(buffer.sample()["number"].tolist()) == {13}
    transform.flush_into(buffer)
    assert set(buffer.sample()["number"].tolist()) == {13, 28}


def test_slices():
    stream = make_stream((), 40, p_done=0.0, traj=True)
    ring = Ring(stream, 24, traj_key=TRAJ_KEY)
    sampler = PrioritizedSliceSampler(
        24, **EXPONENTS, slice_len=4, traj_key=TRAJ_KEY, strict_length=False, truncated_key=None
    )
    buffer = make_buffer(24, sampler=sampler, traj_key=TRAJ_KEY, batch_size=24)
    buffer.extend(ring.take(24)), buffer.extend(ring.take(9))
    sample = buffer.sample()
    assert_sampled(sample, ring, info=INFO)
    begin = sample["number"][0].item()
    buffer.update_priority(torch.arange(24), 0.0)
    sample["td_error"] = (sample["number"] == begin).float()
    buffer.update_tensordict_priority(sample)
    sample = buffer.sample()
    assert_sampled(sample, ring, info=INFO)
    # every slice begins there
    following = {number for number in range(begin, begin + 4) if ring.traj[number] == ring.traj[begin]}
    assert begin in sample["number"] and set(sample["number"].tolist()) <= following


@each
def test_without_the_extension_torchrl_refuses(of, monkeypatch):
    monkeypatch.setattr(prioritized, "SumSegmentTreeFp32", None)
    with pytest.raises(RuntimeError, match="SumSegmentTreeFp32 is not available"):
        of(())


@pytest.mark.parametrize("batch", [(), (2,)])
def test_no_frames(batch):
    buffer = make_buffer(CAPACITY, batch, sampler=PrioritizedSampler(CAPACITY, ALPHA, BETA), batch_size=4)
    data = make_stream(batch, 4)
    data["td_error"] = torch.ones(*data.shape)
    for frames in (0, 3, 0):
        assert len(buffer.extend(data[..., :frames])) == data[..., :frames].batch_size.numel()
