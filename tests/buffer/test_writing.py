"""What is written into the n-step buffer, call by call: the ring, the seam, and what is no tensor."""

import pytest
import torch
from rings import (
    Drawn,
    Ring,
    assert_every_frame,
    assert_returns,
    assert_sampled,
    assert_windows,
    everything,
    make_buffer,
    make_stream,
    wrapped,
)
from rollouts import frames, make_rollout
from tensordict import NonTensorStack, TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer, TensorDictRoundRobinWriter
from torchrl.envs.transforms import Transform

from multistep_triton import MultiStepTransform

REWARD = ("next", "reward")


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


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("key", ["mask", ("collector", "traj_ids")])
def test_add_as_the_first_of_frames_whose_agents_share_marks(key, shape):
    agents = TensorDict({"done": torch.zeros(2, 1, dtype=torch.bool), "reward": torch.ones(2, 1)})
    frame = TensorDict({"next": {"agents": agents}})
    frame[key] = torch.ones(shape, dtype=torch.bool if key == "mask" else torch.int64)
    buffer = make_buffer(8, done_key=("agents", "done"), reward_keys=[("agents", "reward")], gamma=1.0)
    for _ in range(3):
        buffer.add(frame)
    assert everything(buffer)["next", "agents", "reward"][..., 0].tolist() == [[3.0, 3.0], [2.0, 2.0], [1.0, 1.0]]


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
