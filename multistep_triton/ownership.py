"""Ties a transform to the one replay buffer whose stream it holds back, and checks what shares that buffer.

May import ``carrying``, ``neighbours``, ``roles``, ``stored`` and ``torchrl_internals``.
"""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer

from multistep_triton.buffer.stored import check_time_dim
from multistep_triton.carrying import CarryingTransform
from multistep_triton.neighbours import (
    check_around,
    check_holds_n_steps,
    check_mixing,
    check_order,
    check_transforms,
    facts_of,
)
from multistep_triton.roles import TRAJ_PATH
from multistep_triton.torchrl_internals import (
    Calls,
    check_trainer,
    sample_unit_of,
    taking_buffer,
    transforms_in,
    using_buffer,
)

if TYPE_CHECKING:
    from typing_extensions import Self


class OwnedTransform(CarryingTransform):
    """A transform that belongs to one replay buffer; a new copy belongs to none."""

    _owner: weakref.ref[ReplayBuffer] | None = None
    """The buffer whose stream this transform holds back; None if it belongs to none."""
    _checked: tuple[Any, ...] | None = None
    """The facts on which :meth:`_check_owner` last found the buffer right; None before that."""

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
        check_trainer(calling, roles.dones)
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

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without the owner and what was checked of it."""
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name not in ("_owner", "_checked")}

    def clone(self) -> Self:
        """Returns a copy without parent, container and owner, with its own copy of the frames held back."""
        twin = super().clone()
        twin._owner = twin._checked = None
        return twin
