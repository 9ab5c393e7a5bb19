"""torchrl's samplers over the n-step buffer."""

import itertools

import pytest
import torch
from rings import TRAJ_KEY, Ring, assert_same_bytes, assert_sampled, assert_windows, make_buffer, make_stream, wrapped
from segment_trees import Tree, plant
from tensordict import TensorDict
from torchrl.data import RandomSampler, SamplerWithoutReplacement
from torchrl.data.replay_buffers import Sequence
from torchrl.data.replay_buffers.samplers import PrioritizedSampler, SliceSampler
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


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning", "ignore:To copy construct")
def test_another_storage_under_priorities(monkeypatch):
    """Its frames have the default priority, as those of a storage that a buffer is made on."""
    plant(monkeypatch)
    monkeypatch.setattr(Tree, "query", lambda self, left, right: float(self.values[left:right].sum()))
    buffer = make_buffer(8, sampler=PrioritizedSampler(8, 0.7, 0.5))
    buffer.extend(make_stream((), 8))
    other, ring = wrapped(8, ())
    buffer.set_storage(other.storage)
    assert_sampled(buffer.sample(16).exclude("priority_weight"), ring)
