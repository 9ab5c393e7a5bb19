"""The fast path in eager PyTorch where a storage keeps observations once: replaces lost ends, and reads next rows.

Callers name frames by rows, counted over ``[C, *R]`` or, with a row for every agent, ``[C, *R, *A]``. May import
torch, ``ends`` and ``windows``.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from multistep_triton.ends import Ends
from multistep_triton.windows import Taker, bits, move_rows


class EndCounts:
    """Sampled frames ``[N]`` of a storage of ``live`` slots of ``envs`` rows each, and the counts of ends near them."""

    def __init__(self, ends: Ends, newest: int, live: int, envs: int, rows: Tensor) -> None:
        """Finds whether any end is gone, for which the host waits, and replaces the sampled frames that are such ends.

        The frame before replaces such an end. If that is an end, too, or no frame is there, the newest frame of the
        environment does.
        """
        self.ends, self.live, self.envs, self.rows = ends, live, envs, rows
        self.agents, self.oldest = envs // max(ends.count[0].numel(), 1), (newest + 1) % live
        self.has_lost = bool((ends.count[newest] - ends.count[self.oldest] > ends.slots).any())
        if self.has_lost:
            # The rows of the newest frames of these environments, and their counts of ends.
            self.newest = rows % envs + newest * envs
            self.total = self.count(self.newest)
            around = move_rows(rows, torch.arange(-1, 2, device=rows.device).unsqueeze(1), live, envs)
            before, own, _ = numbers = self.count(around)
            lost = self.are_lost(around[1:], numbers[1:])[0]
            # An end before one that is gone is gone, too.
            is_end = (before != own) & (around[0] != self.newest)
            self.rows = torch.where(lost, torch.where(is_end, self.newest, around[0]), rows)

    def count(self, rows: Tensor) -> Tensor:
        """Returns how many ends were passed on before the frames at ``rows`` came; a frame's agents share one count."""
        rows = rows if self.agents == 1 else rows // self.agents
        return self.ends.count.view(-1).index_select(0, rows.view(-1)).view(rows.shape)

    def are_lost(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """Returns which of consecutive frames ``[K, N]`` but the last are ends that are gone, by their counts."""
        return (numbers[:-1] != numbers[1:]) & (rows[:-1] != self.newest) & self.is_gone(numbers[:-1])

    def is_gone(self, number: Tensor) -> Tensor:
        """Returns whether later ends have overwritten the rows of the ends with these numbers."""
        return self.total - number > self.ends.slots


class NextRows:
    """The rows after frames: the next frames hold them, but ``Ends`` those after the newest frame and ends not gone."""

    def __init__(self, rows: Tensor, counted: EndCounts) -> None:
        """Finds where these rows lie."""
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
        """Returns the rows of a leaf; ``take`` copies those that frames hold."""
        taken = take(self.after)
        if len(self.kept):
            rows = bits(self.kept_rows[key])
            rows = rows.flatten(0, rows.ndim - taken.ndim).index_select(0, self.row)
            bits(taken).index_copy_(0, self.kept, rows)
        return taken
