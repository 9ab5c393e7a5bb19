"""Numbers worked out by hand, before any comparison."""

import pytest
import torch
from rings import everything, make_buffer
from rollouts import frames
from tensordict import TensorDict

from multistep_triton import MultiStepTransform, gather_future, n_step_return

pytestmark = pytest.mark.usefixtures("every_path")

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


def test_the_mask_that_collectors_write_is_found():
    """With ``split_trajs=True``; one at the root comes first, and one that is named is the only one."""
    valid, rewards = torch.tensor([T, T, F, T, T]), [1.0, 2.0, 4.0, 8.0, 16.0]
    split = frames(rewards, [F] * 5, collector={"mask": valid})
    buffer = make_buffer(5, n_steps=2, gamma=0.5)
    buffer.extend(split)
    for out in (MultiStepTransform(2, 0.5).inv(split), everything(buffer)):
        assert out["next", "reward"].flatten().tolist()[:3] == [2.0, 2.0, 4.0]
        assert out["nonterminal"].tolist()[:3] == [T, F, F]
    both = frames(rewards, [F] * 5, collector={"mask": valid}, mask=torch.tensor([T] * 5))
    for out in (MultiStepTransform(2, 0.5).inv(both), MultiStepTransform(2, 0.5, mask_key="other").inv(split)):
        assert out["next", "reward"].flatten().tolist() == [2.0, 4.0, 8.0]


def test_transform_mask_at_the_seam_between_calls():
    transform = MultiStepTransform(n_steps=2, gamma=0.5)
    assert transform.inv(frames([1.0, 2.0], [F, F], mask=torch.tensor([T, T]))) is None
    out = transform.inv(frames([100.0, 4.0, 8.0], [F, F, F], mask=torch.tensor([[F], [T], [T]]).squeeze(-1)))
    assert out["next", "reward"].flatten().tolist() == [2.0, 2.0, 100.0]
    assert out["nonterminal"].tolist() == [T, F, F]
    assert out["next", "observation"].tolist() == [2, 2, 1]


def test_transform_trajectory_ids():
    traj = torch.tensor([7, 7, 7, 2, 2, 9, 9])
    out = MultiStepTransform(2, 0.5, traj_key="traj").inv(
        frames([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0], [F] * 7, traj=traj)
    )
    assert out["next", "reward"].flatten().tolist() == [2.0, 4.0, 4.0, 16.0, 16.0]
    assert out["next", "observation"].tolist() == [2, 3, 3, 5, 5]
    assert out["nonterminal"].tolist() == [T, T, F, T, F]
    assert out["next", "done"].any().item() is False
    assert out["traj"].tolist() == [7, 7, 7, 2, 2]


def test_transform_trajectory_ids_at_the_seam_between_calls():
    transform = MultiStepTransform(2, 0.5, traj_key=("collector", "traj_ids"))
    for ids in (torch.tensor([1, 1]), torch.tensor([[1], [1]])):
        transform.clear()
        assert transform.inv(frames([1.0, 2.0], [F, F], collector={"traj_ids": ids})) is None
        out = transform.inv(frames([4.0, 8.0], [F, F], collector={"traj_ids": ids + 1}))
        assert out["next", "reward"].flatten().tolist() == [2.0, 2.0]
        assert out["steps_to_next_obs"].tolist() == [2, 1]
        assert out["nonterminal"].tolist() == [T, F]


def test_frames_of_many_trajectories_in_one_row_do_not_mix():
    # extending with [num_envs] frames of as many environments makes of them a row of time
    transform = MultiStepTransform(3, 0.5, traj_key="env")
    rewards = torch.arange(1.0, 13.0).view(3, 4)
    calls = [frames(call.tolist(), [F] * 4, env=torch.arange(4)) for call in rewards]
    out = torch.cat([out for out in map(transform.inv, calls) if out is not None])
    assert out["next", "reward"].flatten().tolist() == rewards.flatten()[:9].tolist()
    assert out["steps_to_next_obs"].tolist() == [1] * 9
    # as a batch of environments with one frame each, every environment has its own windows
    transform = MultiStepTransform(2, 0.5, traj_key="env")
    out = [transform.inv(call.unsqueeze(-1)) for call in calls]
    assert out[:2] == [None, None]
    assert out[2]["next", "reward"].flatten().tolist() == [1 + 5 / 2, 2 + 6 / 2, 3 + 7 / 2, 4 + 8 / 2]


def test_done_at_the_end_of_the_window():
    rollout = frames([1.0] * 7, [F, F, F, T, F, F, F])
    rollout["next", "terminated"] = rollout["next", "done"].clone()
    out = MultiStepTransform(2, 0.5, done_at="end").inv(rollout)
    assert out["next", "done"].flatten().tolist() == [F, F, T, T, F]
    assert out["next", "terminated"].flatten().tolist() == [F, F, T, T, F]
    assert out["next", "done_orig"].flatten().tolist() == [F, F, F, T, F]
    assert out["next", "terminated_orig"].flatten().tolist() == [F, F, F, T, F]
    assert ("next", "truncated_orig") not in out.keys(True)
    assert out["nonterminal"].tolist() == [T, T, T, F, T]


def test_a_done_key_that_is_no_done_key_of_the_boundary_is_gathered_at_the_end():
    rollout = frames([1.0] * 5, [F] * 5)
    rollout["next", "late"] = torch.tensor([F, T, F, F, F])
    rollout["next", "late_orig"] = torch.tensor([T] * 5)
    arguments = {"n_steps": 2, "gamma": 0.5, "done_keys": ["late"]}
    start, end = (MultiStepTransform(**arguments, done_at=at).inv(rollout) for at in ("start", "end"))
    assert start["next", "late"].tolist() == [F, T, F]
    assert start["next", "late_orig"].tolist() == [T, T, T]
    assert end["next", "late"].tolist() == [T, F, F]
    assert end["next", "late_orig"].tolist() == [F, T, F]


def test_match_reward_shape():
    rollout = frames([1.0, 2.0, 4.0, 8.0], [F, T, F, F])
    rollout["next", "reward"] = rollout["next", "reward"].expand(4, 3).unsqueeze(-1)
    plain = MultiStepTransform(2, 0.5).inv(rollout)
    matched = MultiStepTransform(2, 0.5, match_reward_shape=True).inv(rollout)
    assert torch.equal(plain["next", "reward"], matched["next", "reward"])
    for key in ("steps_to_next_obs", "gamma", "nonterminal"):
        assert plain[key].shape == (2,)
        assert matched[key].shape == (2, 3, 1)
        assert (matched[key] == plain[key].view(2, 1, 1)).all()
        assert matched[key].untyped_storage().nbytes() == matched[key].nbytes


def agents(rewards, done):
    """One row of frames of agents; ``rewards`` and ``done`` are lists [T][A]."""
    rewards, done = torch.tensor(rewards).unsqueeze(-1), torch.tensor(done).unsqueeze(-1)
    count, each = rewards.shape[:2]
    number = torch.arange(1, count + 1)
    return TensorDict(
        {
            "agents": {"observation": number.view(-1, 1, 1).expand(count, each, 2) - 1},
            "next": {
                "state": number,
                "done": done.all(1),
                "agents": {
                    "observation": number.view(-1, 1, 1).expand(count, each, 2) + 100 * torch.arange(each).view(-1, 1),
                    "reward": rewards,
                    "done": done,
                    "team": number.view(-1, 1).expand(count, 5),
                },
            },
        },
        [count],
    )


AGENTS = {
    "reward_keys": [("agents", "reward")],
    "done_key": ("agents", "done"),
    "done_keys": [("agents", "done"), "done"],
}


def test_every_agent_has_its_own_windows():
    # the first agent is done at t = 1, the second at t = 2
    rollout = agents(
        [[1.0, 10.0], [2.0, 20.0], [4.0, 40.0], [8.0, 80.0], [0.0, 0.0], [0.0, 0.0]],
        [[F, F], [T, F], [F, T], [F, F], [F, F], [F, F]],
    )
    out = MultiStepTransform(2, 0.5, **AGENTS).inv(rollout)
    assert out.batch_size == (4,)
    assert out["next", "agents", "reward"].squeeze(-1).tolist() == [[2.0, 20.0], [2.0, 40.0], [8.0, 40.0], [8.0, 80.0]]
    assert out["next", "agents", "reward_orig"].equal(rollout["next", "agents", "reward"][:4])
    assert out["next", "agents", "observation"][..., 0].tolist() == [[2, 102], [2, 103], [4, 103], [5, 105]]
    assert out["steps_to_next_obs"].squeeze(-1).tolist() == [[2, 2], [1, 2], [2, 1], [2, 2]]
    assert out["gamma"].squeeze(-1).tolist() == [[0.25, 0.25], [0.5, 0.25], [0.25, 0.5], [0.25, 0.25]]
    assert out["nonterminal"].squeeze(-1).tolist() == [[T, T], [F, T], [T, F], [T, T]]
    assert out["steps_to_next_obs"].shape == (4, 2, 1)
    assert out["next", "agents", "done"].equal(rollout["next", "agents", "done"][:4])
    # what is no agent's is governed by the flag beside it, which no frame has here
    assert out["next", "state"].tolist() == [2, 3, 4, 5]
    # what agents share, having no dimension for them, ends where that of any agent does
    assert out["next", "agents", "team"][:, 0].tolist() == [2, 2, 3, 5]
    assert out["next", "done"].equal(rollout["next", "done"][:4])


def test_agents_and_done_at_the_end_of_the_window():
    rollout = agents([[1.0, 1.0]] * 5, [[F, F], [T, F], [F, T], [F, F], [F, F]])
    out = MultiStepTransform(2, 0.5, **AGENTS, done_at="end", match_reward_shape=True).inv(rollout)
    assert out["next", "agents", "done"].squeeze(-1).tolist() == [[T, F], [T, T], [F, T]]
    assert out["next", "agents", "done_orig"].squeeze(-1).tolist() == [[F, F], [T, F], [F, T]]
    assert out["next", "done_orig"].flatten().tolist() == [F, F, F]
    assert out["steps_to_next_obs"].shape == out["next", "agents", "reward"].shape


def test_agents_with_a_mask_and_trajectory_ids_between_calls():
    transform = MultiStepTransform(2, 0.5, **AGENTS, traj_key="traj")
    rollout = agents([[1.0, 10.0]] * 7, [[F, F]] * 7)
    rollout["mask"] = torch.tensor([T, T, F, T, T, T, T])
    rollout["traj"] = torch.tensor([1, 1, 1, 1, 2, 2, 2])
    out = torch.cat([out for out in map(transform.inv, rollout.split(1)) if out is not None])
    assert out["steps_to_next_obs"][..., 0].tolist() == [[2, 2], [1, 1], [1, 1], [1, 1], [2, 2]]
    assert out["next", "agents", "reward"][..., 0].tolist() == [[1.5, 15], [1, 10], [1, 10], [1, 10], [1.5, 15]]


def test_several_rewards_of_agents_and_of_all_with_one_done():
    rollout = agents([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0], [8.0, 80.0]], [[F, F], [T, T], [F, F], [F, F]])
    rollout["next", "reward"] = torch.tensor([1.0, 2.0, 4.0, 8.0])
    rollout["next", "agents", "cost"] = torch.tensor([[[3.0, 5.0]] * 2] * 4)
    keys = [("agents", "reward"), "reward", ("agents", "cost")]
    out = MultiStepTransform(2, 0.5, reward_keys=keys, match_reward_shape=True).inv(rollout)
    assert out["next", "agents", "reward"][..., 0].tolist() == [[2.0, 20.0], [2.0, 20.0]]
    assert out["next", "reward"].tolist() == [2.0, 2.0]
    assert out["next", "agents", "cost"].tolist() == [[[4.5, 7.5]] * 2, [[3.0, 5.0]] * 2]
    assert out["next", "agents", "cost_orig"].equal(rollout["next", "agents", "cost"][:2])
    assert out["next", "reward_orig"].tolist() == [1.0, 2.0]
    assert ("next", "original_reward") not in out.keys(True)
    assert out["steps_to_next_obs"].shape == (2, 2, 1)
    # and with a done flag for every agent, while what is no agent's ends with the flag beside it
    keys = {**AGENTS, "reward_keys": keys}
    rollout["next", "agents", "done"][1, 1] = F
    out = MultiStepTransform(2, 0.5, **keys).inv(rollout)
    assert out["next", "agents", "reward"][..., 0].tolist() == [[2.0, 20.0], [2.0, 40.0]]
    assert out["next", "reward"].tolist() == [2.0, 2.0]
    assert out["next", "agents", "cost"].tolist() == [[[4.5, 7.5]] * 2, [[3.0, 5.0], [4.5, 7.5]]]


def test_a_done_key_that_names_a_group():
    rollout = frames([1.0] * 5, [F] * 5)
    rollout["next", "flags"] = {"late": torch.arange(5), "deep": {"er": torch.arange(5)}}
    out = MultiStepTransform(2, 0.5, done_keys=["flags"]).inv(rollout)["next"]
    assert out["flags", "late"].tolist() == out["flags", "deep", "er"].tolist() == [0, 1, 2]
    assert out["observation"].tolist() == [2, 3, 4]
