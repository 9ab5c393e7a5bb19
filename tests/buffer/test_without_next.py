"""Frames that come without what comes after them, as from a collector with compact_obs=True, beside those with it."""

import copy
import threading
import time
import warnings

import pytest
import torch
from rings import TRAJ_KEY, kept_once, make_buffer, make_stream
from saving import WAYS, loading_is_told
from segment_trees import plant
from tensordict import TensorDict, lazy_stack
from torchrl.data.replay_buffers.samplers import PrioritizedSampler

CAPACITY, CUTS = 12, [1, 3, 5, 13, 1, 1, 1]


def without(stream):
    """The frames without what comes after them, which is there of ends alone."""
    bare = stream.exclude(("next", "observation"))
    bare["final", "observation"] = stream["next", "observation"].clone()
    return bare


def make(batch, **arguments):
    return make_buffer(CAPACITY, batch, **{"compact": ["observation"], "end_slots": CAPACITY, **arguments})


def assert_same(buffer, other):
    assert len(buffer) == len(other)
    if len(other):
        sample, expected = buffer.sample(len(other)), other.sample(len(other))
        assert set(sample.keys(True, True)) == set(expected.keys(True, True))
        for key, leaf in expected.items(True, True):
            assert torch.equal(sample[key], leaf), key


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("marks", [{}, {"mask": True}, {"traj": True}], ids=str)
def test_frames_are_stored_when_the_next_one_has_come(batch, marks):
    traj = TRAJ_KEY if "traj" in marks else None
    stream = kept_once(make_stream(batch, 40, p_done=0.3, **marks), traj_key=traj)
    bare, buffer, usual, begin = without(stream), make(batch), make(batch), 0
    for frames in CUTS:
        index = buffer.extend(bare[..., begin : begin + frames])
        stored = stream[..., max(begin - 1, 0) : begin + frames - 1]
        if stored.numel():
            assert torch.equal(index, usual.extend(stored))
        begin += frames
        assert_same(buffer, usual)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = make(batch)
        resumed.load_state_dict(copy.deepcopy(buffer.state_dict()))
    for each in (buffer, resumed):
        each.extend(bare[..., begin : begin + 2])
    usual.extend(stream[..., begin - 1 : begin + 1])
    assert_same(buffer, usual), assert_same(resumed, usual)


@loading_is_told
@pytest.mark.parametrize("way", ["dumps", "state_dict"])
@pytest.mark.parametrize("cuts", [[1, 3, 3], [2, 3, 3], [3, 3, 3]], ids=str)
def test_groups_of_a_frame_that_waits_keep_their_batch_sizes(cuts, way):
    agents, stream = 3, kept_once(make_stream((2,), 12))
    bare = without(stream).exclude("number", ("next", "number"))
    for group in (bare, bare["final"]):
        seen = group.pop("observation").unsqueeze(2).repeat(1, 1, agents, 1)
        group["team"] = TensorDict({"agents": TensorDict({"observation": seen}, [2, 12, agents])}, [2, 12])

    def begin():
        return make_buffer(CAPACITY, (2,), compact=True)

    buffer, at = begin(), 0
    for frames in cuts:
        data, at = bare[:, at : at + frames], at + frames
        if at == frames:
            buffer.extend(data.clone())
            # A folder holds no storage that has no frame yet.
            resumed = WAYS["state_dict" if frames == 1 else way](buffer, begin)
        else:
            buffer.extend(data.clone()), resumed.extend(data.clone())
    assert_same(resumed, buffer)
    for each in (buffer, resumed):
        assert each.sample(4)["team", "agents"].batch_size == (4, agents)


def test_no_frames():
    bare, buffer = without(kept_once(make_stream((3,), 20))), make((3,))
    for frames in (0, 2, 0):
        assert buffer.extend(bare[:, :frames]).shape == (3 * max(frames - 1, 0), 2)
    buffer.empty()
    assert buffer.extend(bare[:, :0]).shape == (0, 2)


def test_single_frames_and_an_empty_buffer():
    stream = kept_once(make_stream((3,), 20))
    bare, buffer, usual = without(stream), make((3,)), make((3,))
    for t in range(10):
        buffer.add(bare[:, t])
    usual.extend(stream[:, :9])
    assert_same(buffer, usual)
    buffer.empty(), usual.empty()
    buffer.extend(bare[:, 10:15]), usual.extend(stream[:, 10:14])
    assert_same(buffer, usual)


def test_a_call_that_fails_leaves_the_frame_that_waits():
    stream = kept_once(make_stream((3,), 20))
    bare, buffer, usual = without(stream), make((3,)), make((3,))
    buffer.extend(bare[:, :5])
    with pytest.raises(KeyError, match="of the frames before, which came without what comes after them"):
        buffer.extend(stream[:, 5:6])
    odd = bare[:, 5:6].clone()
    odd["action"] = odd["action"].float()
    with pytest.raises(ValueError, match="action"):
        buffer.extend(odd)
    buffer.extend(bare[:, 5:8])
    usual.extend(stream[:, :7])
    assert_same(buffer, usual)


@pytest.mark.parametrize("single", [False, True], ids=["extend", "add"])
def test_a_whole_frame_after_one_that_waits_is_refused_however_many_were_stored(single):
    stream = kept_once(make_stream((3,), 20))
    bare, buffer, usual = without(stream), make((3,)), make((3,))
    for t in range(4):
        buffer.extend(bare[:, t : t + 1])
    with pytest.raises(KeyError, match="of the frames before, which came without what comes after them"):
        buffer.add(stream[:, 4]) if single else buffer.extend(stream[:, 4:5])
    buffer.extend(bare[:, 4:6]), usual.extend(stream[:, :5])
    assert_same(buffer, usual)


@pytest.mark.parametrize(
    ("alter", "error", "message"),
    [
        (
            lambda data: data["final"].update({"observation": torch.zeros(3, 2, 1)}),
            ValueError,
            "of the dtype and shape",
        ),
        (lambda data: data["final"].update({"observation": torch.zeros(3, 2, 3).double()}), ValueError, "float64"),
        (lambda data: data["final"].update({"nothing": torch.zeros(3, 2)}), ValueError, "nothing.*got .* and None"),
        (lambda data: data["next"].update({"observation": torch.zeros(3, 2, 3)}), ValueError, "must not hold both"),
        (lambda data: data.set("final", torch.zeros(3, 2)), KeyError, "must hold a group 'final'"),
        (lambda data: data.set_non_tensor("text", "a"), TypeError, "tensors alone"),
    ],
)
@pytest.mark.parametrize("waits", [False, True], ids=["at first", "after one that waits"])
def test_what_comes_after_ends_is_checked(alter, error, message, waits):
    stream = kept_once(make_stream((3,), 20))
    bare, buffer, usual = without(stream), make((3,)), make((3,))
    if waits:
        buffer.extend(bare[:, :2])
    data = bare[:, 2:4].clone()
    alter(data)
    with pytest.raises(error, match=message):
        buffer.extend(data)
    if waits:
        with pytest.raises(ValueError, match=r"must be of .* rows"):
            buffer.extend(bare[:2, 2:4])
        buffer.extend(bare[:, 2:4]), usual.extend(stream[:, :3])
        assert_same(buffer, usual)


def test_a_captured_step_cannot_wait():
    buffer = make((3,), capturable=True, sampler=None)
    with pytest.raises(ValueError, match="capturable must be False"):
        buffer.extend(without(kept_once(make_stream((3,), 5))))


@pytest.mark.parametrize(
    "alter",
    [
        lambda data: data.exclude(("next", "reward")),
        lambda data: data.update({"next": {"done": data["next", "done"].float()}}),
    ],
    ids=["no reward", "floats"],
)
def test_the_first_frame_is_checked_though_it_waits(alter):
    stream = kept_once(make_stream((3,), 20))
    bare, buffer, usual = without(stream), make((3,)), make((3,))
    with pytest.raises((KeyError, TypeError), match=r"reward|done"):
        buffer.extend(alter(bare[:, :1].clone()))
    buffer.extend(bare[:, :1]), buffer.extend(bare[:, 1:4]), usual.extend(stream[:, :3])
    assert_same(buffer, usual)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning", "ignore:To copy construct")
def test_priorities_of_frames_that_wait(monkeypatch):
    plant(monkeypatch)
    stream = kept_once(make_stream((3,), 20))
    bare = without(stream)
    bare["td_error"] = torch.rand(3, 20)
    buffer = make((3,), sampler=PrioritizedSampler(CAPACITY * 3, 0.7, 0.5))
    with pytest.raises(ValueError, match="must hold no priorities, 'td_error'"):
        buffer.extend(bare[:, :3])
    for t in range(6):
        buffer.add(bare[:, t].exclude("td_error"))
    assert len(buffer) == 15
    sample = buffer.sample(8)
    sample["td_error"] = torch.ones(8)
    buffer.update_tensordict_priority(sample)
    sampled = {*map(tuple, buffer.sample(400)["index"].tolist())}
    assert len(sampled) > 5 and sampled <= {(slot, env) for slot in range(5) for env in range(3)}


def test_threads_that_extend_wait_for_each_other(monkeypatch):
    """Of two that go on from the frame that waits, one would store it twice."""
    stream = kept_once(make_stream((), 60, p_done=0.0))
    bare, buffer = without(stream), make(())
    buffer.extend(bare[:1])
    completed, inside = type(buffer)._completed, []

    def slowly(self, data):
        inside.append(len(inside))
        result = completed(self, data)
        time.sleep(0.05)
        return result

    monkeypatch.setattr(type(buffer), "_completed", slowly)
    threads = [threading.Thread(target=buffer.extend, args=(bare[i : i + 1],)) for i in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inside) == len(buffer) == 3
    assert sorted(buffer[:]["number"].tolist())[0] == 0
    assert len({*buffer[:]["number"].tolist()}) == 3


@pytest.mark.parametrize("odd", ["dtype", "rows", "an entry less", "store_as"])
def test_the_first_frame_that_waits_goes_on_from_what_is_stored(odd):
    stream = kept_once(make_stream((3,), 20))
    bare = without(stream)
    buffer, usual = make((3,)), make((3,))
    buffer.extend(stream[:, :2]), usual.extend(stream[:, :2])
    data = bare[:, 2:3].clone()
    if odd == "dtype":
        data["next", "reward"] = data["next", "reward"].double()
    elif odd == "rows":
        data = data[:2]
    elif odd == "an entry less":
        data = data.exclude("action")
    else:
        buffer = make((3,), store_as={"nothing": torch.bfloat16})
        with pytest.raises(KeyError, match="store_as must name entries"):
            buffer.extend(data)
        return
    with pytest.raises((KeyError, ValueError), match=r"reward|rows|action"):
        buffer.extend(data)
    buffer.extend(bare[:, 2:3]), buffer.extend(bare[:, 3:6]), usual.extend(stream[:, 2:5])
    assert_same(buffer, usual)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("frames", [1, 4])
def test_a_lazy_stack_may_come_first(dim, frames):
    stream = kept_once(make_stream((3,), 20))
    bare, buffer, usual = without(stream), make((3,)), make((3,))
    buffer.extend(lazy_stack([*bare[:, :frames].clone().unbind(dim)], dim))
    buffer.extend(bare[:, frames : frames + 2]), usual.extend(stream[:, : frames + 1])
    assert_same(buffer, usual)
