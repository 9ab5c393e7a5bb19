"""The order of the frames in a storage: an ``Order`` tells all buffers on a storage where the newest frame lies.

Reaches into private attributes of torchrl's storages and writers. May import torchrl, ``ends`` and
``stored``.
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
    """The order of the frames in a storage, for all buffers on it; their writers report what they write to it.

    The storage tells where the newest frame is, whichever buffer wrote it.
    """

    broken: str | None = None
    """Why the order of the frames is unknown; None if it is known."""
    torn: tuple[int, int] = (0, 0)
    """The first torn slot and the number of torn slots: a failed write left parts of two frames in each."""
    newest = -1
    """The slot of the newest frame after the last write that this process noticed; -1 before the first."""
    restarts = 0
    """How often :meth:`forget` was called, as frames began anew."""
    other_writes = 0
    """How often :meth:`changes` has found a write that :meth:`advance` did not record."""
    writes = 0
    """How often a writer has reported new frames to :meth:`mark_update`."""
    ends: Ends | None = None
    """The ends of trajectories and their final observations; None unless the storage keeps observations once."""
    wide_dtypes: Mapping[tuple[str, ...], torch.dtype] = MappingProxyType({})
    """The dtypes in which those entries arrived that are stored in narrower ones."""
    pending: TensorDictBase | None = None
    """The newest frame, ``[*B, 1]``, if it came without its next observation and waits for the next frame."""
    ends_keys: tuple[Any, ...] = ()
    """The key arguments by which ``ends`` was found."""
    ends_writes = 0
    """The value of ``writes`` when ``ends`` was last updated; -1 after a write that failed."""
    known_position: tuple[Position, int, int] | None = None
    """The position found last, with the storage's mutation revision and length at that time."""

    def __init__(self, storage: Storage) -> None:
        self.storage, self.cursor, self.revision = storage, storage._last_cursor, storage._mutation_revision
        self.noticed_revision = self.revision
        self.lock = threading.RLock()
        """The lock that all buffers on the storage share, so that they take turns."""

    def __getstate__(self) -> dict[str, Any]:
        """Returns all attributes but the lock and those that hold only in this process."""
        return {name: value for name, value in vars(self).items() if name not in ("lock", "known_position")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`__getstate__` returned, with a new lock."""
        vars(self).update(state, lock=threading.RLock())

    def entries(self) -> TensorDictBase | None:
        """Returns the storage's entries, ``[slots, *R]``, with or without frames in them; None if it has none yet."""
        storage = self.storage
        if not storage.initialized and len(storage):
            # Another process made the entries; torchrl finds them when it reads a frame.
            storage.get(0)
        # A storage that loaded an empty checkpoint is not initialized, but holds an empty tensordict.
        entries: TensorDictBase | None = storage._storage if storage.initialized else None
        return entries

    def stored(self) -> TensorDictBase | None:
        """Returns the storage's entries, or None if no frame is in them."""
        return self.entries() if len(self.storage) else None

    def writers(self) -> list[tuple[ReplayBuffer, RoundRobinWriter]]:
        """Finds the writers of the storage and their buffers, and gives all buffers on it the shared lock."""
        found = []
        for buffer in self.storage._attached_entities:
            if getattr(buffer, "_replay_lock", self.lock) is not self.lock:
                buffer._replay_lock = self.lock
            writer = getattr(buffer, "_writer", None)
            if isinstance(writer, RoundRobinWriter) and writer._storage is self.storage:
                found.append((buffer, writer))
        return found

    def writers_of_others(self) -> list[RoundRobinWriter]:
        """Finds the writers of torchrl's own buffers that have already written."""
        writers = self.writers()
        return [each for buffer, each in writers if not hasattr(buffer, "n_step_ordered") and each._write_count]

    def position(self) -> Position | None:
        """Finds which slots hold frames, and which one holds the newest; None if there are no frames.

        Raises:
            RuntimeError: the order of the frames is unknown.
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
        check_layout(storage, entries)
        newest = live - 1 if live < slots else last
        if live < slots and last not in (None, newest):
            broken = f"of {live} slots that hold frames slot {last} was the last one written"
        elif newest is None:
            broken = "it is full and was loaded or written by itself, so that it does not say which frame is newest"
        elif storage._last_cursor is not self.cursor:
            broken = f"slot {last} was the last one written, by a write that failed or past all buffers"
        elif not broken:
            # OrderedReplayBuffers move their writers to the position before they write; torchrl's buffers do not.
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
        """Moves the cursor of every writer to the slot after the newest frame, and returns the position."""
        position = self.position()
        if position is None:
            self.forget()
            self.go_on(-1, 1)
        else:
            self.go_on(position.newest, position.slots)
        return position

    def forget(self) -> None:
        """Drops what is known of the frames before, as frames begin anew."""
        self.broken, self.torn, self.known_position = None, (0, 0), None
        self.restarts += 1

    def changes(self) -> int:
        """Returns a count that rises after a write which :meth:`advance` did not record: entries may be new or gone."""
        if (revision := self.storage._mutation_revision) != self.noticed_revision:
            self.noticed_revision, self.other_writes = revision, self.other_writes + 1
        return self.other_writes

    def advance(self, position: Position, frames: int, writer: RoundRobinWriter) -> None:
        """Records that a buffer, in place of its writer, has written ``frames`` frames after those of the position.

        The caller must have called :meth:`changes` since the last write by anything else.
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
        self.known_position = Position(newest, live, slots), self.revision, live * rows
        self.noticed_revision = self.revision

    def go_on(self, newest: int, slots: int) -> None:
        """Moves the cursor of every writer of the storage to the slot after ``newest``."""
        storage = self.storage
        for _, writer in self.writers():
            writer._cursor = (newest + 1) % slots
            writer.n_step_seen = writer._write_count
        if isinstance(storage._last_cursor, int):
            # Two writes may leave the same int object, and ``is`` must tell their cursors apart.
            storage._last_cursor = torch.tensor([storage._last_cursor], device="cpu")
        self.newest, self.cursor, self.revision = newest, storage._last_cursor, storage._mutation_revision

    def set_last(self, newest: int | None) -> None:
        """Sets the storage's last cursor to the slot of the newest frame, or to None."""
        # Two writes may leave the same int object, and ``is`` must tell their cursors apart.
        self.storage._set_last_cursor(None if newest is None else range(newest, newest + 1))
        self.cursor, self.known_position = self.storage._last_cursor, None

    def mark_update(self, index: int | Tensor) -> None:
        """Notes the write that a writer reports; one that did not go on after the newest frame breaks the order."""
        entries, storage, newest = self.entries(), self.storage, self.newest
        last = storage._last_cursor_index
        if entries is None or last is None or storage._last_cursor is self.cursor:
            # The write altered frames where they lie.
            return
        self.writes += 1
        slots, rows = entries.shape[0], max(entries.shape[1 : storage.ndim].numel(), 1)
        told = (len(index) if isinstance(index, Tensor) and index.ndim else 1) // rows
        wrote = sum(writer._write_count - getattr(writer, "n_step_seen", 0) for _, writer in self.writers())
        if told >= slots or len(storage) <= told * rows:
            # The write has replaced all frames.
            self.forget()
        elif wrote == told or storage._mutation_revision == self.revision + 1:
            # It is the only write since the last one noticed here: no other process has written.
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
            # The storage was made with its frames, which are in order.
            order.set_last(entries.shape[0] - 1)
        if len(order.writers_of_others()) > 1:
            order.broken = "several buffers have written into it, each at a cursor of its own"
    return order
