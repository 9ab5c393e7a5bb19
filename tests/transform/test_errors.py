"""Every error says what broke which rule, and leaves the carry as it was."""

import importlib
import math

import pytest
import torch
from bad import BAD_DATA
from paths import kernels
from rollouts import make_rollout
from tensordict import TensorDict, tensorclass
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import SerialEnv, TransformedEnv
from torchrl.envs.transforms import MultiStepTransform as TorchRLMultiStepTransform
from torchrl.testing.mocking_classes import CountingEnv

from multistep_triton import MultiStep, MultiStepTransform, eager, gather_future, n_step_return


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "3", None])
def test_n_steps(value):
    message = rf"n_steps must be an int >= 1, got {value!r}"
    with pytest.raises(ValueError, match=message):
        MultiStepTransform(value, 0.9)
    transform = MultiStepTransform(3, 0.9)
    with pytest.raises(ValueError, match=message):
        transform.n_steps = value
    assert transform.n_steps == 3
    with pytest.raises(ValueError, match=message):
        n_step_return(torch.ones(2), torch.zeros(2, dtype=torch.bool), gamma=0.9, n_steps=value)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        *((value, ValueError) for value in (-3, 1.01, math.nan, math.inf, 10**400)),
        *((value, TypeError) for value in (True, "0.9", None)),
    ],
)
def test_gamma(value, error):
    message = rf"gamma must be a finite number in \[0, 1\], got {value!r}"
    with pytest.raises(error, match=message):
        MultiStepTransform(3, value)
    transform = MultiStepTransform(3, 0.9)
    with pytest.raises(error, match=message):
        transform.gamma = value
    assert transform.gamma == 0.9
    with pytest.raises(error, match=message):
        n_step_return(torch.ones(2), torch.zeros(2, dtype=torch.bool), gamma=value, n_steps=2)


def test_backend():
    message = r"backend must be one of 'auto', 'reference', 'triton', 'verify', got 'cuda'"
    with pytest.raises(ValueError, match=message):
        MultiStepTransform(3, 0.9, backend="cuda")
    transform = MultiStepTransform(3, 0.9)
    with pytest.raises(ValueError, match=message):
        transform.backend = "cuda"
    with pytest.raises(ValueError, match=message):
        gather_future(torch.ones(2), torch.ones(2, dtype=torch.int64), backend="cuda")


@pytest.mark.parametrize("name", ["done_key", "mask_key", "reward_keys", "done_keys"])
@pytest.mark.parametrize("value", [7, ("agent", 7), ()], ids=str)
def test_keys(name, value):
    if name.endswith("s") and value != 7:
        value = [value]
    with pytest.raises(TypeError, match=rf"{name} must be a .*key.*, got .*7|got \(\)"):
        MultiStepTransform(3, 0.9, **{name: value})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"done_at": "middle"}, ValueError, "done_at must be one of 'start', 'end', got 'middle'"),
        ({"done_at": None}, ValueError, "done_at must be one of 'start', 'end', got None"),
        ({"traj_key": 7}, TypeError, "traj_key must be a key, a string or a tuple of strings, got 7"),
        ({"match_reward_shape": 1}, TypeError, "match_reward_shape must be True or False, got 1"),
    ],
)
@pytest.mark.parametrize("make", [MultiStepTransform, MultiStep], ids=["transform", "postproc"])
def test_other_arguments(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make(n_steps=3, gamma=0.9, **arguments)
    made = make(n_steps=3, gamma=0.9)
    (name, value), kept = *arguments.items(), getattr(made, *arguments)
    with pytest.raises(error, match=message):
        setattr(made, name, value)
    assert getattr(made, name) == kept


IDS = torch.zeros(2, 10, dtype=torch.int64)
BAD_ROLES = {
    "no ids": ({"traj_key": "ids"}, {}, KeyError, r"a tensor at \('ids',\), got the entries"),
    "ids that are no integers": (
        {"traj_key": "ids"},
        {"ids": IDS.float()},
        TypeError,
        r"trajectory ids \('ids',\), named by traj_key, must be integers, got torch.float32",
    ),
    "ids of another shape": (
        {"traj_key": ("collector", "ids")},
        {("collector", "ids"): IDS.unsqueeze(-1).expand(2, 10, 3)},
        ValueError,
        r"trajectory ids .* must have shape \[\*B, T\] = \[2, 10\] or .* = \[2, 10, 1\], got \[2, 10, 3\]",
    ),
    "a done at the end that is no tensor": (
        {"done_at": "end", "done_keys": ["why"]},
        {("next", "why"): "fell"},
        TypeError,
        r"\('next', 'why'\), named by done_keys, must be a tensor, got a non-tensor",
    ),
    "a name that is written": (
        {"done_at": "end", "done_keys": ["done_orig"]},
        {},
        ValueError,
        r"no key may name an entry that is written besides, got \('next', 'done_orig'\)",
    ),
    "a done per agent that is not bool": (
        {"done_key": "dones", "reward_keys": ["rewards"]},
        {("next", "dones"): torch.zeros(2, 10, 4, 1), ("next", "rewards"): torch.zeros(2, 10, 4, 1)},
        TypeError,
        r"done \('next', 'dones'\) must be bool, got torch.float32",
    ),
    "a done per agent and rewards per team": (
        {"done_key": "dones"},
        {("next", "dones"): torch.zeros(2, 10, 4, 1, dtype=torch.bool)},
        ValueError,
        r"done .* or, per agent, that of a reward beside it, got \[2, 10, 4, 1\]",
    ),
    "a done per agent and rewards of another group": (
        {"done_key": ("red", "done"), "reward_keys": [("blue", "reward")]},
        {
            ("next", "red", "done"): torch.zeros(2, 10, 4, 1, dtype=torch.bool),
            ("next", "blue", "reward"): torch.zeros(2, 10, 4, 1),
        },
        ValueError,
        r"done .* or, per agent, that of a reward beside it, got \[2, 10, 4, 1\]",
    ),
    "no reward to match": (
        {"reward_keys": [], "match_reward_shape": True},
        {},
        ValueError,
        "match_reward_shape must be False where reward_keys is empty, got True",
    ),
    "a first reward that is of no agent": (
        {"done_key": "dones", "reward_keys": ["reward", "rewards"], "match_reward_shape": True},
        {("next", "dones"): torch.zeros(2, 10, 4, 1, dtype=torch.bool), ("next", "rewards"): torch.zeros(2, 10, 4, 1)},
        ValueError,
        r"match_reward_shape must be False where done is per agent and .* \[2, 10, 1\] and windows \[2, 10, 4\]",
    ),
}


@pytest.mark.parametrize("kind", BAD_ROLES)
def test_bad_roles_leave_the_carry_as_it_was(kind):
    arguments, entries, error, message = BAD_ROLES[kind]
    transform, first = MultiStepTransform(3, 0.9), make_rollout((2,), 10)
    first.update(entries)
    transform.inv(first)
    before = transform._buffer
    for name, value in arguments.items():
        setattr(transform, name, value)
    with pytest.raises(error, match=message):
        transform.inv(first)
    assert (transform._buffer == before).all()


def test_a_single_frame_cannot_emit_several():
    transform = MultiStepTransform(5, 0.9)
    rollout = make_rollout((), 20)
    transform.inv(rollout[:10])
    transform.n_steps = 2
    with pytest.raises(ValueError, match=r"at most n_steps = 2 frames held back, got 5.* an empty one will do"):
        transform.inv(rollout[10])
    assert torch.equal(transform.inv(rollout[10:10])["observation"], rollout["observation"][5:8])
    assert torch.equal(transform.inv(rollout[10])["observation"], rollout["observation"][8])


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data_leaves_the_carry_as_it_was(kind):
    spoil, error, message = BAD_DATA[kind]
    rollout = make_rollout((2,), 30)
    first, second = rollout[:, :20], rollout[:, 20:]
    disturbed, calm = MultiStepTransform(3, 0.9), MultiStepTransform(3, 0.9)
    disturbed.inv(first), calm.inv(first)
    with pytest.raises(error, match=message):
        disturbed._inv_call(spoil(second))
    ours, expected = disturbed.inv(second), calm.inv(second)
    for key in expected.keys(True, True):
        assert torch.equal(ours[key], expected[key]), key


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_failing_backend_leaves_the_carry_as_it_was(monkeypatch, backend):
    def fail(*arguments):
        raise RuntimeError("out of memory")

    with kernels():
        rollout = make_rollout((2,), 30)
        transform = MultiStepTransform(3, 0.9, backend=backend)
        transform.inv(rollout[:, :20])
        with monkeypatch.context() as patch:
            if backend == "triton":
                patch.setattr(importlib.import_module("multistep_triton.kernels.launch"), "run", fail)
            else:
                patch.setattr(eager, "discounts", fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                transform.inv(rollout[:, 20:])
        assert torch.equal(transform.inv(rollout[:, 20:])["observation"], rollout["observation"][:, 17:27])


def test_errors_name_every_difference_at_once():
    transform = MultiStepTransform(3, 0.9)
    rollout = make_rollout((2,), 10)
    transform.inv(rollout)
    other = make_rollout((3,), 10).exclude("action")
    other["observation"] = other["observation"].double()
    with pytest.raises(ValueError, match=r"\*B must be \[2\], got \[3\]; .*observation.*action"):
        transform.inv(other)


def test_clear_starts_anew():
    transform = MultiStepTransform(3, 0.9)
    transform.inv(make_rollout((2,), 10))
    transform.clear()
    assert transform.inv(make_rollout((5,), 10)).batch_size == (5, 7)


def test_a_tensorclass_is_not_a_tensordict():
    @tensorclass
    class Frame:
        reward: torch.Tensor

    with pytest.raises(TypeError, match=r"must be a TensorDict .* got Frame"):
        MultiStepTransform(3, 0.9).inv(Frame(reward=torch.ones(4), batch_size=[4]))


@pytest.mark.parametrize("make", [MultiStepTransform, TorchRLMultiStepTransform], ids=["ours", "torchrl"])
def test_on_an_environment_it_raises_torchrls_error(make):
    env = TransformedEnv(SerialEnv(2, lambda: CountingEnv(max_steps=4)), make(3, 0.9))
    with pytest.raises(ValueError, match="only an inverse transform and can be applied exclusively to replay buffers"):
        env.rollout(3)


def test_sampling_is_the_identity():
    rollout = make_rollout((2,), 10)
    assert MultiStepTransform(3, 0.9)(rollout) is rollout


def test_an_error_in_extend_stores_nothing():
    buffer = ReplayBuffer(storage=LazyTensorStorage(100, ndim=2), transform=MultiStepTransform(3, 0.9))
    buffer.extend(make_rollout((2,), 10))
    stored = buffer[:].clone()
    with pytest.raises(ValueError, match=r"\*B must be \[2\], got \[3\]"):
        buffer.extend(make_rollout((3,), 10))
    assert (buffer[:] == stored).all()


DONE = torch.zeros(2, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: n_step_return([1.0], DONE, gamma=0.9, n_steps=2), TypeError, "reward must be a tensor, got list"),
        (
            lambda: n_step_return(torch.ones(2, 5), DONE.int(), gamma=0.9, n_steps=2),
            TypeError,
            "done must be bool, got torch.int32",
        ),
        (
            lambda: n_step_return(torch.ones(2, 4), DONE, gamma=0.9, n_steps=2),
            ValueError,
            r"reward must have shape \[\*B, T, \*F\] with \[\*B, T\] = \[2, 5\], got \[2, 4\]",
        ),
        (
            lambda: n_step_return(torch.ones(2, 5), DONE, gamma=0.9, n_steps=2, mask=DONE[:, :4]),
            ValueError,
            r"mask must have shape \[\*B, T\] = \[2, 5\] or \[\*B, T, 1\] = \[2, 5, 1\], got \[2, 4\]",
        ),
        (
            lambda: n_step_return(torch.ones(()), torch.zeros((), dtype=torch.bool), gamma=0.9, n_steps=2),
            ValueError,
            r"done must have a time dimension, .* got shape \[\]",
        ),
        (
            lambda: n_step_return(torch.ones(2, 5, device="meta"), DONE, gamma=0.9, n_steps=2),
            ValueError,
            "reward and done must be on one device, got reward on meta, done on cpu",
        ),
        (
            lambda: n_step_return(torch.ones(2, 5).to_sparse(), DONE, gamma=0.9, n_steps=2),
            TypeError,
            "reward must be a dense tensor, got a sparse one",
        ),
        (
            lambda: gather_future(torch.nested.nested_tensor([torch.ones(5)], layout=torch.jagged), DONE),
            TypeError,
            "value must be a dense tensor, got a nested one",
        ),
        (
            lambda: gather_future(torch.ones(2, 5), torch.ones(2, 5)),
            TypeError,
            "steps must be int64, got torch.float32",
        ),
        (
            lambda: gather_future(torch.ones(2, 4), torch.ones(2, 5, dtype=torch.int64)),
            ValueError,
            r"got steps \[2, 5\] and value \[2, 4\]",
        ),
        (
            lambda: gather_future(torch.ones(2, 5), torch.full((2, 5), 2)),
            ValueError,
            r"steps must be within 1 .. T - t = 1, got 2 at frame \(0, 4\)",
        ),
        (
            lambda: gather_future(torch.ones(2, 5), torch.zeros(2, 5, dtype=torch.int64)),
            ValueError,
            r"steps must be within 1 .. T - t = 5, got 0 at frame \(0, 0\)",
        ),
    ],
)
def test_functions(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_reward_keys_that_clash_with_what_is_written():
    data = make_rollout((2,), 9)
    data["next", "reward_orig"] = torch.ones(2, 9, 1)
    message = r"no key may name an entry that is written besides, got \('next', '%s'\)"
    with pytest.raises(ValueError, match=message % "reward_orig"):
        MultiStepTransform(3, 0.9, reward_keys=["reward", "reward_orig"]).inv(data)
    with pytest.raises(ValueError, match=message % "original_reward"):
        MultiStepTransform(3, 0.9, reward_keys=["original_reward"]).inv(data)


def test_a_reward_key_that_is_named_twice_counts_once():
    data = make_rollout((2,), 9)
    with kernels():
        data = data.to(torch.get_default_device())
        twice = MultiStepTransform(3, 0.9, reward_keys=["reward", "reward"]).inv(data)
        once = MultiStepTransform(3, 0.9).inv(data)
    assert set(twice.keys(True)) == set(once.keys(True))
    assert torch.equal(twice["next", "reward"], once["next", "reward"])


def test_a_done_that_is_not_there_is_named_with_what_is():
    data = TensorDict({"next": {"reward": torch.ones(4, 1), "finished": torch.zeros(4, dtype=torch.bool)}}, [4])
    with pytest.raises(KeyError, match=r"\('next', 'done'\), got the entries .*\('next', 'finished'\)"):
        MultiStepTransform(2, 0.9).inv(data)
