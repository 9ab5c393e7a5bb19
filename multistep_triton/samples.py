"""Samples: the frames to sample from a ring or to store in one, and the results where an index points at no frame.

May import ``ends`` and ``task``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from multistep_triton.ends import Ends
from multistep_triton.task import Leaves, Results, Task


class Ring(NamedTuple):
    """A storage ``[C, *R]``, a ring of ``C`` slots, to store frames ``[*B, T]`` in."""

    leaves: Leaves
    """Contiguous leaves ``[C, *R, ...]`` with the keys, dtypes and devices of the data's, except those that ``ends``
    has rows for."""
    numbers: Tensor | None
    """int64 ``[C, *R]``, an entry of the storage that holds every frame's slot; or None."""
    dims: int
    """The number of dimensions of ``[C, *R]``; the data has the same ones, with the first and time swapped."""
    time_dim: int
    """The position of the time dimension in ``[*B, T]``."""
    ends: Ends | None = None
    """The ends of a storage that keeps observations once; the slot before the first frame's then holds a frame."""


class Samples(NamedTuple):
    """Frames sampled from a storage ``[C, *R]``, a ring of ``C`` slots."""

    indices: Sequence[Tensor]
    """The indices of the frames: int64 ``[N]`` per dimension, time first, on the leaves' device; but see ``sizes``."""
    newest: int
    """The slot of the newest frame. The next slot holds the oldest frame, or none yet."""
    live: int
    """The number of slots that hold frames: all, or those up to the newest."""
    n_steps: Tensor | None = None
    """Frames in the full window of each sample, int64 ``[N]``; None if that is ``Task.n_steps`` for all."""
    sizes: tuple[int, ...] | None = None
    """``[C, *R]`` if the buffer drew the frames without a sampler. ``indices`` is then one tensor: int64 rows, counted
    over ``[live, *R]``, or float64 fractions in [0, 1) of the number of these rows."""
    rows: Tensor | None = None
    """The rows of the frames, int64 ``[N]``, counted over ``[C, *R]``, if known."""
    written: Tensor | None = None
    """The number of frames ever written per environment, int64 on the device, if the host does not know it; ``live``
    is then ``C``, and ``newest`` the last slot."""
    ends: Ends | None = None
    """The ends of a storage that keeps observations once."""

    def found(self) -> Samples:
        """Returns these samples with an index per dimension; launches operators, and does not wait for the device."""
        if self.sizes is None:
            return self
        (row,), (slots, *lead) = self.indices, self.sizes
        if row.is_floating_point():
            live = self.live if self.written is None else self.written.clamp(max=slots)
            rows = live * math.prod(lead)
            row = (row * rows).to(torch.int64).clamp(max=rows - 1)
        slot, others = row, []
        for size in reversed(lead):
            others.append(slot % size)
            slot = slot // size
        return self._replace(indices=[slot, *reversed(others)], sizes=None, rows=row)

    def rows_in(self, sizes: Sequence[int]) -> Tensor:
        """Returns the rows of the frames, int64 ``[N]``, counted over ``sizes``."""
        if self.rows is not None:
            return self.rows
        row, *others = self.indices
        for size, each in zip(sizes[1:], others, strict=True):
            row = torch.add(each, row, alpha=size)
        return row

    def read(self) -> Samples:
        """Returns these samples with ``newest`` and ``live`` from ``written``, for which the host waits."""
        if self.written is None:
            return self
        written, slots = int(self.written), self.live
        return self._replace(newest=(written - 1) % slots, live=min(written, slots), written=None)


def sampled_where_frames_are(compute: Callable[[Task, Samples, Leaves], Results]) -> Callable[..., Results]:
    """Makes ``n_step_sample`` blank the samples of no frame on an accelerator, where the host checks no indices."""

    @functools.wraps(compute)
    def n_step_sample(task: Task, samples: Samples, data: Leaves) -> Results:
        if samples.indices[0].is_cpu:
            return compute(task, samples, data)
        there, guarded = find_there(samples, next(iter(data.values())).shape)
        return blanked(compute(task, guarded, data), there)

    return n_step_sample


def find_there(samples: Samples, sizes: Sequence[int]) -> tuple[Tensor, Samples]:
    """Returns which indices point at a frame, bool ``[N]``, and samples whose other indices are 0."""
    there = torch.ones_like(samples.indices[0], dtype=torch.bool)
    for index, size in zip(samples.indices, (samples.live, *sizes[1:]), strict=False):
        there = there & (index >= 0) & (index < size)
    return there, samples._replace(indices=[torch.where(there, index, 0) for index in samples.indices], rows=None)


def blanked(results: Results, there: Tensor) -> Results:
    """Returns results with 0 steps, NaN returns, discount 1, and zeros for all else where no frame is ``there``."""

    def blank(value: Tensor, other: float) -> Tensor:
        return torch.where(there.view(-1, *[1] * (value.ndim - 1)), value, other)

    def zero(leaf: Tensor) -> Tensor:
        # Selects bytes, because torch.where does not know all dtypes.
        return blank(leaf.unsqueeze(-1).view(torch.uint8), 0).view(leaf.dtype).squeeze(-1)

    return Results(
        {key: zero(leaf) for key, leaf in results.leaves.items()},
        {key: blank(value, torch.nan) for key, value in results.returns.items()},
        blank(results.steps, 0),
        blank(results.discount, 1),
        there & results.nonterminal,
    )
