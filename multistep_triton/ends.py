"""Ends: what follows the frames of a storage that keeps observations once, where no other frame's entry is it.

What comes after a frame is what the next frame holds, but at an end, after which no frame of its trajectory comes, and
at the newest frame. Rows of what comes after the newest frame are kept until the next frame has come; if it was an end,
they are then passed on to a ring of so many rows, in which they stay until as many other ends have come. Keys are
opaque. May import torch, ``task`` and ``windows``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multistep_triton.task import Leaves
from multistep_triton.windows import bits, runs_of, write_runs


@dataclass(slots=True, eq=False)
class Ends:
    """Of a storage ``[C, *R]`` of ``C`` slots."""

    count: Tensor
    """int32 ``[C, *R]``: how many ends were passed on before each frame came. One more than for the frame before says
    that that was an end; the count of an end is its number."""
    rows: dict[Any, Tensor]
    """``[E + 1, *R, ...]``: of end ``k`` in row ``k % E``, and in the last row what comes after the newest frame."""
    done: tuple[Hashable, ...]
    """Flags, any element of any of which makes a frame an end."""
    mask: Hashable | None = None
    traj: Hashable | None = None

    @property
    def slots(self) -> int:
        """How many ends there are rows for."""
        return next(iter(self.rows.values())).shape[0] - 1

    def is_like(self, other: Ends) -> bool:
        """Whether these have room for the same."""
        kinds = [
            (
                each.done,
                each.mask,
                each.traj,
                [(key, row.dtype, row.shape, row.device) for key, row in each.rows.items()],
            )
            for each in (self, other)
        ]
        return kinds[0] == kinds[1] and self.count.shape == other.count.shape

    def find_ended(self, data: Leaves, ring: Leaves, newest: int | None) -> Tensor:
        """Whether the frame before each was an end, bool ``[T, *R]``; arguments as for :meth:`find_writes`.

        ``ring`` holds the storage's leaves as they are before any of these frames is stored; the result may be a view
        of them. If no frame came before the first one, what this says of it only passes on a row that no frame asks
        for.
        """
        lead, frames = self.count.shape[1:], next(iter(data.values())).shape[0]

        def before(key: Hashable) -> Tensor:
            first = data[key][:1] if newest is None else ring[key][newest : newest + 1]
            return first if frames == 1 else torch.cat((first, data[key][:-1]))

        def of_frames(flag: Tensor) -> Tensor:
            return flag.reshape(frames, *lead) if flag.numel() == count else flag.reshape(frames, *lead, -1).any(-1)

        count = frames * lead.numel()
        ended = functools.reduce(torch.bitwise_or, [of_frames(before(key)) for key in self.done])
        if self.mask is not None:
            ended = ended | ~of_frames(before(self.mask) & data[self.mask])
        if self.traj is not None:
            ended = ended | of_frames(before(self.traj) != data[self.traj])
        return ended

    def find_writes(self, data: Leaves, ended: Tensor, newest: int | None, slot: int) -> Callable[[], None]:
        """What remains to be done when frames ``[T, *R, ...]`` have been stored, at most ``C`` of them.

        Args:
            data: leaves of the frames.
            ended: what :meth:`find_ended` found.
            newest: the slot of the frame before, or None if there is none.
            slot: that of the first frame.
        """
        slots, frames, ends = self.count.shape[0], len(ended), self.slots
        count = ended.cumsum(0, dtype=torch.int32)
        if newest is not None:
            count += self.count[newest]
        # Of more ends than there are rows, the newest stay.
        found: Any = torch.nonzero(ended if frames <= ends else ended & (count[-1] - count < ends), as_tuple=True)
        time, *envs = found
        held = 0
        if len(time):
            # In order of time: that of the frame before these, which is held in the last row, comes first.
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
        """How many ends among the live frames of every environment are gone, int64 ``[*R]``."""
        oldest = (newest + 1) % live
        return (self.count[newest] - self.count[oldest] - self.slots).clamp(min=0).to(torch.int64)
