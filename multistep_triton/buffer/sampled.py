"""SampledReplayBuffer: how a buffer is sampled of which something else than the frames themselves is.

Owns what is read under the buffer's locks, and what of that is prefetched. Reaches into private attributes of torchrl's
buffers. May import torchrl, ``stored`` and ``checkpointed``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn.utils import _set_dispatch_td_nn_modules as set_dispatch_td_nn_modules
from torch import Tensor
from torchrl.data import TensorDictReplayBuffer

from multistep_triton.buffer.checkpointed import CheckpointedReplayBuffer
from multistep_triton.buffer.stored import Position, draws_alike


class SampledReplayBuffer(TensorDictReplayBuffer, CheckpointedReplayBuffer):
    """One of which something else than the frames themselves is sampled: what that is is up to a subclass."""

    def _n_step_at(self, index: Any, position: Position) -> TensorDictBase:
        """What is sampled of the frames at an index of the storage."""
        raise NotImplementedError

    def _n_step_drawn(self, rows: Tensor, position: Position, with_index: bool) -> tuple[TensorDictBase, Tensor]:
        """What is sampled of rows ``[N]`` of those that hold frames, and their index ``[N, ndim]``; it may be in it."""
        raise NotImplementedError

    def extend(self, tensordicts: TensorDictBase, *, update_priority: bool | None = None) -> Tensor:
        """As in torchrl, which copies the tensordict for transforms that it may not have."""
        if self._repeated is not None and not len(self._transform) and self._order.pending is None:
            index = self._extend_repeated(tensordicts)
            if index is not None:
                return index
        stored: Tensor = super().extend(tensordicts, update_priority=update_priority)
        return stored

    def sample(self, batch_size: int | None = None, return_info: bool = False, **kwargs: Any) -> Any:
        """As in torchrl, which sets what a sampler tells of frames in the sample, one entry after the other."""
        if not self.initialized:
            return super().sample(batch_size, return_info, **kwargs)
        size, usual = self._batch_size if batch_size is None else batch_size, self._batch_size
        unusual = kwargs or size is None or usual not in (None, size) or self._sample_dependency is not None
        others = self._prefetch or self._service_shutdown or len(self._transform) or self._collate_fn.is_given
        if unusual or others or not self._draws():
            return super().sample(batch_size, return_info, **kwargs)
        with self._replay_lock, self._write_lock:
            # There is no transform.
            if (position := self._find_whole()) is None:
                return super().sample(batch_size, return_info)
            data, index = self._n_step_drawn(self._draw(size, position), position, True)
        if self._pin_memory and data.device == torch.device("cpu"):
            data = data.pin_memory()
        return (data, self._info_of(index)) if return_info else data

    def _set_index_in_td(self, tensordict: TensorDictBase, index: Tensor | int | None) -> None:
        if self._order.pending is not None:
            # That of a call whose newest frame waits is of other frames.
            return
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
            if position is not None and self._draws():
                data, index = self._n_step_drawn(self._draw(batch_size, position), position, False)
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
        """What a sampler would say of frames that were drawn."""
        return {"index": index.unbind(1) if self._storage.ndim > 1 else index.squeeze(1)}

    def _draws(self) -> bool:
        """Whether frames are drawn here, all as likely, in one launch, and not by a sampler, in one per dimension."""
        return draws_alike(self._sampler) and self._sample_unit is None and not self._writer.tracks_generations

    def _draw(self, batch_size: int, position: Position) -> Tensor:
        """Rows ``[N]`` of those that hold frames."""
        storage = self._storage
        rows = storage.max_size // position.slots * position.live
        return torch.randint(rows, (batch_size,), generator=self._generator, device=storage.device)

    def _read(self, info: dict[str, Any], position: Position | None) -> TensorDictBase:
        """What is sampled of the frames that lie where ``info`` says, which is told how old they are."""
        if self._writer.tracks_generations:
            info["index_generation"] = self._writer.generations_of(info["index"])
        if position is None:
            raise RuntimeError("storage must hold frames to be sampled, got an empty one")
        return self._n_step_at(info["index"], position)

    def _check_whole(self) -> Position | None:
        """Checks what is beside windows, and that all frames are there, in order, before anything is drawn."""
        self._check_neighbours()
        return self._find_whole()

    def _find_whole(self) -> Position | None:
        """Which slots hold frames, all of which are there, in order."""
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
            queue, restarts = self._prefetch_queue, self._order.restarts
            if any(getattr(future, "restarts", restarts) != restarts for future in queue):
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
                future.restarts = restarts
                if future not in of_before:
                    future.changes = changes
