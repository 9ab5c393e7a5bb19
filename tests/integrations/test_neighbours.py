"""What shares a replay buffer with n-step transitions: right, or refused with what to do instead."""

import re
import warnings
from importlib.util import find_spec
from pathlib import Path

import neighbours
import pytest
import torch
import torchrl.data.replay_buffers as replay_buffers
import torchrl.envs.transforms as T
from neighbours import (
    ARGUMENTS,
    FRAMES,
    INVERTED,
    LEAVE_OUT,
    NOT_HERE,
    PLAIN,
    RAISE,
    REFUSED,
    REFUSED_WITH_FLAGS_AT_THE_END,
    RIGHT,
    RIGHT_WITH_FLAGS_AT_THE_END,
    SENSELESS,
    difference,
    make_data,
    name_of,
    of_buffer,
    of_single_steps,
    of_transform,
    wanted,
)
from rollouts import make_rollout
from tensordict import TensorDict, lazy_stack
from torchrl.data import (
    FlatStorageCheckpointer,
    HERReplayBuffer,
    LazyTensorStorage,
    OfflineToOnlineReplayBuffer,
    ReplayBuffer,
    ReplayBufferEnsemble,
    TensorDictReplayBuffer,
    prefill_replay_buffer,
)
from torchrl.data.replay_buffers import Sequence
from torchrl.data.replay_buffers.samplers import (
    Sampler,
    SliceSampler,
    SliceSamplerWithoutReplacement,
    StreamingSliceSampler,
)
from torchrl.envs.transforms import Compose, Transform

from multistep_triton import MultiStepTransform, NStepReplayBuffer
from multistep_triton import neighbours as checks

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torchrl's own weight updaters
    from torchrl.trainers import ReplayBufferTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:include_info is going to be deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:(The VecNorm|This) class is to be deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The last dimension of the tensordict should be marked as 'time':UserWarning"),
]

CLASSES = {"MultiStepTransform": of_transform, "NStepReplayBuffer": of_buffer}
beside = pytest.mark.parametrize("of", CLASSES.values(), ids=CLASSES)
at = pytest.mark.parametrize("done_at", ["start", "end"])
MESSAGE = "transform must leave rewards and the entries under 'next' to the windows, got {}, which .+: .+"


def compared(of, label, make, done_at, plain=None, **arguments):
    """How what is sampled differs from n-step transitions of what the transform makes of single steps."""
    data, own = make_data(text=label == "Tokenizer"), ARGUMENTS.get(label, {})
    expected = wanted(data, plain or make, done_at, **own, **arguments)
    return difference(of(data, make, done_at, **own, **arguments), expected)


@at
@beside
@pytest.mark.parametrize("label", RIGHT)
def test_right_as_it_is(label, of, done_at):
    assert compared(of, label, RIGHT[label], done_at) is None


@at
@beside
@pytest.mark.parametrize("label", REFUSED)
def test_refused_and_wrong_otherwise(label, of, done_at, monkeypatch):
    message = MESSAGE.format(f"({name_of(label)}|MultiStepTransform)")
    with pytest.raises(ValueError, match=message):
        compared(of, label, REFUSED[label], done_at)
    monkeypatch.setattr(checks, "_find_fault", lambda *arguments: None)
    assert compared(of, label, REFUSED[label], done_at) is not None


@beside
@pytest.mark.parametrize("label", [*REFUSED_WITH_FLAGS_AT_THE_END, *RIGHT_WITH_FLAGS_AT_THE_END])
def test_what_reads_done_flags(label, of, monkeypatch):
    make = {**REFUSED_WITH_FLAGS_AT_THE_END, **RIGHT_WITH_FLAGS_AT_THE_END}[label]
    if label in RIGHT_WITH_FLAGS_AT_THE_END:
        assert compared(of, label, make, "end", PLAIN[label]) is None
        with pytest.raises((ValueError, KeyError), match="done"):
            compared(of, label, make, "start", PLAIN[label])
        return
    assert compared(of, label, make, "start") is None
    with pytest.raises(ValueError, match=MESSAGE.format(name_of(label)) + "'done_orig'"):
        compared(of, label, make, "end")
    monkeypatch.setattr(checks, "_find_fault", lambda *arguments: None)
    assert compared(of, label, make, "end") is not None


@at
@beside
@pytest.mark.parametrize("label", SENSELESS)
def test_refused_as_it_has_no_sense(label, of, done_at):
    with pytest.raises(ValueError, match=MESSAGE.format(name_of(label))):
        of(make_data(), SENSELESS[label], done_at)


@at
@beside
def test_n_step_transitions_of_samples_have_no_sense(of, done_at):
    for make in (SENSELESS["MultiStepTransform"], lambda: Compose(SENSELESS["MultiStepTransform"]())):
        with pytest.raises(
            ValueError, match=r"got the inverse of .+ makes n-step transitions .+ leave one of the two out"
        ):
            of(make_data(), make, done_at, invert=True)


@beside
def test_windows_would_go_over_frames_that_are_dropped(of, monkeypatch):
    monkeypatch.setattr(checks, "_find_fault", lambda *arguments: None)
    data = make_data()
    got, expected = of(data, SENSELESS["PolicyAgeFilter"], "end"), wanted(data, None, "end")
    assert difference(got, expected[got["number"]]) is not None


@at
@beside
@pytest.mark.parametrize("label", INVERTED)
def test_right_when_the_buffer_is_extended(label, of, done_at):
    assert compared(of, label, INVERTED[label], done_at, invert=True) is None


@at
@beside
@pytest.mark.parametrize("label", LEAVE_OUT)
def test_right_in_what_is_left(label, of, done_at):
    data = make_data()
    got, expected = of(data, LEAVE_OUT[label], done_at), wanted(data, None, done_at)
    assert 0 < len(got) < FRAMES
    expected = expected[got["number"]]
    assert difference(got.select(*expected.keys(True, True)), expected) is None


@pytest.mark.parametrize("label", RAISE)
def test_raises_in_any_buffer(label):
    with pytest.raises(Exception):  # noqa: B017  # each its own, some without a message
        of_single_steps(make_data(), RAISE[label])


@pytest.mark.parametrize("label", NOT_HERE)
def test_needs_what_is_not_here(label):
    needed, make = NOT_HERE[label]
    if torch.cuda.is_available() if needed == "an accelerator" else find_spec(needed):
        pytest.skip(f"{needed} is here, on a machine that the table is not of")
    with pytest.raises((ImportError, RuntimeError)):
        of_single_steps(make_data(), make)


def test_a_transform_in_the_list_before_ours_runs_after_it():
    ours = MultiStepTransform(3, 0.9)
    for first in (RIGHT["ClipTransform: a reward, inverse"](), RIGHT["CatFrames: as_inverse"]()):
        buffer = ReplayBuffer(storage=LazyTensorStorage(FRAMES), transform=Compose(first, ours.clone()))
        with pytest.raises(ValueError, match=r"MultiStepTransform must be the first in the list, got .+ before it"):
            buffer.extend(make_data())
        assert not len(buffer)
    right = ReplayBuffer(storage=LazyTensorStorage(FRAMES), transform=Compose(RIGHT["RewardScaling"](), ours))
    right.extend(make_data())


def test_a_transform_that_is_appended_or_changed_later_is_seen():
    ours, scaling = MultiStepTransform(3, 0.9), RIGHT["RewardScaling"]()
    stored = ReplayBuffer(storage=LazyTensorStorage(100), transform=ours)
    sampled = NStepReplayBuffer(n_steps=3, gamma=0.9, storage=LazyTensorStorage(100), transform=scaling)
    for buffer in (stored, sampled):
        buffer.extend(make_data())
    stored.append_transform(REFUSED["RewardClipping"]())
    with pytest.raises(ValueError, match=MESSAGE.format("RewardClipping")):
        stored.extend(make_data())
    with pytest.raises(ValueError, match=MESSAGE.format("RewardClipping")):
        sampled.append_transform(REFUSED["RewardClipping"]())
    with pytest.raises(ValueError, match=MESSAGE.format("RewardClipping")):
        stored.sample(4)
    # past the buffer
    beyond = NStepReplayBuffer(n_steps=3, gamma=0.9, storage=LazyTensorStorage(100), batch_size=4)
    beyond.extend(make_data())
    beyond.transform.append(REFUSED["RewardClipping"]())
    for use in (beyond.sample, lambda: beyond.extend(make_data())):
        with pytest.raises(ValueError, match=MESSAGE.format("RewardClipping")):
            use()
    # a reward is what the buffer says is one
    sampled.append_transform(neighbours.T.SignTransform(in_keys=[neighbours.COST]))
    sampled.reward_keys = ["cost"]
    with pytest.raises(ValueError, match=MESSAGE.format("SignTransform")):
        sampled.extend(make_data())
    with pytest.raises(ValueError, match=MESSAGE.format("SignTransform")):
        sampled.sample(4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: NStepReplayBuffer(n_steps=3, gamma=0.9, storage=LazyTensorStorage(100), batch_size=4),
        lambda: ReplayBuffer(storage=LazyTensorStorage(100), transform=MultiStepTransform(3, 0.9), batch_size=4),
    ],
    ids=CLASSES,
)
def test_what_is_checked_is_the_object_and_how_it_is_now(make):
    buffer = make()
    buffer.extend(make_data())
    for _ in range(50):
        # The next one may lie where this one did.
        buffer.transform.append(RIGHT["RewardScaling"]())
        buffer.sample()
        buffer.transform.pop()
        buffer.transform.append(REFUSED["RewardClipping"]())
        with pytest.raises(ValueError, match=MESSAGE.format("RewardClipping")):
            buffer.sample()
        buffer.transform.pop()
    scaling, frozen = RIGHT["RewardScaling"](), RIGHT["VecNorm: frozen"]()
    for transform, change in ((scaling, lambda: scaling.loc.fill_(1.0)), (frozen, frozen.unfreeze)):
        buffer.append_transform(transform)
        buffer.sample()
        change()
        with pytest.raises(ValueError, match=MESSAGE.format(type(transform).__name__)):
            buffer.sample()
        buffer.transform.pop()


def test_a_sampler_that_is_changed_is_seen():
    sampler = SliceSampler(slice_len=2, end_key=("next", "done_orig"), truncated_key=None)
    buffer = stored_with(sampler, "end", batch_size=4)
    buffer.sample()
    sampler.truncated_key = ("next", "truncated")
    with pytest.raises(ValueError, match="sampler must leave the done flags alone"):
        buffer.sample()


REWARD_ON_EXTEND = {
    "in_keys": [],
    "out_keys": [],
    "in_keys_inv": [neighbours.REWARD],
    "out_keys_inv": [neighbours.REWARD],
}


@pytest.mark.parametrize("filled", [False, True])
def test_what_is_inverted_runs_on_samples_if_its_inverse_does(filled):
    """``invert=True`` makes of what would run on extend something that runs on samples."""
    buffer = NStepReplayBuffer(n_steps=3, gamma=0.9, storage=LazyTensorStorage(100))
    if filled:
        buffer.extend(make_data())
    message = MESSAGE.format("the inverse of SignTransform").replace(".+: .+", ".+: append it without invert=True")
    with pytest.raises(ValueError, match=message):
        buffer.append_transform(T.SignTransform(**REWARD_ON_EXTEND), invert=True)
        buffer.extend(make_data())


@pytest.mark.parametrize("kind", ["RewardClipping", "NextObservationDelta"])
def test_what_is_inverted_before_ours_runs_on_n_step_transitions(kind):
    buffer = ReplayBuffer(storage=LazyTensorStorage(FRAMES))
    buffer.append_transform(REFUSED[kind](), invert=True)
    buffer.append_transform(MultiStepTransform(3, 0.9))
    with pytest.raises(ValueError, match=f"must be the first in the list, got {kind} before it"):
        buffer.extend(make_data())
    assert not len(buffer)
    right = ReplayBuffer(storage=LazyTensorStorage(FRAMES))
    right.append_transform(RIGHT["RewardScaling"](), invert=True)
    right.append_transform(MultiStepTransform(3, 0.9))
    right.extend(make_data())


def test_how_long_windows_are_may_not_be_dropped_on_the_way():
    drops = T.ExcludeTransform("steps_to_next_obs", inverse=True)
    buffer = ReplayBuffer(storage=LazyTensorStorage(FRAMES), transform=Compose(drops, MultiStepTransform(3, 0.9)))
    with pytest.raises(ValueError, match="must be the first in the list, got ExcludeTransform before it"):
        buffer.extend(make_data())


# Samplers and sample units


def episodes(ids=False):
    """Three episodes of ten frames, which end in turn by a termination and a truncation, and a part of one."""
    t = torch.arange(33).unsqueeze(-1)
    end, never = t % 10 == 9, torch.zeros(33, 1, dtype=torch.bool)
    terminated = end & (t // 10 % 2 == 0)
    next_ = {"reward": torch.ones(33, 1), "done": end, "terminated": terminated, "truncated": end & ~terminated}
    data = TensorDict({"observation": t.float(), "next": {"observation": t + 1.0, **next_}, "done": never}, [33])
    if ids:
        data["collector", "traj_ids"] = (t // 10).squeeze(-1)
    return data


KINDS = {
    "SliceSampler": SliceSampler,
    "StreamingSliceSampler": StreamingSliceSampler,
    "SliceSamplerWithoutReplacement": SliceSamplerWithoutReplacement,
}
slices = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def stored_with(sampler, done_at, ids=False, batch_size=400):
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(40),
        transform=MultiStepTransform(3, 1.0, done_at=done_at),
        sampler=sampler,
        batch_size=batch_size,
    )
    buffer.extend(episodes(ids))
    return buffer


@slices
def test_slices_of_flags_that_were_moved(kind):
    keep = {"slice_len": 4, "strict_length": False}
    with pytest.raises(ValueError, match=r"sampler must leave the done flags alone.+got \w+ with truncated_key=.+None"):
        stored_with(kind(**keep), "end")
    for found_by in ({}, {"end_key": ("next", "done")}, {"end_keys": [("next", "done"), ("next", "terminated")]}):
        with pytest.raises(ValueError, match=r"sampler must find episodes by flags as they came.+'done_orig'\)"):
            stored_with(kind(**keep, truncated_key=None, **found_by), "end")
    right = {"end_key": ("next", "done_orig")}, {"traj_key": ("collector", "traj_ids")}, {}
    for found_by in right:
        buffer = stored_with(
            kind(**keep, truncated_key=None, **found_by), "end", ids=not found_by.get("end_key"), batch_size=24
        )
        seen = torch.cat([buffer.sample()["observation"].flatten() for _ in range(40)])
        assert {t + i for t in (7, 17, 27) for i in range(3)} <= set(seen.long().tolist())
    # where a sampler is told the flag, it looks for no ids
    with pytest.raises(ValueError, match="sampler must find episodes by flags as they came"):
        stored_with(kind(**keep, truncated_key=None, end_key=("next", "done")), "end", ids=True)
    # with flags as they came, torchrl's defaults
    assert stored_with(kind(**keep), "start", batch_size=24).sample()["next", "truncated"].any()


def test_sequences_of_flags_that_were_moved():
    def stored(done_at, **arguments):
        buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(40),
            transform=MultiStepTransform(3, 1.0, done_at=done_at),
            sample_unit=Sequence(length=4, **arguments),
            batch_size=200,
        )
        buffer.extend(episodes())
        return buffer.sample()

    with pytest.raises(ValueError, match=r"sample_unit must read flags as they came.+done_key=\('next', 'done_orig'\)"):
        stored("end")
    for sample in (stored("end", done_key=("next", "done_orig")), stored("start")):
        # an episode's frames are in one sequence to its end
        frames, valid = sample["observation"].view(-1, 4).long(), sample["validity_mask"].view(-1, 4)
        expected = (frames[:, :1] + torch.arange(4) < (frames[:, :1] // 10 + 1) * 10) & (
            frames[:, :1] + torch.arange(4) < 30
        )
        assert torch.equal(valid, expected)


# Buffers


def test_hindsight_relabels_single_steps():
    with pytest.raises(ValueError, match=r"must not be in a HERReplayBuffer.+relabel rollouts before"):
        HERReplayBuffer(
            lambda data: data["next", "reward"], storage=LazyTensorStorage(40), transform=MultiStepTransform(3, 1.0)
        )


def numbers(count=30):
    t = torch.arange(float(count)).unsqueeze(-1)
    done = torch.zeros(count, 1, dtype=torch.bool)
    return TensorDict({"observation": t, "next": {"observation": t + 1, "reward": t, "done": done}}, [count])


def n_step_buffer(**arguments):
    return NStepReplayBuffer(n_steps=3, gamma=1.0, storage=LazyTensorStorage(40), **arguments)


def test_an_ensemble_reads_storages_itself():
    ours = n_step_buffer()
    ours.extend(numbers())
    with pytest.raises(TypeError, match=r"a ReplayBufferEnsemble reads single steps.+MultiStepTransform each"):
        ReplayBufferEnsemble(ours, ours, batch_size=8).sample()
    assert ours[:]["next", "observation"].equal(numbers()["next", "observation"])
    with pytest.raises(ValueError, match=r"must not be in a ReplayBufferEnsemble.+one of them a transform of its own"):
        ReplayBufferEnsemble(n_step_buffer(), n_step_buffer(), transform=MultiStepTransform(3, 1.0))
    members = [ReplayBuffer(storage=LazyTensorStorage(40), transform=MultiStepTransform(3, 1.0)) for _ in range(2)]
    for member in members:
        member.extend(numbers())
    mixed = ReplayBufferEnsemble(*members, batch_size=8)
    sample = mixed.sample()
    assert torch.equal(sample["next", "observation"], sample["observation"] + 3)
    # the transforms of its own find n-step transitions, too
    mixed.append_transform(REFUSED["RewardClipping"]())
    with pytest.raises(ValueError, match=MESSAGE.format("RewardClipping")):
        mixed.sample()
    single = ReplayBuffer(storage=LazyTensorStorage(40))
    single.extend(numbers())
    mixed = ReplayBufferEnsemble(members[0], single, batch_size=8)
    with pytest.raises(TypeError, match="must find n-step transitions in all of them"):
        for _ in range(64):  # of which members it samples is drawn
            mixed.sample()


def test_offline_to_online():
    """Whose online part is a buffer of torchrl's own."""
    message = (
        r"must find n-step transitions in all of them, .+: give each a MultiStepTransform .+ online_buffer\.append"
    )
    offline = n_step_buffer()
    offline.extend(numbers())
    with pytest.raises(TypeError, match=message):
        OfflineToOnlineReplayBuffer(offline, online_capacity=50, batch_size=8).sample()
    plain = ReplayBuffer(storage=LazyTensorStorage(50))
    plain.extend(numbers())
    with pytest.raises(TypeError, match=message):
        OfflineToOnlineReplayBuffer(
            plain, online_capacity=50, batch_size=8, transform=MultiStepTransform(3, 1.0)
        ).sample()
    offline = ReplayBuffer(storage=LazyTensorStorage(50), transform=MultiStepTransform(3, 1.0, done_at="end"))
    offline.extend(numbers())
    buffer = OfflineToOnlineReplayBuffer(offline, online_capacity=50, offline_fraction=0.5, batch_size=8)
    buffer.extend(numbers())
    with pytest.raises(TypeError, match=message):
        buffer.sample()
    # before anything is stored, where it is the online part that holds n-step transitions
    buffer = OfflineToOnlineReplayBuffer(plain, online_capacity=50, batch_size=8)
    buffer.online_buffer.append_transform(MultiStepTransform(3, 1.0))
    with pytest.raises(TypeError, match=message):
        buffer.extend(numbers())
    assert not len(buffer.online_buffer)
    buffer = OfflineToOnlineReplayBuffer(offline, online_capacity=50, offline_fraction=0.5, batch_size=8)
    buffer.online_buffer.append_transform(MultiStepTransform(3, 1.0, done_at="end"))
    buffer.extend(numbers())
    sample = buffer.sample()
    assert torch.equal(sample["next", "observation"], sample["observation"] + 3)


def test_a_buffer_that_is_filled_at_random():
    dataset = ReplayBuffer(storage=LazyTensorStorage(50))
    dataset.extend(numbers())
    stored = ReplayBuffer(storage=LazyTensorStorage(40), transform=MultiStepTransform(3, 1.0))
    for buffer in (stored, n_step_buffer()):
        with pytest.raises(TypeError, match=r"prefill_replay_buffer .+rb\.extend\(dataset\[:\]\)"):
            prefill_replay_buffer(buffer, dataset)
        assert not len(buffer)
        buffer.extend(dataset[:])
        assert len(buffer) in (27, 30)


@pytest.mark.parametrize("shape", [(2, 20), (2, 20, 1)], ids=str)
@pytest.mark.parametrize("n_step", ["transform", "buffer"])
def test_a_trainer_that_sets_a_flag_in_every_frame(n_step, shape):
    batch = make_rollout((2,), 20, p_done=0.05)
    batch["next", "truncated"] = torch.zeros(shape, dtype=torch.bool)
    batch["next", "terminated"], batch["next", "done"] = (batch["next", "done"].view(shape) for _ in range(2))

    def trained(done_keys, flatten=True, n_steps=3, change=TensorDict.clone, **entries):
        storage = LazyTensorStorage(40, ndim=1 if flatten else 2)
        if n_step == "buffer":
            buffer = NStepReplayBuffer(n_steps=n_steps, gamma=0.9, done_keys=done_keys, storage=storage)
        else:
            buffer = TensorDictReplayBuffer(
                storage=storage, transform=MultiStepTransform(n_steps, 0.9, done_keys=done_keys)
            )
        trainer = ReplayBufferTrainer(buffer, flatten_tensordicts=flatten)
        for _ in range(2):
            trainer.extend(change(batch.clone().update(entries)))
        return buffer

    steps = trained(["done", "terminated"]).sample(200)["steps_to_next_obs"]
    assert steps.max() == 3
    if len(shape) == 2:
        # The last flags are those of the last frames.
        assert trained(None).sample(200)["steps_to_next_obs"].max() == 3
    else:
        with pytest.raises(
            ValueError, match=r"done_keys must not name 'truncated' .+ give done_keys=\['done', 'terminated'\]"
        ):
            trained(None)
    # In a lazy stack the trainer sets the flags of a copy.
    assert (
        trained(None, change=lambda data: lazy_stack([*data.unbind(1)], 1)).sample(200)["steps_to_next_obs"].max() == 3
    )
    assert trained(None, n_steps=1).sample(200)["steps_to_next_obs"].max() == 1
    valid = {"collector": TensorDict({"mask": torch.ones(2, 20, dtype=torch.bool)}, [2, 20])}
    assert trained(None, **valid).sample(200)["steps_to_next_obs"].max() == 3
    assert trained(None, flatten=False).sample(200)["steps_to_next_obs"].max() == 3


def test_a_trainer_after_a_call_that_is_remembered():
    buffer = NStepReplayBuffer(n_steps=3, gamma=0.9, storage=LazyTensorStorage(40))
    # With a device, as what the trainer passes on has one.
    data = make_rollout((), 20).cpu()
    for _ in range(2):
        buffer.extend(data.clone())
    with pytest.raises(ValueError, match="done_keys must not name 'truncated'"):
        ReplayBufferTrainer(buffer, flatten_tensordicts=True).extend(data.clone())
    assert buffer.write_count == 40


def test_a_checkpoint_that_leaves_next_observations_out():
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(40), transform=MultiStepTransform(3, 1.0), checkpointer=FlatStorageCheckpointer()
    )
    with pytest.raises(ValueError, match=r"checkpointer must keep next observations.+got FlatStorageCheckpointer"):
        buffer.extend(numbers())
    assert not len(buffer)


# The table


def exported(module, kind):
    return {
        name
        for name in dir(module)
        if isinstance(getattr(module, name), type) and issubclass(getattr(module, name), kind)
    }


def table():
    """The rows of ``docs/neighbours.md``: name and verdict."""
    text = (Path(__file__).parents[2] / "docs" / "neighbours.md").read_text()
    return {
        name: verdict
        for names, verdict in re.findall(r"^\| (`.+?`) \| (.+?) \|", text, re.M)
        for name in re.findall(r"`(\w+)`", names)
    }


def test_every_class_that_torchrl_exports_is_in_the_table():
    names = exported(T, Transform) | exported(replay_buffers, Sampler) | exported(replay_buffers, ReplayBuffer)
    names |= {"OfflineToOnlineReplayBuffer", "prefill_replay_buffer", "ReplayBufferTrainer"}
    names |= exported(replay_buffers, replay_buffers.SampleUnit)
    names |= exported(replay_buffers, replay_buffers.Storage) | exported(replay_buffers, replay_buffers.Writer)
    names |= exported(replay_buffers, replay_buffers.StorageCheckpointerBase)
    assert names - table().keys() == set()
    assert table().keys() - names == set()


def test_the_table_says_what_was_tested():
    cases = {
        "right": [*RIGHT, *LEAVE_OUT, *REFUSED_WITH_FLAGS_AT_THE_END],
        "refused": [*REFUSED, *SENSELESS, *REFUSED_WITH_FLAGS_AT_THE_END],
        "raises": RAISE,
        "not run": NOT_HERE,
    }
    found = {}
    for verdict, labels in cases.items():
        for label in labels:
            found.setdefault(name_of(label), set()).add(verdict)
    assert found.keys() == exported(T, Transform)
    for name, verdict in table().items():
        if name in found:
            assert {word for word in cases if word in verdict} == found[name], name
