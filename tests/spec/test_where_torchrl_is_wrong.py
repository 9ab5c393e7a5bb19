"""Where torchrl's class is wrong: every test passes with ours and fails with torchrl's in its place.

``python -m pytest tests/spec/test_where_torchrl_is_wrong.py -v`` runs both. Were torchrl to pass one, the test fails:
then it can go from the table in docs/torchrl.md. ``--runxfail`` shows how torchrl fails.
"""

import inspect

import pytest
import torch
from memory import Calls, storages
from rollouts import frames, make_rollout
from targets import ATOMS, assert_every_frame_has_its_own_discount, distributional_loss, row, td0_targets
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs.transforms import MultiStepTransform as TorchRLMultiStepTransform

from benchmarks.measure import PeakMemory
from multistep_triton import MultiStepTransform

F, T = False, True
WRONG = pytest.mark.xfail(strict=True, reason="torchrl 0.14.1 is wrong here")


@pytest.fixture(
    params=[
        pytest.param(MultiStepTransform, id="ours"),
        pytest.param(TorchRLMultiStepTransform, id="torchrl", marks=WRONG),
    ]
)
def make(request):
    """Makes a transform of either class, without the arguments that it does not have."""
    known = inspect.signature(request.param).parameters

    def make(n_steps, gamma, **arguments):
        return request.param(n_steps, gamma, **{name: arguments[name] for name in arguments.keys() & known.keys()})

    return make


def test_1_two_reward_keys_keep_their_originals_apart(make):
    data = frames([1.0, 2.0, 4.0], [F, F, F])
    data["next", "cost"] = data["next", "reward"] * 10
    out = make(1, 0.5, reward_keys=["reward", "cost"]).inv(data)["next"]
    kept = [leaf.flatten().tolist() for key, leaf in out.items() if "orig" in key]
    assert sorted(kept) == [[1.0, 2.0], [10.0, 20.0]]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_2_what_follows_a_done_does_not_reach_before_it(make, poison):
    out = make(3, 0.5).inv(frames([1.0, 2.0, poison, 4.0, 8.0], [F, T, F, F, F]))
    assert out["next", "reward"].flatten().tolist() == [2.0, 2.0]


def test_3_integer_rewards_are_discounted(make):
    data = frames([1.0, 2.0, 4.0, 8.0], [F] * 4)
    data["next", "reward"] = data["next", "reward"].long()
    out = make(2, 0.5).inv(data)
    assert out["next", "reward"].flatten().tolist() == [2.0, 4.0]


def test_4_one_step_is_nonterminal_but_at_a_done(make):
    out = make(1, 0.5).inv(frames([1.0] * 4, [F, T, F, F]))
    assert out["nonterminal"].tolist() == [T, F, T]


def test_5_padding_is_neither_summed_nor_observed(make):
    data = frames([1.0, 2.0, 100.0, 4.0, 8.0, 16.0, 32.0], [F] * 7, mask=torch.tensor([T, T, F, T, T, T, T]))
    out = make(3, 0.5).inv(data)
    assert out["next", "reward"].flatten().tolist() == [2.0, 2.0, 100.0, 12.0]
    assert out["next", "observation"].tolist() == [2, 2, 3, 6]


def steady_call(make, p_done):
    """Peak memory of a call, and the operators that it calls."""
    data = make_rollout((16,), 128, p_done=p_done)
    transform = make(3, 0.9)
    transform.inv(data)
    with PeakMemory() as memory, Calls() as calls:
        transform.inv(data)
    return memory.peak, calls


def test_6_memory_does_not_grow_with_the_episodes_of_a_row(make):
    assert steady_call(make, p_done=1.0)[0] == steady_call(make, p_done=0.0)[0]


def test_6_nothing_waits_for_the_device(make):
    assert not steady_call(make, p_done=0.1)[1].waits()


def test_7_frames_are_held_back_in_memory_of_their_own(make):
    data = make_rollout((2,), 100)
    transform = make(3, 0.9)
    transform.inv(data)
    held = transform._buffer
    assert not storages(held) & storages(data)
    assert sum(leaf.untyped_storage().nbytes() for leaf in held.values(True, True)) == held.bytes()


def test_7_frames_held_back_are_part_of_the_state(make):
    data = make_rollout((2,), 20)
    transform, resumed = make(3, 0.9), make(3, 0.9)
    transform.inv(data[:, :10])
    resumed.load_state_dict(transform.state_dict())
    assert torch.equal(resumed.inv(data[:, 10:])["observation"], data["observation"][:, 7:17])


@pytest.mark.parametrize("frames", [ATOMS, 30], ids=["as many frames as atoms", "more"])
def test_8_distributional_dqn_runs_and_is_right(make, frames):
    data = make_rollout((), frames + 3)
    data["action"] = data["action"] % 2
    out = make(3, 0.9, match_reward_shape=True).inv(data)
    assert_every_frame_has_its_own_discount(distributional_loss(), out)


def test_9_nothing_is_bootstrapped_from_where_an_episode_ended(make):
    out = make(3, 0.9, done_at="end").inv(row(9, terminated=[4]))
    torch.testing.assert_close(td0_targets(out).flatten()[2:5], torch.tensor([2.71, 1.9, 1.0]))


@pytest.mark.parametrize(("n_steps", "gamma"), [(3, -3), (True, 0.9)])
def test_10_wrong_numbers_are_refused(make, n_steps, gamma):
    with pytest.raises(ValueError, match="must be"):
        make(n_steps, gamma)


def test_10_a_missing_done_is_named(make):
    with pytest.raises(KeyError, match="done"):
        make(3, 0.9).inv(TensorDict({"next": {"reward": torch.ones(5, 1)}}, [5]))


def test_10_another_number_of_environments_is_named_and_loses_nothing(make):
    data = make_rollout((2,), 20)
    transform = make(3, 0.9)
    transform.inv(data[:, :10])
    with pytest.raises(ValueError, match=r"got \[3\]"):
        transform.inv(make_rollout((3,), 10))
    assert torch.equal(transform.inv(data[:, 10:])["observation"], data["observation"][:, 7:17])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_11_powers_of_gamma_are_not_rounded_to_the_dtype_of_rewards(make, dtype):
    data = frames([1.0, -1.0, 0.0], [F, F, F])
    data["next", "reward"] = data["next", "reward"].to(dtype)
    returned = make(2, 0.99).inv(data)["next", "reward"]
    assert returned.dtype == dtype
    assert returned.item() == torch.tensor(1 - 0.99).to(dtype).item()


def test_12_workers_are_not_glued_together(make):
    ours = [frames([float(10 * worker + t) for t in range(4)], [F] * 4) for worker in (1, 2)]
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100), transform=make(3, 1.0))
    for part in (0, 1):
        for worker, data in enumerate(ours):
            data["collector"] = TensorDict({"traj_ids": torch.full((4,), worker)}, [4])
            buffer.extend(data[2 * part : 2 * part + 2])
    out = buffer[:]
    worker = out["next", "original_reward"].flatten() // 10
    assert torch.equal(out["next", "reward"].flatten() // 10, worker * out["steps_to_next_obs"])


@pytest.mark.parametrize("truncated", ["truncated", "terminated"])
def test_13_windows_end_at_a_time_limit_that_done_does_not_hold(make, truncated):
    """``done`` is what learners of other libraries store: terminations only."""
    data = frames([1.0, 2.0, 4.0, 8.0, 16.0], [F] * 5)
    data["next", truncated] = torch.tensor([F, T, F, F, F]).unsqueeze(-1)
    out = make(2, 1.0).inv(data)
    assert out["next", "reward"].flatten().tolist() == [3.0, 2.0, 12.0]
    assert out["next", "observation"].tolist() == [2, 2, 4]
    assert out["steps_to_next_obs"].tolist() == [2, 1, 2]
