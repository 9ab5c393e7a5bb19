"""OrderedReplayBuffer: a buffer whose storage is a ring in time.

Owns the parts of a buffer, and what they must be. Reaches into private attributes of torchrl's buffers, storages and
writers. May import torchrl, ``base``, ``neighbours``, ``stored``, ``storage_order`` and ``torchrl_internals``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torchrl.data import ImmutableDatasetWriter, ReplayBuffer, ReplayBufferEnsemble, Storage, Writer
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.envs.transforms import Transform

from multistep_triton.base import MultiStepBase
from multistep_triton.buffer.storage_order import Order, order_of
from multistep_triton.buffer.stored import check_parts, was_torn
from multistep_triton.neighbours import check_transforms, facts_of
from multistep_triton.torchrl_internals import calls, transforms_in

Steps = int | tuple[int, int]


class _CollateOwn(NamedTuple):
    """Collates the buffer's own samples; raises for a ReplayBufferEnsemble, whose samples are single steps."""

    collate: Callable[[Any], Any]
    is_given: bool
    """Whether the user gave ``collate``; torchrl's default changes nothing."""

    def __call__(self, data: Any) -> Any:
        mixing = calls().get("mix")
        if mixing is not None and isinstance(mixing.f_locals["self"], ReplayBufferEnsemble):
            raise TypeError(
                "a ReplayBufferEnsemble reads single steps from the storages of its buffers, and must not have an "
                "NStepReplayBuffer: give it buffers with a MultiStepTransform each"
            )
        return self.collate(data)


class OrderedReplayBuffer(MultiStepBase, ReplayBuffer):
    """A replay buffer whose storage is a ring in time: its frames lie in the order in which they came.

    A base beside ``TensorDictReplayBuffer``, which calls ``_extend`` and ``_add`` after its transforms.
    """

    _changes = 0
    """How often an argument, the storage or the writer was set."""
    _checked_beside: tuple[Any, ...] = ()
    """The value of ``_changes`` and the facts of the transforms at their last check."""
    _order: Order
    """The order of the storage's frames."""
    n_step_ordered = True
    """Tells ``Order`` that this buffer moves its writer to the storage's position before it writes."""
    _capturable = False

    def _check_neighbours(self) -> None:
        """Checks the buffer's transforms, if they or the arguments have changed since the last check."""
        transforms = transforms_in(self._transform)
        beside = self._changes, *map(facts_of, transforms)
        if beside != self._checked_beside:
            check_transforms(transforms, self._roles_in(()))
            self._checked_beside = beside

    def _check_room(self, rows: int | None = None, n_steps: Steps | None = None) -> None:
        """Checks that a full window fits into the slots of each of ``rows`` environments, if their number is known."""
        slots, n_steps = self._slots(rows), n_steps or self._n_steps
        high = max(n_steps) if isinstance(n_steps, tuple) else n_steps
        if slots is not None and high > slots and not isinstance(self._writer, ImmutableDatasetWriter):
            size = self._storage.max_size
            rows = rows or size // slots
            each = f" for all {rows} of them" if rows > 1 else ""
            raise ValueError(
                f"storage must have at least n_steps = {high} slots per environment, got max_size = {size}{each}: "
                f"{slots} slots"
            )

    # Where frames lie

    @property
    def _generator(self) -> torch.Generator | None:
        """The generator of random numbers; None for torch's own."""
        generator: torch.Generator | None = self._storage._rng
        return generator

    def _slots(self, rows: int | None = None) -> int | None:
        """Returns the number of slots of each of ``rows`` environments; None if it is not known yet."""
        if getattr(self, "_order", None) is None:
            return None
        entries, storage = self._order.entries(), self._storage
        if entries is not None:
            return int(entries.shape[0])
        rows = 1 if storage.ndim == 1 else rows
        return None if rows is None else -(-int(storage.max_size) // max(rows, 1))

    # Parts

    def _begin(self) -> None:
        """Makes the buffer's parts, if torchrl has delayed that until now."""
        if self._delayed_init and not self.initialized:
            self._init()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickled buffer, which takes turns with others on its storage from its first call on."""
        super().__setstate__(state)
        # While a storage is restored that refers to its buffers, the order may not have its lock yet.
        if (lock := vars(vars(self).get("_order", self)).get("lock")) is not None:
            self._replay_lock = lock

    def _init(self) -> None:
        super()._init()
        try:
            self._adopt()
            self._check_neighbours()
        except BaseException:
            self._initialized = False
            self._leave()
            raise

    def _check_parts(self, storage: Storage, writer: Writer, sampler: Sampler) -> None:
        """Checks that the buffer can have these parts."""
        check_parts(storage, writer, sampler)

    def _adopt(self) -> None:
        """Takes over the storage, and moves every writer to its position."""
        storage = self._storage
        self._check_parts(storage, self._writer, self._sampler)
        self._order = order_of(storage)
        for other in storage._attached_entities:
            if other is not self:
                if getattr(other, "capturable", False):
                    raise ValueError("storage must be no other buffer's that has capturable=True, got one that is")
                check_parts(storage, getattr(other, "_writer", None), getattr(other, "_sampler", None), True)
        if self.dim_extend >= storage.ndim:
            raise ValueError(f"dim_extend must be below the storage's ndim={storage.ndim}, got {self.dim_extend}")
        storage.attach(self)
        self._order.take_position()
        self._check_room()

    def _leave(self) -> None:
        """Detaches this buffer from the storage, whose writers then report no more writes to it."""
        entities = self._storage._attached_entities
        if self in entities:
            entities.remove(self)

    def _get_collate_fn(self, collate_fn: Callable[..., Any] | None) -> None:
        super()._get_collate_fn(collate_fn)
        collate: Any = self._collate_fn
        self._collate_fn: _CollateOwn = _CollateOwn(collate, collate_fn is not None)

    @contextmanager
    def _undisturbed(self, keep: bool = False) -> Iterator[None]:
        """Drops prefetched batches, or waits to ``keep`` them; no other thread samples or stores within the block.

        Batches that failed of torn slots are not kept, as these may have been mended.
        """
        self._begin()
        with self._futures_lock:
            # A batch that a thread is prefetching needs the other lock to finish.
            if keep:
                wait(self._prefetch_queue)
                for future in filter(was_torn, [*self._prefetch_queue]):
                    self._prefetch_queue.remove(future)
                self._synchronize_futures_locked()
            else:
                self._clear_prefetch_queue_locked()
            with self._replay_lock:
                yield

    def set_storage(self, storage: Storage, collate_fn: Callable[..., Any] | None = None) -> Any:
        """Exchanges the storage, as in torchrl, goes on at the new one's position, and resets the sampler.

        Raises:
            TypeError, ValueError, RuntimeError: the new storage is no ``TensorStorage``, does not fit, or has no order.
        """
        self._check_parts(storage, self.writer, self.sampler)
        before, dim_extend, collate = self._storage, self.dim_extend, self._collate_fn

        def put(storage: Storage, dim_extend: int) -> None:
            self._leave()
            super(OrderedReplayBuffer, self).set_storage(storage, collate_fn)
            # torchrl changes neither of these with the storage.
            self._dim_extend = dim_extend
            self._writer.register_storage(storage)
            self._adopt()

        with self._undisturbed():
            try:
                put(storage, dim_extend if storage.ndim == before.ndim else storage.ndim - 1)
            except BaseException:
                try:
                    put(before, dim_extend)
                finally:
                    self._collate_fn = collate
                raise
            self._sampler._empty()
            self._initialize_prioritized_sampler()
            self.set_rng(self._rng)
        return before

    def set_writer(self, writer: Writer) -> Any:
        """Exchanges the writer, as in torchrl; the new one goes on after the newest frame of the storage.

        Raises:
            TypeError: the writer does not store in order.
        """
        self._check_parts(self.storage, writer, self.sampler)
        with self._replay_lock:
            self._order.position()
            before = super().set_writer(writer)
            self._order.take_position()
        return before

    def set_sampler(self, sampler: Sampler) -> Any:
        """Exchanges the sampler, as in torchrl; one that consumes or alters frames raises a TypeError."""
        self._check_parts(self.storage, self.writer, sampler)
        return super().set_sampler(sampler)

    def append_transform(self, transform: Transform, *, invert: bool = False) -> ReplayBuffer:
        """Appends a transform, as in torchrl; one that is wrong on n-step transitions raises a ValueError."""
        self._check_given(transform, invert)
        return super().append_transform(transform, invert=invert)

    def insert_transform(self, index: int, transform: Transform, *, invert: bool = False) -> ReplayBuffer:
        """Inserts a transform, as in torchrl; one that is wrong on n-step transitions raises a ValueError."""
        self._check_given(transform, invert)
        return super().insert_transform(index, transform, invert=invert)

    def _check_given(self, transform: Any, invert: bool) -> None:
        if isinstance(transform, Transform) and not invert:
            check_transforms(transforms_in(transform), self._roles_in(()))

    def empty(self, empty_write_count: bool = True) -> None:
        """Empties the buffer, as in torchrl, and drops its prefetched batches and the pending frame."""
        with self._undisturbed():
            super().empty(empty_write_count)
            self._order.pending = None
            self._order.take_position()
