"""The fast path in eager PyTorch where a storage keeps observations once: which frames stand for others, what follows.

Frames are given by their rows, counted over ``[C, *R]`` or, with a row for every agent, ``[C, *R, *A]``. May import
torch, ``ends`` and ``windows``.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from multistep_triton.ends import Ends
from multistep_triton.windows import Taker, bits, move_rows


class EndCounts:
    """Frames ``[N]`` of a storage of ``live`` slots, each of ``envs`` rows, and the ends of their environments."""

    def __init__(self, ends: Ends, newest: int, live: int, envs: int, rows: Tensor) -> None:
        """Finds out whether any end is gone, for which the host waits; stands in for frames that are ends then.

        The one before stands for it. If that is an end, too, or there is none of its trajectory, it is the newest frame
        of the environment.
        """
        self.ends, self.live, self.envs, self.rows = ends, live, envs, rows
        self.agents, self.oldest = envs // max(ends.count[0].numel(), 1), (newest + 1) % live
        self.has_lost = bool((ends.count[newest] - ends.count[self.oldest] > ends.slots).any())
        if self.has_lost:
            # The rows of the newest frames there, and how many ends there were.
            self.newest = rows % envs + newest * envs
            self.total = self.count(self.newest)
            around = move_rows(rows, torch.arange(-1, 2, device=rows.device).unsqueeze(1), live, envs)
            before, own, _ = numbers = self.count(around)
            lost = self.are_lost(around[1:], numbers[1:])[0]
            # What is older than an end that is gone is gone, too.
            is_end = (before != own) & (around[0] != self.newest)
            self.rows = torch.where(lost, torch.where(is_end, self.newest, around[0]), rows)

    def count(self, rows: Tensor) -> Tensor:
        """How many ends were passed on before frames came; agents share it."""
        rows = rows if self.agents == 1 else rows // self.agents
        return self.ends.count.view(-1).index_select(0, rows.view(-1)).view(rows.shape)

    def are_lost(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """Whether frames ``[K, N]``, one after the other, but the last, are ends that are gone, by their counts."""
        return (numbers[:-1] != numbers[1:]) & (rows[:-1] != self.newest) & self.is_gone(numbers[:-1])

    def is_gone(self, number: Tensor) -> Tensor:
        """Whether there is no row left of what comes after ends of these numbers."""
        return self.total - number > self.ends.slots


class NextRows:
    """What comes after frames: what the next ones hold, but after ends that are not gone, and after the newest."""

    def __init__(self, rows: Tensor, counted: EndCounts) -> None:
        """Where it lies."""
        ends, envs = counted.ends, counted.envs
        self.after, oldest = move_rows(rows, 1, counted.live, envs), counted.oldest * envs
        number, is_newest = counted.count(rows), (self.after >= oldest) & (self.after < oldest + envs)
        is_end = number != counted.count(self.after)
        if counted.has_lost:
            is_end &= ~counted.is_gone(number)
        self.kept = (is_end | is_newest).nonzero().view(-1)
        row, number, is_newest = (each.index_select(0, self.kept) for each in (rows, number, is_newest))
        slot = torch.where(is_newest, ends.slots, number % ends.slots)
        self.row, self.kept_rows = torch.add(row % envs, slot, alpha=envs), ends.rows

    def take(self, key: Hashable, take: Taker) -> Tensor:
        """The rows of a leaf, which ``take`` takes where they are of frames."""
        taken = take(self.after)
        if len(self.kept):
            rows = bits(self.kept_rows[key])
            rows = rows.flatten(0, rows.ndim - taken.ndim).index_select(0, self.row)
            bits(taken).index_copy_(0, self.kept, rows)
        return taken
