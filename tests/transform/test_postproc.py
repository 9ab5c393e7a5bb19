"""MultiStep, the postproc: every rollout for itself, nothing held back."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts import assert_returns, frames, make_rollout, window_ends
from streams import frame_bytes, streams, take
from tensordict import TensorDict, lazy_stack, tensorclass
from torchrl.data.postprocs import MultiStep as TorchRLMultiStep
from torchrl.envs import SerialEnv
from torchrl.testing.mocking_classes import CountingEnv

from multistep_triton import MultiStep, MultiStepTransform

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torchrl's own, on import
    from torchrl.collectors import Collector

pytestmark = pytest.mark.usefixtures("path")

F, T = False, True


def test_by_hand():
    out = MultiStep(0.5, 2)(frames([1.0, 2.0, 4.0, 8.0, 16.0], [F, F, T, F, F]))
    assert out.batch_size == (5,)
    assert out["observation"].tolist() == [0, 1, 2, 3, 4]
    assert out["next", "observation"].tolist() == [2, 3, 3, 5, 5]
    assert out["next", "reward"].flatten().tolist() == [2.0, 4.0, 4.0, 16.0, 16.0]
    assert out["next", "original_reward"].flatten().tolist() == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert out["next", "original_reward"] is out["next", "reward_orig"]
    assert out["steps_to_next_obs"].tolist() == [2, 2, 1, 2, 1]
    assert out["gamma"].tolist() == [0.25, 0.25, 0.5, 0.25, 0.5]
    assert out["nonterminal"].tolist() == [T, T, F, T, F]


def test_the_mask_ends_windows():
    mask = torch.tensor([T, T, F, T, T])
    out = MultiStep(0.5, 3)(frames([1.0, 2.0, 100.0, 4.0, 8.0], [F] * 5, collector={"mask": mask}))
    assert out["next", "reward"].flatten().tolist() == [2.0, 2.0, 100.0, 8.0, 8.0]
    assert out["nonterminal"].tolist() == [T, F, F, T, F]
    out = MultiStep(0.5, 3, mask_key="other")(frames([1.0, 2.0, 100.0], [F] * 3, collector={"mask": mask[:3]}))
    assert out["next", "reward"].flatten().tolist() == [27.0, 52.0, 100.0]


def test_what_does_not_change_passes_through():
    rollout = make_rollout((2,), 20)
    before = rollout.clone()
    out = MultiStep(0.9, 3)(rollout)
    assert (rollout == before).all()
    for key in ("observation", "action", ("next", "done"), ("next", "terminated"), ("next", "truncated")):
        assert out[key] is rollout[key], key
    assert out["next", "reward_orig"] is rollout["next", "reward"]
    given = {leaf.untyped_storage().data_ptr() for leaf in rollout.values(True, True)}
    for key in ("steps_to_next_obs", "gamma", "nonterminal", ("next", "reward"), ("next", "observation")):
        assert out[key].untyped_storage().data_ptr() not in given, key


@pytest.mark.parametrize("n_steps", [2, 3, 7, 50])
@pytest.mark.parametrize("batch", [(), (2,), (3, 2)], ids=str)
def test_as_torchrls(batch, n_steps):
    rollout = make_rollout(batch, 40, seed=n_steps)
    ours, theirs = MultiStep(0.95, n_steps)(rollout), TorchRLMultiStep(0.95, n_steps)(rollout)
    assert set(ours.keys(True, True)) == set(theirs.keys(True, True)) | {("next", "reward_orig")}
    assert ours.batch_size == theirs.batch_size
    ends = window_ends(rollout["next", "done"].squeeze(-1), n_steps)
    assert_returns(ours["next", "reward"], rollout["next", "reward"], ends, 0.95, n_steps)
    for key in theirs.keys(True, True):
        if key in ("gamma", ("next", "reward")):
            torch.testing.assert_close(ours[key], theirs[key])
        else:
            assert torch.equal(ours[key], theirs[key]), key


@given(streams())
@settings(max_examples=20)
def test_is_the_loop(stream):
    rollout, _, n_steps, gamma = stream
    out = MultiStep(gamma, n_steps, mask_key="mask")(rollout)
    done, mask = rollout["next", "done"].reshape(rollout.batch_size), rollout.get("mask")
    ends = window_ends(done, n_steps, mask)
    assert_returns(out["next", "reward"], rollout["next", "reward"], ends, gamma, n_steps)
    assert torch.equal(frame_bytes(out["next", "value"]), frame_bytes(take(rollout["next", "value"], ends)))
    assert torch.equal(out["steps_to_next_obs"], ends - torch.arange(rollout.shape[-1]) + 1)
    boundary = done.clone()
    if mask is not None:
        boundary |= ~mask
        boundary[..., :-1] |= ~mask[..., 1:]
    boundary[..., max(rollout.shape[-1] - 1, 0) :] = True
    assert torch.equal(out["nonterminal"], ~boundary)


@given(st.integers(1, 9), st.integers(1, 30))
@settings(max_examples=10)
def test_where_windows_are_whole_it_is_the_transform(n_steps, count):
    rollout = make_rollout((2,), count, seed=count)
    whole, held = MultiStep(0.9, n_steps)(rollout), MultiStepTransform(n_steps, 0.9).inv(rollout)
    assert (held is None) == (count <= n_steps)
    if held is not None:
        assert set(whole.keys(True, True)) == set(held.keys(True, True))
        for key in held.keys(True, True):
            assert torch.equal(whole[key][:, : count - n_steps], held[key]), key


def test_calls_do_not_depend_on_each_other():
    rollout = make_rollout((2,), 20)
    postproc = MultiStep(0.9, 3)
    first = postproc(rollout[:, :10])
    second = postproc(rollout[:, 10:])
    again = postproc(rollout[:, :10])
    assert (first == again).all()
    assert second.batch_size == (2, 10)


def test_lazy_stacks_tensorclasses_and_non_tensors():
    @tensorclass
    class Pose:
        position: torch.Tensor

    rollout = make_rollout((2,), 20)
    rollout["next", "pose"] = Pose(position=torch.arange(40.0).view(2, 20), batch_size=[2, 20])
    rollout["task"] = "walk"
    expected = MultiStep(0.9, 3)(rollout)
    assert isinstance(expected["next", "pose"], Pose)
    assert expected["task"] == "walk"
    lazy = MultiStep(0.9, 3)(lazy_stack(list(rollout.unbind(0)), 0))
    for key in expected.keys(True, True):
        if key != "task":
            assert torch.equal(lazy[key], expected[key]), key


def test_the_state_of_torchrls_class_is_loaded_if_it_is_of_the_same_arguments():
    saved = torch.nn.Sequential(TorchRLMultiStep(0.9, 3)).state_dict()
    assert list(saved) == ["0.gammas"]
    for kept in (saved, torch.nn.Sequential(TorchRLMultiStep(0.9, 3)).double().state_dict()):
        torch.nn.Sequential(MultiStep(0.9, 3)).load_state_dict(kept)
    MultiStep(1, 3).load_state_dict(TorchRLMultiStep(1, 3).state_dict())
    for gamma, n_steps in ((0.8, 3), (0.9, 2)):
        with pytest.raises(ValueError, match=f"must be those of the module that was saved, .+ got n_steps={n_steps} "):
            torch.nn.Sequential(MultiStep(gamma, n_steps)).load_state_dict(saved)


def test_arguments_can_be_set():
    postproc = MultiStep(0.9, 3)
    assert (postproc.gamma, postproc.n_steps, postproc.mask_key) == (0.9, 3, ("collector", "mask"))
    postproc.n_steps, postproc.gamma = 1, 0.5
    out = postproc(frames([1.0, 2.0], [F, F]))
    assert out["next", "reward"].flatten().tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="n_steps must be an int >= 1, got 0"):
        postproc.n_steps = 0
    with pytest.raises(ValueError, match=r"gamma must be a finite number in \[0, 1\], got 2"):
        MultiStep(2, 3)


@pytest.mark.parametrize(
    ("data", "got"),
    [(TensorDict({"observation": 1}, []), r"batch size \[\]"), ([1.0], r"\[1.0\]")],
    ids=["no time", "a list"],
)
def test_data_without_time_is_refused(data, got):
    with pytest.raises(ValueError, match=rf"data must be a TensorDict of batch size \[\*B, T\], got {got}"):
        MultiStep(0.9, 3)(data)


def collected(postproc, split_trajs):
    collector = Collector(
        SerialEnv(2, lambda: CountingEnv(max_steps=5)),
        None,
        frames_per_batch=40,
        total_frames=80,
        postproc=postproc,
        split_trajs=split_trajs,
        device=torch.get_default_device(),
    )
    batches = list(collector)
    collector.shutdown()
    return batches


@pytest.mark.filterwarnings("ignore:split_trajs=True:UserWarning")
@pytest.mark.parametrize("split_trajs", [False, True])
def test_in_a_collector(split_trajs):
    torch.manual_seed(0)
    ours = collected(MultiStep(0.9, 3), split_trajs)
    torch.manual_seed(0)
    theirs = collected(TorchRLMultiStep(0.9, 3), split_trajs)
    assert len(ours) == len(theirs) == 2
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.batch_size == other.batch_size
        valid = mine["collector", "mask"] if split_trajs else torch.ones(mine.batch_size, dtype=torch.bool)
        # torchrl's windows go on from a trajectory that was cut into the padding after it
        astray = valid & (other["steps_to_next_obs"] > mine["steps_to_next_obs"])
        assert astray.any() == split_trajs
        for key in (("next", "observation"), "observation", "steps_to_next_obs", ("next", "reward")):
            torch.testing.assert_close(mine[key][valid & ~astray], other[key][valid & ~astray])
        assert (other["next", "observation"][astray] == 0).all()
