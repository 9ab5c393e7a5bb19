"""The fast path in eager PyTorch where a storage keeps observations once: which frames stand for others, what follows.

Frames are given by their rows, counted over ``[C, *R]`` or, with a row for every agent, ``[C, *R, *A]``. May import
torch, ``ends`` and ``windows``.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from multistep_triton.ends import Ends
from multistep_triton.windows import Taker, bits


class Counted:
    """Frames ``[N]`` of a storage of ``live`` slots, each of ``envs`` rows, and the ends of their environments."""

    def __init__(self, ends: Ends, newest: int, live: int, envs: int, rows: Tensor) -> None:
        """Finds out whether any end is gone, for which the host waits; stands in for frames that are ends then.

        The one before stands for it. If that is an end, too, or there is none of its trajectory, it is the newest frame
        of the environment.
        """
        self.ends, self.newest, self.live, self.envs, self.rows = ends, newest, live, envs, rows
        self.agents, self.env = envs // max(ends.count[0].numel(), 1), rows % envs
        self.total = self.count(self.env + newest * envs)
        self.has_lost = bool((ends.count[newest] - ends.count[(newest + 1) % live] > ends.slots).any())
        if self.has_lost:
            around = self.move(rows, torch.arange(-1, 2, device=rows.device).unsqueeze(1))
            (before, own, after), newest_row = self.count(around), self.env + newest * envs
            lost = (own != after) & (rows != newest_row) & self.is_gone(own)
            # What is older than an end that is gone is gone, too.
            is_end = (before != own) & (around[0] != newest_row)
            self.rows = torch.where(lost, torch.where(is_end, newest_row, around[0]), rows)

    def move(self, rows: Tensor, slots: int | Tensor) -> Tensor:
        """The rows of so many slots further on."""
        return torch.add(rows, slots, alpha=self.envs) % (self.live * self.envs)

    def count(self, rows: Tensor) -> Tensor:
        """How many ends were passed on before frames came; agents share it."""
        rows = rows if self.agents == 1 else rows // self.agents
        return self.ends.count.view(-1).index_select(0, rows.view(-1)).view(rows.shape)

    def is_gone(self, number: Tensor) -> Tensor:
        """Whether there is no row left of what comes after ends of these numbers."""
        return self.total - number > self.ends.slots


class Following:
    """What comes after frames: what the next ones hold, but after ends that are not gone, and after the newest."""

    def __init__(self, rows: Tensor, counted: Counted) -> None:
        """Where it lies."""
        self.after, ends = counted.move(rows, 1), counted.ends
        number, is_newest = counted.count(rows), rows == counted.env + counted.newest * counted.envs
        is_end = number != counted.count(self.after)
        if counted.has_lost:
            is_end &= ~counted.is_gone(number)
        self.kept = (is_end | is_newest).nonzero().view(-1)
        slot = torch.where(is_newest, ends.slots, number % ends.slots)
        self.row = torch.add(counted.env, slot, alpha=counted.envs).index_select(0, self.kept)
        self.kept_rows = ends.rows

    def take(self, key: Hashable, take: Taker) -> Tensor:
        """The rows of a leaf, which ``take`` takes where they are of frames."""
        taken, rows = take(self.after), bits(self.kept_rows[key])
        bits(taken).index_copy_(0, self.kept, rows.flatten(0, rows.ndim - taken.ndim).index_select(0, self.row))
        return taken
