"""Threads that use one buffer take turns, and none waits for another for ever."""

import copy
import threading

import pytest
import torch
from rings import kept_once, make_buffer, make_stream
from torchrl.data import RandomSampler
from turns import soon, together

from multistep_triton import NStepReplayBuffer
from multistep_triton.buffer.storing import StoringReplayBuffer


@pytest.mark.parametrize("other", ["empty", "state_dict"])
def test_an_empty_buffer_that_is_sampled(other):
    buffer = make_buffer(8, (2,), sampler=None, batch_size=4)
    buffer.extend(make_stream((2,), 2))
    buffer.empty()

    def sample():
        with pytest.raises(RuntimeError, match="empty"):
            buffer.sample()

    assert not together(sample, getattr(buffer, other))


def test_an_empty_buffer_that_processes_share():
    buffer = make_buffer(8, (2,), sampler=None, batch_size=4, shared=True)
    with pytest.raises(RuntimeError, match="empty"):
        soon(buffer.sample)


@pytest.mark.parametrize("other", ["add", "state_dict", "set_writer"])
def test_a_capturable_buffer(other):
    """An observation is the frame's number, and no trajectory ends."""
    buffer = make_buffer(16, (2,), sampler=None, batch_size=8, capturable=True)
    stream, begin, lock = make_stream((2,), 2, p_done=0.0), [0], threading.Lock()

    def part(frames):
        numbers = torch.arange(begin[0], begin[0] + frames).expand(2, frames).unsqueeze(-1).float()
        data = stream[:, :frames].clone()
        data["observation"], data["next", "observation"] = numbers, numbers + 1
        begin[0] += frames
        return data

    def extend():
        with lock:
            buffer.extend(part(2))

    def sample():
        sample = buffer.sample()
        ahead = sample["next", "observation"] - sample["observation"]
        assert torch.equal(ahead.flatten().long(), sample["steps_to_next_obs"])

    def use():
        if other == "add":
            with lock:
                buffer.add(part(1)[:, 0])
        elif other == "state_dict":
            buffer.state_dict()
        else:
            buffer.set_writer(type(buffer.writer)())

    extend()
    assert not together(extend, sample, use, seconds=1.5)


def test_a_copy_waits_for_its_first_write():
    buffer = make_buffer(8, (2,), sampler=None)
    buffer.extend(make_stream((2,), 8))
    twin, begun, opened, sampled = copy.deepcopy(buffer), threading.Event(), threading.Event(), threading.Event()
    extend = twin._writer.extend

    def slowly(data):
        begun.set()
        opened.wait(10)
        return extend(data)

    twin._writer.extend = slowly
    writer = threading.Thread(target=lambda: twin.extend(make_stream((2,), 1)), daemon=True)
    writer.start()
    assert begun.wait(10)
    reader = threading.Thread(target=lambda: (twin.sample(4), sampled.set()), daemon=True)
    reader.start()
    assert not sampled.wait(0.3)
    opened.set()
    reader.join(10), writer.join(10)
    assert sampled.is_set()


def test_a_buffer_that_is_emptied_while_a_frame_waits(monkeypatch):
    stream = kept_once(make_stream((2,), 20, p_done=0.0))
    bare = stream.exclude(("next", "observation"))
    bare["final", "observation"] = stream["next", "observation"].clone()
    buffer = make_buffer(8, (2,), compact=["observation"], sampler=RandomSampler())
    buffer.extend(bare[:, :2])
    extend, begun, opened = StoringReplayBuffer._extend, threading.Event(), threading.Event()

    def slowly(self, *arguments, **more):
        begun.set()
        opened.wait(10)
        return extend(self, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(StoringReplayBuffer, "_extend", slowly)
        writer = threading.Thread(target=lambda: buffer.extend(bare[:, 2:4]), daemon=True)
        writer.start()
        assert begun.wait(10)
        emptier = threading.Thread(target=buffer.empty, daemon=True)
        emptier.start()
        emptier.join(0.3)
        opened.set()
        writer.join(10), emptier.join(10)
    buffer.extend(bare[:, 10:12])
    assert buffer[:]["number"].flatten().tolist() == stream["number"][:, 10].tolist()


def test_processes_share_no_count_of_a_device():
    message = "shared must be False with capturable=True"
    with pytest.raises(ValueError, match=message):
        make_buffer(8, capturable=True, sampler=None, shared=True)
    buffer = make_buffer(8, capturable=True, sampler=None)
    with pytest.raises(ValueError, match=message):
        buffer.share()
    assert isinstance(buffer, NStepReplayBuffer) and not buffer.shared
