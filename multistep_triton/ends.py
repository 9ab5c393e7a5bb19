"""Ends: the rows after frames of a storage that keeps observations once, where the next frame does not hold them.

The next frame holds the row after a frame, except after an end, which no frame of its trajectory follows, and after
the newest frame. The last row of ``Ends`` follows the newest frame until the next frame comes. If the newest frame was
an end, that row is then passed on to the ring of the other rows, where it stays until a later end overwrites it. Keys
are opaque. May import torch, ``carry``, ``task`` and ``windows``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multistep_triton.carry import runs_of
from multistep_triton.task import Leaves
from multistep_triton.windows import bits, find_boundaries, write_runs


@dataclass(slots=True, eq=False)
class Ends:
    """The ends of a storage ``[C, *R]`` of ``C`` slots."""

    count: Tensor
    """int32 ``[C, *R]``: the number of ends passed on before each frame came. A frame is an end if the next frame's
    count is greater by one; the count of an end is its number ``k``."""
    rows: dict[Any, Tensor]
    """``[E + 1, *R, ...]``: row ``k % E`` follows end ``k``, and the last row follows the newest frame."""
    done: tuple[Hashable, ...]
    """Flags; a frame is an end if any element of any of them is True."""
    mask: Hashable | None = None
    traj: Hashable | None = None

    @property
    def slots(self) -> int:
        """The number ``E`` of ends that have rows."""
        return next(iter(self.rows.values())).shape[0] - 1

    @property
    def kind(self) -> tuple[Any, ...]:
        """Flags, mask and ids, and the kinds and shapes of counts and rows."""
        rows = [(key, row.dtype, row.shape, row.device) for key, row in self.rows.items()]
        return self.done, self.mask, self.traj, self.count.shape, rows

    def find_ended(self, data: Leaves, ring: Leaves, newest: int | None) -> Tensor:
        """Returns whether the frame before each was an end, bool ``[T, *R]``; arguments as for :meth:`find_writes`.

        ``ring`` holds the storage's leaves before any of these frames is stored. If no frame came before the first one,
        its result is arbitrary: True only passes on a row that no frame reads.
        """
        lead, frames = self.count.shape[1:], next(iter(data.values())).shape[0]

        def mark(key: Hashable) -> Tensor:
            before = data[key][:1] if newest is None else ring[key][newest : newest + 1]
            marks = torch.cat((before, data[key]))
            return marks.reshape(shape) if marks.numel() == shape.numel() else marks.reshape(*shape, -1).any(-1)

        shape = torch.Size((frames + 1, *lead))
        done = functools.reduce(torch.bitwise_or, map(mark, self.done))
        mask, traj = (None if key is None else mark(key) for key in (self.mask, self.traj))
        return find_boundaries(done, mask, traj, 0)[:-1]

    def find_writes(self, data: Leaves, ended: Tensor, newest: int | None, slot: int) -> Callable[[], None]:
        """Returns a function that writes counts and rows, to call when frames ``[T, *R, ...]`` have been stored.

        Args:
            data: leaves of the frames, at most ``C`` of them.
            ended: the result of :meth:`find_ended`.
            newest: the slot of the frame before the first one, or None if there is none.
            slot: the slot of the first frame.
        """
        slots, frames, ends = self.count.shape[0], len(ended), self.slots
        count = ended.cumsum(0, dtype=torch.int32)
        if newest is not None:
            count += self.count[newest]
        # If there are more ends than rows, only the newest ones keep theirs.
        found: Any = torch.nonzero(ended if frames <= ends else ended & (count[-1] - count < ends), as_tuple=True)
        time, *envs = found
        held = 0
        if len(time):
            # ``found`` is in order of time: ends of the frame before these, whose row is the last one, come first.
            row, held = (count[found] - 1) % ends, int((time == 0).sum())
            of_held, of_data = [[each[part] for each in (row, *envs)] for part in (slice(held), slice(held, None))]

        def write() -> None:
            write_runs(self.count, count, runs_of(slot, frames, slots), 0)
            for key, rows in self.rows.items():
                kept, leaf = bits(rows), bits(data[key])
                if held:
                    kept[tuple(of_held)] = kept[(ends, *of_held[1:])].clone()
                if len(time) > held:
                    kept[tuple(of_data)] = leaf[(time[held:] - 1, *of_data[1:])].to(kept.dtype)
                kept[ends] = leaf[-1]

        return write

    def lost(self, newest: int, live: int) -> Tensor:
        """Returns how many ends among the live frames of each environment have lost their row, int64 ``[*R]``."""
        oldest = (newest + 1) % live
        return (self.count[newest] - self.count[oldest] - self.slots).clamp(min=0).to(torch.int64)
