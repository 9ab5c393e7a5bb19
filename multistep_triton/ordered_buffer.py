"""OrderedReplayBuffer: one whose frames are stored in order, and whole calls or none.

Owns the parts of a buffer, and what is stored; knows no windows. Reaches into private attributes of torchrl's buffers,
storages and writers. May import torchrl, ``stored``, ``storage_order`` and ``torchrl_internals``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer, ReplayBufferEnsemble, Storage, Writer
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.envs.transforms import Transform

from multistep_triton.storage_order import Order, order_of
from multistep_triton.stored import Leaves, Position, check_continues, check_dims, check_parts, leaves_of, versions_of
from multistep_triton.torchrl_internals import calls, transforms_in


def _collate_own(collate: Callable[[Any], Any], data: Any) -> Any:
    """Collates samples of a buffer's own; an ensemble's are single steps."""
    mixing = calls().get("mix")
    if mixing is not None and isinstance(mixing.f_locals["self"], ReplayBufferEnsemble):
        raise TypeError(
            "a ReplayBufferEnsemble reads single steps from the storages of its buffers, and must not have an "
            "NStepReplayBuffer: give it buffers with a MultiStepTransform each"
        )
    return collate(data)


class OrderedReplayBuffer(ReplayBuffer):
    """A replay buffer whose storage is a ring in time: its frames lie in the order in which they came.

    A base beside ``TensorDictReplayBuffer``, which calls ``_extend`` and ``_add`` when its transforms are through.
    """

    n_step_ordered = True
    """Tells the order that the writer is set to the storage's position before it writes."""

    def _check_data(
        self, data: TensorDictBase, time_dim: int | None, new: Leaves, stored: Leaves, is_filled: bool
    ) -> None:
        """Checks data before it is written; its leaves, those of the storage, and whether there are frames in it."""
        raise NotImplementedError

    def _check_transforms(self, transforms: list[Transform]) -> None:
        """Checks transforms that run when the buffer is sampled."""
        raise NotImplementedError

    def _check_neighbours(self) -> None:
        """Checks all that do, if they or arguments have changed since."""
        raise NotImplementedError

    def _check_room(self, rows: int | None = None) -> None:
        """Checks that the storage has slots enough for each of so many rows, where that is known."""
        raise NotImplementedError

    # Where frames lie

    @property
    def _order(self) -> Order:
        return order_of(self._storage)

    @property
    def _generator(self) -> torch.Generator | None:
        """What random numbers are drawn with."""
        generator: torch.Generator | None = self._storage._rng
        return generator

    def _slots(self, rows: int | None = None) -> int | None:
        """Slots of every environment, of which there are ``rows``; None if nobody can know yet."""
        if getattr(self, "_storage", None) is None:
            return None
        entries, storage = self._order.entries(), self._storage
        if entries is not None:
            return int(entries.shape[0])
        rows = 1 if storage.ndim == 1 else rows
        return None if rows is None else -(-int(storage.max_size) // max(rows, 1))

    # Parts

    def _init(self) -> None:
        super()._init()
        try:
            self._adopt()
            self._check_neighbours()
        except BaseException:
            self._initialized = False
            self._leave()
            raise

    def _adopt(self) -> None:
        """Takes over the storage, at whose position every writer goes on."""
        storage = self._storage
        check_parts(storage, self._writer, self._sampler)
        for other in storage._attached_entities:
            if other is not self:
                check_parts(storage, getattr(other, "_writer", None), getattr(other, "_sampler", None), True)
        if self.dim_extend >= storage.ndim:
            raise ValueError(f"dim_extend must be below the storage's ndim={storage.ndim}, got {self.dim_extend}")
        storage.attach(self)
        self._order.take_position()
        self._check_room()

    def _leave(self) -> None:
        """Is told no more of what is written into the storage."""
        entities = self._storage._attached_entities
        if self in entities:
            entities.remove(self)

    def _get_collate_fn(self, collate_fn: Callable[..., Any] | None) -> None:
        super()._get_collate_fn(collate_fn)
        self._collate_fn: Callable[[Any], Any] = partial(_collate_own, self._collate_fn)

    def set_storage(self, storage: Storage, collate_fn: Callable[..., Any] | None = None) -> Any:
        """Exchanges the storage, as in torchrl, and goes on at its position; its sampler begins anew.

        Raises:
            TypeError: the frames of the storage lie in no order.
        """
        check_parts(storage, self.writer, self.sampler)
        before, dim_extend, collate = self._storage, self.dim_extend, self._collate_fn

        def put(storage: Storage, dim_extend: int) -> None:
            self._leave()
            super(OrderedReplayBuffer, self).set_storage(storage, collate_fn)
            # What torchrl leaves as it was.
            self._dim_extend = dim_extend
            self._writer.register_storage(storage)
            self._adopt()

        with self._futures_lock, self._replay_lock:
            self._clear_prefetch_queue_locked()
            try:
                put(storage, dim_extend if storage.ndim == before.ndim else storage.ndim - 1)
            except BaseException:
                try:
                    put(before, dim_extend)
                finally:
                    self._collate_fn = collate
                raise
            self._sampler._empty()
            self.set_rng(self._rng)
        return before

    def set_writer(self, writer: Writer) -> Any:
        """Exchanges the writer, as in torchrl; the new one goes on after the newest frame of the storage.

        Raises:
            TypeError: it does not store in order.
        """
        check_parts(self.storage, writer, self.sampler)
        with self._replay_lock:
            before = super().set_writer(writer)
            self._order.take_position()
        return before

    def set_sampler(self, sampler: Sampler) -> Any:
        """Exchanges the sampler, as in torchrl; one that consumes or alters what it samples is a TypeError."""
        check_parts(self.storage, self.writer, sampler)
        return super().set_sampler(sampler)

    def append_transform(self, transform: Transform, *, invert: bool = False) -> ReplayBuffer:
        """Appends a transform, as in torchrl; one that is wrong beside windows is a ValueError."""
        self._check_given(transform, invert)
        return super().append_transform(transform, invert=invert)

    def insert_transform(self, index: int, transform: Transform, *, invert: bool = False) -> ReplayBuffer:
        """Inserts a transform, as in torchrl; one that is wrong beside windows is a ValueError."""
        self._check_given(transform, invert)
        return super().insert_transform(index, transform, invert=invert)

    def _check_given(self, transform: Any, invert: bool) -> None:
        if isinstance(transform, Transform) and not invert:
            self._check_transforms(transforms_in(transform))

    # Storing

    def _extend(self, data: TensorDictBase, *, update_priority: bool = True) -> Tensor:
        ndim, time_dim = self._storage.ndim, self.dim_extend
        check_dims(data, ndim, ndim)
        frames = data.shape[time_dim]
        if not data.batch_size.numel():
            return torch.zeros((0, ndim) if ndim > 1 else (0,), dtype=torch.long)

        def write() -> Tensor:
            # Of several frames for one slot, torch might keep any.
            slots = self._slots(data.numel() // frames) or 1
            indices = []
            for part in data.split(slots, time_dim) if frames > slots else [data]:
                indices.append(self._writer.extend(part.transpose(time_dim, 0) if time_dim else part))
                self._sampler.extend(indices[-1])
            return indices[0] if len(indices) == 1 else torch.cat(indices)

        stored: Tensor = self._write(write, data, time_dim, frames)
        return stored

    def _add(self, data: TensorDictBase) -> Any:
        check_dims(data, self._storage.ndim - 1, self._storage.ndim)
        if self.dim_extend > 1:
            # As extend lays out a frame of every environment.
            data = data.unsqueeze(self.dim_extend).transpose(self.dim_extend, 0)[0]

        def write() -> Any:
            index = self._writer.add(data)
            self._sampler.add(index)
            return index

        return self._write(write, data, None, 1)

    def _write(self, write: Callable[[], Any], data: TensorDictBase, time_dim: int | None, frames: int) -> Any:
        """Checks data, and writes it at the storage's position; where that fails, the newest frame stays the newest."""
        with self._replay_lock, self._write_lock:
            order, storage, writer = self._order, self._storage, self._writer
            entries = order.entries()
            stored = {} if entries is None else leaves_of(entries, storage.ndim)
            self._check_new(leaves_of(data, data.batch_dims), stored, data, time_dim, entries)
            position = order.take_position()
            versions, count = versions_of(stored), getattr(writer, "_write_count", None)
            before = len(storage), storage._last_cursor_index
            try:
                index = write()
            except BaseException:
                storage._len = before[0]
                order.set_last(before[1])
                if count is not None:
                    writer._write_count = count
                order.take_position()
                if None in versions or versions != versions_of(stored):
                    self._tear(position, frames)
                raise
        return index

    def _check_new(
        self, new: Leaves, stored: Leaves, data: TensorDictBase, time_dim: int | None, entries: TensorDictBase | None
    ) -> None:
        ndim, dims = self._storage.ndim, data.batch_dims
        self._check_data(data, time_dim, new, stored, bool(len(self._storage)))
        if entries is None:
            return
        batch = [*data.shape]
        if time_dim is not None:
            batch[0], batch[time_dim] = batch[time_dim], batch[0]
            del batch[0]
        rows = [*entries.shape[1:ndim]]
        if batch != rows:
            raise ValueError(f"data must be of {rows} rows, as what is stored, got {batch}")
        check_continues(new, stored, dims, ndim)

    def _tear(self, position: Position | None, frames: int) -> None:
        """Remembers the slots of frames that a write of more has overwritten in part."""
        if position is None:
            return
        free = position.slots - position.live
        if (torn := min(frames - free, position.live)) > 0:
            order = self._order
            order.torn = (position.newest + 1 + free) % position.slots, max(torn, order.torn[1])

    def empty(self, empty_write_count: bool = True) -> None:
        """Empties the buffer, and drops what was prefetched from it."""
        with self._futures_lock:
            self._clear_prefetch_queue_locked()
            super().empty(empty_write_count)
            self._order.take_position()
