"""Repeated calls: data like that of a call that was stored, whose leaves need no further checks.

Owns what such calls have in common. May import ``layouts``, ``roles``, ``samples``, ``storage_order``, ``task`` and
torchrl, by public names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import RoundRobinWriter, TensorDictRoundRobinWriter, TensorStorage, Writer

from multistep_triton.buffer.storage_order import Order
from multistep_triton.layouts import KeyPath, Layout, is_plain, read_layout
from multistep_triton.roles import INDEX
from multistep_triton.samples import Ring
from multistep_triton.task import CachedLeaves


@dataclass(slots=True)
class RepeatedCall:
    """What a call must have in common with a stored one to be stored without checks of its leaves."""

    entries: TensorDictBase
    layout: Layout
    """The layout of the data."""
    rows: tuple[int, ...]
    """The number of batch dimensions, and ``*B``."""
    ring: Ring
    """The storage's leaves at the data's paths, without the twins that are kept once, and its entry ``INDEX``."""
    other_writes: int
    """The value of ``Order.changes()`` when the call was stored."""
    most: int
    """The largest number of frames of such a call: the slots, less the newest frame's if observations are kept once."""

    def read(self, data: TensorDictBase) -> dict[KeyPath, Tensor] | None:
        """Returns the leaves of data that is like that of the stored call; None for other data."""
        # Reading a lazy stack would stack it; groups that are lazy stacks are stacked for the checks anyway.
        if type(data) is not TensorDict or _rows_of(data, self.ring.time_dim) != self.rows:
            return None
        layout, values = read_layout(data, self.rows[0])
        # torchrl's writer keeps the autograd graph of what it copies.
        if layout is not self.layout or any([value.requires_grad for value in values]):
            return None
        return dict(zip(layout.kinds, values, strict=True))


def repeated_call(
    data: TensorDictBase, order: Order, writer: Writer, time_dim: int, priority_key: str
) -> RepeatedCall | None:
    """Returns what to remember of a stored call; None if torchrl's writer must store calls like it, too."""
    storage, entries = order.storage, order.entries()
    # A subclass may do more in the methods that a repeated call bypasses.
    usual = type(storage).set is TensorStorage.set and type(writer) in (RoundRobinWriter, TensorDictRoundRobinWriter)
    is_asked_more = writer.tracks_generations or data.get(priority_key, None) is not None
    if entries is None or not usual or is_asked_more or not is_plain(data):
        return None
    ndim = storage.ndim
    layout, _ = read_layout(data, data.batch_dims)
    kept_once = {} if order.ends is None else order.ends.rows
    ring = {path: entries.get(path, None) for path in layout.kinds if path not in kept_once}
    numbers = entries.get(INDEX, None) if type(writer) is TensorDictRoundRobinWriter else None
    stored: list[Any] = [*ring.values()] if numbers is None else [*ring.values(), numbers]
    if not all(isinstance(leaf, Tensor) and leaf.is_contiguous() for leaf in stored):
        return None
    wide = order.wide_dtypes
    of_paths = {path: kept_once[path] if path in kept_once else ring[path] for path in layout.kinds}
    kinds = {path: (wide.get(path, leaf.dtype), leaf.shape[ndim:], leaf.device) for path, leaf in of_paths.items()}
    count = len([*entries.keys(True, True)])
    if kinds != layout.kinds or count != len(stored) or INDEX in ring:
        return None
    if numbers is not None and (numbers.dtype, numbers.device) != (torch.int64, stored[0].device):
        return None
    most = len(entries) - bool(kept_once)
    to = Ring(CachedLeaves(ring), numbers, ndim, time_dim)
    return RepeatedCall(entries, layout, _rows_of(data, time_dim), to, order.changes(), most)


def _rows_of(data: TensorDictBase, time_dim: int) -> tuple[int, ...]:
    sizes = data.batch_size
    return len(sizes), *sizes[:time_dim], *sizes[time_dim + 1 :]
