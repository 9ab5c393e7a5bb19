"""Samples: which frames of a storage are asked for, and what comes of an index of none.

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


class Samples(NamedTuple):
    """Frames that were sampled from a storage ``[C, *R]``, a ring of ``C`` slots."""

    indices: Sequence[Tensor]
    """Where they lie: of every dimension, time first, int64 ``[N]``, on the device of the leaves."""
    newest: int
    """The slot of the newest frame, after which comes the oldest, or nothing yet."""
    live: int
    """Slots that hold frames: all, or those up to the newest."""
    n_steps: Tensor | None = None
    """int64 ``[N]``: frames in the full window of each, if that is not one number for all."""
    sizes: tuple[int, ...] | None = None
    """``[C, *R]`` where frames were drawn here and not by a sampler: ``indices`` is then one tensor of rows of those
    that hold frames, counted over all dimensions, int64, or of shares of them in [0, 1), float64."""
    rows: Tensor | None = None
    """Their rows, int64 ``[N]``, if these are known."""
    written: Tensor | None = None
    """How many frames of an environment were ever written, int64 on the device, where the host does not know; ``live``
    is then ``C``, and ``newest`` the last slot."""
    ends: Ends | None = None
    """Those of a storage that keeps observations once."""

    def found(self) -> Samples:
        """These, with an index for every dimension, which launches operators on the device, and nothing else."""
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
        """Their rows, int64 ``[N]``, counted over ``sizes``."""
        if self.rows is not None:
            return self.rows
        row, *others = self.indices
        for size, each in zip(sizes[1:], others, strict=True):
            row = torch.add(each, row, alpha=size)
        return row

    def read(self) -> Samples:
        """These, with what the host did not know, for which it waits."""
        if self.written is None:
            return self
        written, slots = int(self.written), self.live
        return self._replace(newest=(written - 1) % slots, live=min(written, slots), written=None)


def sampled_where_frames_are(compute: Callable[[Task, Samples, Leaves], Results]) -> Callable[..., Results]:
    """Of samples on an accelerator, which nobody has checked: those of no frame come out blank."""

    @functools.wraps(compute)
    def n_step_sample(task: Task, samples: Samples, data: Leaves) -> Results:
        if samples.indices[0].is_cpu:
            return compute(task, samples, data)
        there, guarded = find_there(samples, next(iter(data.values())).shape)
        return blanked(compute(task, guarded, data), there)

    return n_step_sample


def find_there(samples: Samples, sizes: Sequence[int]) -> tuple[Tensor, Samples]:
    """Which samples are of a frame, bool ``[N]``, and samples of which the others are of the first frame."""
    there = torch.ones_like(samples.indices[0], dtype=torch.bool)
    for index, size in zip(samples.indices, (samples.live, *sizes[1:]), strict=False):
        there = there & (index >= 0) & (index < size)
    return there, samples._replace(indices=[torch.where(there, index, 0) for index in samples.indices], rows=None)


def blanked(results: Results, there: Tensor) -> Results:
    """What was sampled, with 0 steps and NaN as the return where there is no frame, and zeros for all else."""

    def blank(value: Tensor, other: float) -> Tensor:
        return torch.where(there.view(-1, *[1] * (value.ndim - 1)), value, other)

    def zero(leaf: Tensor) -> Tensor:
        # By their bytes, as torch selects among few of the dtypes.
        return blank(leaf.unsqueeze(-1).view(torch.uint8), 0).view(leaf.dtype).squeeze(-1)

    return Results(
        {key: zero(leaf) for key, leaf in results.leaves.items()},
        {key: blank(value, torch.nan) for key, value in results.returns.items()},
        blank(results.steps, 0),
        blank(results.discount, 1),
        there & results.nonterminal,
    )
