"""The backend ``verify``: every fault is found at its place; no false alarm, see ``test_kernel_bounds``."""

import pickle
from contextlib import contextmanager
from functools import partial

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import kernels
from rollouts import make_rollout, window_ends, window_sums
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement

from multistep_triton import (
    EquivalenceError,
    MultiStep,
    MultiStepTransform,
    NStepReplayBuffer,
    gather_future,
    n_step_return,
)
from multistep_triton.carry import Carry
from multistep_triton.debug.rounding import float64_returns
from multistep_triton.kernels import launch as launchers

GAMMA = 0.9
N_STEPS = 3
REWARD, OBSERVATION = ("next", "reward"), ("next", "observation")


@pytest.fixture(autouse=True, scope="module")
def on_the_kernels():
    with kernels():
        yield


@contextmanager
def fault(spoil, launcher="n_step_extend"):
    """Kernels whose output ``spoil`` changes."""
    launch = getattr(launchers, launcher)

    def launch_and_spoil(*arguments, **options):
        out = launch(*arguments, **options)
        spoil(out)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launchers, launcher, launch_and_spoil)
        yield


def stored(rollout, transform, cuts=(12, 12)):
    parts = [transform.inv(part) for part in rollout.split(list(cuts), -1)]
    return torch.cat([part for part in parts if part is not None], -1)


def found(rollout=None, **arguments):
    """The error of the second of two calls, of 12 frames each, the first of which was right."""
    transform = MultiStepTransform(N_STEPS, GAMMA, backend="verify", **arguments)
    rollout = make_rollout((2,), 24) if rollout is None else rollout
    with pytest.raises(EquivalenceError) as caught:
        transform.inv(rollout[:, 12:] if transform.inv(rollout[:, :12]) is not None else rollout)
    return caught.value


def test_what_comes_out_is_what_the_kernels_computed():
    rollout = make_rollout((2,), 24)
    ours, theirs = (MultiStepTransform(N_STEPS, GAMMA, backend=backend) for backend in ("verify", "triton"))
    out, expected = stored(rollout, ours), stored(rollout, theirs)
    assert (out == expected).all()
    assert (ours.flush() == theirs.flush()).all()
    whole = MultiStep(GAMMA, N_STEPS, backend="verify")(rollout)
    assert (whole == MultiStep(GAMMA, N_STEPS, backend="triton")(rollout)).all()
    reward, done = torch.randn(2, 9), torch.rand(2, 9) < 0.2
    windows = n_step_return(reward, done, gamma=GAMMA, n_steps=3, backend="verify")
    assert all(map(torch.equal, windows, n_step_return(reward, done, gamma=GAMMA, n_steps=3, backend="triton")))
    future = gather_future(reward, windows.steps, backend="verify")
    assert torch.equal(future, gather_future(reward, windows.steps, backend="triton"))


# What spoils the output at (b, t), the key and the tensor that are then named, and the values of kernels and reference.
FAULTS = {
    "a wrong row": (
        lambda out, at: out.leaves[OBSERVATION][at].copy_(out.leaves[OBSERVATION][at[0], at[1] + 1] + 1),
        OBSERVATION,
        "('next', 'observation') at the end of the window",
    ),
    "a wrong row of what is copied": (
        lambda out, at: out.leaves["action",].__setitem__(at, 7),
        ("action",),
        "('action',)",
    ),
    "one step too many": (lambda out, at: out.steps[at].add_(1), "steps_to_next_obs", "steps (steps_to_next_obs)"),
    "a boundary that is none": (lambda out, at: out.nonterminal[at].logical_not_(), "nonterminal", "nonterminal"),
    "a discount of another length": (lambda out, at: out.discount[at].mul_(GAMMA), "gamma", "discount (gamma)"),
    "a NaN": (
        lambda out, at: out.returns[REWARD][at].fill_(torch.nan),
        REWARD,
        "the n-step return of ('next', 'reward')",
    ),
    "a return that lacks a reward": (
        lambda out, at: out.returns[REWARD][at].sub_(1e-3),
        REWARD,
        "the n-step return of ('next', 'reward')",
    ),
    "the reward as it came": (
        lambda out, at: out.leaves["next", "reward_orig"][at].neg_(),
        REWARD,
        "('next', 'reward')",
    ),
}


@pytest.mark.parametrize("kind", FAULTS)
@settings(max_examples=2)
@given(b=st.integers(0, 1), t=st.integers(0, 10))
def test_a_fault_in_one_element_is_reported_there(kind, b, t):
    spoil, key, what = FAULTS[kind]
    with fault(lambda out: spoil(out, (b, t)) if len(out.steps[0]) == 12 else None):
        error = found()
    assert (error.key, error.what, error.frame) == (key, what, (b, t))
    assert f"frame      batch index ({b},), t = {t}" in str(error)
    assert "1 of 24 frames differ" in str(error)
    assert error.kernels != error.reference
    # its window: where the frame lies, its reward and where the window ends
    assert f"data [{t - N_STEPS}]" in str(error) if t >= N_STEPS else f"held back [{t}]" in str(error)
    assert "the reference ends it: " in str(error)


@settings(max_examples=4)
@given(b=st.integers(0, 1), t=st.integers(0, 2))
def test_a_fault_in_what_is_held_back(b, t):
    with fault(lambda out: out.carry.leaves["action",][b, t].add_(1) if len(out.steps[0]) == 12 else None):
        error = found()
    assert (error.key, error.frame) == (("action",), (b, t))
    assert error.what == "('action',) of the frames held back"
    assert f"t = {t} of those held back, t = {12 + t} below; 1 of 6 frames differ" in str(error)
    assert f"data [{9 + t}]" in str(error)


# By what is missed: how many windows that changes. That of a frame that is padding is one of them.
@pytest.mark.parametrize(("missed", "windows"), [("done", 2), ("mask", 3), ("trajectory", 2)])
def test_a_missed_boundary_is_reported_at_the_first_window_that_crosses_it(missed, windows):
    """Everything that follows from windows is wrong alike; the windows are named first, and why they should end."""
    rollout = make_rollout((2,), 24, p_done=0.0)
    rollout["mask"] = torch.ones(2, 24, dtype=torch.bool)
    rollout["ids"] = torch.zeros(2, 24, dtype=torch.int64)
    key, reason = {
        "done": (("next", "done"), "done"),
        "mask": (("mask",), "padding follows, by the mask"),
        "trajectory": (("ids",), "trajectory id changes from 0 to 5"),
    }[missed]
    if missed == "done":
        rollout[key][1, 17] = True
    elif missed == "mask":
        rollout[key][1, 18] = False
    else:
        rollout[key][1, 18:] = 5

    launch = launchers.n_step_extend
    blind = torch.ones if missed == "mask" else torch.zeros

    def launch_blindly(task, carry, data):
        return launch(task, carry, {**data, key: blind(data[key].shape, dtype=data[key].dtype)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launchers, "n_step_extend", launch_blindly)
        error = found(rollout, traj_key="ids")
    # The first call returned frames 0 to 8; the window of frame 16 is the first that goes on beyond frame 17.
    assert (error.key, error.frame) == ("steps_to_next_obs", (1, 16 - 9))
    assert (error.kernels, error.reference) == (3, 2)
    assert f"the reference ends it: {reason}" in str(error)
    assert "the kernels end it" in str(error)
    assert f"also       the n-step return of ('next', 'reward'): {windows} of 24 frames differ" in str(error)


def test_the_whole_message():
    rollout = make_rollout((1,), 9, p_done=0.0)
    rollout["next", "reward"] = torch.tensor([0.5, 1, 2, 4, 8, 16, 32, 64, 128]).view(1, 9, 1)
    rollout["next", "done"][0, 5] = True
    transform = MultiStepTransform(4, 0.5, backend="verify")
    transform.inv(rollout[:, :5])
    with fault(lambda out: out.returns[REWARD][0, 2].add_(1)), pytest.raises(EquivalenceError) as caught:
        transform.inv(rollout[:, 5:])
    # 12 = 4 + 0.5 * 16, and 16 = 8 + 0.5 * 16. With u = 2^-24 the inner sum is off by u (2 * 8 + 16) at most, the outer
    # one by half of that and u (2 * 8 + 12): 44 u; twice that is 5.245e-6.
    assert str(caught.value) == (
        "the kernels and the reference differ at the n-step return of ('next', 'reward'), frame (0, 2): 13 and 12\n"
        "  frame      batch index (0,), t = 2; 1 of 4 frames differ\n"
        "  kernels    13\n"
        "  reference  12\n"
        "  float64    12\n"
        "  tolerance  8.58e-06: twice the error against float64 that a sum of these rewards may have\n"
        "  its window, n_steps = 4, t = 0 the first frame that this call returned:\n"
        "  t  frame          ('next', 'reward')  steps (reference)  steps (kernels)  done\n"
        "  2  held back [2]                   4                  3                3  False  this frame\n"
        "  3  held back [3]                   8                  2                2  False\n"
        "  4  data [0]                       16                  -                -  True   "
        "the reference ends it: done\n"
        "  5  data [1]                       32                  -                -  False"
    )


def test_every_agent_has_its_frames():
    rollout = make_rollout((2,), 24)
    for key in ("done", "reward"):
        rollout["next", key] = rollout["next", key].unsqueeze(-1).repeat(1, 1, 4, 1)
    with fault(lambda out: out.steps[1, 2, 5].add_(1) if out.steps.shape == (2, 4, 12) else None):
        error = found(rollout)
    assert error.frame == (1, 2, 5)
    assert "batch index (1, 2), t = 5" in str(error)


def test_functions():
    reward, done = torch.randn(2, 9), torch.zeros(2, 9, dtype=torch.bool)
    with fault(lambda out: out.returns["reward"][1, 4].neg_()), pytest.raises(EquivalenceError) as caught:
        n_step_return(reward, done, gamma=GAMMA, n_steps=3, backend="verify")
    assert (caught.value.key, caught.value.frame) == ("reward", (1, 4))
    steps = torch.full((2, 9), 1)
    with (
        fault(lambda out: out[0, 3].add_(1), "gather_future"),
        pytest.raises(EquivalenceError, match=r"its window ends at t = 3, as steps is 1 there") as caught,
    ):
        gather_future(reward, steps, backend="verify")
    assert (caught.value.key, caught.value.frame) == ("value", (0, 3))
    with pytest.raises(ValueError, match="steps must be within"):
        gather_future(reward, steps + 9, backend="verify")


def test_bits_that_print_alike_differ():
    """Another payload of a NaN, and the sign of a zero."""
    rollout = make_rollout((2,), 24)
    rollout["next", "observation"][:] = 0.0
    with fault(lambda out: out.leaves[OBSERVATION][1, 4, 2].neg_() if len(out.steps[0]) == 12 else None):
        assert found(rollout).frame == (1, 4)
    quiet, other = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    rollout["next", "observation"][:] = quiet
    with fault(lambda out: out.leaves[OBSERVATION][1, 4, 2].copy_(other) if len(out.steps[0]) == 12 else None):
        error = found(rollout)
    assert "nan, in bytes [1, 0, 192, 127]" in str(error)
    assert "nan, in bytes [0, 0, 192, 127]" in str(error)


@pytest.mark.parametrize("shape", ["dtype", "frames", "entries"])
def test_outputs_of_another_kind_are_reported(shape):
    def spoil(out):
        if shape == "entries":
            del out.leaves[OBSERVATION]
        else:
            leaf = out.leaves[OBSERVATION]
            out.leaves[OBSERVATION] = leaf.double() if shape == "dtype" else leaf[:, 1:]

    transform = MultiStepTransform(N_STEPS, GAMMA, backend="verify")
    with fault(spoil), pytest.raises(EquivalenceError, match="the kernels"):
        transform.inv(make_rollout((2,), 12))


def test_after_an_error_the_frames_held_back_are_those_before():
    rollout = make_rollout((2,), 36)
    transform, steady = (MultiStepTransform(N_STEPS, GAMMA, backend=backend) for backend in ("verify", "triton"))
    parts = rollout.split(12, -1)
    expected = [steady.inv(part) for part in parts] + [steady.flush()]
    out = []
    for part in parts:
        with fault(lambda out: out.steps[0, 0].add_(1)), pytest.raises(EquivalenceError):
            transform.inv(part)
        with fault(lambda out: out.carry.leaves["action",][0, 0].add_(1)), pytest.raises(EquivalenceError):
            transform.inv(part)
        out.append(transform.inv(part))
    with fault(lambda out: out.steps[0, 0].add_(1)), pytest.raises(EquivalenceError):
        transform.flush()
    out.append(transform.flush())
    assert all((mine == other).all() for mine, other in zip(out, expected, strict=True))


def test_kernels_that_write_where_they_read_are_reported_and_undone():
    rollout = make_rollout((2,), 24)
    transform, steady = (MultiStepTransform(N_STEPS, GAMMA, backend=backend) for backend in ("verify", "triton"))
    for each in (transform, steady):
        each.inv(rollout[:, :12])
    launch = launchers.n_step_extend
    for which, what in ((1, "frames held back"), (2, "data")):

        def launch_and_write(*arguments, which=which):
            out = launch(*arguments)
            source = arguments[which]
            (source.pieces(("action",), 1)[0] if isinstance(source, Carry) else source["action",])[0, 0] += 1
            return out

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launchers, "n_step_extend", launch_and_write)
            with pytest.raises(EquivalenceError, match=rf"the kernels wrote into \[\('action',\)\] of the {what}"):
                transform.inv(rollout[:, 12:])
    assert (transform.inv(rollout[:, 12:]) == steady.inv(rollout[:, 12:])).all()


def test_a_window_that_is_long_shows_where_it_should_have_ended():
    rollout = make_rollout((), 120, p_done=0.0)
    rollout["next", "done"][20] = True
    launch = launchers.n_step_extend

    def launch_blindly(task, carry, data):
        return launch(task, carry, {**data, ("next", "done"): torch.zeros(120, 1, dtype=torch.bool)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launchers, "n_step_extend", launch_blindly)
        with pytest.raises(EquivalenceError, match=r"True +the reference ends it: done\n(.*\n)*.*the kernels end it"):
            MultiStep(GAMMA, 50, backend="verify")(rollout)


@pytest.mark.parametrize(
    ("dtype", "rewards", "gamma"),
    [(torch.float32, (1.00312e38, 2.47392e38), 0.97), (torch.float16, (32768.0, 32992.0), 0.9927254319190979)],
    ids=str,
)
@numpy.errstate(all="ignore")  # the interpreter sums with numpy
def test_one_rounding_may_decide_whether_a_return_is_infinite(dtype, rewards, gamma):
    """The exact sum lies between the largest number and the one that would follow it."""
    reward = torch.tensor(rewards * 8).to(dtype)
    done = torch.zeros(16, dtype=torch.bool)
    n_step_return(reward, done, gamma=gamma, n_steps=2, backend="verify")
    with (
        fault(lambda out: out.returns["reward"][15:].fill_(torch.inf)),
        pytest.raises(EquivalenceError, match=r"\(15,\): inf and"),
    ):
        n_step_return(reward, done, gamma=gamma, n_steps=2, backend="verify")


def test_a_tolerance_that_overflows_lets_nothing_pass():
    reward, done = torch.tensor([0.9e308, 0.8e308, 0.7e308], dtype=torch.float64), torch.zeros(3, dtype=torch.bool)
    with (
        numpy.errstate(over="ignore"),  # in sums of more frames than a window has, which the interpreter warns of
        fault(lambda out: out.returns["reward"].zero_()),
        pytest.raises(EquivalenceError, match="3 of 3 frames differ"),
    ):
        n_step_return(reward, done, gamma=0.6, n_steps=3, backend="verify")


@pytest.mark.parametrize(
    ("reward", "gamma"),
    [
        ([-3e38, 3e38, 3e38], 1.0),
        ([3e38, 3e38, -3e38], 1.0),
        ([0.0, 3e38, 3e38, -3e38], 1.0),
        ([0.0] * 64 + [torch.inf, 1.0], 0.1),
        ([0.0] * 64 + [1e38, 1.0], 0.1),
        ([0.0, 0.0, -3.4028234663852886e38, -3.4028234663852886e38, 1.0], 0.5),
        ([3e38, 3e38, -torch.inf], 1.0),
        ([0.0] * 8 + [torch.inf], 1e-45),
        ([3e38, -3e38, 1.7e38, -2.9e38, 1.1e38], 0.99),
    ],
    ids=str,
)
@numpy.errstate(all="ignore")  # the interpreter sums with numpy
def test_sums_that_overflow_on_the_way_and_powers_that_underflow(reward, gamma):
    """Which of the sums are finite depends on their order; a value that is wrong is found all the same."""
    reward, done = torch.tensor(reward), torch.zeros(len(reward), dtype=torch.bool)
    windows = partial(n_step_return, reward, done, gamma=gamma, n_steps=len(reward), backend="verify")
    windows()
    with fault(lambda out: out.returns["reward"][-1:].neg_()), pytest.raises(EquivalenceError):
        windows()


def test_an_infinite_reward_that_is_lost_is_found():
    reward, done = torch.tensor([1.0, torch.inf, 1.0, 1.0]), torch.zeros(4, dtype=torch.bool)
    for wrong in (3.0, torch.nan, -torch.inf):
        with fault(lambda out, wrong=wrong: out.returns["reward"][:1].fill_(wrong)), pytest.raises(EquivalenceError):
            n_step_return(reward, done, gamma=0.9, n_steps=3, backend="verify")


def test_the_error_can_be_sent_to_another_process():
    with fault(lambda out: out.steps[0, 4].add_(1) if len(out.steps[0]) == 12 else None):
        error = found()
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.frame, copy.kernels) == (str(error), error.frame, error.kernels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_return_may_be_off_by_the_tolerance_and_no_more(dtype):
    rollout = make_rollout((2,), 12)
    rollout["next", "reward"] = rollout["next", "reward"].to(dtype)

    def push(factor):
        """Adds a part of the tolerance to the return of frame 4, which has a window of three frames."""

        def spoil(out):
            _, bound, _ = float64_returns(out.leaves["next", "reward_orig"], out.steps, GAMMA, dtype)
            far = out.returns[REWARD][1, 4].double() + 2 * factor * bound[1, 4]
            out.returns[REWARD][1, 4] = far.to(dtype)

        return fault(spoil)

    rollout["next", "done"][:] = False
    with push(0.5):
        MultiStepTransform(N_STEPS, GAMMA, backend="verify").inv(rollout)
    with push(3), pytest.raises(EquivalenceError) as caught:
        MultiStepTransform(N_STEPS, GAMMA, backend="verify").inv(rollout)
    assert caught.value.frame == (1, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32])
@pytest.mark.parametrize("n_steps", [1, 2, 10, 50])
def test_the_bound_holds_and_is_no_larger_than_the_worst_case(n_steps, dtype):
    """Against plain loops; by more than 3 (n - 1) + 1 roundings of the sum of absolute terms nothing can be off."""
    reward = torch.randn(4, 60, 2)
    reward = (reward * 100).to(dtype) if not dtype.is_floating_point else reward.to(dtype)
    done = torch.rand(4, 60) < 0.05
    out = n_step_return(reward, done, gamma=0.97, n_steps=n_steps, backend="reference")
    exact, bound, _ = float64_returns(reward, out.steps, 0.97, out.reward.dtype)
    expected, magnitude = window_sums(reward, window_ends(done, n_steps), 0.97)
    torch.testing.assert_close(exact, expected, rtol=1e-13, atol=1e-13)
    assert ((out.reward.double() - exact).abs() <= bound).all()
    worst = 1.5 * (out.steps - 1).unsqueeze(-1) * torch.finfo(torch.float32).eps * magnitude * (1 + 1e-6)
    if out.reward.dtype != torch.float32:
        worst += torch.finfo(out.reward.dtype).eps / 2 * (magnitude + worst)
    assert (bound <= worst + 60 * torch.finfo(torch.float32).tiny + 1e-7 * (dtype == torch.float16)).all()
    if n_steps > 1 and out.reward.dtype == torch.float32:
        assert bound.max() > 0


def ring_of_eight(**arguments):
    """Frames 2 .. 9 of two environments, of which 8 lies in slot 0; every slot is sampled, in order."""
    buffer = NStepReplayBuffer(
        n_steps=N_STEPS,
        gamma=GAMMA,
        backend="verify",
        storage=LazyTensorStorage(16, ndim=2, device=torch.get_default_device()),
        sampler=SamplerWithoutReplacement(shuffle=False),
        batch_size=16,
        **arguments,
    )
    rollout = make_rollout((2,), 10, p_done=0.0)
    rollout["next", "reward"] = torch.arange(10.0).expand(2, 10).unsqueeze(-1)
    for part in rollout.split([7, 3], 1):
        buffer.extend(part)
    return buffer


# The same faults of what is sampled, (j,) the sample.
@pytest.mark.parametrize("kind", [kind for kind in FAULTS if kind != "a wrong row"])
def test_a_fault_of_a_sample_is_found_at_its_place(kind):
    spoil, key, what = FAULTS[kind]
    buffer = ring_of_eight()
    # Slot 2, environment 1.
    spoiled = fault(lambda out: spoil(out, (5,)), "n_step_sample")
    with spoiled, pytest.raises(EquivalenceError) as caught:
        buffer.sample()
    error = caught.value
    assert (error.key, error.what, error.frame) == (key, what, (5,))
    assert "sample = 5; 1 of 16 frames differ" in str(error)
    assert "at index (2, 1) of the storage" in str(error)
    assert buffer.sample()["steps_to_next_obs"].view(8, 2)[:, 1].tolist() == [2, 1, 3, 3, 3, 3, 3, 3]


def test_the_window_of_a_sample_is_shown_as_it_lies_in_the_ring():
    buffer = ring_of_eight()
    # The newest frame but one lies in slot 0, the oldest in slot 2.
    with (
        fault(lambda out: out[1][REWARD][0].sub_(1), "n_step_sample"),
        pytest.raises(EquivalenceError) as caught,
    ):
        buffer.sample()
    shown = [line.split() for line in str(caught.value).splitlines()]
    table = shown[next(i for i, line in enumerate(shown) if line[:1] == ["t"]) :]
    assert [line[:2] for line in table[1:]] == [["0", "8"], ["1", "9"]]
    assert "end of data" in str(caught.value)


@pytest.mark.parametrize("n_steps", [N_STEPS, (1, N_STEPS), 20])
def test_what_is_sampled_is_what_the_kernels_computed(n_steps):
    outs = []
    for backend in ("verify", "triton"):
        buffer = ring_of_eight(generator=torch.Generator(torch.get_default_device()).manual_seed(0))
        buffer.backend = backend
        outs.append(buffer.sample(n_steps=n_steps))
    assert (outs[0] == outs[1]).all()
