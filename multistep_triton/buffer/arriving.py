"""ArrivingReplayBuffer: a buffer that narrows floats, and adds next observations to frames that come without them.

Reaches into private attributes of torchrl's buffers. May import torchrl, ``storing`` and what it may, and
``ends``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data.replay_buffers.samplers import PrioritizedSampler

from multistep_triton.buffer.stored import check_continues, check_dims, device_of, leaves_of, move_to
from multistep_triton.buffer.storing import StoringReplayBuffer
from multistep_triton.ends import Ends
from multistep_triton.frames import Frames
from multistep_triton.layouts import KeyPath
from multistep_triton.roles import as_key, as_path, check_key, marks_of

NARROW = torch.float16, torch.bfloat16, torch.float32
"""The dtypes that ``store_as`` may give."""


class ArrivingReplayBuffer(StoringReplayBuffer):
    """A buffer that converts frames, as they arrive, into the form in which they are stored."""

    _compact: bool | tuple[KeyPath, ...] = False
    """Whether all twins are kept once, or the paths at the root of those that are."""
    _store_as: Mapping[KeyPath, torch.dtype] = MappingProxyType({})

    def _set_store_as(self, store_as: Mapping[NestedKey, torch.dtype] | None) -> None:
        """Checks and sets ``store_as``, once."""
        if store_as is not None and not isinstance(store_as, Mapping):
            raise TypeError(f"store_as must be a dict of keys and dtypes, got {store_as!r}")
        if odd := [dtype for dtype in (store_as or {}).values() if dtype not in NARROW]:
            raise ValueError(f"store_as must have dtypes of {', '.join(map(str, NARROW))}, got {odd}")
        self._store_as = {as_path(check_key("store_as", key)): dtype for key, dtype in (store_as or {}).items()}

    @property
    def store_as(self) -> dict[NestedKey, torch.dtype]:
        """The narrower dtypes in which entries are stored, by key."""
        return {as_key(path): dtype for path, dtype in self._store_as.items()}

    def _extend(self, data: TensorDictBase, *, update_priority: bool = True) -> Tensor:
        if not self._compact:
            return super()._extend(data, update_priority=update_priority)
        with self._replay_lock:
            data, pending = self._completed(data)
            index = super()._extend(data, update_priority=update_priority)
            if pending is not None:
                self._order.pending = pending
        return index

    def _add(self, data: TensorDictBase) -> Any:
        waits = self._order.pending is not None or data.get("final", None) is not None
        if self._compact and waits and data.ndim == self._storage.ndim - 1:
            return self._extend(data.unsqueeze(self.dim_extend))
        return super()._add(data)

    def _completed(self, data: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase | None]:
        """Adds next observations to frames that lack them; returns these frames, and the newest one, which has to wait.

        Next observations are those of the next frame or, at an end, of the group "final". Returns other data with None.
        """
        dim, pending, group = self.dim_extend, self._order.pending, data.get("final", None)
        if not self._compact or (group is None and pending is None) or not data.batch_size.numel():
            return data, None
        check_dims(data, self._storage.ndim, self._storage.ndim)
        data = self._moved(data)
        self._check_final(data)
        if pending is not None:
            data = torch.cat([move_to(pending, device_of(data), data.device is not None), data], dim)
        leaves = {path: leaf.transpose(0, dim) for path, leaf in Frames.read(data).tensors.items()}
        marks, finals = marks_of(self._roles_in(leaves), leaves), [path for path in leaves if path[0] == "final"]
        ended = Ends(torch.empty(1, *leaves[finals[0]].shape[1 : data.ndim]), {}, *marks).find_ended(leaves, {}, None)
        whole = data.narrow(dim, 0, data.shape[dim] - 1).exclude("final")
        for path in finals:
            own, after = leaves[path[1:]], leaves[path]
            there = ended[1:].view(*ended[1:].shape, *[1] * (own.ndim - ended.ndim))
            whole.set(("next", *path[1:]), torch.where(there, after[:-1], own[1:]).transpose(0, dim))
        return whole, data.narrow(dim, data.shape[dim] - 1, 1).clone()

    def _check_final(self, data: TensorDictBase) -> None:
        """Checks the group "final" of frames without next observations, and that they continue the pending frame."""
        every, pending = leaves_of(data, data.batch_dims), self._order.pending
        finals = [path for path in every if path[0] == "final" and len(path) > 1]
        if not finals:
            raise KeyError(
                f"data must hold a group 'final', as that of the frames before, which came without what comes after "
                f"them, got the entries {list(every)}"
            )
        if self._capturable:
            raise ValueError("capturable must be False where frames come without what comes after them")
        if isinstance(self._sampler, PrioritizedSampler) and as_path(key := getattr(self, "priority_key", "")) in every:
            raise ValueError(
                f"data must hold no priorities, {key!r}, where frames come without what comes after them, as the "
                f"newest is stored with the next one: delete the entry, and update the priorities of what is sampled"
            )
        if objects := [path for path, leaf in every.items() if not isinstance(leaf, Tensor)]:
            raise TypeError(
                f"data must hold tensors alone where frames come without what comes after them, got {objects}"
            )
        for path in finals:
            leaf, root = every[path], every.get(path[1:])
            if root is None or (root.dtype, root.shape) != (leaf.dtype, leaf.shape):
                kinds = [None if each is None else (each.dtype, [*each.shape]) for each in (leaf, root)]
                raise ValueError(f"{path} must be of the dtype and shape of {path[1:]}, got {kinds[0]} and {kinds[1]}")
            if ("next", *path[1:]) in every:
                raise ValueError(
                    f"data must not hold both {path} and {('next', *path[1:])}, which comes after every frame"
                )
        if pending is None:
            # The newest frame is stored with the next one; what is wrong with it is to be said now.
            whole = data.exclude("final").copy()
            for path in finals:
                whole.set(("next", *path[1:]), data.get(path))
            whole, (entries, stored) = self._narrowed(whole), self._stored()
            super()._check_new(leaves_of(whole, whole.batch_dims), stored, whole, self.dim_extend, entries)
            return
        before = leaves_of(pending, pending.batch_dims)
        sizes = [[size for d, size in enumerate(each.shape) if d != self.dim_extend] for each in (data, pending)]
        if odd := sorted(every.keys() ^ before.keys()):
            raise KeyError(
                f"data must hold the entries of the frame before, which waits for it, got {odd} in one alone"
            )
        if sizes[0] != sizes[1]:
            raise ValueError(f"data must be of {sizes[1]} rows, as the frame before, got {sizes[0]}")
        check_continues(every, before, data.batch_dims, pending.batch_dims, "as in the frame before")

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
                # In a lazy stack, ``leaf`` belongs to one element alone.
                data.set(path, data.get(path).to(dtype))
        if odd := [path for path in wide if path[0] == "next" and wide.get(path[1:], wide[path]) != wide[path]]:
            raise ValueError(f"data must hold {odd} of the dtypes at the root, to be stored alike, got {wide}")
        if order.stored() is None:
            order.wide_dtypes = wide
        elif wide != {path: dtype for path, dtype in order.wide_dtypes.items() if path in leaves}:
            raise ValueError(
                f"store_as must be that of what is stored, whose entries came as {dict(order.wide_dtypes)} and others "
                f"as they lie there, got store_as={self.store_as} and data of {wide}"
            )
        return data
