"""Rings: where frames lie that are held back or stored. Owns which slot is whose, and no maths; imports torch only."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from multistep_triton.task import Task


@functools.lru_cache(maxsize=1024)
def strides_in_order(sizes: tuple[int, ...], first: int = 0) -> tuple[int, ...]:
    """Strides of sizes that lie one inside the other in memory, in order but for the dimension that lies ``first``."""
    order = (first, *(dim for dim in range(len(sizes)) if dim != first)) if sizes else ()
    strides, step = [0] * len(sizes), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(sizes[dim], 1)
    return tuple(strides)


class Ring:
    """Frames held back, in slots that the next call may go on writing into.

    A leaf ``[*B, C, ...]`` has ``C`` slots. The oldest of ``count`` frames lies in slot ``first``, every other one in
    the slot after that of the frame before it, and after the last slot comes the first. A call that goes on from a
    ring writes into slots that are free, or into the memory of the ring before it, and returns another ring: if it
    fails, the frames of the one before are there. After the next call they may not be.
    """

    def __init__(
        self,
        leaves: dict[Any, Tensor],
        first: int,
        count: int,
        capacity: int,
        time_first: bool,
        free: bool = True,
        spare: Mapping[Any, Tensor] | None = None,
    ) -> None:
        self.leaves = leaves
        self.first = first
        self.count = count
        self.capacity = capacity
        self.time_first = time_first
        """Whether the frames of a slot lie side by side in memory, ``[C, *B, ...]``, and not those of a row."""
        self.free = free
        """Whether the slots that hold no frame may be written into."""
        self.spare = spare or {}
        """Leaves of a ring before it, laid out alike, whose frames nobody asks for any more."""

    @classmethod
    def of(cls, leaves: Mapping[Any, Tensor], count: int) -> Ring:
        """A copy of these leaves, ``[*B, count, ...]``."""
        copies = {key: leaf.clone(memory_format=torch.contiguous_format) for key, leaf in leaves.items()}
        return cls(copies, 0, count, count, False)

    def may_write(self, frames: Iterable[Tensor]) -> bool:
        """Whether leaves of these frames may be written into the free slots."""
        if not self.free or any([frame.requires_grad for frame in frames]):
            return False
        # What was made in inference mode cannot be written into outside of it.
        mine = *self.leaves.values(), *self.spare.values()
        return torch.is_inference_mode_enabled() or not any([leaf.is_inference() for leaf in mine])

    def with_leaves(
        self, leaves: dict[Any, Tensor], free: bool = True, spare: Mapping[Any, Tensor] | None = None
    ) -> Ring:
        """The same slots of other leaves."""
        return Ring(leaves, self.first, self.count, self.capacity, self.time_first, free, spare)

    def clone(self) -> Ring:
        """A copy, free slots and all."""
        return self.with_leaves({key: leaf.clone() for key, leaf in self.leaves.items()}, self.free)

    def arrange(self, leaf: Tensor, time_dim: int) -> Tensor:
        """A leaf ``[*B, C, ...]`` in memory whose order is that of the ring's leaves."""
        return leaf.movedim(time_dim, 0).contiguous().movedim(0, time_dim) if self.time_first else leaf.contiguous()

    def runs(self, begin: int, count: int) -> list[tuple[int, int]]:
        """First slot and length of the stretches of slots for ``count`` frames from frame ``begin`` on."""
        slot = (self.first + begin) % max(self.capacity, 1)
        length = min(count, self.capacity - slot)
        return [run for run in ((slot, length), (0, count - length)) if run[1]]

    def pieces(self, key: Hashable, time_dim: int, begin: int = 0, count: int | None = None) -> list[Tensor]:
        """Views ``[*B, k, ...]`` of the frames from ``begin`` on, in order."""
        leaf, count = self.leaves[key], self.count - begin if count is None else count
        if count == self.capacity and not self.first:
            return [leaf]
        return [leaf.narrow(time_dim, *run) for run in self.runs(begin, count)]

    def frames(self, key: Hashable, time_dim: int) -> Tensor:
        """The frames, ``[*B, count, ...]``, in order; a view where they lie in order."""
        pieces = self.pieces(key, time_dim) or [self.leaves[key].narrow(time_dim, 0, 0)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, time_dim)


def lie_alike(
    data: Mapping[Hashable, Tensor], dims: int, time_dim: int, task: Task
) -> tuple[Mapping[Hashable, Tensor], int, int]:
    """Leaves that lie alike, in memory ``[outer, T, inner, *F]``: those that do not are copied.

    Returns:
        The leaves, ``inner``, and how many inner environments, agents, share a mark or an id where these are expanded.
    """
    sizes = next(iter(data.values())).shape[:dims]
    every = data.values()
    if all(map(Tensor.is_contiguous, every)) and not any([*map(Tensor.is_neg, every), *map(Tensor.is_conj, every)]):
        return data, math.prod(sizes[time_dim + 1 :]), 1
    data = {key: leaf.resolve_neg().resolve_conj() for key, leaf in data.items()}
    most = max(data.values(), key=Tensor.numel)
    at = next((dim for dim in range(dims) if most.movedim(time_dim, dim).is_contiguous()), time_dim)
    inner = [dim for dim in range(dims) if dim != time_dim][at:]
    marks = [key for key in (task.mask_key, task.traj_key) if key is not None]
    # Either all of them have a row for so many, or each has one for every environment.
    sharing = {_count_sharing(data[key], inner, time_dim, at) if key in task.only_read else 1 for key in marks}
    agents = sharing.pop() if len(sharing) == 1 else 1
    for key, leaf in data.items():
        if not leaf.movedim(time_dim, at).is_contiguous() and (agents == 1 or key not in marks):
            leaf = leaf.movedim(time_dim, at).clone(memory_format=torch.contiguous_format)
            data[key] = leaf.movedim(at, time_dim)
    return data, math.prod([sizes[dim] for dim in inner]), agents


def _count_sharing(mark: Tensor, inner: Sequence[int], time_dim: int, at: int) -> int:
    """How many of the innermost environments a mark is expanded over, if it lies in order but for that; else 1."""
    shared = list(itertools.takewhile(lambda dim: mark.shape[dim] == 1 or not mark.stride(dim), reversed(inner)))
    each = mark[tuple([0 if dim in shared else slice(None) for dim in range(mark.ndim)])]
    alone = each.movedim(time_dim and -1, at).is_contiguous()
    return math.prod([mark.shape[dim] for dim in shared]) if alone else 1


class Place(NamedTuple):
    """Where a call puts the frames that it holds back: frame ``f`` of carry and data into slot ``first + f``."""

    first: int
    """Modulo ``capacity``."""
    capacity: int
    stay: int
    """Frames of the carry that lie there already; 0 where the slots are in new memory."""
    time_first: bool

    def empty(self, leaf: Tensor, time_dim: int) -> Tensor:
        """New memory for the slots of a leaf ``[*B, T, ...]``."""
        shape = leaf.shape
        sizes = (*shape[:time_dim], self.capacity, *shape[time_dim + 1 :])
        strides = strides_in_order(sizes, time_dim if self.time_first else 0)
        return torch.empty_strided(sizes, strides, dtype=leaf.dtype, device=leaf.device)

    def ring(
        self, leaves: dict[Any, Tensor], emitted: int, known: int, spare: Mapping[Any, Tensor] | None = None
    ) -> Ring:
        """The frames held back, from frame ``emitted`` on."""
        first = (self.first + emitted) % self.capacity
        return Ring(leaves, first, known - emitted, self.capacity, self.time_first, spare=spare)

    def is_like(self, ring: Ring) -> bool:
        """Whether the slots of a ring are laid out as these."""
        return (self.capacity, self.time_first) == (ring.capacity, ring.time_first)


def find_place(carry: Ring | None, frames: Collection[Tensor], new: int, n_steps: int) -> Place:
    """Where to put the frames held back after ``new`` ones came, whose leaves are ``frames``.

    Calls of fewer than ``n_steps`` frames write these into the slots that are free, so that a frame is written twice,
    whatever ``n_steps``: there, and when it comes out. In longer calls all that is held back is new.
    """
    carried = carry.count if carry else 0
    known = carried + new
    emitted = max(known - n_steps, 0)
    if new >= n_steps:
        return Place(-emitted % n_steps, n_steps, 0, False)
    if carry and carry.time_first and known <= carry.capacity <= 2 * (n_steps + new) and carry.may_write(frames):
        return Place(carry.first, carry.capacity, carried - emitted, True)
    capacity = max(min(n_steps, 2 * known) + new, 1)
    return Place(-emitted % capacity, capacity, 0, True)


def next_ring(
    carry: Ring | None, data: Mapping[Hashable, Tensor], task: Task, new: int, n_steps: int, time_dim: int
) -> tuple[Ring, int]:
    """The ring that is to hold back the last frames after ``new`` ones, ``data``, came; how many lie there already.

    Longer calls, after which all that is held back is new, write it into two rings in turn.
    """
    place, known = find_place(carry, data.values(), new, n_steps), new + (carry.count if carry else 0)
    memory: Mapping[Hashable, Tensor] = {}
    spare = None
    if carry and place.stay:
        memory = carry.leaves
    elif carry and carry.free and place.is_like(carry):
        memory, spare = carry.spare, carry.leaves
    leaves = {
        key: memory[key] if key in memory else place.empty(leaf, time_dim)
        for key, leaf in data.items()
        if key not in task.only_read
    }
    return place.ring(leaves, max(known - n_steps, 0), known, spare), place.stay


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
