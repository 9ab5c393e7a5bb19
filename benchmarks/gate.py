"""The gate before every timing: what is about to be timed computes n-step transitions.

The oracle is a plain loop over ``k < n`` in float64, on the frames of the stream, and shares no code with any
contender. Transitions are identified by the number that the stream writes into their actions. What passed is what is
timed: the stream leaves it in its steady state, and a ring that is sampled begins in the middle of its memory.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from tensordict import NestedKey, TensorDict

from benchmarks.cases import GAMMA, Case, Stream
from benchmarks.contenders import FLAGS, Subject

SECONDS = 45.0
EPS = float(np.finfo(np.float32).eps)


class Windows(NamedTuple):
    """Of every frame, ``[B, K]``."""

    returns: np.ndarray
    magnitude: np.ndarray
    """The sum of the absolute terms of the return, of which rounding errors are a fraction."""
    ends: np.ndarray


def oracle(reward: np.ndarray, done: np.ndarray, n_steps: int, gamma: float) -> Windows:
    """Windows of n frames in float64 ``[B, K]``, cut after the first done and at the last frame."""
    start = np.arange(reward.shape[1])
    returns, magnitude = np.zeros(reward.shape), np.zeros(reward.shape)
    ends, open_ = np.zeros(reward.shape, int), np.ones(reward.shape, bool)
    for k in range(n_steps):
        open_ = open_ & (start + k < len(start))
        reached = np.minimum(start + k, len(start) - 1)
        term = np.where(open_, gamma**k * reward[:, reached], 0.0)
        returns, magnitude = returns + term, magnitude + abs(term)
        ends = np.where(open_, reached, ends)
        open_ = open_ & ~done[:, reached]
    return Windows(returns, magnitude, ends)


def array(transitions: TensorDict, key: NestedKey) -> np.ndarray:
    """A leaf, without trailing dimensions of one element."""
    leaf = transitions[key].cpu().numpy()
    return leaf.reshape(*transitions.batch_size) if leaf.size == transitions.numel() else leaf


def errors_of(case: Case, stream: Stream, transitions: TensorDict, subject: Subject) -> dict[NestedKey, str]:
    """What is wrong with transitions of the stream, by key."""
    rollout = stream.rollout.cpu()
    env, frame = np.divmod(np.arange(stream.envs * stream.length), stream.length)
    everything = stream.source(env, frame)
    shape = (stream.envs, stream.length)
    reward = array(rollout, ("next", "reward"))[everything].reshape(shape).astype(np.float64)
    done = array(rollout, ("next", "done"))[everything].reshape(shape)
    windows = oracle(reward, done, case.n_steps, GAMMA)

    env, frame = np.divmod(transitions["action"][..., 0].cpu().numpy().astype(np.int64), stream.length)
    if subject.in_order and not is_newest(case, stream, env, frame):
        return {"action": "frames are lost, repeated or out of order"}
    # Uniform draws with replacement from twice as many frames or more find three quarters of their number.
    distinct = np.unique(env * stream.length + frame).size
    if not subject.in_order and (env.size != case.sample_size or distinct < env.size / 4):
        return {"action": f"{case.sample_size} frames are not what is sampled, or too few of them"}
    if subject.store and np.unique(frame).size < case.frames:
        return {"action": "some frames of the ring are never sampled"}
    end = windows.ends[env, frame]
    steps = end - frame + 1
    here, there = stream.source(env, frame), stream.source(env, end)
    flags_at = there if subject.done_at == "end" else here
    expected = {
        "observation": array(rollout, "observation")[here],
        "steps_to_next_obs": steps,
        "gamma": GAMMA**steps,
        "nonterminal": ~done[env, frame] & (frame < stream.length - 1),
        ("next", "observation"): array(rollout, ("next", "observation"))[there],
        ("next", "reward"): windows.returns[env, frame],
        **{("next", flag): array(rollout, ("next", flag))[flags_at] for flag in FLAGS},
    }
    # A float32 sum of n products is wrong by at most n roundings of its terms; twice that for another order of them.
    tolerance = {
        ("next", "reward"): 2 * (case.n_steps + 1) * EPS * windows.magnitude[env, frame],
        "gamma": (steps + 1) * EPS,
    }
    errors: dict[NestedKey, str] = {}
    for key in subject.promises:
        found = array(transitions, key)
        # NaN is within no tolerance.
        wrong = ~(abs(found - expected[key]) <= tolerance[key]) if key in tolerance else found != expected[key]
        if wrong.any():
            name = key if isinstance(key, str) else ".".join(key)
            errors[key] = f"{name} differs in {wrong.mean():.1%} of elements"
    return errors


def is_newest(case: Case, stream: Stream, env: np.ndarray, frame: np.ndarray) -> bool:
    """Whether ``[B, T']`` are the newest frames of which n are known, in order; a ring may begin anywhere."""
    frame = np.roll(frame, -frame[0].argmin(), axis=1)
    last = stream.length - case.n_steps
    newest = np.arange(last - frame.shape[1], last)
    return bool((frame == newest).all() and (env == np.arange(stream.envs)[:, None]).all())


class TooSlow(Exception):
    """To check a contender would take longer than it is worth."""


def check(case: Case, rollout: TensorDict, subject: Subject) -> dict[NestedKey, str]:
    """What is wrong, by key, after a stream that takes a new subject to its steady state and a buffer once round.

    Raises:
        TooSlow: the stream would take more than ``SECONDS``.
    """
    calls = -(-(case.n_steps + case.capacity(not subject.in_order)) // case.frames) + 1
    # What is stored beforehand ends in the middle of a rollout, and so in the middle of a ring as long as one.
    stream = Stream(rollout, calls * case.frames - (case.frames // 2 - 1 if subject.store else 0))
    results: list[Any] = []
    for call, part in enumerate(stream):
        begin = perf_counter()
        results = [*results[-2:], (subject.store or subject.call)(part)]
        # The first calls compile.
        if call > 2 and (seconds := perf_counter() - begin) * (calls - call) > SECONDS:
            raise TooSlow(f"a call takes {seconds:.1f} s, and to check it takes {calls - call} more")
    if subject.store:
        results = [subject.call(rollout)]
    return errors_of(case, stream, subject.transitions(results), subject)
