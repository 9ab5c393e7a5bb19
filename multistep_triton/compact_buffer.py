"""CompactReplayBuffer: one that keeps observations once, as what comes after a frame is what the next one holds.

Owns which entries are kept once, or as narrower dtypes, and when rows of what comes after an end are written. Reaches
into private attributes of torchrl's buffers and writers. May import torchrl, ``ends``, ``storing_buffer`` and what it
may, and ``roles``.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from multistep_triton.backends import resolve_backend
from multistep_triton.checks import check_positive_int
from multistep_triton.ends import Ends
from multistep_triton.engine import check_kept_once
from multistep_triton.frames import KeyPath
from multistep_triton.roles import COUNT_PATH, Roles, as_path, key_list
from multistep_triton.stored import Leaves, leaves_of
from multistep_triton.storing import Seen
from multistep_triton.storing_buffer import StoringReplayBuffer

NARROW = torch.float16, torch.bfloat16, torch.float32
"""What entries can be stored as."""
SLOTS_PER_END = 16
"""Slots for which there is one row of what comes after an end, unless told."""


def find_twins(roles: Roles, leaves: Leaves) -> list[KeyPath]:
    """The entries under "next" that can be kept once: no rewards or flags, and alike at the root."""

    def is_twin(path: KeyPath, leaf: Any) -> bool:
        twin = leaves.get(path[1:]) if path[0] == "next" and len(path) > 1 else None
        if not isinstance(leaf, Tensor) or not isinstance(twin, Tensor) or roles.is_role(path, leaf):
            return False
        above = any(path[: len(done)] == done for done in roles.dones)
        return not above and (leaf.dtype, leaf.shape) == (twin.dtype, twin.shape)

    return [path for path, leaf in leaves.items() if is_twin(path, leaf)]


def marks_of(roles: Roles, leaves: Leaves) -> tuple[tuple[KeyPath, ...], KeyPath | None, KeyPath | None]:
    """What tells ends: the done flags of all groups, and mask and trajectory ids, if there are such."""
    mask, traj = (path if path in leaves else None for path in (roles.mask, roles.traj))
    return tuple([path for path, leaf in leaves.items() if roles.is_flag(path, leaf)]), mask, traj


class CompactReplayBuffer(StoringReplayBuffer):
    """One that may be ``compact``; if it is not, all entries are stored as they come."""

    _compact: bool | tuple[KeyPath, ...] = False
    """Whether all entries are kept once that can be, or which ones, by their paths at the root."""
    _end_slots: int | None = None
    _store_as: Mapping[KeyPath, torch.dtype] = MappingProxyType({})

    def _roles_in(self, entries: Container[KeyPath]) -> Roles:
        """The roles in data of these entries."""
        raise NotImplementedError

    def _set_compact(
        self,
        compact: bool | Iterable[NestedKey],
        end_slots: int | None,
        store_as: Mapping[NestedKey, torch.dtype] | None,
    ) -> None:
        """Sets the arguments, which are not set again."""
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
        if store_as is not None and not isinstance(store_as, Mapping):
            raise TypeError(f"store_as must be a dict of keys and dtypes, got {store_as!r}")
        if odd := [dtype for dtype in (store_as or {}).values() if dtype not in NARROW]:
            raise ValueError(f"store_as must have dtypes of {', '.join(map(str, NARROW))}, got {odd}")
        self._store_as = {as_path(key): dtype for key, dtype in (store_as or {}).items()}

    @property
    def compact(self) -> bool | list[NestedKey]:
        """Whether observations are kept once, or which ones."""
        if isinstance(self._compact, bool):
            return self._compact
        return [path[0] if len(path) == 1 else path for path in self._compact]

    @property
    def store_as(self) -> dict[NestedKey, torch.dtype]:
        """The dtypes that entries are stored as, of those that come as others."""
        return {path[0] if len(path) == 1 else path: dtype for path, dtype in self._store_as.items()}

    def ends_lost(self) -> int:
        """How many ends of trajectories among the frames that are stored have lost what comes after them.

        Of those the rows were overwritten by those of later ends, as there are more than ``end_slots`` of an
        environment. A window ends one frame earlier there. Waits for the device.
        """
        order = self._order
        if order.ends is None or (position := order.position()) is None:
            return 0
        return int(order.ends.lost(position.newest, position.live).sum())

    # What is kept

    def _ends(self) -> Ends | None:
        """Those of the storage; after checks that they are what its frames need."""
        order = self._order
        ends: Ends | None = order.ends
        if ends is None:
            if self._compact and order.stored() is not None:
                raise ValueError(
                    f"storage must be empty, or filled by a buffer with compact={self.compact}, or loaded with what "
                    f"that has saved, got one with frames that were stored otherwise"
                )
            return None
        if not self._compact:
            raise ValueError("compact must be True for a storage that keeps observations once, got False")
        if order.kept_by != (by := self._kept_by()):
            raise ValueError(
                f"done_key, done_keys, traj_key, mask_key and reward_keys must stay as they are while a storage keeps "
                f"observations once, whose ends they tell: {order.kept_by}, got {by}; empty the buffer first"
            )
        if order.kept_writes != order.writes:
            raise RuntimeError(
                "storage must be written by buffers with compact alone, got frames of another writer, of which nobody "
                "kept what comes after them: empty the buffer"
            )
        return ends

    def _kept_by(self) -> tuple[Any, ...]:
        """The arguments that tell which frames are ends."""
        names = ("done_key", "done_keys", "traj_key", "mask_key", "reward_keys")
        return tuple([repr(getattr(self, f"_{name}")) for name in names])

    def _twins(self, roles: Roles, leaves: Leaves) -> list[KeyPath]:
        """The entries under "next" that are kept once."""
        twins = find_twins(roles, leaves)
        if isinstance(self._compact, bool):
            return twins
        if none := [path for path in self._compact if ("next", *path) not in twins]:
            raise KeyError(
                f"compact must name entries that are under 'next', too, of the same dtype and shape, got {none}; there "
                f"are {[path[1:] for path in twins]}"
            )
        return [path for path in twins if path[1:] in self._compact]

    def _make_ends(self, leaves: dict[KeyPath, Tensor], dims: int) -> Ends | None:
        """Room for what comes after ends in data ``[T, *R]``; None if nothing is kept once."""
        if COUNT_PATH in leaves:
            raise ValueError(f"data must hold no entry {COUNT_PATH} with compact, which the buffer reads")
        roles = self._roles_in(leaves)
        twins = self._twins(roles, leaves)
        if not twins:
            raise KeyError(
                f"data must hold an entry under 'next' that is at the root, too, of the same dtype and shape, with "
                f"compact, got the entries {list(leaves)}"
            )
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

    def _extend(self, data: TensorDictBase, *, update_priority: bool = True) -> Tensor:
        data, waiting = self._completed(data)
        index = super()._extend(data, update_priority=update_priority)
        if waiting is not None:
            self._order.waiting = waiting
        return index

    def _add(self, data: TensorDictBase) -> Any:
        if self._compact and data.ndim == self._storage.ndim - 1 and "final" in data.keys():  # noqa: SIM118
            return self._extend(data.unsqueeze(self.dim_extend))
        return super()._add(data)

    def _completed(self, data: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase | None]:
        """Frames with what comes after them, of frames without, and the newest, which waits until the next has come.

        What comes after ends is then the entries of the group "final".
        """
        order, dim = self._order, self.dim_extend
        waiting: TensorDictBase | None = order.waiting
        if not self._compact or (data.get("final", None) is None and waiting is None) or not data.numel():
            return data, None
        leaves = leaves_of(data, data.batch_dims)
        finals = [path for path in leaves if path[0] == "final" and ("next", *path[1:]) not in leaves]
        if waiting is not None and sorted(leaves) != sorted(leaves_of(waiting, waiting.batch_dims)):
            raise KeyError(
                f"data must hold the entries of the frames before, which came without what comes after them, "
                f"got {list(leaves)}"
            )
        if getattr(self, "_capturable", False):
            raise ValueError("capturable must be False where frames come without what comes after them")
        if waiting is not None:
            data = torch.cat([waiting, data], dim)
        leaves = {path: leaf.transpose(0, dim) for path, leaf in leaves_of(data, data.batch_dims).items()}
        marks = marks_of(self._roles_in(leaves), leaves)
        lead = leaves[finals[0]].shape[1 : data.ndim]
        ended = Ends(torch.empty(1, *lead), {}, *marks).find_ended(leaves, {}, None)[1:]
        whole = data.narrow(dim, 0, data.shape[dim] - 1).exclude("final")
        for path in finals:
            own, after = leaves[path[1:]], leaves[path]
            there = ended.view(*ended.shape, *[1] * (own.ndim - ended.ndim))
            whole.set(("next", *path[1:]), torch.where(there, after[:-1], own[1:]).transpose(0, dim))
        return whole, data.narrow(dim, data.shape[dim] - 1, 1).clone()

    def empty(self, empty_write_count: bool = True) -> None:
        """Empties the buffer, as in torchrl."""
        self._order.waiting = None
        super().empty(empty_write_count)

    def _narrowed(self, data: TensorDictBase) -> TensorDictBase:
        if not self._store_as:
            return data
        leaves, order, wide = leaves_of(data, data.batch_dims), self._order, dict[KeyPath, torch.dtype]()
        roles, data = self._roles_in(leaves), data.copy()
        for named, dtype in self._store_as.items():
            paths = [path for path in dict.fromkeys((named, ("next", *named))) if path in leaves]
            if not paths:
                raise KeyError(f"store_as must name entries of the data, got {named}, which has {list(leaves)}")
            for path in paths:
                leaf = leaves[path]
                is_wide = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.itemsize > dtype.itemsize
                if roles.is_role(path, leaf) or not is_wide:
                    got = leaf.dtype if isinstance(leaf, Tensor) else "a non-tensor"
                    raise ValueError(
                        f"store_as must name entries of wider floating dtypes that are no rewards, got {path} of {got} "
                        f"for {dtype}"
                    )
                wide[path] = leaf.dtype
                data.set(path, leaf.to(dtype))
        if order.stored() is None:
            order.wide = wide
        elif wide != order.wide:
            raise ValueError(f"data must hold dtypes as what is stored came as, {dict(order.wide)}, got {wide}")
        return data

    def _put(self, data: TensorDictBase, write: Callable[[TensorDictBase], Any]) -> Any:
        if not self._compact:
            return super()._put(data, write)
        storage, order = self._storage, self._order
        frames = data if data.ndim == storage.ndim else data.unsqueeze(0)
        ends, position, entries = self._ends(), order.position(), order.entries()
        # Where it is to lie nobody but the storage knows before it has stored something.
        to = storage.device if isinstance(storage.device, torch.device) else None
        leaves = {path: leaf for path, leaf in leaves_of(frames, storage.ndim).items() if isinstance(leaf, Tensor)}
        leaves = {path: leaf.to(to or leaf.device) for path, leaf in leaves.items()}
        made = ends or self._make_ends(leaves, storage.ndim)
        ring = {} if position is None or entries is None else leaves_of(entries, storage.ndim)
        newest = None if position is None else position.newest
        slot = 0 if position is None else (position.newest + 1) % position.slots
        ended = made.find_ended(leaves, ring, newest)
        # Before the first frame there is none whose trajectory it would go on with.
        begun = ended if newest is not None else torch.cat((torch.ones_like(ended[:1]), ended[1:]))
        check_kept_once(made, leaves, begun, self._backend)
        keep = made.find_writes(leaves, ended, newest, slot)
        index = write(data.exclude(*[path for path in made.rows]))
        keep()
        order.ends, order.kept_by, order.kept_writes = made, self._kept_by(), order.writes
        return index

    def _find_seen(self, data: TensorDictBase, time_dim: int) -> Seen | None:
        # What is promised of observations is verified where frames are stored call by call.
        is_verified = self._compact and resolve_backend(self._backend, data.values(True, True)) == "verify"
        return None if is_verified else super()._find_seen(data, time_dim)

    def _adopt(self) -> None:
        super()._adopt()
        self._ends()
