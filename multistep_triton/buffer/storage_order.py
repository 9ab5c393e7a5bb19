"""Where the newest frame of a storage lies, and in which order the others do: one object for all buffers on it.

Reaches into private attributes of torchrl's storages and writers. May import torchrl and ``stored``.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer, RoundRobinWriter, Storage

from multistep_triton.buffer.stored import Position, check_layout, mended
from multistep_triton.ends import Ends


class Order:
    """In which order frames lie in a storage, for all buffers on it; their writers tell it when they have written.

    The storage knows where the newest frame is, whoever wrote it.
    """

    broken: str | None = None
    """Why frames are in no order; None if they are in order."""
    torn: tuple[int, int] = (0, 0)
    """The first and the number of slots in which a write that failed has left parts of two frames."""
    newest = -1
    """The newest slot when the storage was last seen to be written to, by this process."""
    restarts = 0
    """How often frames began anew."""
    other_writes = 0
    """How often anything was written otherwise than by :meth:`advance`, as of :meth:`changes`."""
    writes = 0
    """How often a writer has written."""
    ends: Ends | None = None
    """What comes after frames, if the storage keeps observations once."""
    wide_dtypes: Mapping[tuple[str, ...], torch.dtype] = MappingProxyType({})
    """The dtypes that entries came as, of those that are stored as others."""
    pending: TensorDictBase | None = None
    """The newest frame, ``[*B, 1]``, where frames come without what comes after them."""
    ends_keys: tuple[Any, ...] = ()
    """The arguments that told which frames are ends."""
    ends_writes = 0
    """How often a writer had written when those were written last."""
    checked_entries: TensorDictBase | None = None
    """The storage's entries, once they were checked."""
    known_position: tuple[Position, int, int] | None = None
    """The position, after how many changes of the storage and of how many frames it was found."""

    def __init__(self, storage: Storage) -> None:
        self.storage, self.cursor, self.revision = storage, storage._last_cursor, storage._mutation_revision
        self.noticed_revision = self.revision
        self.lock = threading.RLock()
        """That of all buffers on the storage, which take turns."""

    def __getstate__(self) -> dict[str, Any]:
        """All but the lock, and what was checked in this process."""
        return {
            name: value
            for name, value in vars(self).items()
            if name not in ("lock", "checked_entries", "known_position")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What :meth:`__getstate__` returned, and a new lock."""
        vars(self).update(state, lock=threading.RLock())

    def entries(self) -> TensorDictBase | None:
        """The storage's entries, ``[slots, *R]``, whether frames are in them or not; None if it has none yet."""
        storage = self.storage
        if not storage.initialized and len(storage):
            # Another process made the entries; torchrl looks for them when a frame is read.
            storage.get(0)
        # One that has loaded what an empty one saved has a tensordict of nothing.
        entries: TensorDictBase | None = storage._storage if storage.initialized else None
        return entries

    def stored(self) -> TensorDictBase | None:
        """The storage's entries, or None if no frame is in them."""
        return self.entries() if len(self.storage) else None

    def writers(self) -> list[tuple[ReplayBuffer, RoundRobinWriter]]:
        """The writers of the storage, and the buffers whose they are; all that are on it take turns from then on."""
        found = []
        for buffer in self.storage._attached_entities:
            if getattr(buffer, "_replay_lock", self.lock) is not self.lock:
                buffer._replay_lock = self.lock
            writer = getattr(buffer, "_writer", None)
            if isinstance(writer, RoundRobinWriter) and writer._storage is self.storage:
                found.append((buffer, writer))
        return found

    def writers_of_others(self) -> list[RoundRobinWriter]:
        """Those of torchrl's buffers, if they have written."""
        writers = self.writers()
        return [each for buffer, each in writers if not hasattr(buffer, "n_step_ordered") and each._write_count]

    def position(self) -> Position | None:
        """Which slots hold frames, and which one the newest; None if there are none.

        Raises:
            RuntimeError: nobody can tell.
        """
        storage = self.storage
        alone = not self.broken and len(storage._attached_entities) == 2
        if self.known_position is not None and alone and storage._last_cursor is self.cursor:
            known, *seen = self.known_position
            if seen == [storage._mutation_revision, storage._len]:
                return known
        if (position := self._find_position()) is not None:
            self.known_position = position, storage._mutation_revision, storage._len
        return position

    def _find_position(self) -> Position | None:
        entries, storage = self.stored(), self.storage
        if entries is None:
            return None
        slots, last, broken = int(entries.shape[0]), storage._last_cursor_index, self.broken
        live = -(-len(storage) // max(entries.shape[1 : storage.ndim].numel(), 1))
        if self.checked_entries is not entries:
            check_layout(storage, entries)
            self.checked_entries = entries
        newest = live - 1 if live < slots else last
        if live < slots and last not in (None, newest):
            broken = f"of {live} slots that hold frames slot {last} was the last one written"
        elif newest is None:
            broken = "it is full and was loaded or written by itself, so that it does not say which frame is newest"
        elif storage._last_cursor is not self.cursor:
            broken = f"slot {last} was the last one written, by a write that failed or past all buffers"
        elif not broken:
            # Those of buffers like this one are set to the position before they write.
            wrote = [writer for writer in self.writers_of_others() if writer._cursor != (newest + 1) % slots]
            if wrote:
                broken = f"slot {newest} was the last one written, and a writer goes on at slot {wrote[0]._cursor}"
        if broken:
            raise RuntimeError(
                f"storage must hold frames in the order in which they came, but {broken}. Load whole buffers (loads, "
                f"load_state_dict), and give buffers that write into one storage one writer; or extend a buffer with "
                f"the frames in order; empty() begins anew"
            )
        return Position(newest, live, slots)

    def take_position(self) -> Position | None:
        """The position, at which every writer goes on."""
        position = self.position()
        if position is None:
            self.forget()
            self.go_on(-1, 1)
        else:
            self.go_on(position.newest, position.slots)
        return position

    def forget(self) -> None:
        """Frames begin anew: what was known of those before is."""
        self.broken, self.torn, self.known_position = None, (0, 0), None
        self.restarts += 1

    def changes(self) -> int:
        """How often anything was written otherwise than by :meth:`advance`: entries may have come or gone."""
        if (revision := self.storage._mutation_revision) != self.noticed_revision:
            self.noticed_revision, self.other_writes = revision, self.other_writes + 1
        return self.other_writes

    def advance(self, position: Position, frames: int, writer: RoundRobinWriter) -> None:
        """Frames were written after those of the position, by a buffer in the place of its writer.

        Nothing else was since :meth:`changes` was asked.
        """
        storage, (newest, before, slots, _) = self.storage, position
        rows = storage.max_size // slots
        newest, live = (newest + frames) % slots, min(before + frames, slots)
        if live != before:
            storage._len = live * rows
        self.set_last(newest)
        storage._bump_mutation_revision()
        self.torn = mended(self.torn, position.newest, frames, slots)
        writer._write_count = writer.n_step_seen = writer._write_count + frames
        if len(storage._attached_entities) > 2:
            self.go_on(newest, slots)
        else:
            writer._cursor = (newest + 1) % slots
            self.newest, self.cursor, self.revision = newest, storage._last_cursor, storage._mutation_revision
        self.known_position, self.noticed_revision = (
            (Position(newest, live, slots), self.revision, live * rows),
            self.revision,
        )

    def go_on(self, newest: int, slots: int) -> None:
        """Makes every writer of the storage go on after the newest frame, whoever wrote it."""
        storage = self.storage
        for _, writer in self.writers():
            writer._cursor = (newest + 1) % slots
            writer.n_step_seen = writer._write_count
        if isinstance(storage._last_cursor, int):
            # An int may be the same object the next time.
            storage._last_cursor = torch.tensor([storage._last_cursor])
        self.newest, self.cursor, self.revision = newest, storage._last_cursor, storage._mutation_revision

    def set_last(self, newest: int | None) -> None:
        """Tells the storage which frame is the newest."""
        # An int may be the same object the next time.
        self.storage._set_last_cursor(None if newest is None else range(newest, newest + 1))
        self.cursor = self.storage._last_cursor

    def mark_update(self, index: int | Tensor) -> None:
        """Called by every writer of the storage when it has written: one that goes on elsewhere breaks the order."""
        entries, storage, newest = self.entries(), self.storage, self.newest
        last = storage._last_cursor_index
        if entries is None or last is None or storage._last_cursor is self.cursor:
            # Frames were altered where they lie.
            return
        self.writes += 1
        slots, rows = entries.shape[0], max(entries.shape[1 : storage.ndim].numel(), 1)
        told = (len(index) if isinstance(index, Tensor) and index.ndim else 1) // rows
        wrote = sum(writer._write_count - getattr(writer, "n_step_seen", 0) for _, writer in self.writers())
        if told >= slots or len(storage) <= told * rows:
            # All that is there.
            self.forget()
        elif wrote == told or storage._mutation_revision == self.revision + 1:
            # All that was written since: no other process did.
            if (newest + told) % slots != last:
                self.broken = f"a writer went on elsewhere than after slot {newest}, at which the newest frame was"
            self.torn = mended(self.torn, newest, told, slots)
        self.go_on(last, slots)


def order_of(storage: Storage) -> Order:
    order: Order | None = vars(storage).get("n_step_order")
    if order is None:
        order = vars(storage)["n_step_order"] = Order(storage)
        storage.attach(order)
        entries = order.stored()
        if entries is not None and storage._last_cursor_index is None and not storage._mutation_revision:
            # It was given its frames when it was made, in order.
            order.set_last(entries.shape[0] - 1)
        if len(order.writers_of_others()) > 1:
            order.broken = "several buffers have written into it, each at a cursor of its own"
    return order
