"""Nodes for torchrl's Hydra configs: what they build is what the same arguments build by hand."""

import inspect
import warnings
from dataclasses import fields
from pathlib import Path

import fresh
import pytest
import torch
from hydra import compose, initialize, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rollouts import make_rollout
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement, TensorDictReplayBuffer

from multistep_triton import MultiStep, MultiStepTransform, NStepReplayBuffer

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torchrl's own, on import
    from torchrl.trainers.algorithms.configs.data import TensorDictReplayBufferConfig

    from multistep_triton.configs import MultiStepConfig, MultiStepTransformConfig, NStepReplayBufferConfig

ROOT = Path(__file__).parents[2]
KINDS = {
    MultiStepTransform: MultiStepTransformConfig,
    MultiStep: MultiStepConfig,
    NStepReplayBuffer: NStepReplayBufferConfig,
}
# None of them a default; nested keys as in YAML and as they must arrive.
VALUES = {
    "n_steps": (7, 7),
    "gamma": (0.5, 0.5),
    "reward_keys": ([["agents", "reward"], "bonus"], [("agents", "reward"), "bonus"]),
    "done_key": (["agents", "done"], ("agents", "done")),
    "done_keys": (["done", ["agents", "done"]], ["done", ("agents", "done")]),
    "mask_key": (["info", "valid"], ("info", "valid")),
    "backend": ("reference", "reference"),
    "done_at": ({"start": "end", "end": "start"}, {"start": "end", "end": "start"}),
    "traj_key": (["collector", "traj_ids"], ("collector", "traj_ids")),
    "match_reward_shape": (True, True),
}


def composed(*overrides):
    with initialize(version_base=None):
        return compose(overrides=list(overrides))


def arguments(kind):
    """Name and default of the arguments of our own."""
    _, *parameters = inspect.signature(kind.__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD}


def assert_equal(one, other):
    assert set(one.keys(True, True)) == set(other.keys(True, True))
    assert (one == other).all()


def test_torchrls_own_node_cannot_be_built():
    with pytest.raises(InstantiationException) as raised:
        instantiate(composed("+transform=multi_step").transform)
    assert isinstance(raised.value.__cause__, TypeError)
    assert "unexpected keyword argument 'in_keys'" in str(raised.value.__cause__)


@pytest.mark.parametrize("kind", KINDS)
def test_every_argument_has_a_field_with_its_default(kind):
    own = {field.name: field.default for field in fields(KINDS[kind]) if field.name != "_target_"}
    if kind is NStepReplayBuffer:
        for field in fields(TensorDictReplayBufferConfig):
            own.pop(field.name, None)
    required = {name for name, default in arguments(kind).items() if default is inspect.Parameter.empty}
    assert required == {"n_steps", "gamma"}
    assert own == {**arguments(kind), "n_steps": 3, "gamma": 0.99}


@pytest.mark.parametrize("kind", KINDS)
def test_every_argument_arrives(kind):
    default = arguments(kind)["done_at"]
    values = {**VALUES, "done_at": [each[default] for each in VALUES["done_at"]]}
    if kind is NStepReplayBuffer:
        asked = ["gamma", ["next", "reward"]], ["gamma", ("next", "reward")]
        kept = ["observation", ["agents", "state"]], ["observation", ("agents", "state")]
        values.update(outputs=asked, capturable=(True, True), compact=kept, end_slots=(2, 2))
        values["store_as"] = {"observation": "bfloat16"}, {"observation": torch.bfloat16}
    assert values.keys() == arguments(kind).keys()
    node = OmegaConf.structured(KINDS[kind](**{name: given for name, (given, _) in values.items()}))
    if kind is NStepReplayBuffer:
        node.storage = {"_target_": "torchrl.data.LazyTensorStorage", "max_size": 8}
    built = instantiate(OmegaConf.create(OmegaConf.to_yaml(node)))
    assert type(built) is kind
    assert {name: getattr(built, name) for name in values} == {name: arrives for name, (_, arrives) in values.items()}


@pytest.mark.parametrize(("given", "arrives"), [("score", ["score"]), (["score", "cost"], ["score", "cost"])])
def test_flat_reward_keys(given, arrives):
    assert instantiate(OmegaConf.structured(MultiStepTransformConfig(reward_keys=given))).reward_keys == arrives


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("n_steps", 0, ValueError("n_steps must be an int >= 1, got 0")),
        ("gamma", 1.5, ValueError("gamma must be a finite number in [0, 1], got 1.5")),
        ("done_at", "middle", ValueError("done_at must be one of 'start', 'end', got 'middle'")),
        ("backend", "cuda", ValueError("backend must be one of ")),
        ("traj_key", 3, TypeError("traj_key must be a key, a string or a tuple of strings, got 3")),
        ("done_key", ["done", 3], TypeError("done_key must be a key, a string or a tuple of strings, got ('done', 3)")),
        ("reward_keys", 3, TypeError("reward_keys must be a sequence of keys, got 3")),
    ],
)
def test_wrong_values_are_refused_by_the_class(name, value, error):
    config = composed("+transform=multi_step_triton")
    config.transform[name] = value
    with pytest.raises(InstantiationException) as raised:
        instantiate(config.transform)
    assert type(raised.value.__cause__) is type(error)
    assert str(raised.value.__cause__).startswith(str(error))


@pytest.mark.parametrize(("name", "kind"), [("base", ReplayBuffer), ("tensordict", TensorDictReplayBuffer)])
def test_stored_frames_are_those_of_a_transform_made_by_hand(name, kind):
    config = composed(
        f"+replay_buffer={name}",
        "+storage@replay_buffer.storage=lazy_tensor",
        "replay_buffer.storage.max_size=80",
        "replay_buffer.storage.ndim=2",
        "+transform@replay_buffer.transform=multi_step_triton",
        "replay_buffer.transform.n_steps=4",
        "replay_buffer.transform.done_at=end",
        "replay_buffer.transform.reward_keys=[reward, [agents, reward]]",
        "replay_buffer.transform.traj_key=[collector, traj_ids]",
    )
    rb = instantiate(config.replay_buffer)
    keys = {"reward_keys": ["reward", ("agents", "reward")], "traj_key": ("collector", "traj_ids")}
    transform = MultiStepTransform(4, 0.99, done_at="end", **keys)
    expected = kind(storage=LazyTensorStorage(80, ndim=2), transform=transform)
    rollout = make_rollout((2,), 40)
    rollout["next", "agents", "reward"] = torch.randn(2, 40, 3)
    rollout["collector", "traj_ids"] = (torch.arange(80) // 7).view(2, 40)
    for part in rollout.split([17, 2, 21], -1):
        rb.extend(part)
        expected.extend(part)
    assert len(rb) == 2 * (40 - 4)
    assert_equal(rb[:], expected[:])


def test_the_config_in_the_documentation(tmp_path):
    text = (ROOT / "docs" / "hydra.md").read_text().split("<!-- config: hydra -->\n```yaml\n")[1].split("```")[0]
    (tmp_path / "config.yaml").write_text(text)
    with initialize_config_dir(str(tmp_path), version_base=None):
        rb = instantiate(compose("config").replay_buffer)
    (transform,) = rb.transform
    assert type(rb) is ReplayBuffer
    assert type(transform) is MultiStepTransform
    assert (transform.n_steps, transform.gamma, transform.traj_key) == (3, 0.99, "auto")


def test_torchrls_name_builds_ours_when_stored_so(monkeypatch):
    store = ConfigStore.instance()
    monkeypatch.setitem(store.repo, "transform", dict(store.repo["transform"]))
    store.store(group="transform", name="multi_step", node=MultiStepTransformConfig)
    assert type(instantiate(composed("+transform=multi_step", "transform.n_steps=2").transform)) is MultiStepTransform


def test_a_sampled_batch_is_that_of_a_buffer_made_by_hand():
    config = composed(
        "+replay_buffer=n_step_triton",
        "+storage@replay_buffer.storage=lazy_tensor",
        "replay_buffer.storage.max_size=80",
        "replay_buffer.storage.ndim=2",
        "+sampler@replay_buffer.sampler=without_replacement",
        "replay_buffer.sampler.shuffle=false",
        "replay_buffer.batch_size=80",
    )
    rb = instantiate(config.replay_buffer)
    storage, sampler = LazyTensorStorage(80, ndim=2), SamplerWithoutReplacement(shuffle=False)
    expected = NStepReplayBuffer(n_steps=3, gamma=0.99, storage=storage, sampler=sampler, batch_size=80)
    for part in make_rollout((2,), 40).split([17, 2, 21], -1):
        rb.extend(part)
        expected.extend(part)
    assert_equal(rb.sample(), expected.sample())


def test_the_postproc_of_a_collector():
    collector = [
        "+collector=sync",
        "+env@collector.create_env_fn=gym",
        "collector.create_env_fn.env_name=CartPole-v1",
        "collector.frames_per_batch=60",
        "collector.total_frames=60",
        "collector.reset_at_each_iter=true",  # once it is seeded
    ]
    batches = []
    for postproc in ([], ["+postproc@collector.postproc=multi_step_triton", "collector.postproc.n_steps=4"]):
        made = instantiate(composed(*collector, *postproc).collector)
        made.set_seed(0)
        torch.manual_seed(0)
        batches += list(made)
        made.shutdown()
    steps, n_steps = batches
    assert_equal(n_steps, MultiStep(0.99, 4)(steps))


TRAINER = {
    "env": """
        +env@env=batched_env env.num_workers=2 env.batched_env_type=serial
        +env@env.create_env_fn=gym env.create_env_fn.env_name=CartPole-v1 ++env.create_env_fn._partial_=true
    """,
    "network": """
        +network@network=mlp network.in_features=4 network.out_features=2 +network.num_cells=[8]
        +model@model=qvalue model.in_keys=[observation] model.action_space=one-hot model.network=${network}
    """,
    "collector": """
        +collector@collector=sync collector.create_env_fn=${env} collector.policy=${model}
        collector.frames_per_batch=40 collector.total_frames=200 collector.auto_register_policy_transforms=true
        collector._partial_=true
    """,
    "replay buffer": """
        +replay_buffer@replay_buffer=base replay_buffer.batch_size=16
        +storage@replay_buffer.storage=lazy_tensor replay_buffer.storage.max_size=200
        +transform@replay_buffer.transform=multi_step_triton replay_buffer.transform.traj_key=[collector,traj_ids]
        replay_buffer.transform.done_keys=[done,terminated]
    """,
    "loss": """
        +loss@loss=dqn loss.value_network=${model} loss.action_space=one-hot loss.gamma=0.99
        +target_net_updater@target_net_updater=hard +optimizer@optimizer=adam
    """,
    "trainer": """
        +trainer@trainer=dqn trainer.collector=${collector} trainer.value_network=${model} trainer.loss_module=${loss}
        trainer.replay_buffer=${replay_buffer} trainer.target_net_updater=${target_net_updater}
        trainer.optimizer=${optimizer} trainer.total_frames=200 trainer.optim_steps_per_batch=2 trainer.clip_norm=10.0
        trainer.seed=0 trainer.logger=null trainer.enable_logging=false trainer.save_trainer_file=null
        trainer.progress_bar=false
    """,
}


@pytest.mark.filterwarnings("ignore:DQNTrainer is an experimental:UserWarning")
@pytest.mark.filterwarnings("ignore:The '.*' hook stage will be replaced:FutureWarning")
def test_torchrls_dqn_trainer(monkeypatch):
    trainer = instantiate(composed(*" ".join(TRAINER.values()).split()).trainer)
    rb, extended = trainer.replay_buffer, []

    def extend(data, *arguments, **options):
        extended.append(data.clone())
        return ReplayBuffer.extend(rb, data, *arguments, **options)

    monkeypatch.setattr(rb, "extend", extend)
    trainer.train()
    # The trainer makes one row of both environments' frames, which ids keep apart.
    assert [data.batch_size for data in extended] == [(40,)] * 5
    transform = MultiStepTransform(3, 0.99, done_keys=["done", "terminated"])
    expected = ReplayBuffer(storage=LazyTensorStorage(200), transform=transform)
    for data in extended:
        expected.extend(data)
    assert len(rb) == 200 - 3
    assert_equal(rb[:], expected[:])
    assert (rb[:]["steps_to_next_obs"] == 3).sum() > 100


def test_hydra_is_imported_with_the_configs_alone_and_missed_by_name():
    script = """
import sys

import multistep_triton

hydra = {"hydra", "omegaconf", "multistep_triton.configs"}
print(sorted(hydra & sys.modules.keys()))
sys.modules["hydra"] = None
try:
    import multistep_triton.configs
except ImportError as error:
    print(error)
"""
    run = fresh.run(script)
    assert not run.returncode, run.stderr
    assert run.stdout.splitlines() == [
        "[]",
        'multistep_triton.configs needs hydra-core: pip install "multistep_triton[hydra]"',
    ]
