"""Targets that bootstrap, with torchrl's own value estimators and losses."""

from unittest.mock import patch

import pytest
import torch
from rollouts import make_rollout
from targets import (
    ATOMS,
    GAMMA,
    Constant,
    assert_every_frame_has_its_own_discount,
    distributional_loss,
    row,
    td0_targets,
)
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch.distributions import Categorical
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs.transforms import MultiStepTransform as TorchRLMultiStepTransform
from torchrl.envs.transforms import RenameTransform
from torchrl.modules import ProbabilisticActor, QValueActor, TanhNormal, ValueOperator
from torchrl.objectives import DiscreteIQLLoss, DQNLoss, IQLLoss, REDQLoss

from multistep_triton import MultiStepTransform, NStepReplayBuffer


def stored(transform, data):
    """What a replay buffer holds after it was extended with ``data``."""
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(1000, ndim=data.ndim), transform=transform)
    buffer.extend(data)
    return buffer[:]


@pytest.mark.parametrize("match", [False, True])
def test_td0_target_before_a_termination(match):
    data = row(12, terminated=[4])
    ours = stored(MultiStepTransform(3, GAMMA, done_at="end", match_reward_shape=match), data)
    # 1 + .9 + .81, 1 + .9, 1: nothing is left to bootstrap from; before and after, 2.71 + .729 * 100
    targets = torch.tensor([75.61, 75.61, 2.71, 1.9, 1.0, 75.61, 75.61, 75.61, 75.61])
    torch.testing.assert_close(td0_targets(ours).flatten(), targets)
    theirs = stored(TorchRLMultiStepTransform(3, GAMMA), data)
    torch.testing.assert_close(td0_targets(theirs).flatten()[2:5], torch.tensor([75.61, 82.9, 1.0]))
    start = stored(MultiStepTransform(3, GAMMA), data)
    torch.testing.assert_close(td0_targets(start), td0_targets(theirs))


def test_td0_target_before_a_truncation_bootstraps():
    ours = stored(MultiStepTransform(3, GAMMA, done_at="end"), row(12, truncated=[4]))
    # 1 + .9 + .81 + .729 * 100, 1 + .9 + .81 * 100, 1 + .9 * 100
    targets = torch.tensor([75.61, 75.61, 75.61, 82.9, 91.0, 75.61, 75.61, 75.61, 75.61])
    torch.testing.assert_close(td0_targets(ours).flatten(), targets)
    assert ours["next", "truncated"].flatten().tolist() == [False, False, True, True, True, *[False] * 4]


def test_dqn_target_before_a_termination():
    network = TensorDictModule(Constant(2), in_keys=["observation"], out_keys=["action_value"])
    actor = QValueActor(network, spec=None, action_space="categorical")
    loss = DQNLoss(actor, action_space="categorical", delay_value=False)
    loss.make_value_estimator(gamma=GAMMA)
    data = row(12, terminated=[4]).set("action", torch.zeros(12, dtype=torch.int64))
    ours = stored(MultiStepTransform(3, GAMMA, done_at="end"), data)
    loss(ours)
    targets = torch.tensor([75.61, 75.61, 2.71, 1.9, 1.0, 75.61, 75.61, 75.61, 75.61])
    torch.testing.assert_close(ours["td_error"].flatten(), (targets - 100) ** 2)


@pytest.mark.parametrize("frames", [ATOMS, 30], ids=["as many frames as atoms", "more"])
def test_distributional_dqn_runs_and_is_right(frames):
    data = make_rollout((), frames + 3)
    data["action"] = data["action"] % 2
    ours = stored(MultiStepTransform(3, GAMMA, match_reward_shape=True), data)
    assert ours.batch_size == (frames,)
    loss = distributional_loss()
    value = loss(ours)["loss"]
    assert value.isfinite()
    assert_every_frame_has_its_own_discount(loss, ours)
    theirs = stored(TorchRLMultiStepTransform(3, GAMMA), data)
    if frames == ATOMS:
        # the discount of another frame for every atom, and no error
        assert not torch.isclose(loss(theirs)["loss"], value)
    else:
        with pytest.raises(RuntimeError, match="must match the size"):
            loss(theirs)


def agents_rollout(batch, frames, count):
    data = make_rollout((*batch, count), frames).auto_batch_size_(len(batch) + 2)
    group = data.select("observation", "next").transpose(-1, -2).clone()
    group.batch_size = (*batch, frames)
    shared = make_rollout(batch, frames, seed=1)["next"].select("done", "terminated", "truncated")
    return TensorDict(
        {
            "agents": {"observation": group["observation"]},
            "next": {
                "agents": {"observation": group["next", "observation"], "reward": group["next", "reward"]},
                **shared.to_dict(),
            },
        },
        (*batch, frames),
    )


AGENT_KEYS = {"observation": ("agents", "observation"), "reward": ("agents", "reward"), "value": ("agents", "value")}


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_td0_with_rewards_of_agents_runs_and_is_right(batch):
    data = agents_rollout(batch, 20, 4)
    assert data["next", "agents", "reward"].shape == (*batch, 20, 4, 1)
    keys = {"reward_keys": [("agents", "reward")]}
    for name in ("done", "terminated"):
        data["next", "agents", name] = data["next", name].unsqueeze(-1).expand(*batch, 20, 4, 1).clone()
    done = {"done": ("agents", "done"), "terminated": ("agents", "terminated")}
    dones = ["done", "terminated", "truncated", *done.values()]
    ours = stored(MultiStepTransform(3, GAMMA, **keys, done_keys=dones, done_at="end", match_reward_shape=True), data)
    reward, ends = ours["next", "agents", "reward"], ours["next", "terminated"].unsqueeze(-1)
    discount = ours["gamma"]
    assert discount.shape == reward.shape
    expected = reward + torch.where(ends, 0, discount * 100)
    torch.testing.assert_close(td0_targets(ours, **AGENT_KEYS, **done), expected)
    theirs = stored(TorchRLMultiStepTransform(3, GAMMA, **keys, done_keys=dones), data)
    with pytest.raises(RuntimeError, match=r"shape .* is invalid"):
        td0_targets(theirs, **AGENT_KEYS, **done)


def action_of(out_key, kind, **arguments):
    module = TensorDictModule(Constant(4, value=0.0), in_keys=["observation"], out_keys=[out_key])
    parts = module, TensorDictModule(NormalParamExtractor(), in_keys=[out_key], out_keys=["loc", "scale"])
    policy = module if kind is Categorical else TensorDictSequential(*parts)
    keys = ["logits"] if kind is Categorical else ["loc", "scale"]
    return ProbabilisticActor(policy, in_keys=keys, distribution_class=kind, return_log_prob=True, **arguments)


def values(*in_keys):
    return ValueOperator(Constant(1), in_keys=[*in_keys])


def redq():
    # No entropy is left in the target.
    alpha = {"alpha_init": 1e-30, "min_alpha": 1e-35, "fixed_alpha": True}
    critic = values("observation", "action")
    return REDQLoss(action_of("all", TanhNormal), critic, action_spec=Bounded(-1, 1, (2,)), **alpha)


def iql():
    return IQLLoss(action_of("all", TanhNormal), values("observation", "action"), values("observation"))


def discrete_iql():
    critic = TensorDictModule(Constant(4), in_keys=["observation"], out_keys=["state_action_value"])
    actor = action_of("logits", Categorical)
    return DiscreteIQLLoss(actor, critic, values("observation"), action_space="categorical")


@pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")
@pytest.mark.parametrize("make", [redq, iql, discrete_iql])
def test_losses_that_pass_on_what_is_under_next_alone(make):
    data = row(12)
    data["action"] = torch.zeros(12, dtype=torch.int64) if make is discrete_iql else torch.zeros(12, 2)
    targets = []
    for told in (False, True):
        buffer = NStepReplayBuffer(n_steps=3, gamma=GAMMA, storage=LazyTensorStorage(12), batch_size=64)
        buffer.extend(data)
        loss = make()
        loss.make_value_estimator(gamma=GAMMA)
        if told:
            steps = "steps_to_next_obs"
            buffer.append_transform(RenameTransform([steps], [("next", steps)], create_copy=True))
            loss.value_estimator.set_keys(steps_to_next_obs=("next", steps))
        batch = buffer.sample()
        with patch.object(loss.value_estimator, "value_estimate", wraps=loss.value_estimator.value_estimate) as called:
            (loss.qvalue_loss if "IQL" in type(loss).__name__ else loss)(batch[batch["steps_to_next_obs"] == 3])
        (argument,), keywords = called.call_args
        targets.append(loss.value_estimator.value_estimate(argument, **keywords).flatten()[0].item())
    # 1 + .9 + .81 + .9 * 100, and + .729 * 100
    assert targets == pytest.approx([92.71, 75.61])
