"""Numbers worked out by hand, before any comparison."""

import pytest
import torch
from rollouts import frames

from multistep_triton import MultiStepTransform, gather_future, n_step_return

pytestmark = pytest.mark.usefixtures("path")

F, T = False, True


def test_n_step_return_without_ends():
    out = n_step_return(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([F, F, F, F]), gamma=0.5, n_steps=3)
    # 1 + 2/2 + 4/4, 2 + 4/2 + 8/4, then cut at the last frame
    assert out.reward.tolist() == [3.0, 6.0, 8.0, 8.0]
    assert out.steps.tolist() == [3, 3, 2, 1]
    assert out.discount.tolist() == [0.125, 0.125, 0.25, 0.5]
    assert (out.steps.dtype, out.discount.dtype) == (torch.int64, torch.float32)


def test_n_step_return_stops_at_done():
    out = n_step_return(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([F, T, F, F]), gamma=0.5, n_steps=3)
    assert out.reward.tolist() == [2.0, 2.0, 8.0, 8.0]
    assert out.steps.tolist() == [2, 1, 2, 1]


@pytest.mark.parametrize("n_steps", [4, 5, 10**12])
def test_n_step_return_window_as_long_as_the_row_or_longer(n_steps):
    out = n_step_return(
        torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.zeros(4, dtype=torch.bool), gamma=0.5, n_steps=n_steps
    )
    assert out.reward.tolist() == [4.0, 6.0, 8.0, 8.0]
    assert out.steps.tolist() == [4, 3, 2, 1]


def test_n_step_return_one_step_is_the_reward():
    reward = torch.tensor([1.0, 2.0, 4.0])
    out = n_step_return(reward, torch.tensor([F, T, F]), gamma=0.5, n_steps=1)
    assert out.reward.tolist() == [1.0, 2.0, 4.0]
    assert out.discount.tolist() == [0.5, 0.5, 0.5]
    assert out.reward.data_ptr() != reward.data_ptr()


def test_n_step_return_gamma_zero_and_one():
    reward, done = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.zeros(4, dtype=torch.bool)
    assert n_step_return(reward, done, gamma=0, n_steps=3).reward.tolist() == [1.0, 2.0, 4.0, 8.0]
    assert n_step_return(reward, done, gamma=1, n_steps=3).reward.tolist() == [7.0, 14.0, 12.0, 8.0]


def test_n_step_return_rows_do_not_mix():
    reward = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    out = n_step_return(reward, torch.zeros(2, 2, dtype=torch.bool), gamma=1.0, n_steps=2)
    assert out.reward.tolist() == [[3.0, 2.0], [12.0, 8.0]]


def test_n_step_return_mask():
    # frames 2 and 3 are padding: frame 1 is the last of its trajectory though it is not done
    out = n_step_return(
        torch.tensor([1.0, 2.0, 100.0, 100.0, 4.0]),
        torch.zeros(5, dtype=torch.bool),
        gamma=0.5,
        n_steps=3,
        mask=torch.tensor([T, T, F, F, T]),
    )
    assert out.reward.tolist() == [2.0, 2.0, 100.0, 100.0, 4.0]
    assert out.steps.tolist() == [2, 1, 1, 1, 1]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_after_a_done_do_not_reach_back(poison):
    reward = torch.tensor([1.0, 2.0, poison, 4.0])
    out = n_step_return(reward, torch.tensor([F, T, F, F]), gamma=0.5, n_steps=3)
    assert out.reward[:2].tolist() == [2.0, 2.0]
    assert not out.reward[2].isfinite()
    assert out.reward[3].item() == 4.0


def test_integer_and_bool_rewards_are_promoted():
    done = torch.zeros(3, dtype=torch.bool)
    out = n_step_return(torch.tensor([1, 2, 4]), done, gamma=0.5, n_steps=2)
    assert (out.reward.dtype, out.reward.tolist()) == (torch.float32, [2.0, 4.0, 4.0])
    out = n_step_return(torch.tensor([T, T, F]), done, gamma=0.5, n_steps=2)
    assert (out.reward.dtype, out.reward.tolist()) == (torch.float32, [1.5, 1.0, 0.0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_accumulated_in_float32(dtype):
    # back from the end: added to the large reward one by one in its own dtype, the ones would be lost
    large = 2 / torch.finfo(dtype).eps
    reward = torch.tensor([1.0, 1.0, 1.0, 1.0, large], dtype=dtype)
    out = n_step_return(reward, torch.zeros(5, dtype=torch.bool), gamma=1.0, n_steps=5)
    assert (out.reward.dtype, out.reward[0].item()) == (dtype, large + 4)


def test_promotion_follows_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        out = n_step_return(torch.tensor([1, 1, 1]), torch.zeros(3, dtype=torch.bool), gamma=0.1, n_steps=3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (out.reward.dtype, out.reward[0].item()) == (torch.float64, 1 + 0.1 * (1 + 0.1))


def test_gather_future():
    value = torch.tensor([10, 11, 12, 13])
    assert gather_future(value, torch.tensor([3, 2, 2, 1])).tolist() == [12, 12, 13, 13]
    assert gather_future(value.view(2, 2), torch.tensor([[2, 1], [1, 1]])).tolist() == [[11, 11], [12, 13]]


def test_transform_holds_back_the_last_n_frames():
    transform = MultiStepTransform(n_steps=2, gamma=0.5)
    out = transform.inv(frames([1.0, 2.0, 4.0, 8.0, 16.0], [F, F, T, F, F]))
    assert out.batch_size == (3,)
    assert out["observation"].tolist() == [0, 1, 2]
    assert out["next", "observation"].tolist() == [2, 3, 3]
    assert out["next", "reward"].flatten().tolist() == [2.0, 4.0, 4.0]
    assert out["next", "reward_orig"].flatten().tolist() == [1.0, 2.0, 4.0]
    assert out["next", "original_reward"] is out["next", "reward_orig"]
    assert out["next", "done"].flatten().tolist() == [F, F, T]
    assert out["steps_to_next_obs"].tolist() == [2, 2, 1]
    assert out["gamma"].tolist() == [0.25, 0.25, 0.5]
    assert out["nonterminal"].tolist() == [T, T, F]
    assert [out[key].dtype for key in ("steps_to_next_obs", "gamma", "nonterminal")] == [
        torch.int64,
        torch.float32,
        torch.bool,
    ]

    out = transform.inv(frames([32.0], [F]))
    assert out["observation"].tolist() == [3]
    assert out["next", "observation"].tolist() == [5]
    assert out["next", "reward"].flatten().tolist() == [16.0]
    assert out["nonterminal"].tolist() == [T]


def test_transform_emits_nothing_until_it_holds_more_than_n():
    transform = MultiStepTransform(n_steps=3, gamma=0.5)
    assert transform.inv(frames([1.0, 1.0], [F, F])) is None
    assert transform.inv(frames([1.0], [F])) is None
    assert transform.inv(frames([1.0], [F]))["next", "reward"].tolist() == [[1.75]]


def test_transform_with_one_step_knows_what_is_terminal():
    out = MultiStepTransform(n_steps=1, gamma=0.5).inv(frames([1.0, 2.0, 4.0], [F, T, F]))
    assert out["nonterminal"].tolist() == [T, F]
    assert out["next", "observation"].tolist() == [1, 2]
    assert out["steps_to_next_obs"].tolist() == [1, 1]


def test_transform_with_another_mask_key():
    valid = torch.tensor([T, T, F, T, T])
    out = MultiStepTransform(2, 0.5, mask_key=("collector", "valid")).inv(
        frames([1.0, 2.0, 4.0, 8.0, 16.0], [F] * 5, collector={"valid": valid}, mask=torch.tensor([T] * 5))
    )
    assert out["next", "reward"].flatten().tolist() == [2.0, 2.0, 4.0]
    assert out["nonterminal"].tolist() == [T, F, F]


def test_transform_mask_at_the_seam_between_calls():
    transform = MultiStepTransform(n_steps=2, gamma=0.5)
    assert transform.inv(frames([1.0, 2.0], [F, F], mask=torch.tensor([T, T]))) is None
    out = transform.inv(frames([100.0, 4.0, 8.0], [F, F, F], mask=torch.tensor([[F], [T], [T]]).squeeze(-1)))
    assert out["next", "reward"].flatten().tolist() == [2.0, 2.0, 100.0]
    assert out["nonterminal"].tolist() == [T, F, F]
    assert out["next", "observation"].tolist() == [2, 2, 1]
