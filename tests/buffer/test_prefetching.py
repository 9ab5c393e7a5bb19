"""What the n-step buffer samples ahead, and while others write."""

import copy
import threading
from concurrent.futures import wait

import pytest
import torch
from rings import assert_sampled, make_buffer, wrapped
from rollouts import frames
from torchrl.data import SamplerWithoutReplacement
from torchrl.envs.transforms import Transform
from turns import soon

REWARD, NEXT = ("next", "reward"), ("next", "observation")


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


def sampled_on(buffer, ring, *arguments):
    """The numbers of the frames of seven more samples, each of which is right."""
    numbers = []
    for _ in range(7):
        sample = soon(buffer.sample)
        assert_sampled(sample, ring, *arguments)
        numbers += sample["number"].tolist()
    return numbers


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
    seen += sampled_on(buffer, ring)
    if when == "after":
        assert sorted(seen) == ring.numbers()


class Broken(Transform):
    """Fails on sample while it is told to."""

    fails = False

    def forward(self, tensordict):
        if self.fails:
            raise OSError("disk full")
        return tensordict


def test_an_error_of_a_transform_while_prefetching_is_raised():
    broken = Broken()
    buffer, _ = wrapped(sampler=SamplerWithoutReplacement(), batch_size=4, prefetch=2, transform=broken)
    soon(buffer.sample), buffer.synchronize()
    broken.fails = True
    for _ in range(2):
        soon(buffer.sample)
    wait(buffer._prefetch_queue)
    broken.fails = False
    for use in (buffer.state_dict, buffer.sample):
        with pytest.raises(OSError, match="disk full"):
            soon(use)


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
    seen += sampled_on(buffer, ring, 5)
    assert sorted(seen) == ring.numbers()


@pytest.mark.parametrize("how", ["set_storage", "empty"])
def test_a_batch_that_is_prefetched_is_not_waited_for_under_its_lock(how):
    """The thread that prefetches takes the lock under which the storage is exchanged, or the buffer emptied."""
    (buffer, _), (other, ring) = wrapped(sampler=None, batch_size=4, prefetch=1), wrapped(sampler=None)
    entries, begun, opened, used = buffer._order.entries, threading.Event(), threading.Event(), [threading.get_ident()]

    def gate():
        if threading.get_ident() not in used and not opened.is_set():
            begun.set()
            opened.wait(0.5)
        return entries()

    def use():
        used.append(threading.get_ident())
        if how == "empty":
            buffer.empty()
        else:
            buffer.set_storage(other.storage)

    buffer._order.entries = gate
    buffer.sample()
    assert begun.wait(10)
    soon(use)
    opened.set()
    if how == "set_storage":
        assert_sampled(soon(buffer.sample), ring)


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
