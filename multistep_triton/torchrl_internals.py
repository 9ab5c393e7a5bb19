"""torchrl from inside: who is calling, and what a buffer, a transform or a sampler does not tell by a public name.

This file, ``replay_buffer`` and the subpackage ``buffer`` alone reach into private attributes of torchrl;
``tests/test_torchrl_internals.py`` names every one, and where it is used. May import torchrl.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Mapping
from types import CodeType, FrameType
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import (
    OfflineToOnlineReplayBuffer,
    ReplayBuffer,
    ReplayBufferEnsemble,
    SliceSampler,
    TensorDictPrioritizedReplayBuffer,
    TensorDictReplayBuffer,
    prefill_replay_buffer,
)
from torchrl.data.replay_buffers import SampleUnit
from torchrl.envs.transforms import Compose, Transform
from torchrl.envs.transforms.transforms import _InvertTransform

# torchrl tells a transform nothing of its buffer, and a buffer nothing of who calls: the frames of the calls say it.
_CODES: dict[CodeType, str] = {}
for _kind, _functions in {
    "take": [ReplayBuffer._maybe_make_transform, ReplayBuffer.append_transform, ReplayBuffer.insert_transform],
    "extend": [ReplayBuffer.extend, TensorDictReplayBuffer.extend, TensorDictPrioritizedReplayBuffer.extend],
    # They make a batch of one frame of what they get, and do not.
    "add": [ReplayBuffer.add],
    "put": [TensorDictReplayBuffer.add, TensorDictPrioritizedReplayBuffer.add],
    "sample": [ReplayBuffer._sample, TensorDictReplayBuffer._sample, TensorDictPrioritizedReplayBuffer._sample],
    "overwrite": [ReplayBuffer.__setitem__, ReplayBuffer.write_all],
    "route": [ReplayBufferEnsemble.extend, ReplayBufferEnsemble.add],
    "mix": [OfflineToOnlineReplayBuffer.extend, OfflineToOnlineReplayBuffer.sample, ReplayBufferEnsemble._sample],
    "prefill": [prefill_replay_buffer],
}.items():
    for _function in _functions:
        _CODES.setdefault(inspect.unwrap(_function).__code__, _kind)
# By identity, as what is looked for would be hashed as a whole; that of another is never the same while these are kept.
_KINDS = {id(_code): _kind for _code, _kind in _CODES.items()}

Calls = Mapping[str, FrameType]
"""Frames of torchrl's functions that are calling, by what they do."""


def calls(depth: int = 16) -> Calls:
    """Those of them that are, the innermost of every kind."""
    found: dict[str, FrameType] = {}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and depth:
        if (kind := _KINDS.get(id(frame.f_code))) is not None:
            found.setdefault(kind, frame)
        frame, depth = frame.f_back, depth - 1
    return found


def taking_buffer() -> tuple[ReplayBuffer, bool] | None:
    """The replay buffer that is being given the transform which asks, if one is, and whether inverted."""
    frame = calls().get("take")
    return None if frame is None else (frame.f_locals["self"], bool(frame.f_locals.get("invert")))


def using_buffer(calling: Calls, transform: Transform) -> ReplayBuffer | None:
    """The replay buffer that is calling this transform, if one is."""
    for kind in ("extend", "add", "put", "sample"):
        if kind in calling:
            buffer: ReplayBuffer = calling[kind].f_locals["self"]
            if transform in transforms_in(buffer.transform):
                return buffer
    return None


def mixing_buffer(calling: Calls) -> tuple[list[ReplayBuffer], list[Transform]] | None:
    """Of the ensemble or OfflineToOnlineReplayBuffer that is in use, if one is: its buffers, its own transforms."""
    if "mix" not in calling:
        return None
    mixing = calling["mix"].f_locals["self"]
    pair = isinstance(mixing, OfflineToOnlineReplayBuffer)
    buffers = [mixing.offline_buffer, mixing.online_buffer] if pair else mixing._rbs or []
    return [*buffers], [] if mixing._transform is None else transforms_in(mixing._transform)


def refuse_other_ways(calling: Calls) -> None:
    """Raises an error where frames are stored otherwise than one after the other."""
    if "prefill" in calling:
        raise TypeError(
            "prefill_replay_buffer extends with frames drawn at random, of which no windows can be made: extend with "
            "those of the dataset in order of time, rb.extend(dataset[:])"
        )
    if "overwrite" in calling:
        raise TypeError(
            "frames that are overwritten where they lie are no part of a stream, of which windows are made: write into "
            "rb.storage, of n-step transitions, or extend the buffer"
        )
    if "route" in calling:
        raise TypeError(
            "a ReplayBufferEnsemble must not store n-step transitions, of which there are fewer than frames: extend "
            "its buffers themselves"
        )


def lock_of(buffer: ReplayBuffer) -> contextlib.AbstractContextManager[Any]:
    """The lock under which a buffer stores and samples."""
    lock: contextlib.AbstractContextManager[Any] = buffer._replay_lock
    return lock


def store(buffer: ReplayBuffer, data: TensorDictBase) -> Tensor:
    """What ``extend`` stores once its transforms are through."""
    indices: Tensor = buffer._extend(data)
    return indices


def update_priority(buffer: ReplayBuffer, indices: Tensor, data: TensorDictBase) -> None:
    """What ``extend`` does with a priority that comes with the data."""
    priority_key = getattr(buffer, "priority_key", None)
    if priority_key is not None and (priority := data.get(priority_key, None)) is not None:
        buffer.update_priority(indices, priority)


def inverted_in(transform: Transform) -> Transform | None:
    """What ``append_transform(..., invert=True)`` made this of; None if it did not."""
    return transform.transform if isinstance(transform, _InvertTransform) else None


def reads_ids(sampler: SliceSampler) -> bool:
    """Whether a sampler tells episodes by trajectory ids, as far as it has looked."""
    return bool(sampler._fetch_traj)


def transforms_in(transform: Transform) -> list[Transform]:
    """A buffer's transform in its parts, in order."""
    if type(transform).forward is Compose.forward:
        return [part for each in transform for part in transforms_in(each)]
    return [transform]


def sample_unit_of(buffer: ReplayBuffer) -> SampleUnit | None:
    """What a buffer makes of every frame that is drawn."""
    unit: SampleUnit | None = buffer._sample_unit
    return unit
