"""CompactReplayBuffer: a buffer that keeps observations once, as the next frame holds a frame's next observation.

Owns which entries are kept once, and when final observations are written. Reaches into private attributes
of torchrl's buffers. May import torchrl, ``backends``, ``ends``, ``engine``, ``arriving`` and what it may.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from multistep_triton.backends import resolve_backend
from multistep_triton.buffer.arriving import ArrivingReplayBuffer
from multistep_triton.buffer.repeated import RepeatedCall
from multistep_triton.buffer.stored import Leaves, leaves_of
from multistep_triton.checks import check_positive_int
from multistep_triton.ends import Ends
from multistep_triton.engine import implementation_of
from multistep_triton.frames import Frames
from multistep_triton.layouts import KeyPath
from multistep_triton.roles import COUNT_PATH, Roles, as_key, as_path, find_twins, key_list, marks_of

SLOTS_PER_END = 16
"""Slots per row in the ring of final observations, unless ``end_slots`` is given."""


class CompactReplayBuffer(ArrivingReplayBuffer):
    """A buffer that may be ``compact``; if it is not, it stores all entries as they come."""

    _end_slots: int | None = None

    def _set_compact(self, compact: bool | Iterable[NestedKey], end_slots: int | None) -> None:
        """Checks and sets ``compact`` and ``end_slots``, once."""
        if isinstance(compact, bool):
            self._compact = compact
        else:
            paths = [as_path(key) for key in key_list("compact", compact, ())]
            self._compact = tuple([path[1:] if path[0] == "next" else path for path in paths])
            if not all(self._compact) or not self._compact:
                raise ValueError(f"compact must be True, False or keys of observations, got {compact!r}")
        if end_slots is not None:
            if not self._compact:
                raise ValueError(f"end_slots must be None without compact, got {end_slots!r}")
            check_positive_int("end_slots", end_slots)
        self._end_slots = end_slots

    @property
    def compact(self) -> bool | list[NestedKey]:
        """Whether observations are kept once, or the keys of those that are."""
        if isinstance(self._compact, bool):
            return self._compact
        return [as_key(path) for path in self._compact]

    @property
    def end_slots(self) -> int | None:
        """Rows for final observations per environment; None for one row for every 16 slots."""
        return self._end_slots

    def ends_lost(self) -> int:
        """Counts the stored ends of trajectories whose final observations are lost.

        Later ends have overwritten their rows, as an environment has more than ``end_slots`` ends. A window ends one
        frame before such an end. The host waits for the device.
        """
        self._begin()
        order = self._order
        if order.ends is None or (position := order.position()) is None:
            return 0
        return int(order.ends.lost(position.newest, position.live).sum())

    # What is kept

    def _ends(self) -> Ends | None:
        """Returns the storage's ends; if it holds frames, first checks that the ends fit them and the arguments."""
        order = self._order
        ends: Ends | None = order.ends
        if (ends is None and not self._compact) or order.stored() is None:
            return ends
        if ends is None:
            raise ValueError(
                f"storage must be empty, or filled by a buffer with compact={self.compact}, or loaded with what that "
                f"has saved, got one with frames that were stored otherwise"
            )
        if not self._compact:
            raise ValueError("compact must be True for a storage that keeps observations once, got False")
        if order.ends_keys != (by := self._ends_keys()):
            raise ValueError(
                f"done_key, done_keys, traj_key, mask_key and reward_keys must stay as they are while a storage keeps "
                f"observations once, whose ends they tell: {order.ends_keys}, got {by}; empty the buffer first"
            )
        position = order.position()
        if order.ends_writes != order.writes or (position is not None and position.newest != order.newest):
            raise RuntimeError(
                "storage must be written by buffers with compact alone, got frames of another writer, or of a write "
                "that failed, of which nobody kept what comes after them: empty the buffer"
            )
        return ends

    def _ends_keys(self) -> tuple[Any, ...]:
        """Returns the arguments that decide which frames are ends."""
        return self._done_key, [*self._done_keys], self._traj_key, self._mask_key, [*self._reward_keys]

    def _twins(self, roles: Roles, leaves: Leaves) -> list[KeyPath]:
        """Finds the twins that this buffer keeps once."""
        twins = find_twins(roles, leaves)
        if isinstance(self._compact, bool):
            return twins
        if none := [path for path in self._compact if ("next", *path) not in twins]:
            raise KeyError(
                f"compact must name entries that are under 'next', too, of the same dtype and shape, got {none}; there "
                f"are {[path[1:] for path in twins]}"
            )
        return [path for path in twins if path[1:] in self._compact]

    def _make_ends(self, leaves: dict[KeyPath, Tensor], dims: int) -> Ends:
        """Allocates the ends of a storage for data like leaves ``[T, *R, ...]``, with ``dims`` dimensions of frames."""
        if COUNT_PATH in leaves:
            raise ValueError(f"data must hold no entry {COUNT_PATH} with compact, which the buffer reads")
        roles = self._roles_in(leaves)
        twins = self._twins(roles, leaves)
        if not twins:
            raise KeyError(
                f"data must hold an entry under 'next' that is at the root, too, of the same dtype and shape, with "
                f"compact, or what comes after ends in a group 'final' (docs/buffer.md), got the entries {list(leaves)}"
            )
        entries = self._order.entries()
        if entries is not None and (there := [path for path in twins if entries.get(path, None) is not None]):
            raise ValueError(f"storage must have no room for {there} with compact, got one that was filled without it")
        _, *lead = leaves[twins[0]].shape[:dims]
        slots = self._slots(torch.Size(lead).numel()) or 1
        ends = -(-slots // SLOTS_PER_END) if self._end_slots is None else self._end_slots
        if ends > slots:
            raise ValueError(f"end_slots must be at most the slots of an environment, {slots}, got {ends}")
        return Ends(
            torch.zeros(slots, *lead, dtype=torch.int32, device=leaves[twins[0]].device),
            {path: leaves[path].new_empty(ends + 1, *leaves[path].shape[1:]) for path in twins},
            *marks_of(roles, leaves),
        )

    # Storing

    def _stored(self) -> tuple[TensorDictBase | None, Leaves]:
        (entries, leaves), ends = super()._stored(), self._ends()
        return entries, leaves if ends is None or self._order.stored() is None else {**leaves, **ends.rows}

    def _check_new(
        self, new: Leaves, stored: Leaves, data: TensorDictBase, time_dim: int | None, entries: TensorDictBase | None
    ) -> None:
        super()._check_new(new, stored, data, time_dim, entries)
        if self._compact and self._is_verified(data):
            frames = data.unsqueeze(0) if time_dim is None else data.transpose(0, time_dim) if time_dim else data
            ends, leaves, ended, newest = self._find_ended(frames)
            if newest is None:
                # No frame came before the first one, which thus continues no trajectory.
                ended[0] = True
            implementation_of("verify").check_kept_once(ends, leaves, ended)

    def _find_ended(self, frames: TensorDictBase) -> tuple[Ends, dict[KeyPath, Tensor], Tensor, int | None]:
        """Returns ends, leaves ``[T, *R, ...]``, whether the frame before each frame is an end, and the newest slot."""
        storage, order = self._storage, self._order
        position, entries, leaves = order.position(), order.entries(), Frames.read(frames).tensors
        known = self._ends()
        ends = known if known is not None and position is not None else self._make_ends(leaves, storage.ndim)
        if known is not None and known.kind == ends.kind:
            # A CUDA graph may have captured the tensors of ``known``.
            ends = known
        ring = {} if position is None or entries is None else leaves_of(entries, storage.ndim)
        newest = None if position is None else position.newest
        return ends, leaves, ends.find_ended(leaves, ring, newest), newest

    def _put(self, data: TensorDictBase, write: Callable[[TensorDictBase], Any]) -> Any:
        order = self._order
        if not self._compact:
            if order.stored() is None:
                order.ends = None
            return super()._put(data, write)
        ends, leaves, ended, newest = self._find_ended(data if data.ndim == self._storage.ndim else data.unsqueeze(0))
        slot = 0 if newest is None else (newest + 1) % len(ends.count)
        keep = ends.find_writes(leaves, ended, newest, slot)
        index = write(data.exclude(*ends.rows))
        # If ``keep`` fails, nobody knows which rows it has overwritten.
        order.ends_writes = -1
        keep()
        order.ends, order.ends_keys, order.ends_writes = ends, self._ends_keys(), order.writes
        return index

    def __setitem__(self, index: Any, value: Any) -> None:
        """Overwrites stored frames, as in torchrl; entries that are kept once raise a ValueError."""
        self._begin()
        ends, entries = self._order.ends, value if isinstance(value, TensorDictBase) else {}
        if ends is not None and (kept := [path for path in ends.rows if entries.get(path, None) is not None]):
            raise ValueError(
                f"data must not hold {kept}, which are kept once: what comes after a frame the next one holds"
            )
        super().__setitem__(index, value)

    def _find_repeated(self, data: TensorDictBase, time_dim: int) -> RepeatedCall | None:
        # "verify" checks what the user promises of observations in _check_new, which repeated calls skip.
        return None if self._compact and self._is_verified(data) else super()._find_repeated(data, time_dim)

    def _is_verified(self, data: TensorDictBase) -> bool:
        tensors = [leaf for leaf in data.values(True, True) if isinstance(leaf, Tensor)]
        return resolve_backend(self._backend, tensors) == "verify"

    def _adopt(self) -> None:
        super()._adopt()
        self._ends()
