"""StoringReplayBuffer: a buffer that stores frames in order, the frames of a call wholly or not at all.

Owns which frames may be stored, and how: by torchrl's writer or, in repeated calls, by the engine. Reaches into private
attributes of torchrl's buffers, storages and writers. May import torchrl, ``ordered`` and what it may, ``checks``,
``layouts``, ``frames``, ``roles``, ``samples``, ``repeated`` and ``engine``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from multistep_triton.buffer.ordered import OrderedReplayBuffer
from multistep_triton.buffer.repeated import RepeatedCall, repeated_call
from multistep_triton.buffer.stored import (
    Leaves,
    Position,
    check_continues,
    check_dims,
    device_of,
    leaves_of,
    move_to,
    versions_of,
)
from multistep_triton.checks import check_not_captured
from multistep_triton.engine import store_frames
from multistep_triton.frames import Frames
from multistep_triton.layouts import KeyPath, without_leftovers
from multistep_triton.neighbours import check_trainer
from multistep_triton.roles import check_entries, check_single_steps
from multistep_triton.samples import Ring
from multistep_triton.torchrl_internals import calls, refuse_other_ways


class StoringReplayBuffer(OrderedReplayBuffer):
    """A replay buffer that writes after its storage's newest frame, whichever buffer wrote that."""

    _repeated: RepeatedCall | None = None
    """A stored call; the engine stores calls like it directly. None if torchrl's writer must store the next call."""
    _checked = -1
    """The value of ``_changes`` when data was last checked."""

    def _check_call(self) -> None:
        """Checks that frames may be stored by the functions that are calling, whatever the data and the transforms."""
        refuse_other_ways(calls(self))
        check_trainer(self)
        if not self._capturable:
            check_not_captured("extend")

    def _extend(self, data: TensorDictBase, *, update_priority: bool = True) -> Tensor:
        if self._repeated is not None:
            self._check_neighbours()
            if (index := self._extend_repeated(data)) is not None:
                return index
        given = self._moved(without_leftovers(data))
        if given is not data and (index := self._extend_repeated(given)) is not None:
            return index
        ndim, time_dim, data = self._storage.ndim, self.dim_extend, given
        check_dims(data, ndim, ndim)
        frames = data.shape[time_dim]
        if not data.batch_size.numel():
            return torch.zeros((0, ndim) if ndim > 1 else (0,), dtype=torch.long, device="cpu")
        data = self._narrowed(data)

        def put(part: TensorDictBase) -> Tensor:
            # The writer sets "index" in what it stores.
            index: Tensor = self._writer.extend(part.copy() if part is given else part)
            self._sampler.extend(index)
            return index

        def write() -> Tensor:
            # torch may keep any of several frames for one slot, so that no part has more frames than slots.
            slots = self._slots(data.numel() // frames) or 1
            indices = []
            for part in data.split(slots, time_dim) if frames > slots else [data]:
                part = part.transpose(time_dim, 0) if time_dim else part
                if not self._storage.initialized and type(part) is TensorDict:
                    # torchrl allocates entries in the memory layout of the first frames.
                    part = part.apply(Tensor.contiguous)
                indices.append(self._put(part, put))
            return indices[0] if len(indices) == 1 else torch.cat(indices)

        stored: Tensor = self._write(write, data, time_dim, frames)
        with self._replay_lock:
            self._repeated = self._find_repeated(given, time_dim)
        return stored

    def _moved(self, data: TensorDictBase) -> TensorDictBase:
        """Returns data where the storage's leaves lie or, if it has neither these nor a device, where its own do."""
        device, told = self._place()
        return move_to(data, device or device_of(data), told)

    def _place(self) -> tuple[torch.device | None, bool]:
        """Returns where the storage's leaves lie or will lie, if it is known, and whether their tensordict says so."""
        entries, device = self._order.entries(), self._storage.device
        if entries is not None:
            # torchrl's writer makes the index where data says it lies, and the storage its entry where that says so.
            return device_of(entries), entries.device is not None
        return device if isinstance(device, torch.device) else None, True

    def _narrowed(self, data: TensorDictBase) -> TensorDictBase:
        """Returns data in the dtypes in which it is stored."""
        return data

    def _put(self, data: TensorDictBase, write: Callable[[TensorDictBase], Any]) -> Any:
        """Writes frames ``[T, *R]``, or a single one ``[*R]``, at the writer's cursor."""
        return write(data)

    def _find_repeated(self, data: TensorDictBase, time_dim: int) -> RepeatedCall | None:
        """Returns what to remember of a call that was just stored; see :func:`repeated_call`."""
        return repeated_call(data, self._order, self._writer, time_dim, getattr(self, "priority_key", ""))

    def _extend_repeated(self, data: TensorDictBase) -> Tensor | None:
        """Stores data like that of the remembered call; returns None if all checks and torchrl's writer are needed."""
        call = self._repeated
        if call is None or (leaves := call.read(data)) is None:
            return None
        with self._replay_lock, self._write_lock:
            order = self._order
            # Other writers may have added entries, or track generations, which this path does not count.
            known = call.entries is order.entries() and call.other_writes == order.changes()
            if not known or self._writer._generation is not None:
                return None
            self._check_call()
            return self._store(call, leaves, data.batch_size[call.ring.time_dim])

    def _store(self, call: RepeatedCall, leaves: dict[KeyPath, Tensor], frames: int) -> Tensor | None:
        """Stores frames like those of ``call``; returns the index, or None for 0 or more than ``call.most`` frames."""
        order, storage, writer = self._order, self._storage, self._writer
        position = order.position()
        if position is None or not 0 < frames <= call.most:
            return None

        kept, rows = [] if order.ends is None else order.ends.rows.values(), storage.max_size // position.slots
        stored = [*call.ring.leaves.values(), *kept]
        count, index = writer._write_count, None
        before = position.live * rows, position.newest, order.writes, order.torn, count, versions_of(stored)
        try:
            index = self._store_at(call, leaves, (position.newest + 1) % position.slots)
            order.advance(position, frames, writer)
            for entity in storage._attached_entities:
                if entity is not order:
                    entity.mark_update(index)
            self._sampler.extend(index)
        except BaseException:
            # torch's version counters do not count what kernels write.
            wrote = index is not None
            if wrote or before[-1][len(call.ring.leaves) :] != versions_of(kept):
                # The row for the newest frame now belongs to a frame that is not stored.
                order.ends_writes = -1
            self._undo(before, position, stored, frames, wrote)
            raise
        return index

    def _store_at(self, call: RepeatedCall, leaves: dict[KeyPath, Tensor], slot: int | Tensor) -> Tensor:
        """Stores frames from ``slot`` on, and returns their index in the form in which a writer returns it."""
        # Quicker than _replace.
        index = store_frames(leaves, Ring(*call.ring[:-1], self._order.ends), slot, self._backend)
        return index if call.ring.dims > 1 else index.squeeze(1)

    def _add(self, data: TensorDictBase) -> Any:
        check_dims(data, self._storage.ndim - 1, self._storage.ndim)
        if self.dim_extend > 1:
            # The order of dimensions in which extend stores one frame of every environment.
            data = data.unsqueeze(self.dim_extend).transpose(self.dim_extend, 0)[0]
        data = self._narrowed(self._moved(data))

        def put(data: TensorDictBase) -> Any:
            index = self._writer.add(data)
            self._sampler.add(index)
            return index

        return self._write(lambda: self._put(data, put), data, None, 1)

    def _write(self, write: Callable[[], Any], data: TensorDictBase, time_dim: int | None, frames: int) -> Any:
        """Checks data, and writes it after the newest frame, which stays the newest if the write fails."""
        with self._replay_lock, self._write_lock:
            order, (entries, stored) = self._order, self._stored()
            self._check_new(leaves_of(data, data.batch_dims), stored, data, time_dim, entries)
            position, storage, leaves = order.take_position(), self._storage, stored.values()
            count = getattr(self._writer, "_write_count", None)
            before = storage._len, storage._last_cursor_index, order.writes, order.torn, count, versions_of(leaves)
            try:
                return write()
            except BaseException:
                self._undo(before, position, leaves, frames)
                raise

    def _stored(self) -> tuple[TensorDictBase | None, Leaves]:
        """Returns the storage's entries and their leaves."""
        entries = self._order.entries()
        return entries, {} if entries is None else leaves_of(entries, self._storage.ndim)

    def _undo(
        self, before: Any, position: Position | None, stored: Collection[Any], frames: int, wrote: bool = False
    ) -> None:
        """Restores length, newest frame, ``writes`` and write count, of a writer that has one; notes torn slots."""
        order, (length, newest, writes, torn, count, versions) = self._order, before
        self._storage._len, order.writes, order.torn = length, writes, torn
        order.set_last(newest)
        if count is not None:
            self._writer._write_count = count
        order.take_position()
        if wrote or None in versions or versions != versions_of(stored):
            self._tear(position, frames)

    def _check_new(
        self, new: Leaves, stored: Leaves, data: TensorDictBase, time_dim: int | None, entries: TensorDictBase | None
    ) -> None:
        """Checks data before it is written, by its leaves, those of the storage, and the storage's entries."""
        ndim, dims, is_filled = self._storage.ndim, data.batch_dims, bool(len(self._storage))
        self._check_call()
        self._check_neighbours()
        check_single_steps([(key,) for key in data.keys()])  # noqa: SIM118  # iterating it goes over its frames
        roles = self._roles_in({**stored, **new})
        check_entries(roles, new, stored, is_filled)
        if self._checked != self._changes or not is_filled:
            frames = Frames.read(data.unsqueeze(-1) if time_dim is None else data, roles.written)
            self._groups_in(frames, roles)
            self._checked = self._changes
        self._check_room(data.numel() // (1 if time_dim is None else data.shape[time_dim]))
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
        """Records as torn the slots whose frames a failed write of ``frames`` frames may have overwritten in part."""
        if position is None:
            return
        free = position.slots - position.live
        if (torn := min(frames - free, position.live)) > 0:
            order = self._order
            order.torn = (position.newest + 1 + free) % position.slots, max(torn, order.torn[1])
