"""Key by key as torchrl's transform, where torchrl's is right."""

from functools import partial

import pytest
import torch
from rollouts import extend, make_rollout, window_ends, window_sums
from tensordict import LazyStackedTensorDict, lazy_stack
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.data.postprocs import MultiStep as TorchRLMultiStep
from torchrl.envs import SerialEnv
from torchrl.envs.transforms import MultiStepTransform as TorchRLMultiStepTransform
from torchrl.testing.mocking_classes import CountingEnv

from multistep_triton import MultiStep, MultiStepTransform, NStepReplayBuffer
from multistep_triton.frames import Frames

FRAMES = 250


def assert_same(ours, theirs, *, reward_key=("next", "reward")):
    """Exactly, but for what is rounded: both are within their error bounds of the exact power and the exact sum."""
    assert ours.batch_size == theirs.batch_size
    keys, their_keys = set(ours.keys(True, True)), set(theirs.keys(True, True))
    assert keys == their_keys | {(*reward_key[:-1], "reward_orig")}
    eps, steps = torch.finfo(torch.float32).eps, theirs["steps_to_next_obs"]
    for key in their_keys:
        mine, other = ours[key], theirs[key]
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype), key
        if key == "gamma":
            # torchrl rounds gamma to float32 before it raises it, and rounds the power
            assert ((mine - other).abs() <= (steps + 1) * eps * other).all()
        elif key == reward_key:
            # a sum of terms of at most the largest reward, rounded twice per term and once for gamma, by both
            magnitude = (
                steps.view(*steps.shape, *[1] * (mine.ndim - steps.ndim)) * ours["next", "original_reward"].abs().max()
            )
            assert ((mine - other).abs() <= 3 * steps.max() * eps * magnitude).all()
        else:
            assert torch.equal(mine, other), key


def assert_same_returns(ours, theirs, rollout, n_steps, gamma):
    """Both sum in float32, in different orders: each is within its own bound of the float64 sum."""
    ends = window_ends(rollout["next", "done"].squeeze(-1), n_steps)
    _, magnitude = window_sums(rollout["next", "reward"], ends, gamma)
    emitted = ours.batch_size[-1]
    bound = 3 * n_steps * torch.finfo(torch.float32).eps * magnitude.narrow(ours.ndim - 1, 0, emitted)
    difference = (ours["next", "reward"].double() - theirs["next", "reward"].double()).abs()
    assert (difference <= bound).all()


@pytest.mark.parametrize("n_steps", [2, 3, 7, 50])
@pytest.mark.parametrize("batch", [(), (2,), (3, 2), (2, 1, 2)], ids=str)
@pytest.mark.parametrize(
    "cuts", [[250], [50] * 5, [2] * 125, [1, 0, 100, 3, 146]], ids=["1x250", "5x50", "125x2", "ragged"]
)
def test_schedules(batch, cuts, n_steps):
    rollout = make_rollout(batch, FRAMES, seed=n_steps)
    theirs = extend(TorchRLMultiStepTransform(n_steps, 0.95), rollout, [FRAMES])
    ours = extend(MultiStepTransform(n_steps, 0.95), rollout, cuts)
    assert_same(ours, theirs)
    assert_same_returns(ours, theirs, rollout, n_steps, 0.95)


def test_one_step_but_for_nonterminal_which_torchrl_leaves_false():
    rollout = make_rollout((2,), 40)
    ours, theirs = MultiStepTransform(1, 0.9).inv(rollout), TorchRLMultiStepTransform(1, 0.9).inv(rollout)
    assert not theirs["nonterminal"].any()
    assert torch.equal(ours["nonterminal"], ~rollout["next", "done"].squeeze(-1)[:, :-1])
    theirs["nonterminal"] = ours["nonterminal"]
    assert_same(ours, theirs)
    assert torch.equal(ours["next", "reward"], theirs["next", "reward"])


@pytest.mark.parametrize("schedule", [[3, 4, 5, 6, 7, 8], [5, 3], [8, 1, 4], [2, 30, 2]], ids=str)
def test_changing_n_steps(schedule):
    rollout = make_rollout((2,), 20 * len(schedule))
    transform = MultiStepTransform(1, 0.9)
    seen = 0
    for i, part in enumerate(rollout.split(20, -1)):
        transform.n_steps = schedule[i]
        mine = transform.inv(part)
        known, emitted = 20 * (i + 1), max(20 * (i + 1) - schedule[i], seen)
        if emitted == seen:
            assert mine is None
            continue
        # no frame lost, none repeated
        assert torch.equal(mine["observation"], rollout["observation"][:, seen:emitted])
        ends = window_ends(rollout["next", "done"].squeeze(-1)[:, :known], schedule[i])[:, seen:emitted]
        rows = torch.arange(2).unsqueeze(-1)
        assert torch.equal(mine["next", "observation"], rollout["next", "observation"][rows, ends])
        seen = emitted


def test_growing_n_steps_as_torchrl():
    rollout = make_rollout((2,), 120)
    ours, theirs = MultiStepTransform(3, 0.9), TorchRLMultiStepTransform(3, 0.9)
    for part in rollout.split(20, -1):
        mine, other = ours.inv(part), theirs.inv(part)
        assert_same(mine, other)
        ours.n_steps = theirs.n_steps = ours.n_steps + 2


def test_add_stores_what_extend_stores():
    rollout = make_rollout((), 30)
    buffers = [ReplayBuffer(storage=LazyTensorStorage(100), transform=MultiStepTransform(3, 0.9)) for _ in range(2)]
    for frame in rollout:
        buffers[0].add(frame)
    buffers[1].extend(rollout)
    added, extended = buffers[0][:], buffers[1][:]
    assert added.batch_size == extended.batch_size == (27,)
    for key in extended.keys(True, True):
        assert torch.equal(added[key], extended[key]), key


@pytest.mark.parametrize("done_keys", [None, ["done"], ["done", "terminated"]], ids=str)
def test_done_keys(done_keys):
    rollout = make_rollout((2,), 40)
    ours = MultiStepTransform(3, 0.9, done_keys=done_keys).inv(rollout)
    assert_same(ours, TorchRLMultiStepTransform(3, 0.9, done_keys=done_keys).inv(rollout))


def test_nested_reward_and_done_keys():
    rollout = make_rollout((2,), 40)
    rollout["next", "agent"] = rollout["next"].select("reward", "done", "terminated").clone()
    for key in ("reward", "done", "terminated"):
        del rollout["next", key]
    keys = {
        "reward_keys": [("agent", "reward")],
        "done_key": ("agent", "done"),
        "done_keys": [("agent", "done"), ("agent", "terminated")],
    }
    ours = MultiStepTransform(3, 0.9, **keys).inv(rollout)
    theirs = TorchRLMultiStepTransform(3, 0.9, **keys).inv(rollout)
    assert_same(ours, theirs, reward_key=("next", "agent", "reward"))


def test_reward_and_done_without_a_trailing_dimension():
    rollout = make_rollout((2,), 40)
    for key in ("reward", "done", "terminated", "truncated"):
        rollout["next", key] = rollout["next", key].squeeze(-1)
    ours, theirs = MultiStepTransform(3, 0.9).inv(rollout), TorchRLMultiStepTransform(3, 0.9).inv(rollout)
    assert_same(ours, theirs)
    assert ours["next", "reward"].shape == (2, 37)


def test_signature_is_torchrls_and_more():
    import inspect

    ours = inspect.signature(MultiStepTransform.__init__).parameters
    theirs = inspect.signature(TorchRLMultiStepTransform.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default)


def test_default_keys_are_torchrls():
    ours, theirs = MultiStepTransform(3, 0.9), TorchRLMultiStepTransform(3, 0.9)
    for name in ("n_steps", "gamma", "reward_keys", "done_key", "mask_key"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert set(ours.done_keys) == set(theirs.done_keys)


@pytest.mark.parametrize("envs", [1, 2])
def test_rollouts_that_go_on_from_next_as_in_torchrls_docstring(envs):
    env = SerialEnv(envs, partial(CountingEnv, max_steps=7)) if envs > 1 else CountingEnv(max_steps=7)
    ndim = 1 + (envs > 1)
    pair = [
        ReplayBuffer(storage=LazyTensorStorage(200, ndim=ndim), transform=kind(n_steps=3, gamma=0.9))
        for kind in (MultiStepTransform, TorchRLMultiStepTransform)
    ]
    single = NStepReplayBuffer(n_steps=3, gamma=0.9, done_at="start", storage=LazyTensorStorage(200, ndim=ndim))
    last, rollouts = env.reset(), []
    for _ in range(3):
        rollout = env.rollout(9, break_when_any_done=False, tensordict=last, auto_reset=False)
        last = rollout[..., -1]["next"]
        rollouts.append(rollout)
        for buffer in (*pair, single):
            buffer.extend(rollout.clone())
    # The first frame of a rollout that goes on has the last reward at its root.
    assert ("reward",) in Frames.read(last).leaves
    assert isinstance(rollouts[-1], LazyStackedTensorDict)
    assert_same(*(buffer[:] for buffer in pair))
    assert len(single) == len(pair[0]) + 3 * envs
    one, other = (kind(0.9, 3)(rollouts[-1].clone()) for kind in (MultiStep, TorchRLMultiStep))
    assert_same(one, other)


def take(kind, data):
    """Has a class take a rollout."""
    if kind is MultiStep:
        return kind(0.9, 2)(data)
    storage = LazyTensorStorage(200, ndim=data.ndim)
    if kind is NStepReplayBuffer:
        buffer = kind(n_steps=2, gamma=0.9, storage=storage, batch_size=8)
    else:
        buffer = ReplayBuffer(storage=storage, transform=kind(2, 0.9), batch_size=8)
    buffer.extend(data)
    return buffer.sample()


ALL = pytest.mark.parametrize("kind", [MultiStep, MultiStepTransform, NStepReplayBuffer])


@ALL
@pytest.mark.parametrize("first", ["time", "environments"])
def test_what_the_first_frames_hold_of_the_last_rollout_in_stacks_of_stacks(kind, first):
    rollout = make_rollout((2,), 6)

    def frame(env, t):
        data = rollout[env, t].clone()
        return data.set("reward", torch.ones(1)) if not t else data

    rows = [[frame(env, t) for t in range(6)] for env in range(2)]
    if first == "time":
        data = lazy_stack([lazy_stack(list(column), 0) for column in zip(*rows, strict=True)], 1)
    else:
        data = lazy_stack([lazy_stack(row, 0) for row in rows], 0)
    assert "reward" not in take(kind, data).keys()  # noqa: SIM118


@ALL
@pytest.mark.parametrize("odd", [None, 0, 3])
def test_what_other_frames_lack_is_an_error(kind, odd):
    frames = [frame.clone() for frame in make_rollout((), 6).unbind(0)]
    for t, frame in enumerate(frames):
        frame["next", "state"] = torch.ones(1)
        if t != odd:
            frame["state"] = torch.ones(1)
    if odd is None:
        # Not under "next".
        frames[0]["seed"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"in every element of a lazily|the same entries in all of a lazy stack"):
        take(kind, lazy_stack(frames, 0))
