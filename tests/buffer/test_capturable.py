"""A buffer that can be captured: what it stores and samples is what a usual one does, and the host need not know."""

import copy
import pickle

import fresh
import pytest
import torch
from paths import EITHER, GCC
from rings import Drawn, Ring, assert_sampled, make_buffer, make_stream
from torchrl.data import (
    LazyTensorStorage,
    RandomSampler,
    ReplayBuffer,
    SamplerWithoutReplacement,
    SliceSampler,
    TensorDictReplayBuffer,
    TensorDictRoundRobinWriter,
)
from torchrl.envs.transforms import RewardScaling

from multistep_triton import MultiStepTransform, NStepReplayBuffer

CAPACITY, BATCH = 8, (3,)


def make(batch=BATCH, **arguments):
    return make_buffer(CAPACITY, batch, **{"sampler": RandomSampler(), "capturable": True, **arguments})


def sampled_at(buffer, index):
    """What a usual buffer samples of the same storage at an index."""
    usual = make_buffer(CAPACITY, BATCH, n_steps=buffer.n_steps, sampler=Drawn(index.unbind(-1)))
    usual.load_state_dict(copy.deepcopy(buffer.state_dict()))
    return usual.sample(len(index))


@pytest.mark.parametrize("how", ["machine", pytest.param("recorded", marks=GCC)])
def test_a_recorded_step_is_repeated_without_python(how):
    """As a CUDA graph repeats it: launches with the same arguments, no operator that reads, memory that stays."""
    steps = 1000 if how == "machine" else 50
    done = fresh.run(f"import captured\ncaptured.main({how!r}, {steps}, {100})")
    assert done.returncode == 0, done.stderr


@EITHER
@pytest.mark.parametrize("batch", [(), BATCH], ids=str)
@pytest.mark.parametrize("cuts", [[1] * 20, [3, 5, 8, 2, 7], [8, 8, 1]], ids=str)
def test_a_stream_is_stored_and_sampled_as_by_a_usual_buffer(where, batch, cuts):
    with where():
        stream = make_stream(batch, 40, p_done=0.2)
        ring, buffer, usual = Ring(stream, CAPACITY), make(batch), make_buffer(CAPACITY, batch)
        for frames in cuts:
            part = ring.take(frames)
            assert torch.equal(buffer.extend(part), usual.extend(part))
            assert_sampled(buffer.sample(32), ring)
        assert len(buffer) == len(usual) and buffer.write_count == usual.write_count
        assert (buffer[:] == usual[:]).all()


@EITHER
def test_an_n_of_its_own_for_each_sample(where):
    with where():
        stream = make_stream(BATCH, 40, p_done=0.05)
        ring, buffer = Ring(stream, CAPACITY), make(n_steps=(2, 4))
        for frames in (5, 5, 1):
            buffer.extend(ring.take(frames))
        assert_sampled(buffer.sample(64), ring, (2, 4))
        assert_sampled(buffer.sample(64, n_steps=1), ring, 1)


@EITHER
def test_every_live_frame_is_as_likely(where):
    with where():
        stream = make_stream(BATCH, 40)
        ring, buffer = Ring(stream, CAPACITY), make()
        torch.manual_seed(0)
        for frames in (3, 2, 7):
            buffer.extend(ring.take(frames))
            live, draws = len(ring.numbers()), 6000
            numbers, counts = buffer.sample(draws)["number"].unique(return_counts=True)
            assert numbers.tolist() == sorted(ring.numbers())
            # Its mean is live - 1, and the square root of twice that its standard deviation.
            chi_square = ((counts - draws / live) ** 2 / (draws / live)).sum().item()
            assert chi_square < live - 1 + 4 * (2 * (live - 1)) ** 0.5


@EITHER
def test_a_generator_draws_the_same_again(where):
    with where():
        samples = []
        for _ in range(2):
            buffer = make(generator=torch.Generator(torch.get_default_device()).manual_seed(7))
            for part in make_stream(BATCH, 9).split([4, 5], -1):
                buffer.extend(part)
            samples.append(torch.stack([buffer.sample(16) for _ in range(3)]))
        assert (samples[0] == samples[1]).all()


@EITHER
def test_saved_and_loaded(where, tmp_path):
    with where():
        stream = make_stream(BATCH, 40)
        ring, buffer = Ring(stream, CAPACITY), make()
        for frames in (3, 4, 6):
            buffer.extend(ring.take(frames))
        buffer.dumps(tmp_path)
        state, others = copy.deepcopy(buffer.state_dict()), [make() for _ in range(3)]
        others[0].loads(tmp_path), others[1].load_state_dict(state)
        others[2].extend(stream[..., :7]), others[2].extend(stream[..., :2]), others[2].loads(tmp_path)
        others += [copy.deepcopy(buffer), pickle.loads(pickle.dumps(buffer))]
        part = ring.take(3)
        for each in others:
            each.extend(part), each.extend(part[..., :0])
            assert_sampled(each.sample(32), ring)
            assert len(each) == len(ring.numbers())
        part = ring.take(2)
        for each in others:
            each.extend(part)
            assert_sampled(each.sample(32), ring)


@EITHER
def test_emptied_and_given_another_storage(where):
    with where():
        stream = make_stream(BATCH, 60)
        ring, buffer = Ring(stream, CAPACITY), make()
        for frames in (6, 5):
            buffer.extend(ring.take(frames))
        buffer.empty()
        assert not len(buffer)
        with pytest.raises(RuntimeError, match="empty"):
            buffer.sample(4)
        ring.empty()
        for frames in (2, 3):
            buffer.extend(ring.take(frames))
            assert_sampled(buffer.sample(32), ring)
        buffer.set_storage(LazyTensorStorage(CAPACITY * 3, ndim=2, device=torch.get_default_device()))
        ring.empty()
        for frames in (4, 1, 8):
            buffer.extend(ring.take(frames))
            assert_sampled(buffer.sample(32), ring)


@EITHER
def test_whatever_asks_is_told_how_many_frames_there_are(where):
    with where():
        stream, buffer = make_stream(BATCH, 40), make()
        for frames in range(1, 5):
            buffer.extend(stream[..., :frames])
            count = 3 * min(frames * (frames + 1) // 2, CAPACITY)
            asked = [len(buffer), len(buffer.storage), buffer.stats()["size"], buffer[:].numel()]
            assert asked == [count] * 4, frames
            buffer.extend(stream[..., :1]), buffer.empty()
            for again in range(1, frames + 1):
                buffer.extend(stream[..., :again])


@EITHER
def test_calls_of_other_frames_between(where):
    """More than there are slots, or a single one: the host stores these, and the device goes on."""
    with where():
        stream = make_stream(BATCH, 60)
        ring, buffer = Ring(stream, CAPACITY), make()
        for frames in (2, 2, 11, 1, 1):
            buffer.extend(ring.take(frames))
            sample = buffer.sample(400)
            assert_sampled(sample, ring)
            # All that are there, whoever stored them.
            assert sample["number"].unique().tolist() == sorted(ring.numbers())
        with torch.device("cpu"):  # torchrl's index is in part on the default device, in part on the CPU
            buffer.add(ring.take(1)[:, 0])
        buffer.extend(ring.take(1))
        assert_sampled(buffer.sample(32), ring)


@EITHER
def test_a_transform_of_the_buffer_runs(where):
    with where():
        stream = make_stream(BATCH, 20)
        ring, buffer = Ring(stream, CAPACITY), make(transform=RewardScaling(0.0, 2.0, in_keys=["observation"]))
        for frames in (3, 4):
            buffer.extend(ring.take(frames))
        sample = buffer.sample(16)
        at = sample["index"].unbind(-1)
        assert torch.equal(sample["observation"], 2 * buffer.storage[:]["observation"][at])


@EITHER
def test_agents(where):
    with where():
        stream = make_stream(BATCH, 20)
        for key in ("reward", "done", "terminated", "truncated"):
            stream["next", key] = stream["next", key].repeat_interleave(2, -1).unsqueeze(-1).clone()
        stream["next", "done"][..., 1, :] ^= torch.rand(*BATCH, 20, 1, device=stream["next", "done"].device) < 0.3
        buffer = make()
        for part in stream[..., :11].split([3, 2, 6], -1):
            buffer.extend(part)
            sample = buffer.sample(32)
            expected = sampled_at(buffer, sample["index"])
            assert (sample == expected).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sampler": SamplerWithoutReplacement()}, TypeError, "a RandomSampler, .* got SamplerWithoutReplacement"),
        ({"sampler": SliceSampler(num_slices=2, truncated_key=None)}, TypeError, "sampler must be a RandomSampler"),
        ({"prefetch": 2, "batch_size": 4}, ValueError, "capturable must be False where samples are prefetched"),
        ({"writer": TensorDictRoundRobinWriter(track_generations=True)}, ValueError, "track_generations=True"),
        ({"capturable": 1}, TypeError, "capturable must be True or False, got 1"),
    ],
    ids=["without replacement", "slices", "prefetch", "generations", "1"],
)  # fmt: skip
def test_what_cannot_be_captured_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)


def test_parts_that_come_later_are_refused_too():
    buffer = make()
    with pytest.raises(TypeError, match="sampler must be a RandomSampler"):
        buffer.set_sampler(SamplerWithoutReplacement())
    shared = LazyTensorStorage(CAPACITY * 3, ndim=2)
    other = TensorDictReplayBuffer(storage=shared)
    other.extend(make_stream(BATCH, 4).transpose(0, 1))
    with pytest.raises(ValueError, match=r"storage must be this buffer's alone .* got one of TensorDictReplayBuffer"):
        buffer.set_storage(shared)
    buffer.extend(make_stream(BATCH, 4))
    assert len(buffer) == 12


@EITHER
def test_a_buffer_that_is_given_the_storage_later(where):
    with where():
        stream, buffer = make_stream(BATCH, 20), make()
        buffer.extend(stream[:, :3]), buffer.extend(stream[:, 3:5])
        storage = buffer.storage
        with pytest.raises(ValueError, match="storage must be no other buffer's that has capturable=True"):
            NStepReplayBuffer(n_steps=3, gamma=0.9, storage=storage)
        buffer.extend(stream[:, 5:6])
        assert len(buffer) == 18
        if where is not EITHER.args[1][0]:
            # torchrl's asks nobody.
            ReplayBuffer(storage=storage)
            for call in (lambda: buffer.extend(stream[:, 6:7]), lambda: buffer.sample(4)):
                with pytest.raises(ValueError, match="storage must be this buffer's alone"):
                    call()


@EITHER
def test_a_sampler_whose_method_is_replaced_is_asked_by_the_host(where):
    with where():
        stream = make_stream(BATCH, 40)
        ring, buffer = Ring(stream, CAPACITY), make()
        for frames in (2, 3, 6):
            buffer.extend(ring.take(frames))
        index = torch.arange(CAPACITY), torch.zeros(CAPACITY, dtype=torch.int64)
        buffer.sampler.sample = lambda storage, count: (index, {})
        sample = buffer.sample(CAPACITY)
        assert torch.equal(sample["index"], torch.stack(index, -1))
        assert_sampled(sample, ring)


@EITHER
def test_parts_are_told_when_they_are_asked_for(where):
    with where():
        buffer = make()
        for frames in range(1, 4):
            buffer.extend(make_stream(BATCH, frames))
        assert buffer.writer.state_dict()["_cursor"] == 6 and len(buffer.storage) == 18


@EITHER
def test_begun_in_inference_mode(where):
    with where():
        buffer, stream = make(), make_stream(BATCH, 20)
        buffer.extend(stream[:, :2])
        with torch.inference_mode():
            for t in range(2, 5):
                buffer.extend(stream[:, t : t + 1].clone())
                buffer.sample(4)
        buffer.extend(stream[:, 5:6])
        assert len(buffer) == 18 and len(buffer.sample(8)) == 8


@EITHER
def test_while_a_graph_is_captured(where, monkeypatch):
    """What is like calls before may be captured, and nothing else."""
    with where():
        stream = make_stream(BATCH, 40)
        ring, buffer, captured = Ring(stream, CAPACITY), make(), {"is_initialized", "is_current_stream_capturing"}
        kernels = where is not EITHER.args[1][0]
        buffer.extend(ring.take(2)), buffer.extend(ring.take(1)), buffer.sample(4)
        part = ring.take(1) if kernels else stream[..., 3:4]
        with monkeypatch.context() as patch:
            for name in captured:
                patch.setattr(torch.cuda, name, lambda: True)
            if kernels:
                buffer.extend(part), buffer.sample(4)
            outside = pytest.raises(RuntimeError, match="outside of the capture of a CUDA graph")
            for call in (
                lambda: len(buffer),
                lambda: buffer[:],
                lambda: buffer.extend(part.exclude("number")),
                lambda: buffer.add(part[:, 0]),
                lambda: buffer.state_dict(),
                lambda: buffer.empty(),
                lambda: MultiStepTransform(3, 0.9).inv(part),
                *(() if kernels else (lambda: buffer.extend(part), lambda: buffer.sample(4))),
            ):
                with outside:
                    call()
        assert_sampled(buffer.sample(32), ring)
        assert len(buffer) == len(ring.numbers())
