"""A transform that carries frames of one replay buffer from call to call: it saves, moves and copies them.

Owns whose stream it is, and checks what shares that buffer. May import ``base``, ``carry``, ``checks``, ``frames``,
``neighbours``, ``roles``, ``stored`` and ``torchrl_internals``.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer
from torchrl.envs.transforms import Transform
from typing_extensions import Self

from multistep_triton.base import MultiStepBase
from multistep_triton.buffer.stored import check_time_dim
from multistep_triton.carry import Carry
from multistep_triton.checks import check_gamma, check_positive_int
from multistep_triton.frames import frames_of, from_state, moved, to_state
from multistep_triton.neighbours import (
    check_around,
    check_holds_n_steps,
    check_mixing,
    check_order,
    check_trainer,
    check_transforms,
    facts_of,
)
from multistep_triton.roles import TRAJ_PATH
from multistep_triton.torchrl_internals import Calls, sample_unit_of, taking_buffer, transforms_in, using_buffer


class CarryingTransform(MultiStepBase, Transform):
    """A transform that holds back the last frames of one replay buffer's stream; a copy belongs to no buffer."""

    _owner: weakref.ref[ReplayBuffer] | None = None
    """The buffer whose stream this transform holds back; None if it belongs to none."""
    _checked: tuple[Any, ...] | None = None
    """The facts on which :meth:`_check_owner` last found the buffer right; None before that."""
    # Every call replaces the carry; the frames of the replaced one stay intact until the next call only.
    _carry: Carry | None = None

    def __init__(self) -> None:
        super().__init__()
        # The transform needs a lock, as a replay buffer calls its transforms outside its own.
        self._lock = threading.RLock()

    @property
    def frames_held(self) -> int:
        """The number of frames held back of every row: at most ``n_steps`` as of the last call."""
        carry = self._carry  # reads it once, as a call in another thread may replace it
        return 0 if carry is None else carry.count

    def _said(self) -> list[str]:
        return [*super()._said(), f"frames_held={self.frames_held}"]

    def clear(self) -> None:
        """Drops the frames held back."""
        with self._lock:
            self._carry = None

    def get_extra_state(self) -> dict[str, Any]:
        """Returns the state that :meth:`state_dict` holds: the frames held back, ``n_steps`` and ``gamma``.

        Raises:
            TypeError: a non-tensor entry holds objects that ``torch.load`` refuses with ``weights_only=True``.
        """
        with self._lock:
            carry = None if self._carry is None else to_state(self._carry)
            return {"n_steps": int(self._n_steps), "gamma": float(self._gamma), "carry": carry}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores the state that :meth:`get_extra_state` returned; the next call continues its stream."""
        if not isinstance(state, dict) or state.keys() != {"n_steps", "gamma", "carry"}:
            raise ValueError(f"the state must be one of a MultiStepTransform, got {state!r:.200}")
        n_steps, gamma = check_positive_int("n_steps", state["n_steps"]), check_gamma(state["gamma"])
        carry = None if state["carry"] is None else from_state(state["carry"])
        with self._lock:
            self._n_steps, self._gamma, self._carry = n_steps, gamma, carry

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        _, _, missing_keys, *_ = arguments
        # torchrl's class saves no such entry: a transform that holds back no frames may load its state.
        if self._carry is None and (key := f"{prefix}_extra_state") in missing_keys:
            missing_keys.remove(key)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the frames held back to the device that ``fn`` moves tensors to; they keep the dtypes of the data."""
        super()._apply(fn, recurse)
        with self._lock:
            if self._carry is not None:
                self._carry = moved(
                    self._carry, lambda leaf: fn(torch.empty(0, dtype=torch.bool, device=leaf.device)).device
                )
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without lock and owner, and with a copy of the frames held back.

        A process that is being spawned, such as a collector's worker, begins a stream of its own and gets no frames:
        otherwise each of several workers would emit the same frames again.
        """
        with self._lock:
            state: dict[str, Any] = super().__getstate__()
            state["_carry"] = self._carry and self._carry.compact() if get_spawning_popen() is None else None
        return {name: value for name, value in state.items() if name not in ("_lock", "_owner", "_checked")}

    def clone(self) -> Self:
        """Returns a copy without parent, container and owner, with its own copy of the frames held back."""
        with self._lock:
            twin: Self = super().clone()
            twin._carry = self._carry and self._carry.compact()
        twin._lock, twin._owner, twin._checked = threading.RLock(), None, None
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores the state that :meth:`__getstate__` returned, with a new lock."""
        super().__setstate__({**state, "_lock": threading.RLock()})

    @property
    def _buffer(self) -> TensorDict | None:
        """A copy of the frames held back, under the name that torchrl's class gives them."""
        with self._lock:
            frames = None if self._carry is None else frames_of(self._carry)
        return None if frames is None else frames.structure.build(frames.leaves, frames.batch_size)

    # Whose stream it is

    def train(self, mode: bool = True) -> Self:
        """Sets the mode as in torch; a replay buffer that takes the transform calls this, and becomes its owner.

        Raises:
            ValueError: the transform belongs to another buffer, holds back its frames, or would be wrong in this one.
        """
        super().train(mode)
        if (taking := taking_buffer()) is not None:
            buffer, inverted = taking
            if inverted:
                raise ValueError("invert must be False for an n-step transform, which runs when a buffer is extended")
            with self._lock:
                self._join(buffer)
        return self

    def _join(self, buffer: ReplayBuffer) -> None:
        owner = self._find_owner()
        if owner not in (None, buffer):
            # The other buffer may be garbage that Python has not collected yet.
            del owner
            gc.collect()
            owner = self._find_owner()
        # Torchrl asks twice before it appends a transform to its list.
        is_known = self._owner is None or owner is buffer or self._owner() is buffer
        if owner not in (None, buffer) or (not is_known and self._carry is not None):
            remedy = "clear() it, as the other one is gone" if owner is None else "give each a transform of its own"
            raise ValueError(
                f"a MultiStepTransform must belong to one replay buffer, as it holds back frames of one stream, got a "
                f"second one: {remedy}"
            )
        # Assumes that the data holds ids, and skips transforms, which the buffer may lack as yet: calls check both.
        check_around(buffer, sample_unit_of(buffer), self._roles_in(()), True)
        self._owner, self._checked = weakref.ref(buffer), None

    def _find_owner(self) -> ReplayBuffer | None:
        """Returns the owner; None if it is gone, is not initialized, or no longer has the transform in its list."""
        owner = None if self._owner is None else self._owner()
        if owner is None or not owner.initialized or self not in transforms_in(owner.transform):
            return None
        return owner

    def _check_owner(self, data: TensorDictBase, calling: Calls) -> None:
        """Checks what shares the buffer with this transform, unless nothing has changed since the last check.

        A copy that belongs to no buffer, such as a worker's, joins the buffer that calls it.
        """
        if not calling and self._owner is None:
            return  # no buffer uses this transform
        roles = self._roles_in(())
        check_mixing(calling, roles)
        check_trainer(self)
        buffer, caller = self._find_owner(), using_buffer(calling, self)
        if caller is not None and caller is not buffer:
            self._join(caller)
            buffer = caller
        if buffer is None:
            return
        if "extend" in calling and caller is not None:
            check_time_dim(data, buffer.storage, buffer.dim_extend)
            if not data.ndim:
                raise ValueError(
                    "data must be of batch size [*B, T] to extend a buffer, got [], a single frame: add it, or extend "
                    "with data.unsqueeze(-1)"
                )
        elif ("add" in calling or "put" in calling) and buffer.storage.ndim > 2:
            raise ValueError(
                f"data must be extended, as data.unsqueeze(-1), with a storage of ndim={buffer.storage.ndim}, whose "
                f"environments torchrl's add and extend put in different orders, got add"
            )
        entries = data.keys(True)
        ids = any(key in entries for key in (TRAJ_PATH, "episode"))
        transforms, unit = transforms_in(buffer.transform), sample_unit_of(buffer)
        parts = map(facts_of, (buffer.sampler, unit, buffer.storage.checkpointer, *transforms))
        keys = *self._reward_keys, self._done_key, *self._done_keys
        checked = (*parts, bool(len(buffer.storage)), ids, self._done_at, *keys)
        if checked == self._checked:
            return
        if transforms.count(self) > 1:
            raise ValueError(
                "a MultiStepTransform must be in a buffer's list once, got it twice: leave one of them out"
            )
        check_around(buffer, unit, roles, ids)
        check_transforms([each for each in transforms if each is not self], roles)
        check_order(transforms[: transforms.index(self)] if self in transforms else [], roles)
        check_holds_n_steps(buffer)
        self._checked = checked
