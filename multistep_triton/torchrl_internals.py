"""torchrl's internals: which of its functions is calling, and what its classes do not tell by a public name.

Only this file, ``replay_buffer`` and the subpackage ``buffer`` use private attributes of torchrl;
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

# torchrl tells a transform neither its buffer nor who calls the buffer: the code on the call stack shows both.
_CODES: dict[CodeType, str] = {}
for _kind, _functions in {
    "take": [ReplayBuffer._maybe_make_transform, ReplayBuffer.append_transform, ReplayBuffer.insert_transform],
    "extend": [ReplayBuffer.extend, TensorDictReplayBuffer.extend, TensorDictPrioritizedReplayBuffer.extend],
    # Under "add", torchrl passes its transforms a frame as a batch of one frame; under "put", as it comes.
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
# By id, as hashing a code object takes long; no other object has the same id while _CODES keeps these alive.
_KINDS = {id(_code): _kind for _code, _kind in _CODES.items()}

# In these, one buffer stores or samples.
_USES = {"extend", "add", "put", "sample", "overwrite"}

Calls = Mapping[str, FrameType]
"""Stack frames of the torchrl functions that are calling, by the kind of call."""


def calls(of: ReplayBuffer | None = None, depth: int = 16) -> Calls:
    """Returns the innermost stack frame of every kind of call, among the ``depth`` innermost frames.

    They are those of the buffer ``of`` or of the innermost one, and not of one whose transforms call it.
    """
    found: dict[str, FrameType] = {}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and depth:
        if (kind := _KINDS.get(id(frame.f_code))) is not None:
            if kind in _USES:
                user: ReplayBuffer = frame.f_locals["self"]
                if user is not (of := user if of is None else of):
                    break
            found.setdefault(kind, frame)
        frame, depth = frame.f_back, depth - 1
    return found


def taking_buffer() -> tuple[ReplayBuffer, bool] | None:
    """Returns the replay buffer that is being given a transform, and whether inverted; None if there is none."""
    frame = calls().get("take")
    return None if frame is None else (frame.f_locals["self"], bool(frame.f_locals.get("invert")))


def using_buffer(calling: Calls, transform: Transform) -> ReplayBuffer | None:
    """Returns the replay buffer that is calling this transform; None if there is none."""
    for kind in ("extend", "add", "put", "sample"):
        if kind in calling:
            buffer: ReplayBuffer = calling[kind].f_locals["self"]
            if transform in transforms_in(buffer.transform):
                return buffer
    return None


def mixing_buffer(calling: Calls) -> tuple[list[ReplayBuffer], list[Transform]] | None:
    """Returns the buffers and transforms of the calling ensemble or OfflineToOnlineReplayBuffer; None without one."""
    if "mix" not in calling:
        return None
    mixing = calling["mix"].f_locals["self"]
    pair = isinstance(mixing, OfflineToOnlineReplayBuffer)
    buffers = [mixing.offline_buffer, mixing.online_buffer] if pair else mixing._rbs or []
    return [*buffers], [] if mixing._transform is None else transforms_in(mixing._transform)


def refuse_other_ways(calling: Calls) -> None:
    """Raises a TypeError if one of the calls stores frames otherwise than one after the other."""
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


def truncates_all(depth: int = 32) -> bool:
    """Returns whether a trainer that makes one row of all frames is calling, and has set "truncated" in each of them.

    It is found among the ``depth`` innermost stack frames.
    """
    # Who trains has imported the module, which warns of torchrl's own classes.
    trainers = sys.modules.get("torchrl.trainers.trainers")
    if trainers is None:
        return False
    code, frame = trainers.ReplayBufferTrainer.extend.__code__, sys._getframe(1)
    while frame.f_code is not code:
        depth -= 1
        if frame.f_back is None or not depth:
            return False
        frame = frame.f_back
    trainer, batch = (frame.f_locals[name] for name in ("self", "batch"))
    flag, keys = batch.get(("next", "truncated"), None), batch.keys(True)
    if not trainer.flatten_tensordicts or ("collector", "mask") in keys or flag is None or flag.ndim == batch.ndim:
        return False
    # The trainer sets the last flags of the last dimension, which is not time in [*B, T, 1]; the batch is on the CPU.
    return bool(flag.numel() and flag.all())


def lock_of(buffer: ReplayBuffer) -> contextlib.AbstractContextManager[Any]:
    """Returns the lock under which a buffer stores and samples."""
    lock: contextlib.AbstractContextManager[Any] = buffer._replay_lock
    return lock


def store(buffer: ReplayBuffer, data: TensorDictBase) -> Tensor:
    """Stores data as ``extend`` does after its transforms, and returns the indices."""
    indices: Tensor = buffer._extend(data)
    return indices


def update_priority(buffer: ReplayBuffer, indices: Tensor, data: TensorDictBase) -> None:
    """Updates the priorities as ``extend`` does if the data holds a priority."""
    priority_key = getattr(buffer, "priority_key", None)
    if priority_key is not None and (priority := data.get(priority_key, None)) is not None:
        buffer.update_priority(indices, priority)


def inverted_in(transform: Transform) -> Transform | None:
    """Returns the transform that ``append_transform(..., invert=True)`` wrapped in this one; None if there is none."""
    return transform.transform if isinstance(transform, _InvertTransform) else None


def reads_ids(sampler: SliceSampler) -> bool:
    """Returns whether a sampler tells episodes apart by trajectory ids, as far as it has looked at a storage."""
    return bool(sampler._fetch_traj)


def transforms_in(transform: Transform) -> list[Transform]:
    """Returns the parts of a buffer's transform, nested lists included, in order."""
    if type(transform).forward is Compose.forward:
        return [part for each in transform for part in transforms_in(each)]
    return [transform]


def sample_unit_of(buffer: ReplayBuffer) -> SampleUnit | None:
    """Returns the sample unit that a buffer expands drawn frames to; None if it has none."""
    unit: SampleUnit | None = buffer._sample_unit
    return unit
