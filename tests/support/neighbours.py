"""torchrl's transforms as a user gives them to a replay buffer, and what comes of them beside n-step transitions.

A transform that runs when a buffer is sampled is right there if it commutes with the windows: n-step transitions of
what it makes of single steps are what it makes of n-step transitions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchrl.envs.transforms as T
from tensordict import NonTensorStack, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Composite, LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement, Unbounded
from torchrl.data.vla import UniformActionTokenizer
from torchrl.envs.transforms import Compose, Transform
from torchrl.modules import GRUModule

from multistep_triton import MultiStep, MultiStepTransform, NStepReplayBuffer

N_STEPS, GAMMA, FRAMES, SLICE = 3, 0.9, 24, 8
REWARD, SUCCESS, COST = ("next", "reward"), ("next", "success"), ("next", "cost")
OBS, PIXELS, IMAGE = (
    ["observation", ("next", "observation")],
    ["pixels", ("next", "pixels")],
    ["image", ("next", "image")],
)

Make = Callable[[], Transform]


def make_data(text: bool = False) -> TensorDict:
    """One row of consecutive frames, with a termination, a truncation, and frames of an old policy."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=generator)

    number = torch.arange(FRAMES).unsqueeze(-1)
    terminated, truncated = number == 6, number == 13
    done = terminated | truncated
    states = rand(FRAMES + 1, 3)
    after = torch.where(done, states[1:] + 100.0, states[1:])
    images = torch.randint(0, 256, (FRAMES + 1, 8, 8, 3), generator=generator, dtype=torch.uint8)
    begin = torch.where(number > 13, 14, torch.where(number > 6, 7, 0))
    data = TensorDict(
        {
            "number": number.squeeze(-1),
            "observation": states[:-1],
            "double": states[:-1].double(),
            "pixels": images[:-1].permute(0, 3, 1, 2).contiguous(),
            "image": images[:-1].contiguous(),
            "action": rand(FRAMES, 2),
            "choice": nn.functional.one_hot(torch.randint(0, 3, (FRAMES,), generator=generator), 4),
            "step_count": number - begin,
            "is_init": number == begin,
            "policy_version": torch.where((number == 4) | (number == 5), 1, 4),
            "next": {
                "observation": after,
                "double": after.double(),
                "pixels": images[1:].permute(0, 3, 1, 2).contiguous(),
                "image": images[1:].contiguous(),
                "step_count": number - begin + 1,
                "delta": {"observation": (after - states[:-1]).half()},
                "reward": rand(FRAMES, 1),
                "cost": rand(FRAMES, 1),
                "rewards": rand(FRAMES, 2),
                "success": torch.rand(FRAMES, 1, generator=generator) < 0.5,
                "done": done,
                "terminated": terminated,
                "truncated": truncated,
            },
        },
        batch_size=[FRAMES],
    )
    if text:
        data["text"], data["next", "text"] = (
            NonTensorStack(*(f"{when} {t}" for t in range(FRAMES))) for when in ("frame", "after")
        )
    return data


def in_slices(*transforms: Transform | Callable) -> Compose:
    """What needs a time dimension, as one uses it: a flat sample is cut into slices, and they are joined again."""

    def cut(data):
        data = data.reshape(-1, SLICE)
        data.names = [None, "time"]
        return data

    def join(data):
        data.names = None
        return data.reshape(-1)

    return Compose(cut, *transforms, join)


def hash_rows(value):
    """A hash of every row; torchrl's own one is of the whole batch."""
    return (value.double() * 1000).round().long().sum(-1, keepdim=True)


class StubTokenizer:
    """What ``Tokenizer`` asks of one of transformers'."""

    def add_tokens(self, tokens):
        pass

    def __call__(self, text, **kwargs):
        ids = torch.tensor([[ord(c) for c in each.ljust(10)] for each in ([text] if isinstance(text, str) else text)])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Doubled(T.ObservationTransform):
    def _apply_transform(self, value):
        return value * 2


def module(*in_keys, out, of):
    return TensorDictModule(of, in_keys=list(in_keys), out_keys=[out])


def distance(state, after):
    return (after - state).norm(dim=-1, keepdim=True)


def burn_in():
    torch.manual_seed(0)
    keys = {"in_keys": ["observation", "hidden", "is_init"], "out_keys": ["features", ("next", "hidden")]}
    gru = GRUModule(input_size=3, hidden_size=4, default_recurrent_mode=True, **keys)
    return in_slices(
        lambda data: data.set("hidden", torch.zeros(*data.shape, 1, 4)),
        T.BurnInTransform(gru, burn_in=2, out_keys=["hidden"]),
    )


def norm(*keys, frozen):
    transform = T.VecNorm(in_keys=list(keys), decay=1.0)
    if frozen:
        transform(make_data().select(*keys))
        transform.freeze()
    return transform


def chunks(**arguments):
    return in_slices(T.ActionChunkTransform(3, action_key="action", chunk_key="chunk", pad_key="pad", **arguments))


def stacked(*keys, **arguments):
    return in_slices(T.CatFrames(N=3, dim=-1, in_keys=list(keys), **arguments))


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 4)


RIGHT: dict[str, Make] = {
    "ActionScaling": lambda: T.ActionScaling(loc=1.0, scale=2.0),
    "ActionScaling: a reward, loc=0": lambda: T.ActionScaling(in_keys=[REWARD], in_keys_inv=[], loc=0.0, scale=2.0),
    "ActionTokenizerTransform": lambda: T.ActionTokenizerTransform(
        UniformActionTokenizer(num_bins=16, low=-3.0, high=3.0), in_key="action", out_key="tokens"
    ),
    "BatchSizeTransform": lambda: T.BatchSizeTransform(reshape_fn=lambda data: data.reshape(-1)),
    "CatFrames: as_inverse": lambda: T.CatFrames(N=3, dim=-1, in_keys=OBS, as_inverse=True),
    "CatTensors": lambda: Compose(
        T.CatTensors(in_keys=["observation", "action"], out_key="vector", del_keys=False),
        T.CatTensors(in_keys=[OBS[1], COST], out_key=("next", "vector"), del_keys=False),
    ),
    "ClipTransform": lambda: T.ClipTransform(in_keys=OBS, low=-0.5, high=0.5),
    "ClipTransform: a reward, inverse": lambda: T.ClipTransform(in_keys_inv=[REWARD], low=-0.5, high=0.5),
    "Compose": lambda: Compose(T.ObservationNorm(0.5, 2.0, in_keys=OBS), Compose(T.DoubleToFloat(in_keys=["double"]))),
    "DTypeCastTransform": lambda: T.DTypeCastTransform(torch.float32, torch.float64, in_keys=OBS),
    "DTypeCastTransform: a reward": lambda: T.DTypeCastTransform(torch.float32, torch.float64, in_keys=[REWARD]),
    "DeviceCastTransform": lambda: T.DeviceCastTransform("cpu"),
    "DiscreteActionProjection": lambda: T.DiscreteActionProjection(3, 4, action_key="choice"),
    "DoubleToFloat": lambda: T.DoubleToFloat(in_keys=["double", ("next", "double")]),
    "ExcludeTransform": lambda: T.ExcludeTransform("double", ("next", "double")),
    "ExpandAs": lambda: T.ExpandAs(COST, ("next", "rewards")),
    "ExpandAs: a reward": lambda: T.ExpandAs(REWARD, ("next", "rewards")),
    "FiniteTensorDictCheck": lambda: T.FiniteTensorDictCheck(),
    "FlattenAction": lambda: T.FlattenAction(in_keys=["image"], in_keys_inv=[]),
    "FlattenObservation": lambda: T.FlattenObservation(-3, -1, in_keys=PIXELS),
    "GrayScale": lambda: T.GrayScale(in_keys=PIXELS),
    "Hash": lambda: T.Hash(in_keys=OBS, out_keys=["hash", ("next", "hash")], hash_fn=hash_rows),
    "LineariseRewards": lambda: T.LineariseRewards(in_keys=[("next", "rewards")], weights=[0.5, 2.0]),
    "MacroPrimitiveTransform": lambda: T.MacroPrimitiveTransform(macro_steps=4),
    "ModuleTransform": lambda: T.ModuleTransform(
        module=TensorDictSequential(
            module(OBS[0], out="value", of=lambda o: o.tanh().sum(-1, keepdim=True)),
            module(OBS[1], out=("next", "value"), of=lambda o: o.tanh().sum(-1, keepdim=True)),
        )
    ),
    "ModuleTransform: a reward of both, inverse": lambda: T.ModuleTransform(
        module=module(*OBS, out=REWARD, of=distance), inverse=True
    ),
    "NextObservationDelta: no keys": lambda: T.NextObservationDelta(),
    "NoopResetEnv": lambda: T.NoopResetEnv(),
    "ObservationNorm": lambda: T.ObservationNorm(0.5, 2.0, in_keys=OBS),
    "ObservationNorm: a reward, loc=0": lambda: T.ObservationNorm(0.0, 2.0, in_keys=[REWARD]),
    "ObservationTransform": lambda: Doubled(in_keys=OBS, out_keys=OBS),
    "PermuteTransform": lambda: T.PermuteTransform((-1, -3, -2), in_keys=IMAGE),
    "RemoveEmptySpecs": lambda: T.RemoveEmptySpecs(),
    "RenameTransform": lambda: T.RenameTransform(OBS, ["obs", ("next", "obs")]),
    "Reward2GoTransform: at the root": lambda: T.Reward2GoTransform(gamma=GAMMA, out_keys=["togo"]),
    "RewardScaling": lambda: T.RewardScaling(loc=0.0, scale=3.0, in_keys=[REWARD]),
    "RewardScaling: loc, observations": lambda: T.RewardScaling(loc=1.0, scale=3.0, in_keys=OBS),
    "SelectTransform: with the windows": lambda: T.SelectTransform(
        *("observation", "action", "next", "steps_to_next_obs", "gamma", "nonterminal")
    ),
    "SignTransform": lambda: T.SignTransform(in_keys=OBS),
    "SqueezeTransform": lambda: T.SqueezeTransform(-1, in_keys=[COST, REWARD, "step_count"]),
    "Stack": lambda: Compose(
        T.Stack(in_keys=["observation", "double"], out_key="stacked", del_keys=False),
        T.Stack(in_keys=[OBS[1], ("next", "double")], out_key=("next", "stacked"), del_keys=False),
    ),
    "SuccessReward: no reward": lambda: T.SuccessReward(SUCCESS, ("next", "bonus")),
    "TensorDictPrimer": lambda: T.TensorDictPrimer(
        primers=Composite(hidden=Unbounded((FRAMES, 4)), shape=(FRAMES,)), random=False
    ),
    "ToTensorImage": lambda: T.ToTensorImage(in_keys=IMAGE),
    "Tokenizer": lambda: T.Tokenizer(
        in_keys=["text", ("next", "text")], out_keys=["tokens", ("next", "tokens")], tokenizer=StubTokenizer()
    ),
    "Transform": Transform,
    "UnaryTransform": lambda: T.UnaryTransform(in_keys=OBS, out_keys=OBS, fn=torch.tanh),
    "UnsqueezeTransform": lambda: T.UnsqueezeTransform(-1, in_keys=OBS),
    "VecNorm: frozen": lambda: norm(*OBS, frozen=True),
    "gSDENoise": lambda: T.gSDENoise(state_dim=3, action_dim=2, shape=(FRAMES,)),
}
"""Those that commute with the windows, by class and what is special."""

REFUSED: dict[str, Make] = {
    "ActionScaling: a reward": lambda: T.ActionScaling(in_keys=[REWARD], in_keys_inv=[], loc=1.0, scale=2.0),
    "BinarizeReward": lambda: T.BinarizeReward(in_keys=[REWARD]),
    "BinarizeReward: other out_keys": lambda: T.BinarizeReward(in_keys=[REWARD], out_keys=[("next", "binary")]),
    "CatFrames": lambda: stacked(*OBS),
    "CatTensors: of both": lambda: T.CatTensors(in_keys=OBS, out_key="both", del_keys=False),
    "ClipTransform: a reward": lambda: T.ClipTransform(in_keys=[REWARD], low=-0.5, high=0.5),
    "DTypeCastTransform: a reward to integers": lambda: T.DTypeCastTransform(
        torch.float32, torch.int64, in_keys=[REWARD]
    ),
    "ExcludeTransform: windows": lambda: T.ExcludeTransform("steps_to_next_obs"),
    "Hash: a reward": lambda: T.Hash(in_keys=[REWARD], out_keys=[REWARD], hash_fn=hash_rows),
    "LineariseRewards: of no rewards": lambda: T.LineariseRewards(in_keys=[("next", "rewards")], out_keys=[REWARD]),
    "ModuleTransform: a reward of both": lambda: T.ModuleTransform(module=module(*OBS, out=REWARD, of=distance)),
    "ModuleTransform: of both": lambda: T.ModuleTransform(module=module(*OBS, out="distance", of=distance)),
    "NextObservationDelta": lambda: T.NextObservationDelta(in_keys=["observation"], drop_delta=False),
    "ObservationNorm: a reward": lambda: T.ObservationNorm(0.5, 2.0, in_keys=[REWARD]),
    "RewardClipping": lambda: T.RewardClipping(-0.5, 0.5, in_keys=[REWARD]),
    "RewardScaling: loc": lambda: T.RewardScaling(loc=1.0, scale=3.0, in_keys=[REWARD]),
    "RewardSum": lambda: in_slices(T.RewardSum(in_keys=[REWARD], out_keys=[("next", "episode_reward")])),
    "SelectTransform": lambda: T.SelectTransform("observation", "action", "next", keep_rewards=False, keep_dones=False),
    "SignTransform: a reward": lambda: T.SignTransform(in_keys=[REWARD]),
    "Stack: of both": lambda: T.Stack(in_keys=OBS, out_key="both", del_keys=False),
    "SuccessReward": lambda: T.SuccessReward(SUCCESS, REWARD),
    "UnaryTransform: a reward": lambda: T.UnaryTransform(in_keys=[REWARD], out_keys=[REWARD], fn=torch.tanh),
    "UnaryTransform: a flag": lambda: T.UnaryTransform(
        in_keys=[("next", "done")], out_keys=[("next", "done")], fn=torch.logical_not
    ),
    "VecNorm": lambda: norm(*OBS, frozen=False),
    "VecNorm: a reward, frozen": lambda: norm(REWARD, frozen=True),
}
"""Those that do not, and are refused."""

REFUSED_WITH_FLAGS_AT_THE_END: dict[str, Make] = {
    "ActionChunkTransform": chunks,
    "CatFrames: root alone": lambda: stacked("observation"),
}
"""Those that read done flags, right with ``done_at="start"``."""

RIGHT_WITH_FLAGS_AT_THE_END: dict[str, Make] = {
    "ActionChunkTransform: done_orig": lambda: chunks(done_key="done_orig"),
    "CatFrames: root alone, done_orig": lambda: stacked("observation", done_key="done_orig"),
}
"""The same, right with ``done_at="end"``."""

SENSELESS: dict[str, Make] = {
    "MultiStepTransform": lambda: T.MultiStepTransform(N_STEPS, GAMMA),
    "NextStateReconstructor": T.NextStateReconstructor,
    "Reward2GoTransform": lambda: T.Reward2GoTransform(gamma=GAMMA),
    "DTypeCastTransform: all to integers": lambda: T.DTypeCastTransform(torch.float32, torch.int64),
    "PolicyAgeFilter": lambda: T.PolicyAgeFilter(current_version=4, max_policy_lag=2),
}
"""Those that are refused though they may commute: they make windows of windows, of returns, or over gaps."""

LEAVE_OUT: dict[str, Make] = {
    "BurnInTransform": burn_in,
    "PolicyAgeFilter: forward": lambda: Compose(T.PolicyAgeFilter(current_version=4, max_policy_lag=2).forward),
    "RandomCropTensorDict": lambda: T.RandomCropTensorDict(8),
}
"""Those that leave out samples, right in all that is left."""

RAISE: dict[str, Make] = {
    "ActionDiscretizer": lambda: T.ActionDiscretizer(num_intervals=4),
    "ActionMask": lambda: T.ActionMask(mask_key="choice"),
    "AutoResetTransform": T.AutoResetTransform,
    "BinarizeReward: default keys": T.BinarizeReward,
    "CatTensors: default keys": T.CatTensors,
    "ConditionalPolicySwitch": lambda: T.ConditionalPolicySwitch(lambda data: data, lambda data: False),
    "ConditionalSkip": lambda: T.ConditionalSkip(lambda data: torch.zeros(data.shape, dtype=torch.bool)),
    "EndOfLifeTransform": T.EndOfLifeTransform,
    "FrameSkipTransform": lambda: T.FrameSkipTransform(2),
    "InitTracker": T.InitTracker,
    "MeanActionSelector": T.MeanActionSelector,
    "MultiAction": T.MultiAction,
    "RNDTransform": lambda: T.RNDTransform(linear(), linear()),
    "RandomTruncationTransform": lambda: T.RandomTruncationTransform(2, 5, 0.5),
    "RayTransform": T.RayTransform,
    "RewardClipping: default keys": lambda: T.RewardClipping(-1.0, 1.0),
    "RewardScaling: default keys": lambda: T.RewardScaling(0.0, 2.0),
    "RewardSum: default keys": T.RewardSum,
    "StepCounter": T.StepCounter,
    "SuccessReward: default keys": T.SuccessReward,
    "TargetReturn": lambda: T.TargetReturn(10.0, in_keys=[REWARD], out_keys=[("next", "target")], reset_key="_reset"),
    "TerminateTransform": lambda: T.TerminateTransform(lambda data: False),
    "TimeMaxPool": lambda: T.TimeMaxPool(in_keys=OBS, T=2),
    "Timer": T.Timer,
    "TrajCounter": T.TrajCounter,
    "VecGymEnvTransform": T.VecGymEnvTransform,
    "VecNormV2": lambda: T.VecNormV2(in_keys=OBS),
}
"""Those of an environment, which raise in a buffer, whatever is in it."""

NOT_HERE: dict[str, tuple[str, Make]] = {
    "CenterCrop": ("torchvision", lambda: T.CenterCrop(4, 4, in_keys=PIXELS)),
    "Crop": ("torchvision", lambda: T.Crop(4, 4, in_keys=PIXELS)),
    "DecodeVideoTransform": ("torchcodec", lambda: T.DecodeVideoTransform(in_keys=["video"])),
    "R3MTransform": (
        "torchvision",
        lambda: T.R3MTransform("resnet18", in_keys=["image"], out_keys=["r3m_vec"], size=32),
    ),
    "Resize": ("torchvision", lambda: T.Resize(4, 4, in_keys=PIXELS)),
    "VC1Transform": ("vc_models", lambda: T.VC1Transform(in_keys=["pixels"], out_keys=["vec"], model_name="default")),
    "VIPRewardTransform": ("torchvision", lambda: T.VIPRewardTransform("resnet50", in_keys=["image"], size=32)),
    "VIPTransform": ("torchvision", lambda: T.VIPTransform("resnet50", in_keys=["image"], size=32)),
    "PinMemoryTransform": ("an accelerator", T.PinMemoryTransform),
}
"""Those that need what tests cannot have; by their source each works on every frame by itself."""

INVERTED = {
    label: REFUSED[label]
    for label in (
        *("BinarizeReward", "CatTensors: of both", "ClipTransform: a reward", "LineariseRewards: of no rewards"),
        *("ModuleTransform: a reward of both", "ObservationNorm: a reward", "RewardClipping", "RewardScaling: loc"),
        *("SignTransform: a reward", "Stack: of both", "SuccessReward", "UnaryTransform: a reward"),
    )
}
"""Of those that are refused, the ones that are right if they run when the buffer is extended."""

ARGUMENTS = {"LineariseRewards": {"reward_keys": ["rewards", "reward"]}}
"""Arguments of the n-step classes, where a case needs some."""

PLAIN = {
    "ActionChunkTransform: done_orig": chunks,
    "CatFrames: root alone, done_orig": lambda: stacked("observation"),
}
"""What a case is with single steps, which have no flags beside those that came."""


def name_of(label: str) -> str:
    return label.partition(":")[0]


def in_order() -> SamplerWithoutReplacement:
    return SamplerWithoutReplacement(shuffle=False)


def of_single_steps(data: TensorDictBase, make: Make | None, invert: bool = False) -> TensorDictBase:
    """What a plain buffer samples, in order."""
    buffer = ReplayBuffer(storage=LazyTensorStorage(FRAMES), sampler=in_order())
    if make is not None:
        buffer.append_transform(make(), invert=invert)
    buffer.extend(data.clone())
    torch.manual_seed(0)
    return buffer.sample(len(buffer))


def of_transform(data: TensorDictBase, make: Make, done_at: str, invert: bool = False, **arguments) -> TensorDictBase:
    """What a buffer samples in which n-step transitions were stored."""
    ours = MultiStepTransform(N_STEPS, GAMMA, done_at=done_at, **arguments)
    buffer = ReplayBuffer(storage=LazyTensorStorage(FRAMES), sampler=in_order(), transform=ours)
    buffer.append_transform(make(), invert=invert)
    buffer.extend(data.clone())
    ours.flush_into(buffer)
    torch.manual_seed(0)
    return buffer.sample(len(buffer))


def of_buffer(data: TensorDictBase, make: Make, done_at: str, invert: bool = False, **arguments) -> TensorDictBase:
    """What a buffer samples that makes n-step transitions."""
    buffer = NStepReplayBuffer(
        n_steps=N_STEPS,
        gamma=GAMMA,
        done_at=done_at,
        storage=LazyTensorStorage(FRAMES),
        sampler=in_order(),
        **arguments,
    )
    buffer.append_transform(make(), invert=invert)
    buffer.extend(data.clone())
    torch.manual_seed(0)
    # torchrl sets "index" in what transforms left, of as many samples as it drew.
    return buffer.sample(len(buffer), include_info=False).exclude("index")


def wanted(data: TensorDictBase, make: Make | None, done_at: str, invert: bool = False, **arguments) -> TensorDictBase:
    """n-step transitions of what single steps become."""
    multistep = MultiStep(GAMMA, N_STEPS, done_at=done_at, mask_key="mask", **arguments)
    return multistep(of_single_steps(data, make, invert))


def difference(actual: TensorDictBase, expected: TensorDictBase) -> str | None:
    """The first entry that differs, but those that keep what came."""

    def entries(data):
        keys = [(key,) if isinstance(key, str) else key for key in data.keys(True, True)]
        return {key: data[key] for key in keys if not key[-1].endswith("_orig") and key[-1] != "original_reward"}

    ours, theirs = entries(actual), entries(expected)
    if ours.keys() != theirs.keys():
        return f"entries: {sorted(ours.keys() ^ theirs.keys())} in one alone"
    for key, value in ours.items():
        other = theirs[key]
        if not isinstance(value, torch.Tensor):
            if list(value) != list(other):
                return f"{key}: other objects"
        elif value.shape != other.shape or value.dtype != other.dtype:
            return f"{key}: {value.dtype} {list(value.shape)}, not {other.dtype} {list(other.shape)}"
        elif not torch.allclose(value.double(), other.double(), rtol=1e-5, atol=1e-5, equal_nan=True):
            return f"{key}: other values"
    return None
