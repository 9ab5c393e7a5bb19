"""SampledReplayBuffer: a buffer whose samples are computed from frames.

Owns what is computed under the buffer's locks, and which prefetched batches are valid. Reaches into private attributes
of torchrl's buffers. May import torchrl, ``stored``, ``outputs``, ``samples``, ``checkpointed`` and what it may.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn.utils import _set_dispatch_td_nn_modules as set_dispatch_td_nn_modules
from torch import Tensor
from torchrl.data import TensorDictReplayBuffer, TensorDictRoundRobinWriter

from multistep_triton.buffer.checkpointed import CheckpointedReplayBuffer
from multistep_triton.buffer.ordered import Steps
from multistep_triton.buffer.outputs import Selection, StoredLayout
from multistep_triton.buffer.stored import Position, TornError, check_index, draws_alike, was_torn
from multistep_triton.samples import Samples

# The ``n_steps`` of a call of ``sample``, in its own thread alone: prefetching threads use the buffer's.
steps_of_call: ContextVar[Steps | None] = ContextVar("n_steps of a call", default=None)


class SampledReplayBuffer(TensorDictReplayBuffer, CheckpointedReplayBuffer):
    """A buffer whose samples are computed from frames."""

    _layout_before: StoredLayout | None = None
    _selection: Selection | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Returns torchrl's state; a copy remembers no call and reads its storage itself."""
        return {**super().__getstate__(), "_repeated": None, "_layout_before": None}

    def extend(self, tensordicts: TensorDictBase, *, update_priority: bool | None = None) -> Tensor:
        """Stores frames, as in torchrl; a repeated call skips torchrl's copy if the buffer has no transforms."""
        if self._repeated is not None and not len(self._transform) and self._order.pending is None:
            index = self._extend_repeated(tensordicts)
            if index is not None:
                return index
        if isinstance(tensordicts, TensorDictBase) and not tensordicts.batch_size.numel():
            # No frame has a priority, and no priority has a place before the first frame.
            update_priority = False
        stored: Tensor = super().extend(tensordicts, update_priority=update_priority)
        return stored

    def sample(self, batch_size: int | None = None, return_info: bool = False, **kwargs: Any) -> Any:
        """Samples a batch, as in torchrl; a plain uniform draw skips torchrl's handling of info and transforms."""
        if not self.initialized:
            return super().sample(batch_size, return_info, **kwargs)
        size, usual = self._batch_size if batch_size is None else batch_size, self._batch_size
        unusual = kwargs or size is None or usual not in (None, size) or self._sample_dependency is not None
        others = self._prefetch or self._service_shutdown or len(self._transform) or self._collate_fn.is_given
        if unusual or others or not self._draws():
            return super().sample(batch_size, return_info, **kwargs)
        with self._replay_lock, self._write_lock:
            # Without transforms, no neighbours need a check.
            if (position := self._find_whole()) is not None:
                data, index = self._n_step_drawn(size, position, True)
        if position is None:
            # torchrl raises its error, under locks that come before these.
            return super().sample(batch_size, return_info)
        if self._pin_memory and data.device == torch.device("cpu"):
            data = data.pin_memory()
        return (data, self._info_of(index)) if return_info else data

    def _set_index_in_td(self, tensordict: TensorDictBase, index: Tensor | int | None) -> None:
        if self._order.pending is not None:
            # While a frame is pending, the index is not that of the call's own frames.
            return
        # torchrl's method assumes indices with time last, but they come with time first.
        ndim, dim = self._storage.ndim, self.dim_extend
        if ndim == 1 or not isinstance(index, Tensor):
            super()._set_index_in_td(tensordict, index)
            return
        lead = [*tensordict.batch_size[:ndim]]
        single = len(lead) < ndim or index.shape[0] != tensordict.batch_size[:ndim].numel()
        if single:
            # A single frame has no time dimension.
            lead = lead[: ndim - 1]
            lead.insert(dim, 1)
        lead[0], lead[dim] = lead[dim], lead[0]
        placed = index.view(*lead, ndim).transpose(0, dim)
        tensordict.set("index", placed.squeeze(dim) if single else placed)

    def update_tensordict_priority(self, data: TensorDictBase) -> None:
        """Updates priorities, as in torchrl, which would take time alone for the index of frames ``[num_envs, T]``."""
        self._begin()
        index = data.get("index", None)
        if index is None and self._order.pending is not None:
            # The frame waits, and gets the sampler's default priority when it is stored.
            return
        super().update_tensordict_priority(data.reshape(-1) if index is not None and index.ndim > 2 else data)

    def _sample(self, batch_size: int) -> tuple[TensorDictBase, dict[str, Any]]:
        # Another process may have made the entries; the sampler sees them once the order has found them.
        self._order.entries()
        with self._replay_lock, self._write_lock:
            position = self._check_whole()
            if position is not None and self._draws():
                data, index = self._n_step_drawn(batch_size, position, False)
                return self._finished(data, self._info_of(index))
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

    def _info_of(self, index: Tensor) -> dict[str, Any]:
        """Returns the info that a sampler would return for frames that the buffer has drawn."""
        return {"index": index.unbind(1) if self._storage.ndim > 1 else index.squeeze(1)}

    def _draws(self) -> bool:
        """Whether the buffer draws frames, uniformly in one launch; a sampler takes one launch per dimension."""
        return draws_alike(self._sampler) and self._sample_unit is None and not self._writer.tracks_generations

    def _draw(self, batch_size: int, position: Position, device: torch.device) -> Tensor:
        """Draws rows ``[N]``, counted over the slots that hold frames."""
        rows = self._storage.max_size // position.slots * position.live
        return self._draw_integers(0, rows, (batch_size,), device)

    def _draw_integers(self, low: int, high: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Draws integers below ``high`` where the buffer's generator is, and returns them on ``device``."""
        drawn_on = device if self._generator is None else self._generator.device
        return torch.randint(low, high, shape, generator=self._generator, device=drawn_on).to(device)

    def _read(self, info: dict[str, Any], position: Position | None) -> TensorDictBase:
        """Computes the samples of the frames at the index in ``info``; adds their generations to it, if tracked."""
        if self._writer.tracks_generations:
            info["index_generation"] = self._writer.generations_of(info["index"])
        if position is None:
            raise RuntimeError("storage must hold frames to be sampled, got an empty one")
        layout = self._layout()
        indices = check_index(info["index"], self._storage.ndim, layout.device)
        shape = indices[0].shape
        samples, high = self._samples([dim.reshape(-1) for dim in indices], position)
        built, _ = layout.sample(samples, high, self, self._selection, False)
        return built if len(shape) == 1 else built.reshape(*shape, *built.shape[1:])

    def _n_step_drawn(self, batch_size: int, position: Position, with_index: bool) -> tuple[TensorDict, Any]:
        """Draws frames, and computes their n-step transitions and, if wanted, their index."""
        layout = self._layout()
        rows = self._draw(batch_size, position, layout.device)
        samples, high = self._samples([rows], position, layout.frames.batch_size)
        return layout.sample(samples, high, self, self._selection, with_index)

    def _layout(self) -> StoredLayout:
        """Returns the storage's layout, which it reads again if entries, ends or arguments may have changed."""
        order, before = self._order, self._layout_before
        indexed = isinstance(self._writer, TensorDictRoundRobinWriter)
        of = order.entries(), order.changes(), self._changes, indexed, self._ends(), order.wide_dtypes
        if before is not None and of[0] is before.of[0] and of[1:] == before.of[1:]:
            return before
        self._layout_before = StoredLayout.read(of, self, self._selection)
        return self._layout_before

    def _samples(self, indices: Sequence[Tensor], position: Position, sizes: Any = None) -> tuple[Samples, int]:
        """Returns samples at indices or, in a storage of ``sizes``, at drawn rows, and the largest n of any sample."""
        low, high = steps if isinstance(steps := steps_of_call.get() or self._n_steps, tuple) else (steps, steps)
        drawn = None if low == high else self._draw_integers(low, high + 1, indices[0].shape, indices[0].device)
        newest, live, slots, written = position
        known = (newest, live) if written is None else (slots - 1, slots)
        return Samples(indices, *known, drawn, sizes, written=written), high

    def _check_whole(self) -> Position | None:
        """Checks the transforms; returns the result of :meth:`_find_whole`. Runs before anything is drawn."""
        self._check_neighbours()
        return self._find_whole()

    def _find_whole(self) -> Position | None:
        """Finds which slots hold frames; raises a RuntimeError if they are in no order, or a TornError."""
        position, (first, torn) = self._order.position(), self._order.torn
        if torn:
            raise TornError(
                f"a write that failed has overwritten frames in part: extend the buffer, whose next frames overwrite "
                f"them wholly, before it is sampled again ({torn} slots from {first} on), or empty it"
            )
        return position

    def _finished(self, data: TensorDictBase, info: dict[str, Any]) -> tuple[TensorDictBase, dict[str, Any]]:
        """Collates, transforms and pins a sample, as torchrl's buffer does."""
        data = self._collate_fn(data)
        if self._transform is not None and len(self._transform):
            with data.unlock_(), set_dispatch_td_nn_modules(True):
                data = self._transform(data)
        if self._pin_memory and data.device == torch.device("cpu"):
            data = data.pin_memory()
        return data, info

    @contextlib.contextmanager
    def _up_to_date(self, changes: tuple[Any, ...], anew: bool) -> Iterator[None]:
        """Makes the next prefetched batch one that was computed with these ``changes`` or, if ``anew``, now.

        Drops the batches whose frames are gone, since another buffer emptied the storage.

        A batch that is computed again keeps the slots that were drawn for it, and reads the frames there now.
        """
        if not self._prefetch:
            yield
            return
        with self._futures_lock:
            queue, restarts = self._prefetch_queue, self._order.restarts
            if any(getattr(future, "restarts", restarts) != restarts for future in queue):
                self._clear_prefetch_queue_locked()
            # A batch from a checkpoint has no ``changes``, and may have been computed with any arguments.
            of_before = [future for future in queue if getattr(future, "changes", None) != changes]
            while queue and (anew or queue[0] in of_before or was_torn(queue[0])):
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
                future.restarts = restarts
                if future not in of_before:
                    future.changes = changes
