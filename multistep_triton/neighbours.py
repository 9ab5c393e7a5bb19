"""Neighbours: the transforms and other parts of a replay buffer that would read n-step transitions as single steps.

A transform that runs when a buffer is sampled is right on n-step transitions if it commutes with the windows: n-step
transitions made of transformed single steps must equal transformed n-step transitions. Owns the rules that find parts
that are wrong, and their remedies; ``docs/neighbours.md`` lists all of torchrl's. May import torchrl, by its public
names alone, ``base`` and what it may, and ``torchrl_internals``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tensordict import is_tensor_collection
from tensordict.nn import TensorDictSequential
from torch import Tensor
from torchrl.data import FlatStorageCheckpointer, HERReplayBuffer, ReplayBuffer, ReplayBufferEnsemble
from torchrl.data.replay_buffers import Sequence
from torchrl.data.replay_buffers.samplers import SliceSampler
from torchrl.envs import transforms as T
from torchrl.envs.transforms import Transform

from multistep_triton.base import MultiStepBase
from multistep_triton.layouts import KeyPath
from multistep_triton.roles import STEPS_KEY, Roles, as_path
from multistep_triton.torchrl_internals import (
    Calls,
    inverted_in,
    mixing_buffer,
    reads_ids,
    transforms_in,
    truncates_all,
)

# These transforms change shapes, names or devices of entries but no values.
_KEEP_VALUES = (
    T.CatTensors,
    T.DeviceCastTransform,
    T.ExcludeTransform,
    T.ExpandAs,
    T.FiniteTensorDictCheck,
    T.FlattenAction,
    T.FlattenObservation,
    T.PermuteTransform,
    T.PinMemoryTransform,
    T.RandomCropTensorDict,
    T.RemoveEmptySpecs,
    T.RenameTransform,
    T.SelectTransform,
    T.SqueezeTransform,
    T.Stack,
    T.UnsqueezeTransform,
)
_INVERT = "append it with invert=True, so that it runs on single steps when the buffer is extended"
_IN_ENV = "use it in the environment"
_LEAVE_OUT = "leave one of the two out"


def check_transforms(transforms: Iterable[Transform], roles: Roles) -> None:
    """Checks the transforms that run on n-step transitions when a buffer is sampled."""
    for transform in transforms:
        if found := _find_fault(transform, roles):
            fault, remedy = found
            name = type(transform).__name__
            if inverted := inverted_in(transform):
                name = f"the inverse of {type(inverted).__name__}"
                remedy = remedy if remedy is _LEAVE_OUT else "append it without invert=True"
            raise ValueError(
                f"transform must leave rewards and the entries under 'next' to the windows, got {name}, which {fault}: "
                f"{remedy}"
            )


def facts_of(part: Any) -> tuple[Any, ...]:
    """Returns a part of a buffer and those of its attributes that the checks read and that may change later."""
    loc, frozen = getattr(part, "loc", None), getattr(part, "frozen", None)
    names = ("in_keys", "out_keys", "in_keys_inv", "out_keys_inv", "truncated_key", "end_key")
    keys = (getattr(part, name, None) for name in names)
    # What was made in inference mode may change unseen, and is checked every time.
    version = None if not isinstance(loc, Tensor) else object() if loc.is_inference() else loc._version
    return part, frozen, version, *(repr(key) for key in keys)


def check_order(before: Iterable[Transform], roles: Roles) -> None:
    """Checks the transforms before a MultiStepTransform in a list, whose inverses run after it on extend."""
    for transform in before:
        if inverted := inverted_in(transform):
            name, wrong = type(inverted).__name__, bool(_find_fault(inverted, roles))
        else:
            keys = _paths(getattr(transform, "in_keys_inv", None)) | _paths(getattr(transform, "out_keys_inv", None))
            stacks = isinstance(transform, T.CatFrames) and transform.as_inverse
            drops = isinstance(transform, T.ExcludeTransform) and transform.inverse and _drops_steps(transform)
            name, wrong = type(transform).__name__, stacks or drops or isinstance(transform, T.Reward2GoTransform)
            wrong = wrong or bool(keys & {*roles.rewards} and not _is_linear(transform))
        if wrong:
            raise ValueError(
                f"a MultiStepTransform must be the first in the list, got {name} before it, which would run on n-step "
                f"transitions when the buffer is extended"
            )


def _find_fault(transform: Any, roles: Roles) -> tuple[str, str] | None:
    """Returns what a transform does wrong on n-step transitions and the remedy; None if it is right."""
    rewards, dones, done_at = {*roles.rewards}, {*roles.dones}, roles.done_at
    read, written = (_paths(getattr(transform, name, None)) for name in ("in_keys", "out_keys"))
    moved = done_at == "end" and _path(getattr(transform, "done_key", ())) in {path[1:] for path in dones}
    flag_remedy = "give it done_key='done_orig', the flag as it came"
    parts = transforms_in(inverted_in(transform) or transform)
    if any(isinstance(part, T.MultiStepTransform | MultiStepBase) for part in parts):
        return "makes n-step transitions of what it gets", _LEAVE_OUT
    match transform:
        case T.NextStateReconstructor():
            return "writes what is one step ahead", "store next observations (compact_obs=False)"
        case T.NextObservationDelta() if transform.in_keys:
            return "adds the step to the window's end to the frame's own observation", "call it on data before extend"
        case T.RewardSum():
            return "sums n-step returns", _IN_ENV
        case T.PolicyAgeFilter():
            return "drops frames on extend, over which windows go", "give transform=filter.forward, which drops samples"
        case T.Reward2GoTransform():
            fault = "makes rewards of returns, which windows would sum", "give it other out_keys, at the root"
            return fault if _paths(transform.out_keys_inv) & rewards else None
        case T.CatFrames() if not transform.as_inverse and any(path[0] == "next" for path in read):
            return "stacks the ends of several windows", f"{_IN_ENV}, or as_inverse=True"
        case T.CatFrames() | T.ActionChunkTransform() if moved and not getattr(transform, "as_inverse", False):
            return "reads done flags that are those of the window's end", flag_remedy
        case T.ActionChunkTransform() if done_at == "start" and transform.done_key == "done_orig":
            return "reads a flag that is not there with done_at='start'", "give it the done flag, done_key='done'"
        case T.DTypeCastTransform() if not read and transform.dtype_in.is_floating_point and not _is_linear(transform):
            return "casts every entry, rewards among them, to integers", "give it in_keys"
        case T.SelectTransform() if (STEPS_KEY,) not in _paths(transform.selected_keys):
            return "leaves out how long windows are", f"select {STEPS_KEY}, too"
        case T.ExcludeTransform() if not transform.inverse and _drops_steps(transform):
            return "leaves out how long windows are", f"keep {STEPS_KEY}"
        case T.LineariseRewards() if (read | written) & rewards and not read <= rewards:
            return "makes a reward of what is none", f"name its in_keys in reward_keys, or {_INVERT}"
        case T.VecNorm() if not transform.frozen:
            return "learns from n-step transitions", f"freeze it, or {_INVERT}"
    if (read | written) & rewards and not _is_linear(transform):
        return "is not linear in a reward, so that it is wrong of a sum", _INVERT
    if written & dones and not _is_linear(transform):
        return "changes flags by which windows ended", _INVERT
    joins = isinstance(transform, T.CatTensors | T.Stack | T.ModuleTransform)
    one_by_one = isinstance(getattr(transform, "module", None), TensorDictSequential)
    if joins and not one_by_one and len({path[0] == "next" for path in read}) > 1:
        return "joins an entry of the frame with one of the window's end", _INVERT
    return None


def _is_linear(transform: Any) -> bool:
    """Returns whether transforming a discounted sum equals the discounted sum of the transformed values."""
    match inverted_in(transform) or transform:
        case T.DTypeCastTransform():
            return bool(transform.dtype_out.is_floating_point)
        case T.ActionScaling():
            return bool((transform.loc == (0 if transform.standard_normal else transform.scale)).all())
        case T.RewardScaling() | T.ObservationNorm():
            return getattr(transform, "initialized", True) and bool((transform.loc == 0).all())
    return isinstance(transform, (*_KEEP_VALUES, T.LineariseRewards))


def _drops_steps(transform: Any) -> bool:
    return (STEPS_KEY,) in _paths(transform.excluded_keys)


def check_mixing(calling: Calls, roles: Roles) -> None:
    """Checks that the calling ensemble or OfflineToOnlineReplayBuffer, if there is one, suits n-step transitions."""
    if (mixing := mixing_buffer(calling)) is None:
        return
    buffers, transforms = mixing
    check_transforms([each for each in transforms if not isinstance(each, MultiStepBase)], roles)
    if any(isinstance(each, MultiStepBase) or holds_single_steps(each) for each in buffers):
        raise TypeError(
            "a buffer that samples from several must find n-step transitions in all of them, got single steps: give "
            "each a MultiStepTransform of the same arguments, an OfflineToOnlineReplayBuffer's by "
            "online_buffer.append_transform(...)"
        )


def check_trainer(of: MultiStepBase) -> None:
    """Checks that no trainer of torchrl's ends every window of ``of`` with its first frame."""
    if of._n_steps == 1 or not truncates_all() or ("next", "truncated") not in of._roles_in(()).dones:
        return
    raise ValueError(
        "done_keys must not name 'truncated' where torchrl's trainer makes one row of all frames, as it sets that "
        "flag in every frame, and every window would be of one frame: give done_keys=['done', 'terminated'], or "
        "collect with split_trajs=True"
    )


def holds_single_steps(buffer: ReplayBuffer) -> bool:
    """Returns whether a buffer holds frames that are not n-step transitions."""
    storage = buffer.storage
    if not len(storage) or not getattr(storage, "initialized", True):
        # The buffer is empty, or another thread is storing its first frames.
        return False
    first = storage.get(0)
    return is_tensor_collection(first) and first.get(STEPS_KEY, None) is None


def check_holds_n_steps(buffer: ReplayBuffer) -> None:
    """Checks that a buffer for n-step transitions holds no single steps."""
    if holds_single_steps(buffer):
        raise ValueError(
            f"storage must hold n-step transitions alone, got single steps, which lack {STEPS_KEY!r} and were stored "
            f"without the transform: extend a new buffer with them"
        )


def check_around(buffer: ReplayBuffer, unit: Any, roles: Roles, has_ids: bool) -> None:
    """Checks what shares a buffer with a :class:`~multistep_triton.MultiStepTransform`, apart from transforms.

    Args:
        buffer, unit: the buffer and its sample unit.
        has_ids: whether the data holds trajectory ids where samplers look for them.
    """
    if isinstance(buffer, HERReplayBuffer):
        raise ValueError(
            "a MultiStepTransform must not be in a HERReplayBuffer, which gives n-step transitions the reward of one "
            "step: relabel rollouts before the buffer is extended"
        )
    if isinstance(buffer, ReplayBufferEnsemble):
        raise ValueError(
            "a MultiStepTransform must not be in a ReplayBufferEnsemble, whose buffers are extended without it: give "
            "every one of them a transform of its own"
        )
    if isinstance(buffer.storage.checkpointer, FlatStorageCheckpointer):
        raise ValueError(
            f"checkpointer must keep next observations, which n-step transitions have of other frames, got "
            f"{type(buffer.storage.checkpointer).__name__}: use the storage's default"
        )
    if roles.done_at == "start":
        return
    sampler, first = buffer.sampler, f"('next', '{min(roles.dones)[-1]}_orig')"
    if isinstance(sampler, SliceSampler):
        if sampler.truncated_key is not None:
            raise ValueError(
                f"sampler must leave the done flags alone, which are those of the window's end with done_at='end', got "
                f"{type(sampler).__name__} with truncated_key={sampler.truncated_key!r}: give it truncated_key=None"
            )
        ends = _paths(sampler.end_keys or [sampler.end_key] if sampler.end_key or sampler.end_keys else [])
        if ends & {*roles.dones} and not (reads_ids(sampler) and (has_ids or sampler.traj_key is not None)):
            raise ValueError(
                f"sampler must find episodes by flags as they came, not by those of the window's end, got "
                f"{type(sampler).__name__} with end_key={sampler.end_key!r}: give it end_key={first} or a traj_key, or "
                f"use done_at='start'"
            )
    if isinstance(unit, Sequence) and _path(unit.done_key) in roles.dones:
        raise ValueError(
            f"sample_unit must read flags as they came, not those of the window's end, got Sequence with "
            f"done_key={unit.done_key!r}: give it done_key={first}, or use done_at='start'"
        )


def _paths(keys: Any) -> set[KeyPath]:
    return {_path(key) for key in keys or ()}


def _path(key: Any) -> KeyPath:
    return as_path(key) if isinstance(key, str | tuple) and key else ()
