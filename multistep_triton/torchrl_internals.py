"""torchrl from inside: the one file that reaches into private attributes of torchrl's buffers, storages and writers.

Owns where the newest frame of a storage lies, how a call is stored wholly or not at all, and how a buffer is sampled;
knows no windows. ``tests/test_torchrl_internals.py`` names every attribute that is used here. May import torchrl and
``stored``.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn.utils import _set_dispatch_td_nn_modules as set_dispatch_td_nn_modules
from torch import Tensor
from torchrl.data import (
    OfflineToOnlineReplayBuffer,
    ReplayBuffer,
    ReplayBufferEnsemble,
    RoundRobinWriter,
    SliceSampler,
    Storage,
    TensorDictPrioritizedReplayBuffer,
    TensorDictReplayBuffer,
    Writer,
    prefill_replay_buffer,
)
from torchrl.data.replay_buffers import SampleUnit
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.envs.transforms import Compose, Transform
from torchrl.envs.transforms.transforms import _InvertTransform

from multistep_triton.stored import (
    Leaves,
    Position,
    check_continues,
    check_dims,
    check_layout,
    check_parts,
    leaves_of,
    mended,
    versions_of,
)

_RING_FILE = "n_step_ring.json"


# torchrl tells a transform nothing of its buffer, and a buffer nothing of who calls: the frames of the calls say it.
_KINDS: dict[CodeType, str] = {}
for _kind, _functions in {
    "take": [ReplayBuffer._maybe_make_transform, ReplayBuffer.append_transform, ReplayBuffer.insert_transform],
    "extend": [ReplayBuffer.extend, TensorDictReplayBuffer.extend, TensorDictPrioritizedReplayBuffer.extend],
    # They make a batch of one frame of what they get, and do not.
    "add": [ReplayBuffer.add],
    "put": [TensorDictReplayBuffer.add, TensorDictPrioritizedReplayBuffer.add],
    "sample": [ReplayBuffer._sample, TensorDictReplayBuffer._sample, TensorDictPrioritizedReplayBuffer._sample],
    "overwrite": [ReplayBuffer.__setitem__, ReplayBuffer.write_all],
    "route": [ReplayBufferEnsemble.extend, ReplayBufferEnsemble.add],
    "mix": [OfflineToOnlineReplayBuffer.extend, OfflineToOnlineReplayBuffer.sample, ReplayBufferEnsemble._sample],
    "prefill": [prefill_replay_buffer],
}.items():
    for _function in _functions:
        _KINDS.setdefault(inspect.unwrap(_function).__code__, _kind)

Calls = Mapping[str, FrameType]
"""Frames of torchrl's functions that are calling, by what they do."""


def calls(depth: int = 16) -> Calls:
    """Those of them that are, the innermost of every kind."""
    found: dict[str, FrameType] = {}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and depth:
        if (kind := _KINDS.get(frame.f_code)) is not None:
            found.setdefault(kind, frame)
        frame, depth = frame.f_back, depth - 1
    return found


def taking_buffer() -> tuple[ReplayBuffer, bool] | None:
    """The replay buffer that is being given the transform which asks, if one is, and whether inverted."""
    frame = calls().get("take")
    return None if frame is None else (frame.f_locals["self"], bool(frame.f_locals.get("invert")))


def using_buffer(calling: Calls, transform: Transform) -> ReplayBuffer | None:
    """The replay buffer that is calling this transform, if one is."""
    for kind in ("extend", "add", "put", "sample"):
        if kind in calling:
            buffer: ReplayBuffer = calling[kind].f_locals["self"]
            if transform in transforms_in(buffer.transform):
                return buffer
    return None


def mixing_buffer(calling: Calls) -> tuple[list[ReplayBuffer], list[Transform]] | None:
    """Of the ensemble or OfflineToOnlineReplayBuffer that is in use, if one is: its buffers, its own transforms."""
    if "mix" not in calling:
        return None
    mixing = calling["mix"].f_locals["self"]
    pair = isinstance(mixing, OfflineToOnlineReplayBuffer)
    buffers = [mixing.offline_buffer, mixing.online_buffer] if pair else mixing._rbs or []
    return [*buffers], [] if mixing._transform is None else transforms_in(mixing._transform)


def refuse_other_ways(calling: Calls) -> None:
    """Raises an error where frames are stored otherwise than one after the other."""
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


def _collate_own(collate: Callable[[Any], Any], data: Any) -> Any:
    """Collates samples of a buffer's own; an ensemble's are single steps."""
    mixing = calls().get("mix")
    if mixing is not None and isinstance(mixing.f_locals["self"], ReplayBufferEnsemble):
        raise TypeError(
            "a ReplayBufferEnsemble reads single steps from the storages of its buffers, and must not have an "
            "NStepReplayBuffer: give it buffers with a MultiStepTransform each"
        )
    return collate(data)


def lock_of(buffer: ReplayBuffer) -> contextlib.AbstractContextManager[Any]:
    """The lock under which a buffer stores and samples."""
    lock: contextlib.AbstractContextManager[Any] = buffer._replay_lock
    return lock


def store(buffer: ReplayBuffer, data: TensorDictBase) -> Tensor:
    """What ``extend`` stores once its transforms are through."""
    indices: Tensor = buffer._extend(data)
    return indices


def update_priority(buffer: ReplayBuffer, indices: Tensor, data: TensorDictBase) -> None:
    """What ``extend`` does with a priority that comes with the data."""
    priority_key = getattr(buffer, "priority_key", None)
    if priority_key is not None and (priority := data.get(priority_key, None)) is not None:
        buffer.update_priority(indices, priority)


def inverted_in(transform: Transform) -> Transform | None:
    """What ``append_transform(..., invert=True)`` made this of; None if it did not."""
    return transform.transform if isinstance(transform, _InvertTransform) else None


def reads_ids(sampler: SliceSampler) -> bool:
    """Whether a sampler tells episodes by trajectory ids, as far as it has looked."""
    return bool(sampler._fetch_traj)


def transforms_in(transform: Transform) -> list[Transform]:
    """A buffer's transform in its parts, in order."""
    if type(transform).forward is Compose.forward:
        return [part for each in transform for part in transforms_in(each)]
    return [transform]


def sample_unit_of(buffer: ReplayBuffer) -> SampleUnit | None:
    """What a buffer makes of every frame that is drawn."""
    unit: SampleUnit | None = buffer._sample_unit
    return unit


class _Order:
    """In which order frames lie in a storage, for all buffers on it; their writers tell it when they have written.

    The storage knows where the newest frame is, whoever wrote it.
    """

    broken: str | None = None
    """Why frames are in no order; None if they are in order."""
    torn: tuple[int, int] = (0, 0)
    """The first and the number of slots in which a write that failed has left parts of two frames."""
    newest = -1
    """The newest slot when the storage was last seen to be written to, by this process."""
    begun = 0
    """How often frames began anew."""
    laid_out: TensorDictBase | None = None
    """The storage's entries, once they were checked."""

    def __init__(self, storage: Storage) -> None:
        self.storage, self.cursor, self.revision = storage, storage._last_cursor, storage._mutation_revision
        self.lock = threading.RLock()
        """That of all buffers on the storage, which take turns."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("lock", "laid_out")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.RLock())

    def entries(self) -> TensorDictBase | None:
        """The storage's entries, ``[slots, *R]``, whether frames are in them or not; None if it has none yet."""
        storage = self.storage
        if not storage.initialized and len(storage):
            # Another process made the entries; torchrl looks for them when a frame is read.
            storage.get(0)
        entries: TensorDictBase | None = storage._storage
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
        return [each for buffer, each in writers if not isinstance(buffer, OrderedReplayBuffer) and each._write_count]

    def position(self) -> Position | None:
        """Which slots hold frames, and which one the newest; None if there are none.

        Raises:
            RuntimeError: nobody can tell.
        """
        entries, storage = self.stored(), self.storage
        if entries is None:
            return None
        slots, last, broken = int(entries.shape[0]), storage._last_cursor_index, self.broken
        live = -(-len(storage) // max(entries.shape[1 : storage.ndim].numel(), 1))
        if self.laid_out is not entries:
            check_layout(storage, entries)
            self.laid_out = entries
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
        self.broken, self.torn = None, (0, 0)
        self.begun += 1

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
        self.storage._set_last_cursor(newest)
        self.cursor = self.storage._last_cursor

    def mark_update(self, index: int | Tensor) -> None:
        """Called by every writer of the storage when it has written: one that goes on elsewhere breaks the order."""
        entries, storage, newest = self.entries(), self.storage, self.newest
        last = storage._last_cursor_index
        if entries is None or last is None or storage._last_cursor is self.cursor:
            # Frames were altered where they lie.
            return
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


def _order_of(storage: Storage) -> _Order:
    order: _Order | None = vars(storage).get("n_step_order")
    if order is None:
        order = vars(storage)["n_step_order"] = _Order(storage)
        storage.attach(order)
        entries = order.stored()
        if entries is not None and storage._last_cursor_index is None and not storage._mutation_revision:
            # It was given its frames when it was made, in order.
            order.set_last(entries.shape[0] - 1)
        if len(order.writers_of_others()) > 1:
            order.broken = "several buffers have written into it, each at a cursor of its own"
    return order


class OrderedReplayBuffer(ReplayBuffer):
    """A replay buffer whose storage is a ring in time: its frames lie in the order in which they came.

    A base beside ``TensorDictReplayBuffer``, which calls ``_extend`` and ``_add`` when its transforms are through.
    """

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
    def _order(self) -> _Order:
        return _order_of(self._storage)

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

    # Checkpoints

    @contextlib.contextmanager
    def _settled(self) -> Iterator[None]:
        """Within, nothing is sampled, prefetched or stored by another thread."""
        with self._futures_lock:
            # A sample that is being prefetched waits for the other lock.
            self._synchronize_futures_locked()
            with self._replay_lock:
                yield

    def _ring_state(self) -> dict[str, Any]:
        position = self._order.position()
        return {"newest": None if position is None else position.newest, "torn": [*self._order.torn]}

    def _load_ring(self, ring: dict[str, Any] | None) -> None:
        """Puts the storage where it was when it was saved; a buffer of torchrl's saves its writer's cursor alone."""
        order, newest = self._order, None if ring is None else ring["newest"]
        entries = order.stored()
        order.forget()
        if entries is None:
            return
        if isinstance(self._writer, RoundRobinWriter):
            # A file of another time may lie beside what a buffer of torchrl's has saved since.
            at = (self._writer._cursor - 1) % entries.shape[0]
            ring, newest = ring if newest == at else None, at
        order.set_last(newest)
        if ring is not None:
            first, torn = ring["torn"]
            order.torn = first, torn
        if newest is not None:
            order.go_on(newest, entries.shape[0])

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        """Within, a checkpoint is loaded; where that fails when frames were loaded already, they are in no order."""
        with self._settled():
            before = self._fingerprint()
            try:
                yield
            except BaseException:
                if before != self._fingerprint():
                    self._order.broken = "a checkpoint was loaded in part"
                raise

    def _fingerprint(self) -> tuple[Any, ...]:
        """What is another one when frames are."""
        storage, entries = self._storage, self._order.entries()
        versions = [] if entries is None else versions_of(leaves_of(entries, storage.ndim))
        return id(entries), len(storage), storage._mutation_revision, versions

    def state_dict(self) -> dict[str, Any]:
        """As in torchrl, and which frame is the newest, whatever the writer."""
        with self._settled():
            return {**super().state_dict(), "_ring": self._ring_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torchrl, whose buffers' states are taken, too."""
        with self._loading():
            super().load_state_dict(state_dict)
            self._load_ring(state_dict.get("_ring"))

    def dumps(self, path: str | Path) -> None:
        """As in torchrl, and which frame is the newest, whatever the writer."""
        with self._settled():
            super().dumps(path)
            (Path(path) / _RING_FILE).write_text(json.dumps(self._ring_state()))

    def loads(self, path: str | Path) -> None:
        """As in torchrl, whose buffers' files are taken, too."""
        with self._loading():
            super().loads(path)
            file = Path(path) / _RING_FILE
            self._load_ring(json.loads(file.read_text()) if file.exists() else None)


class SampledReplayBuffer(TensorDictReplayBuffer, OrderedReplayBuffer):
    """One of which something else than the frames themselves is sampled: what that is is up to a subclass."""

    def _n_step_at(self, index: Any, position: Position) -> TensorDictBase:
        """What is sampled of the frames at an index of the storage."""
        raise NotImplementedError

    def _set_index_in_td(self, tensordict: TensorDictBase, index: Tensor | int | None) -> None:
        # torchrl's takes the indices, which are those of frames with time first, for some with time last.
        ndim, dim = self._storage.ndim, self.dim_extend
        if ndim == 1 or not isinstance(index, Tensor):
            super()._set_index_in_td(tensordict, index)
            return
        lead = [*tensordict.batch_size[:ndim]]
        single = len(lead) < ndim or index.shape[0] != tensordict.batch_size[:ndim].numel()
        if single:
            # One frame, which has no time.
            lead = lead[: ndim - 1]
            lead.insert(dim, 1)
        lead[0], lead[dim] = lead[dim], lead[0]
        placed = index.view(*lead, ndim).transpose(0, dim)
        tensordict.set("index", placed.squeeze(dim) if single else placed)

    def update_tensordict_priority(self, data: TensorDictBase) -> None:
        """As in torchrl, which takes the time of a frame for its place where there are several environments."""
        index = data.get("index", None)
        super().update_tensordict_priority(data.reshape(-1) if index is not None and index.ndim > 2 else data)

    def _sample(self, batch_size: int) -> tuple[TensorDictBase, dict[str, Any]]:
        # Another process may have laid the storage out, which the sampler does not see.
        self._order.entries()
        with self._replay_lock, self._write_lock:
            position = self._check_whole()
            index, info = self._sampler.sample(self._storage, batch_size)
            if self._sample_unit is not None:
                index, info = self._sample_unit.expand(index, info, self._storage)
            if taken := [key for key in info if key[0] == "next"]:
                raise TypeError(
                    f"sampler must leave the entries under 'next' to the windows, got {type(self._sampler).__name__}, "
                    f"which writes {taken}"
                )
            info["index"] = index
            data = self._read(info, position)
        return self._finished(data, info)

    def _read(self, info: dict[str, Any], position: Position | None) -> TensorDictBase:
        """What is sampled of the frames that lie where ``info`` says, which is told how old they are."""
        if self._writer.tracks_generations:
            info["index_generation"] = self._writer.generations_of(info["index"])
        if position is None:
            raise RuntimeError("storage must hold frames to be sampled, got an empty one")
        return self._n_step_at(info["index"], position)

    def _check_whole(self) -> Position | None:
        """Checks that all frames are there, in order, before anything is drawn."""
        self._check_neighbours()
        position, (first, torn) = self._order.position(), self._order.torn
        if torn:
            raise RuntimeError(
                f"a write that failed has overwritten frames in part: extend the buffer, whose next frames overwrite "
                f"them wholly, before it is sampled again ({torn} slots from {first} on), or empty it"
            )
        return position

    def _finished(self, data: TensorDictBase, info: dict[str, Any]) -> tuple[TensorDictBase, dict[str, Any]]:
        """What was read from the storage, as a sample of torchrl's buffer leaves it."""
        data = self._collate_fn(data)
        if self._transform is not None and len(self._transform):
            with data.unlock_(), set_dispatch_td_nn_modules(True):
                data = self._transform(data)
        if self._pin_memory and data.device == torch.device("cpu"):
            data = data.pin_memory()
        return data, info

    @contextlib.contextmanager
    def _up_to_date(self, changes: int, anew: bool) -> Iterator[None]:
        """Within, the next batch in the queue is one that was computed after so many changes, or ``anew``.

        Batches of frames that are gone, since another buffer emptied the storage, are dropped.

        It is of the slots that were drawn for it, no sampler draws anew, and of the frames that lie there now.
        """
        if not self._prefetch:
            yield
            return
        with self._futures_lock:
            queue, begun = self._prefetch_queue, self._order.begun
            if any(getattr(future, "begun", begun) != begun for future in queue):
                self._clear_prefetch_queue_locked()
            # What was loaded may be of any arguments.
            of_before = [future for future in queue if getattr(future, "changes", None) != changes]
            while queue and (anew or queue[0] in of_before):
                if queue[0].exception() is not None:
                    queue.popleft()
                    continue
                info = dict(queue[0].result()[1])
                with self._replay_lock, self._write_lock:
                    data = self._read(info, self._check_whole())
                computed: Future[Any] = Future()
                computed.set_result(self._finished(data, info))
                queue[0] = computed
                break
            yield
            for future in queue:
                future.begun = begun
                if future not in of_before:
                    future.changes = changes
