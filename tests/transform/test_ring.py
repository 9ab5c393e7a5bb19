"""Frames held back in slots that later calls go on writing into: what that saves, and that nobody's are overwritten."""

import copy
import pickle
import threading
import time
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import kernels
from rollouts import make_rollout
from tensordict import NonTensorData, NonTensorStack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from multistep_triton import MultiStepTransform
from multistep_triton.carry import Carry, next_carry

N_STEPS, GAMMA, WIDTH = 5, 0.9, 10_000
DUPLICATES = [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one)), MultiStepTransform.clone]


def stream(frames, width=3):
    rollout = make_rollout((2,), frames, seed=frames)
    for data in (rollout, rollout["next"]):
        data["observation"] = torch.randn(2, frames, width)
    return rollout


def one_by_one(transform, rollout):
    outs = [transform.inv(frame) for frame in rollout.split(1, 1)]
    return torch.cat([out for out in outs if out is not None], 1)


def equal(one, other):
    return all(torch.equal(one[key], other[key]) for key in one.keys(True, True))


class Written(TorchDispatchMode):
    """Bytes that operators write into tensors of many bytes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in str(function):
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves(out) if leaf.nbytes >= 4 * WIDTH)
        return out


@pytest.mark.parametrize("n_steps", [2, 10, 50])
def test_a_byte_is_written_twice_whatever_n(n_steps):
    """Into the ring and when it comes out, of calls of one frame."""
    transform, rollout = MultiStepTransform(n_steps, GAMMA), stream(1, WIDTH)
    for _ in range(3 * n_steps):
        transform.inv(rollout)
    for _ in range(2 * n_steps):
        with Written() as written:
            transform.inv(rollout)
        assert written.bytes == 2 * 2 * rollout["observation"].nbytes


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_the_ring_stays_where_it_is_and_holds_no_more_than_it_must(frames):
    transform, rollout = MultiStepTransform(N_STEPS, GAMMA), stream(frames)
    for _ in range(10):
        transform.inv(rollout)
    before = transform._carry
    for _ in range(20):
        transform.inv(rollout)
        ring = transform._carry
        assert ring.count == N_STEPS
        assert ring.capacity <= N_STEPS + frames + 1
        assert all(ring.leaves[key] is before.leaves[key] for key in before.leaves)


def places(leaves):
    return {key: leaf.data_ptr() for key, leaf in leaves.items()}


@pytest.mark.parametrize("done_at", ["start", "end"])
def test_long_calls_on_the_kernels_write_into_two_rings_in_turn(done_at):
    seen, outs = [], []
    with kernels():
        rollout, transform = stream(90), MultiStepTransform(N_STEPS, GAMMA, backend="triton", done_at=done_at)
        for part in rollout.split([10, 10, 6, 5, 16, 13, 10, 20], 1):
            outs.append(transform.inv(part))
            seen.append(places(transform._carry.leaves))
    assert seen[2:] == [seen[0], seen[1]] * 3
    assert not {*seen[0].values()} & {*seen[1].values()}
    expected = MultiStepTransform(N_STEPS, GAMMA, backend="reference", done_at=done_at).inv(rollout)
    out = torch.cat(outs, 1)
    torch.testing.assert_close(out.pop("next"), expected.pop("next"))
    assert equal(out, expected)


@settings(max_examples=8)
@given(
    calls=st.lists(
        st.tuples(
            st.sampled_from([1, 4, 5, 9]),
            st.sampled_from([2, N_STEPS]),
            st.sampled_from(["", "fails", "inference", "copy", "state", "another backend", "clear"]),
        ),
        min_size=4,
        max_size=12,
    )
)
def test_whatever_becomes_of_the_two_rings(calls):
    """Calls that fail after they wrote, that are copied, saved, of another n or another backend, on the kernels."""
    frames = sum(count for count, _, _ in calls)
    make = partial(MultiStepTransform, N_STEPS, 0.5, done_at="end")
    transform, model = (make(backend=each) for each in ("triton", "reference"))
    with kernels(), pytest.MonkeyPatch.context() as patch:
        rollout = stream(frames)
        rollout["next", "reward"] = torch.randint(9, (2, frames, 1)).float()
        parts = rollout.split([count for count, _, _ in calls], 1)
        for part, (_, n_steps, event) in zip(parts, calls, strict=True):
            transform.n_steps = model.n_steps = n_steps
            transform.backend = "reference" if event == "another backend" else "triton"
            if event == "fails":
                patch.setattr(transform, "_output_leaves", lambda *arguments: 1 / 0)
                for _ in range(2):
                    with pytest.raises(ZeroDivisionError):
                        transform.inv(part.clone().zero_())
                patch.undo()
            elif event == "copy":
                transform, other = copy.deepcopy(transform), transform
                other.inv(part.clone().zero_())
            elif event == "state":
                state = copy.deepcopy(transform.state_dict())
                transform = make()
                transform.load_state_dict(state)
            elif event == "clear":
                transform.clear(), model.clear()
            with torch.inference_mode(event == "inference"):
                out, expected = transform.inv(part), model.inv(part)
            assert (out is None) == (expected is None)
            assert out is None or equal(out, expected)
            assert equal(transform._buffer, model._buffer)


@pytest.mark.parametrize(
    ("duplicate", "backend"), [*((each, "reference") for each in DUPLICATES), (copy.copy, "triton")]
)
def test_copies_of_a_transform_do_not_write_into_each_others_frames(duplicate, backend):
    frames = 40 if backend == "reference" else 24
    first = MultiStepTransform(N_STEPS, GAMMA, backend=backend)
    with kernels() if backend == "triton" else nullcontext():
        rollout, other = stream(frames), stream(41)[:, :frames]
        begin = one_by_one(first, rollout[:, :13])
        second = duplicate(first)
        outs = []
        for transform, then in ((first, rollout), (second, other)):
            outs.append([transform.inv(frame) for frame in then[:, 13:16].split(1, 1)])
        for out, transform, then in zip(outs, (first, second), (rollout, other), strict=True):
            out += [transform.inv(frame) for frame in then[:, 16:].split(1, 1)]
            whole = torch.cat((rollout[:, :13], then[:, 13:]), 1)
            expected = MultiStepTransform(N_STEPS, GAMMA).inv(whole)
            assert equal(torch.cat([begin, *out], 1), expected)


@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_copies_that_are_made_while_another_thread_extends_are_whole(duplicate):
    numbers = torch.arange(40_000).view(1, -1)
    transform, begun, stop = MultiStepTransform(N_STEPS, GAMMA), threading.Event(), threading.Event()

    def extend():
        frame = make_rollout((1,), 2, seed=0)
        for number in numbers.split(2, 1):
            if stop.is_set():
                break
            frame["observation"] = number
            transform.inv(frame)
            begun.set()

    thread = threading.Thread(target=extend)
    thread.start()
    begun.wait()
    copies = []
    for _ in range(60):
        copies.append(duplicate(transform))
        time.sleep(0.002)
    assert thread.is_alive()
    stop.set()
    thread.join()
    for each in copies:
        assert (each._buffer["observation"].diff() == 1).all()


def test_a_call_that_fails_after_it_wrote_leaves_the_frames_as_they_were(monkeypatch):
    rollout, transform = stream(40), MultiStepTransform(N_STEPS, GAMMA)
    begin = one_by_one(transform, rollout[:, :20])
    build = transform._output_leaves
    for frame in rollout[:, 20:30].split(1, 1):
        with monkeypatch.context() as patch:
            patch.setattr(transform, "_output_leaves", lambda *arguments: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                transform.inv(frame.clone().zero_())
        assert transform._output_leaves == build
    end = one_by_one(transform, rollout[:, 20:])
    assert equal(torch.cat((begin, end), 1), MultiStepTransform(N_STEPS, GAMMA).inv(rollout))


@pytest.mark.parametrize("noted", [False, True])
def test_frames_held_back_in_inference_mode_are_gone_on_from_outside_of_it(noted):
    """And the other way round; objects are numbered anew in every call."""
    rollout, transform, outs = stream(30), MultiStepTransform(N_STEPS, GAMMA), []
    expected = MultiStepTransform(N_STEPS, GAMMA).inv(rollout)
    if noted:
        rollout["note"] = NonTensorStack(*(NonTensorData(str(i)) for i in range(60))).view(2, 30)
    for t, frame in enumerate(rollout.split(1, 1)):
        with torch.inference_mode(t % 7 in (1, 2, 5)):
            outs.append(transform.inv(frame))
    out = torch.cat([out for out in outs if out is not None], 1)
    if noted:
        notes = out.pop("note").tolist()
        assert notes == [[str(30 * b + t) for t in range(30 - N_STEPS)] for b in range(2)]
    assert equal(out, expected)


def test_rewards_that_require_grad_keep_their_graph_frame_by_frame():
    rollout = stream(12)
    reward = rollout["next", "reward"].requires_grad_()
    whole = MultiStepTransform(N_STEPS, GAMMA).inv(rollout)["next", "reward"]
    transform, returns = MultiStepTransform(N_STEPS, GAMMA), []
    for part in rollout.split(4, 1):
        out = transform.inv(part)
        returns += [] if out is None else [out["next", "reward"]]
        assert not any(leaf.requires_grad for leaf in transform._carry.leaves.values())
    assert torch.equal(torch.cat(returns, 1), whole)
    # Frames that were held back have no graph.
    (gradient,) = torch.autograd.grad(returns[0].sum(), reward)
    assert gradient[:, 4:8].any()
    assert not gradient[:, :4].any()


def test_runs_of_slots_turn_at_the_last_one():
    carry = Carry({"leaf": torch.zeros(8, 2).movedim(0, 1)}, 6, 3, 8, True)
    assert carry.runs(0, 3) == [(6, 2), (0, 1)]
    assert carry.runs(2, 1) == [(0, 1)]
    assert [piece.shape[1] for piece in carry.pieces("leaf", 1)] == [2, 1]
    after, stay = next_carry(carry, {}, ("leaf",), 2, 4, 1)
    assert (after.leaves, after.first, after.count, stay) == (carry.leaves, 7, 4, 2)
    assert next_carry(carry.view(carry.leaves, free=False), {}, (), 2, 4, 1)[1] == 0


@pytest.mark.parametrize(
    ("count", "new", "n_steps", "stay"),
    [
        (3, 1, 3, 2),
        (3, 2, 3, 1),
        (3, 3, 3, 0),
        (3, 6, 3, 0),
        (4, 4, 9, 4),
        (5, 4, 9, 0),
        (3, 1, 1, 0),
        (8, 1, 8, 0),
        (3, 0, 2, 0),
    ],
)
def test_where_frames_go(count, new, n_steps, stay):
    """A new place where the ring is too small, or all that is held back is new."""
    carry = Carry({"leaf": torch.zeros(2, 8)}, 0, count, 8, True)
    after, stays = next_carry(carry, {}, (), new, n_steps, 1)
    assert (after.count, stays) == (min(count + new, n_steps), stay)
    assert after.capacity == 8 if stay else after.capacity >= after.count
    assert after.first == count + new - after.count if stay else not after.first
