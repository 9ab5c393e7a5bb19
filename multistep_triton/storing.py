"""Storing calls that are like one before, whose leaves need no checks again.

Owns what such calls have in common. May import ``frames``, ``storage_order``, ``task`` and torchrl, by public names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import RoundRobinWriter, Storage, TensorDictRoundRobinWriter, TensorStorage, Writer

from multistep_triton.frames import KeyPath
from multistep_triton.storage_order import Order
from multistep_triton.task import KnownLeaves

INDEX = ("index",)
"""Where a writer of tensordicts stores every frame's slot."""


@dataclass(slots=True)
class Seen:
    """What calls have in common with one that was checked and stored."""

    storage: Storage
    writer: Writer
    entries: TensorDictBase
    names: list[Any]
    """Of the data's entries; a group's is the list of its name and theirs."""
    kinds: list[tuple[Any, ...]]
    """dtype, trailing shape and device of every leaf."""
    rows: tuple[int, ...]
    """The number of batch dimensions, and ``*B``."""
    time_dim: int
    paths: list[KeyPath]
    ring: KnownLeaves
    """The storage's leaves of these paths."""
    numbers: Tensor | None
    """The one that holds every frame's slot."""
    others: int
    """How often anything else was written by then."""
    most: int
    """Of how many frames such a call may be: one less than there are slots where that of the newest is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a buffer has seen nothing."""
        return type(None), ()

    def read(self, data: TensorDictBase) -> dict[KeyPath, Tensor] | None:
        """The leaves of such a call; None if it is another."""
        found = read_plain(data, self.time_dim)
        if found is None or found[1:] != (self.names, self.kinds, self.rows):
            return None
        return dict(zip(self.paths, found[0], strict=True))


def find_seen(data: TensorDictBase, order: Order, writer: Writer, time_dim: int, priority_key: str) -> Seen | None:
    """What is to be remembered of a call that was stored; None if others like it are for torchrl to store."""
    storage, entries, found = order.storage, order.entries(), read_plain(data, time_dim)
    # Theirs and no other's, in whose place this would be.
    usual = type(storage).set is TensorStorage.set and type(writer) in (RoundRobinWriter, TensorDictRoundRobinWriter)
    is_asked_more = writer.tracks_generations or data.get(priority_key, None) is not None
    if found is None or entries is None or not usual or is_asked_more:
        return None
    _, names, kinds, rows = found
    paths, ndim = _paths(names), storage.ndim
    kept_once = {} if order.ends is None else order.ends.rows
    ring = {path: entries.get(path, None) for path in paths if path not in kept_once}
    numbers = entries.get(INDEX, None) if type(writer) is TensorDictRoundRobinWriter else None
    stored: list[Any] = [*ring.values()] if numbers is None else [*ring.values(), numbers]
    if not all(isinstance(leaf, Tensor) and leaf.is_contiguous() for leaf in stored):
        return None
    of_paths = [kept_once[path] if path in kept_once else ring[path] for path in paths]
    pairs, wide = zip(paths, of_paths, strict=True), order.wide
    alike = kinds == [(wide.get(path, leaf.dtype), leaf.shape[ndim:], leaf.device) for path, leaf in pairs]
    count = len([*entries.keys(True, True)])
    if not alike or count != len(stored) or (numbers is not None and numbers.dtype != torch.int64) or INDEX in ring:
        return None
    known, others = KnownLeaves(ring), order.changes()
    most = len(entries) - bool(kept_once)
    return Seen(storage, writer, entries, names, kinds, rows, time_dim, paths, known, numbers, others, most)


def read_plain(
    data: TensorDictBase, time_dim: int
) -> tuple[list[Tensor], list[Any], list[Any], tuple[int, ...]] | None:
    """Leaves, names, kinds and rows of a tensordict that holds tensors and tensordicts alone; None of any other."""
    leaves: list[Tensor] = []
    names: list[Any] = []
    if not _read_into(data, leaves, names):
        return None
    sizes = data.batch_size
    ndim = len(sizes)
    kinds = [(leaf.dtype, leaf.shape[ndim:], leaf.device) for leaf in leaves]
    return leaves, names, kinds, (ndim, *sizes[:time_dim], *sizes[time_dim + 1 :])


def _read_into(data: Any, leaves: list[Tensor], names: list[Any]) -> bool:
    if type(data) is not TensorDict:
        return False
    for name, value in data.items():
        if isinstance(value, Tensor):
            if value.requires_grad:
                # torch keeps the graph of what is copied.
                return False
            names.append(name)
            leaves.append(value)
        else:
            names.append(inner := [name])
            if not _read_into(value, leaves, inner):
                return False
    return True


def _paths(names: list[Any], above: KeyPath = ()) -> list[KeyPath]:
    paths: list[KeyPath] = []
    for name in names:
        paths += [(*above, name)] if isinstance(name, str) else _paths(name[1:], (*above, name[0]))
    return paths
