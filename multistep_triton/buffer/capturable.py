"""CapturableReplayBuffer: a buffer whose calls a CUDA graph can capture, as its write count lies on the device.

Owns that count, and when the host reads it. Reaches into private attributes of torchrl's buffers. May import torchrl,
``sampled`` and what it may, ``backends`` and ``checks``.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torchrl.data import ReplayBuffer, Storage, Writer
from torchrl.data.replay_buffers.samplers import Sampler
from typing_extensions import Self

from multistep_triton.backends import resolve_backend
from multistep_triton.buffer.repeated import RepeatedCall
from multistep_triton.buffer.sampled import SampledReplayBuffer
from multistep_triton.buffer.stored import Position, device_of, draws_alike
from multistep_triton.checks import check_not_captured
from multistep_triton.layouts import KeyPath


class CapturableReplayBuffer(SampledReplayBuffer):
    """A buffer that may be ``capturable``; if it is not, the host alone counts its frames.

    If it is, and the kernels run, each repeated call and each ``sample`` makes the same launches with the same
    arguments, and reads nothing back. Any other use of the frames first makes the host read the device's count.
    """

    _written: Tensor | None = None
    """The write count on the device, int64, or None: it tells the next slot, and whether the ring is full."""
    _read_last = 0
    """The value of ``_written`` up to which the host knows the frames."""

    @property
    def capturable(self) -> bool:
        """Whether calls can be captured into a CUDA graph."""
        return self._capturable

    def _pull(self) -> None:
        """Reads the device's write count, and advances the host's position to it."""
        if self._written is None:
            return
        check_not_captured("what is neither sample, nor extend with frames like those of a call before,")
        with self._replay_lock:
            written, order = self._written, self._order
            frames = 0 if written is None else int(written) - self._read_last
            if frames and (entries := order.entries()) is not None:
                order.changes()
                position = order.position() or Position(-1, 0, int(entries.shape[0]))
                order.advance(position, frames, self._writer)
                self._read_last += frames

    def _push(self) -> None:
        """Sets the device's write count to the host's position."""
        entries = self._order.entries()
        if not self._capturable or entries is None:
            return
        position = self._order.position() or Position(-1, 0, 0)
        # The count has to tell the next slot and whether any slot is free, and no more.
        self._read_last = position.newest + 1 + (position.slots if position.live == position.slots else 0)
        if self._written is None:
            device = device_of(entries)
            with torch.inference_mode(False):
                self._written = torch.zeros((), dtype=torch.int64, device=device)
        self._written.fill_(self._read_last)

    @contextmanager
    def _by_host(self) -> Iterator[None]:
        """Brings the host's position up to date before the block, and the device's write count after it; locked."""
        with self._replay_lock:
            self._pull()
            yield
            self._push()

    def _on_device(self, tensors: Collection[Tensor]) -> bool:
        """Whether there is a write count on the device, and the kernels run on these tensors."""
        return self._written is not None and resolve_backend(self._backend, tensors) == "triton"

    # Parts

    def _check_parts(self, storage: Storage, writer: Writer, sampler: Sampler) -> None:
        super()._check_parts(storage, writer, sampler)
        if not self._capturable:
            return
        generator = self._rng
        if not draws_alike(sampler) or self._sample_unit is not None:
            raise TypeError(
                f"sampler must be a RandomSampler, of single frames, with capturable=True, as frames are drawn on the "
                f"device, got {type(sampler).__name__} and sample_unit={self._sample_unit}"
            )
        self._check_unshared(self.shared)
        if self._prefetch or writer.tracks_generations:
            raise ValueError(
                f"capturable must be False where samples are prefetched, or a writer tracks generations, as the host "
                f"knows of no call that a graph repeats, got prefetch={self._prefetch} and track_generations="
                f"{writer.tracks_generations}"
            )
        self._check_alone(storage)
        # With device="auto" the storage has no device before it has data.
        device = getattr(storage.device, "type", None)
        if generator is not None and device not in (None, generator.device.type):
            raise ValueError(
                f"generator must be on the storage's device, {storage.device}, with capturable=True, got one on "
                f"{generator.device}"
            )

    def _check_unshared(self, shared: bool) -> None:
        if self._capturable and shared:
            raise ValueError("shared must be False with capturable=True, as no other process sees the device's count")

    def share(self, shared: bool = True) -> Self:
        """Shares the buffer among processes, as in torchrl; with ``capturable=True`` that is a ValueError."""
        self._check_unshared(shared)
        super().share(shared)
        return self

    def _check_alone(self, storage: Storage) -> None:
        """Checks that no other buffer uses the storage, as neither buffer would see what the other writes."""
        others = [each for each in storage._attached_entities if isinstance(each, ReplayBuffer) and each is not self]
        if others:
            raise ValueError(
                f"storage must be this buffer's alone with capturable=True, as others see nothing of what the device "
                f"knows, got one of {', '.join(type(each).__name__ for each in others)}, too"
            )

    def _adopt(self) -> None:
        super()._adopt()
        self._written = None
        self._push()

    # Storing and sampling

    def _store(self, call: RepeatedCall, leaves: dict[KeyPath, Tensor], frames: int) -> Tensor | None:
        written = self._written
        if written is None or not self._on_device(leaves.values()):
            with self._by_host():
                return super()._store(call, leaves, frames)
        if not 0 < frames <= call.most:
            return None
        self._check_alone(self._storage)
        try:
            index = self._store_at(call, leaves, written)
            written.add_(frames)
        except BaseException:
            # During a capture nothing is stored, and _pull raises; any other call may have written some slots.
            with suppress(RuntimeError):
                self._pull()
                self._tear(self._order.position(), frames)
                self._order.ends_writes = -1
            raise
        return index

    def _write(self, *arguments: Any) -> Any:
        with self._by_host():
            return super()._write(*arguments)

    def _find_whole(self) -> Position | None:
        on_device = self._written is not None and self._draws() and self._on_device([self._written])
        if not (on_device and self._read_last) or self._order.torn[1]:
            self._pull()
        if on_device:
            self._check_alone(self._storage)
        position = super()._find_whole()
        return position if position is None or not on_device else position._replace(written=self._written)

    def _draw(self, batch_size: int, position: Position, device: torch.device) -> Tensor:
        if position.written is None:
            return super()._draw(batch_size, position, device)
        shares = torch.empty(batch_size, dtype=torch.float64, device=device)
        return shares.uniform_(generator=self._generator)

    # The buffer as a whole

    @contextmanager
    def _undisturbed(self, keep: bool = False) -> Iterator[None]:
        with super()._undisturbed(keep), self._by_host():
            yield


def _once_known(inherited: Any) -> Any:
    """Wraps an inherited method or property, so that the host reads the device's write count first."""
    if isinstance(inherited, property):
        return property(_once_known(inherited.fget))

    @functools.wraps(inherited)
    def method(self: CapturableReplayBuffer, *args: Any, **kwargs: Any) -> Any:
        self._pull()
        return inherited(self, *args, **kwargs)

    return method


for _name in (
    *("storage", "writer", "write_count", "ends_lost", "set_at_", "set_", "update_"),
    *("__len__", "__getitem__", "__getstate__", "stats", "can_sample", "query", "read_all_in_order"),
):
    setattr(CapturableReplayBuffer, _name, _once_known(getattr(CapturableReplayBuffer, _name)))
