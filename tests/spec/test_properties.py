"""Any shape, done pattern, window, gamma, dtype and schedule, against plain loops in float64."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts import extend, make_rollout, window_ends
from streams import check_functions, check_transform, frame_bytes, streams, take

from multistep_triton import MultiStepTransform


@given(streams(), st.sampled_from(["start", "end"]))
def test_transform_is_the_loop_however_the_stream_is_cut(stream, done_at):
    check_transform(stream, done_at)


@given(streams())
def test_functions_are_the_loop(stream):
    check_functions(stream)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=8))
def test_changing_n_steps_loses_and_repeats_no_frame(calls):
    known = sum(frames for _, frames in calls)
    rollout = make_rollout((2,), known, seed=known)
    transform = MultiStepTransform(1, 0.9)
    seen = given = 0
    for n_steps, frames in calls:
        transform.n_steps = n_steps
        out = transform.inv(rollout[:, given : given + frames])
        given += frames
        emitted = max(given - n_steps, seen)
        assert (out is None) == (emitted == seen)
        if out is not None:
            ends = window_ends(rollout["next", "done"].squeeze(-1)[:, :given], n_steps)
            assert torch.equal(out["observation"], rollout["observation"][:, seen:emitted])
            future = take(rollout["next", "observation"][:, :given], ends)
            assert torch.equal(out["next", "observation"], future[:, seen:emitted])
        seen = emitted


@given(st.integers(1, 6), st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_every_cut_gives_the_same_bits(n_steps, cuts):
    rollout = make_rollout((2,), sum(cuts), seed=sum(cuts))
    whole = extend(MultiStepTransform(n_steps, 0.97), rollout, [sum(cuts)])
    parts = extend(MultiStepTransform(n_steps, 0.97), rollout, cuts)
    assert (whole is None) == (parts is None)
    if whole is not None:
        for key in whole.keys(True, True):
            assert torch.equal(whole[key], parts[key]), key


@given(streams())
def test_n_steps_of_one_is_the_data(stream):
    rollout, cuts, _, gamma = stream
    out = extend(MultiStepTransform(1, gamma), rollout, cuts)
    if out is None:
        assert rollout.shape[-1] <= 1
        return
    expected = rollout[..., :-1]
    assert torch.equal(out["next", "reward"], expected["next", "reward"].to(out["next", "reward"].dtype))
    assert torch.equal(frame_bytes(out["next", "value"]), frame_bytes(expected["next", "value"]))
