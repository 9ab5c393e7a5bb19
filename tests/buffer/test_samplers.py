"""torchrl's samplers over the n-step buffer."""

import itertools

import numpy as np
import pytest
import torch
from rings import TRAJ_KEY, Ring, assert_same_bytes, assert_sampled, assert_windows, make_buffer, make_stream, wrapped
from tensordict import TensorDict
from torchrl.data import RandomSampler, SamplerWithoutReplacement
from torchrl.data.replay_buffers import Sequence
from torchrl.data.replay_buffers.samplers import PrioritizedSampler, SliceSampler, prioritized
from torchrl.envs.transforms import Transform

DONE = ("next", "done")


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
