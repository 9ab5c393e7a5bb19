"""Replay buffers whose storage is a ring in time: calls write in order, and only what goes on from what is stored.

Owns what may be stored, and what stores it; knows no windows. May import torchrl.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from tensordict import LazyStackedTensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import ImmutableDatasetWriter, ReplayBuffer, RoundRobinWriter, Storage, TensorStorage, Writer
from torchrl.data.replay_buffers.samplers import ConsumingSampler, Sampler

from multistep_triton.frames import KeyPath


class OrderedReplayBuffer(ReplayBuffer):
    """Frames lie in the storage in the order in which they came.

    A base beside ``TensorDictReplayBuffer``, which calls ``_extend`` and ``_add`` when its transforms are through.
    """

    def _needed(self) -> tuple[Collection[KeyPath], Collection[KeyPath]]:
        """The entries that a call must have, and those that it must have if they are stored."""
        raise NotImplementedError

    def _stored(self) -> TensorDictBase | None:
        """The storage's entries ``[slots, *R]``, or None if it holds no frame."""
        storage = self._storage
        if not len(storage):
            return None
        if not storage.initialized:
            # Another process made the entries; torchrl looks for them when a frame is read.
            storage.get(0)
        entries: TensorDictBase = storage._storage
        return entries

    def _init(self) -> None:
        super()._init()
        check_parts(self._storage, self._writer, self._sampler)

    def set_storage(self, storage: Storage, collate_fn: Callable[..., Any] | None = None) -> Any:
        """Exchanges the storage, as in torchrl; one whose frames lie in no order is a TypeError.

        Example:
            >>> from multistep_triton import NStepReplayBuffer
            >>> from torchrl.data import LazyMemmapStorage, LazyTensorStorage
            >>> rb = NStepReplayBuffer(n_steps=3, gamma=0.99, storage=LazyTensorStorage(100), batch_size=4)
            >>> _ = rb.set_storage(LazyMemmapStorage(50))
            >>> rb.storage.max_size
            50
        """
        check_parts(storage, self.writer, self.sampler)
        return super().set_storage(storage, collate_fn)

    def set_writer(self, writer: Writer) -> Any:
        """Exchanges the writer, as in torchrl; one that does not store in order is a TypeError.

        Example:
            >>> from multistep_triton import NStepReplayBuffer
            >>> from torchrl.data import LazyTensorStorage, TensorDictRoundRobinWriter
            >>> rb = NStepReplayBuffer(n_steps=3, gamma=0.99, storage=LazyTensorStorage(100), batch_size=4)
            >>> _ = rb.set_writer(TensorDictRoundRobinWriter(track_generations=True))
            >>> rb.writer.tracks_generations
            True
        """
        check_parts(self.storage, writer, self.sampler)
        return super().set_writer(writer)

    def set_sampler(self, sampler: Sampler) -> Any:
        """Exchanges the sampler, as in torchrl; one that consumes what it samples is a TypeError.

        Example:
            >>> from multistep_triton import NStepReplayBuffer
            >>> from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement
            >>> rb = NStepReplayBuffer(n_steps=3, gamma=0.99, storage=LazyTensorStorage(100), batch_size=4)
            >>> _ = rb.set_sampler(SamplerWithoutReplacement())
            >>> type(rb.sampler).__name__
            'SamplerWithoutReplacement'
        """
        check_parts(self.storage, self.writer, sampler)
        return super().set_sampler(sampler)

    def _extend(self, data: TensorDictBase, *, update_priority: bool = True) -> Tensor:
        storage, time_dim = self._storage, self.dim_extend
        _check_dims(data, storage.ndim, storage.ndim)
        frames = data.shape[time_dim]
        if not frames:
            return torch.zeros((0, storage.ndim) if storage.ndim > 1 else (0,), dtype=torch.long)
        self._check_data(data, time_dim)
        # Of several frames for one slot, torch might keep any.
        slots = max(-(-storage.max_size * frames // max(data.shape[: storage.ndim].numel(), 1)), 1)
        parts = data.split(slots, time_dim) if frames > slots else [data]
        extend = super()._extend
        with self._undone_if_it_fails():
            indices = [extend(part, update_priority=update_priority) for part in parts]
        return indices[0] if len(indices) == 1 else torch.cat(indices)

    def _add(self, data: TensorDictBase) -> Any:
        _check_dims(data, self._storage.ndim - 1, self._storage.ndim)
        self._check_data(data, None)
        with self._undone_if_it_fails():
            return super()._add(data)

    def _check_data(self, data: TensorDictBase, time_dim: int | None) -> None:
        """Checks data ``[*B, T]``, or a frame, before it is written: torch fails when some of it is."""
        needed, if_stored = map(set, self._needed())
        ndim, storage = self._storage.ndim, self._stored()
        new, stored = _kinds(data, ndim - (time_dim is None)), {} if storage is None else _kinds(storage, ndim)
        if missing := sorted((needed | if_stored & stored.keys()) - new.keys()):
            raise KeyError(f"data must hold {', '.join(map(str, missing))}, got the entries {list(new)}")
        if storage is None:
            return
        batch = [*data.shape[: ndim - (time_dim is None)]]
        if time_dim is not None:
            batch[0], batch[time_dim] = batch[time_dim], batch[0]
            del batch[0]
        rows = [*storage.shape[1:ndim]]
        if batch != rows:
            raise ValueError(f"data must be of {rows} rows, as what is stored, got {batch}")
        for path in new.keys() & stored.keys():
            if new[path] != stored[path]:
                raise ValueError(f"{path} must be {_say(stored[path])}, as what is stored, got {_say(new[path])}")

    @contextlib.contextmanager
    def _undone_if_it_fails(self) -> Iterator[None]:
        """The newest frame stays the newest one: torchrl moves the writer on before anything is written."""
        with self._replay_lock:
            storage, writer = self._storage, self._writer
            before = storage._len, getattr(writer, "_cursor", None), getattr(writer, "_write_count", None)
            try:
                yield
            except BaseException:
                storage._len, cursor, count = before
                if cursor is not None:
                    writer._cursor, writer._write_count = cursor, count
                raise


def _check_dims(data: TensorDictBase, dims: int, ndim: int) -> None:
    """Checks that data has the batch dimensions of the storage's index; that of one dimension may hold any rows."""
    if data.batch_dims < dims or (data.batch_dims > dims and ndim > 1):
        kind = "[*B, T]" if dims == ndim else "[*B]"
        raise ValueError(
            f"data must have a batch size {kind} of {dims} dimensions, as the storage has ndim={ndim}, "
            f"got {list(data.batch_size)}"
        )


def _kinds(data: TensorDictBase, ndim: int) -> dict[KeyPath, tuple[torch.dtype, torch.Size]]:
    """Dtype and trailing shape of every tensor."""
    if isinstance(data, LazyStackedTensorDict) and data.stack_dim < ndim and data.tensordicts:
        # Its entries would be stacked for this; those of one element tell.
        return _kinds(data.tensordicts[0], ndim - 1)
    kinds = {}
    for key, leaf in data.items(True, True):
        if isinstance(leaf, Tensor):
            kinds[(key,) if isinstance(key, str) else key] = leaf.dtype, leaf.shape[ndim:]
    return kinds


def _say(kind: tuple[torch.dtype, torch.Size]) -> str:
    return f"{kind[0]} {list(kind[1])}"


def check_parts(storage: Storage, writer: Writer, sampler: Sampler) -> None:
    """Checks that frames lie in the storage in the order in which they came."""
    if not isinstance(storage, TensorStorage):
        raise TypeError(f"storage must be a TensorStorage, such as LazyTensorStorage, got {type(storage).__name__}")
    if not isinstance(writer, RoundRobinWriter | ImmutableDatasetWriter):
        raise TypeError(f"writer must be a RoundRobinWriter, which stores in order, got {type(writer).__name__}")
    if isinstance(sampler, ConsumingSampler):
        raise TypeError(
            f"sampler must leave frames where windows read them, got {type(sampler).__name__}; "
            f"consume_after_n_samples must be None"
        )
