"""The fast path in eager PyTorch where a storage keeps observations once: which frames stand for others, what follows.

May import torch, ``ends``, ``samples`` and ``windows``.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from multistep_triton.samples import Samples
from multistep_triton.windows import Taker, bits


def stand_in(samples: Samples) -> Samples:
    """Samples in which no frame is an end whose rows are gone: the one before stands for it.

    If that is one, too, or there is none of its trajectory, it is the newest frame of the environment.
    """
    ends = samples.ends
    if ends is None:
        return samples
    (time, *others), newest, live = samples.indices, samples.newest, samples.live
    lead = others[: ends.count.ndim - 1]

    def is_end(slot: Tensor) -> Tensor:
        return (slot != newest) & (ends.count[(slot, *lead)] != ends.count[((slot + 1) % live, *lead)])

    gone = is_end(time) & is_gone(samples, time)
    before = (time - 1) % live
    # What is older than an end that is gone is gone, too.
    before = torch.where(is_end(before), newest, before)
    return samples._replace(indices=[torch.where(gone, before, time), *others], rows=None)


def is_gone(samples: Samples, slot: Tensor) -> Tensor:
    """Whether the rows of the first end at or after a slot are gone, ``[N]``."""
    ends, lead = samples.ends, samples.indices[1:]
    assert ends is not None
    lead = lead[: ends.count.ndim - 1]
    newest: Tensor = ends.count[samples.newest]
    return newest[tuple(lead)] - ends.count[(slot, *lead)] > ends.slots


class Following:
    """What comes after the last frame of windows of ``steps``."""

    def __init__(self, samples: Samples, steps: Tensor, sizes: Sequence[int]) -> None:
        """Where it lies."""
        ends, (time, *others), live = samples.ends, samples.indices, samples.live
        assert ends is not None
        self.ends, self.sizes = ends, torch.Size(sizes)
        last = (time + steps - 1) % live
        after, is_newest, lead = (last + 1) % live, last == samples.newest, others[: ends.count.ndim - 1]
        own = ends.count[(last, *lead)]
        is_end = (own != ends.count[(after, *lead)]) & ~is_gone(samples, last)
        self.kept = (is_newest | is_end).nonzero().squeeze(1)
        row = torch.where(is_newest, ends.slots, own % ends.slots)[self.kept]

        def rows_of(slot: Tensor, others: Sequence[Tensor]) -> Tensor:
            for size, each in zip(self.sizes[1:], others, strict=True):
                slot = slot * size + each
            return slot

        self.after = rows_of(after, others)
        self.row = rows_of(row, [each[self.kept] for each in others])

    def take(self, key: Hashable, take: Taker) -> Tensor:
        """The rows of a leaf, which ``take`` takes where they are of frames."""
        taken, rows = take(self.after), bits(self.ends.rows[key])
        bits(taken).index_copy_(0, self.kept, rows.flatten(0, len(self.sizes) - 1).index_select(0, self.row))
        return taken
