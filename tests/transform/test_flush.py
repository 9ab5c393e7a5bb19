"""Frames held back come out in the end, once."""

import copy

import pytest
import torch
from paths import EITHER
from rollouts import frames, make_rollout, window_ends
from tensordict import NonTensorStack
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ListStorage, ReplayBuffer, TensorDictReplayBuffer
from torchrl.envs.transforms import Compose, Transform

from multistep_triton import MultiStep, MultiStepTransform

F, T = False, True


def same(stored, expected):
    """Wherever the storage is."""
    return torch.equal(stored, expected.to(stored.device))


@EITHER
@pytest.mark.usefixtures("where")
def test_windows_are_cut_at_the_last_frame():
    transform = MultiStepTransform(3, 0.5)
    assert transform.flush() is None
    assert transform.inv(frames([1.0, 2.0, 4.0, 8.0], [F, F, F, F]))["next", "reward"].flatten().tolist() == [3.0]
    out = transform.flush()
    assert out.batch_size == (3,)
    assert out["next", "reward"].flatten().tolist() == [6.0, 8.0, 8.0]
    assert out["next", "observation"].tolist() == [4, 4, 4]
    assert out["steps_to_next_obs"].tolist() == [3, 2, 1]
    assert out["nonterminal"].tolist() == [T, T, F]
    assert transform.flush() is None
    assert transform.inv(frames([1.0], [F])) is None


@EITHER
@pytest.mark.usefixtures("where")
@pytest.mark.parametrize("ns", [(3, 3, 3), (1, 5, 2), (7, 2, 1), (2, 4, 9), (9, 1, 4)], ids=str)
def test_changing_n_steps_loses_and_repeats_no_frame(ns):
    rollout = make_rollout((2,), 24)
    transform = MultiStepTransform(ns[0], 0.9)
    outs = []
    for n_steps, part in zip(ns, rollout.split(8, 1), strict=True):
        transform.n_steps = n_steps
        outs.append(transform.inv(part))
    for last in range(1, 6):
        transform.n_steps = last
        assert transform.n_steps == last
    transform.n_steps = ns[-1]
    outs.append(transform.flush())
    out = torch.cat([out for out in outs if out is not None], 1)
    assert torch.equal(out["observation"], rollout["observation"])


@pytest.mark.parametrize("n_steps", [2, 3, 9])
def test_extend_and_flush_are_the_postproc(n_steps):
    rollout = make_rollout((2, 3), 20)
    transform = MultiStepTransform(n_steps, 0.9, done_at="end")
    out = torch.cat([transform.inv(rollout), transform.flush()], -1)
    expected = MultiStep(0.9, n_steps, done_at="end")(rollout)
    assert set(out.keys(True, True)) == set(expected.keys(True, True))
    for key in expected.keys(True, True):
        assert torch.equal(out[key], expected[key]), key


def test_flush_after_n_steps_was_changed_uses_the_new():
    rollout = make_rollout((), 10, p_done=0)
    transform = MultiStepTransform(5, 0.9)
    transform.inv(rollout)
    transform.n_steps = 2
    out = transform.flush()
    assert torch.equal(out["observation"], rollout["observation"][5:])
    assert out["steps_to_next_obs"].tolist() == [2, 2, 2, 2, 1]


def test_flush_of_single_frames_and_of_non_tensors():
    transform = MultiStepTransform(2, 0.9)
    data = make_rollout((), 3)
    data["name"] = NonTensorStack("a", "b", "c")
    data["next", "name"] = NonTensorStack("b", "c", "d")
    for frame in data[:2]:
        assert transform.inv(frame) is None
    assert transform.inv(data[2])["name"] == "a"
    out = transform.flush()
    assert out.batch_size == (2,)
    assert list(out["name"]) == ["b", "c"]
    assert torch.equal(out["observation"], data["observation"][1:])


def test_a_flush_that_fails_leaves_the_frames():
    transform = MultiStepTransform(2, 0.9)
    rollout = make_rollout((), 6)
    transform.inv(rollout)
    transform.done_key = "finished"
    with pytest.raises(KeyError, match=r"tensor at \('next', 'finished'\)"):
        transform.flush()
    transform.done_key = "done"
    assert torch.equal(transform.flush()["observation"], rollout["observation"][4:])


@pytest.mark.parametrize("make_buffer", [ReplayBuffer, TensorDictReplayBuffer])
@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_flush_into_stores_every_frame(make_buffer, storage, batch):
    rollout = make_rollout(batch, 30)
    transform = MultiStepTransform(4, 0.9)
    buffer = make_buffer(storage=storage(1000, ndim=rollout.ndim), transform=transform)
    first = [buffer.extend(part) for part in rollout.split(15, -1)]
    indices = transform.flush_into(buffer)
    assert indices.shape[1:] == first[0].shape[1:]
    assert len(indices) == rollout.batch_size[:-1].numel() * 4
    ends = window_ends(rollout["next", "done"].squeeze(-1), 4)
    stored = buffer[:]
    assert same(stored["observation"], rollout["observation"])
    assert same(stored["steps_to_next_obs"], ends - torch.arange(30) + 1)
    again = transform.flush_into(buffer)
    assert again.shape == (0, rollout.ndim)
    assert len(buffer) == rollout.numel()
    # the stream may go on
    buffer.extend(rollout)
    assert (*transform._carry.structure.batch, transform._carry.count) == (*batch, 4)


@pytest.mark.parametrize("make_buffer", [ReplayBuffer, TensorDictReplayBuffer])
def test_frames_are_not_added_where_torchrl_adds_and_extends_in_different_orders(make_buffer):
    """The frames that are flushed are extended."""
    transform = MultiStepTransform(2, 0.9)
    buffer, data = make_buffer(storage=LazyTensorStorage(40, ndim=3), transform=transform), make_rollout((2, 2), 4)
    with pytest.raises(ValueError, match=r"extended, as data.unsqueeze\(-1\), with a storage of ndim=3.+got add"):
        buffer.add(data[..., 0])
    buffer.extend(data)
    transform.flush_into(buffer)
    assert same(buffer.storage[:]["observation"].transpose(0, 2), data["observation"])


def test_flush_into_a_list_storage_and_a_priority():
    rollout = make_rollout((), 10)
    transform = MultiStepTransform(4, 0.9)
    buffer = ReplayBuffer(storage=ListStorage(100), transform=transform)
    buffer.extend(rollout)
    transform.flush_into(buffer)
    assert same(torch.stack(buffer[:])["observation"], rollout["observation"])


class Change(Transform):
    """Changes the observation on extend, and remembers how many frames it saw."""

    def __init__(self, change):
        super().__init__()
        self.change, self.seen = change, 0

    def _inv_call(self, tensordict):
        if tensordict is None:
            return None
        self.seen += tensordict.batch_size[-1]
        return tensordict.set("observation", self.change(tensordict["observation"]))


@pytest.mark.parametrize("nested", [False, True])
def test_flush_into_applies_every_other_transform_once(nested):
    rollout = make_rollout((2,), 12)
    transform = MultiStepTransform(3, 0.9)
    before, after, last = (Change(change) for change in (lambda x: x + 1, lambda x: x * 2, lambda x: x + 10))
    parts = [last, Compose(after), Compose(transform, before)] if nested else [last, after, transform, before]
    buffer = ReplayBuffer(storage=LazyTensorStorage(100, ndim=2), transform=Compose(*parts))
    buffer.extend(rollout)
    transform.flush_into(buffer)
    assert same(buffer[:]["observation"], (rollout["observation"] + 1) * 2 + 10)
    assert (before.seen, after.seen, last.seen) == (12, 12, 12)
    assert transform._carry is None


def test_flush_into_a_buffer_of_other_transforms_applies_them_all():
    rollout = make_rollout((2,), 12)
    transform = MultiStepTransform(3, 0.9)
    buffer = ReplayBuffer(storage=LazyTensorStorage(100, ndim=2), transform=Change(lambda x: x + 10))
    buffer.extend(transform.inv(rollout))
    transform.flush_into(buffer)
    assert same(buffer[:]["observation"], rollout["observation"] + 10)


def test_flush_into_a_buffer_with_another_n_step_transform():
    transform = MultiStepTransform(3, 0.9)
    buffer = ReplayBuffer(storage=LazyTensorStorage(100, ndim=2), transform=transform)
    buffer.extend(make_rollout((2,), 12))
    with pytest.raises(ValueError, match="replay_buffer must hold this transform or none of its kind, got MultiStep"):
        transform.flush_into(copy.deepcopy(buffer))
    assert len(transform.flush_into(buffer)) == 6


def test_flush_into_one_frame_of_each_environment():
    # where extend raises after it has stored, in torchrl 0.14.1
    rollout = make_rollout((2,), 6)
    transform = MultiStepTransform(1, 0.9)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100, ndim=2), transform=transform)
    buffer.extend(rollout)
    assert len(transform.flush_into(buffer)) == 2
    assert same(buffer[:]["observation"], rollout["observation"])


def test_flush_into_updates_priorities_as_extend_does(monkeypatch):
    rollout = make_rollout((), 6)
    rollout["td_error"] = torch.arange(6.0)
    transform = MultiStepTransform(2, 0.9)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100), transform=transform)
    updates = []
    monkeypatch.setattr(buffer, "update_priority", lambda *update: updates.append([each.tolist() for each in update]))
    buffer.extend(rollout)
    transform.flush_into(buffer)
    assert updates == [[[0, 1, 2, 3], [0, 1, 2, 3]], [[4, 5], [4, 5]]]


def test_flush_into_what_is_no_buffer():
    transform = MultiStepTransform(3, 0.9)
    with pytest.raises(TypeError, match="replay_buffer must be a torchrl ReplayBuffer, got LazyTensorStorage"):
        transform.flush_into(LazyTensorStorage(10))


@pytest.mark.parametrize("where", ["a transform", "the storage"])
def test_flush_into_a_buffer_that_fails_keeps_the_frames(monkeypatch, where):
    def fail(*arguments, **keywords):
        raise OSError("disk full")

    rollout = make_rollout((2,), 12)
    # what has been changed in place was a copy
    transform, other = MultiStepTransform(3, 0.9), Change(lambda x: x.add_(1))
    last = Change(lambda x: x)
    buffer = ReplayBuffer(storage=LazyTensorStorage(100, ndim=2), transform=Compose(last, other, transform))
    buffer.extend(rollout)
    with monkeypatch.context() as patch:
        patch.setattr(*((last, "_inv_call") if where == "a transform" else (buffer.storage, "set")), fail)
        with pytest.raises(OSError, match="disk full"):
            transform.flush_into(buffer)
    assert torch.equal(transform.flush()["observation"], rollout["observation"][:, 9:])
