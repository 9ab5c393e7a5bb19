"""The carry: frames held back between calls, in slots that the next call may go on writing into.

Owns which frame lies in which slot, and no maths. Imports torch only.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(slots=True, eq=False)
class Carry:
    """Frames held back.

    A leaf ``[*B, C, ...]`` has ``C`` slots. The oldest of ``count`` frames lies in slot ``first``, every other one in
    the slot after that of the frame before it, and after the last slot comes the first. A call that goes on from a
    carry writes into slots that are free, or into the memory of the carry before it, and returns another carry: if it
    fails, the frames of the one before are there. After the next call they may not be.
    """

    leaves: dict[Any, Tensor]
    first: int
    count: int
    capacity: int
    time_first: bool = False
    """Whether the frames of a slot lie side by side in memory, ``[C, *B, ...]``, and not those of an environment."""
    free: bool = True
    """Whether the slots that hold no frame may be written into."""
    spare: dict[Any, Tensor] = field(default_factory=dict)
    """Leaves of a carry before it, laid out alike, whose frames nobody asks for any more."""
    structure: Any = None
    """What the leaves are of, for whoever builds tensordicts of them."""
    stream: Any = None
    """The stream of an accelerator on which they were written; None on the CPU."""

    @classmethod
    def of(cls, leaves: Mapping[Any, Tensor], count: int, structure: Any = None) -> Carry:
        """A copy of these leaves, ``[*B, count, ...]``."""
        copies = {key: leaf.clone(memory_format=torch.contiguous_format) for key, leaf in leaves.items()}
        return cls(copies, 0, count, count, structure=structure, stream=current_stream(copies.values()))

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is written on the stream that is current where it is made; streams themselves are not copied."""
        self.follow()
        return _copied, (self.leaves, self.first, self.count, self.capacity, self.time_first, self.structure)

    def follow(self) -> None:
        """Makes what is launched from now on come after what wrote the frames, on whatever stream either is.

        The user sees neither their memory nor when it is freed.
        """
        if self.stream is not None and (stream := current_stream(self.leaves.values())) != self.stream:
            stream.wait_stream(self.stream)
            for leaf in (*self.leaves.values(), *self.spare.values()):
                leaf.record_stream(stream)

    def may_write(self, frames: Iterable[Tensor]) -> bool:
        """Whether leaves of these frames may be written into the free slots."""
        if not self.free or any([frame.requires_grad for frame in frames]):
            return False
        # What was made in inference mode cannot be written into outside of it.
        mine = *self.leaves.values(), *self.spare.values()
        return torch.is_inference_mode_enabled() or not any([leaf.is_inference() for leaf in mine])

    def view(self, leaves: dict[Any, Tensor], free: bool = True) -> Carry:
        """The same slots of other leaves."""
        return replace(self, leaves=leaves, free=free, spare={})

    def clone(self) -> Carry:
        """A copy, free slots and all."""
        return self.view({key: leaf.clone() for key, leaf in self.leaves.items()}, self.free)

    def compact(self) -> Carry:
        """A copy, of the frames alone, in order."""
        self.follow()
        count, dim = self.count, self.structure.time_dim
        return Carry.of({key: self.frames(key, dim) for key in self.leaves}, count, self.structure)

    def arrange(self, leaf: Tensor, time_dim: int) -> Tensor:
        """A leaf ``[*B, C, ...]`` in memory whose order is that of the carry's leaves."""
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


def _copied(
    leaves: dict[Any, Tensor], first: int, count: int, capacity: int, time_first: bool, structure: Any
) -> Carry:
    stream = current_stream(leaves.values())
    return Carry(leaves, first, count, capacity, time_first, structure=structure, stream=stream)


def current_stream(leaves: Iterable[Tensor]) -> Any:
    """The stream on which work on these leaves is launched; None if they are on the CPU, or if there are none."""
    leaf = next(iter(leaves), None)
    if leaf is None or leaf.device.type in ("cpu", "meta"):
        return None
    return torch.accelerator.current_stream(leaf.device)


class Slots(NamedTuple):
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
        strides = _strides(sizes, time_dim if self.time_first else 0)
        return torch.empty_strided(sizes, strides, dtype=leaf.dtype, device=leaf.device)

    def carry(
        self, leaves: dict[Any, Tensor], emitted: int, known: int, spare: dict[Any, Tensor] | None = None
    ) -> Carry:
        """The frames held back, from frame ``emitted`` on."""
        first = (self.first + emitted) % self.capacity
        return Carry(leaves, first, known - emitted, self.capacity, self.time_first, spare=spare or {})


@functools.lru_cache(maxsize=1024)
def _strides(sizes: tuple[int, ...], first: int = 0) -> tuple[int, ...]:
    """Strides of sizes that lie one inside the other in memory, in order but for the dimension that lies ``first``."""
    order = (first, *(dim for dim in range(len(sizes)) if dim != first)) if sizes else ()
    strides, step = [0] * len(sizes), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(sizes[dim], 1)
    return tuple(strides)


def find_slots(carry: Carry | None, frames: Collection[Tensor], new: int, n_steps: int) -> Slots:
    """Where to put the frames held back after ``new`` ones came, whose leaves are ``frames``.

    Calls of fewer than ``n_steps`` frames write these into the slots that are free, so that a frame is written twice,
    whatever ``n_steps``: there, and when it comes out. In longer calls all that is held back is new.
    """
    carried = carry.count if carry else 0
    known = carried + new
    emitted = max(known - n_steps, 0)
    if new >= n_steps:
        return Slots(-emitted % n_steps, n_steps, 0, False)
    if carry and carry.time_first and known <= carry.capacity <= 2 * (n_steps + new) and carry.may_write(frames):
        return Slots(carry.first, carry.capacity, carried - emitted, True)
    capacity = max(min(n_steps, 2 * known) + new, 1)
    return Slots(-emitted % capacity, capacity, 0, True)


def next_carry(
    carry: Carry | None,
    data: Mapping[Hashable, Tensor],
    held: Iterable[Hashable],
    new: int,
    n_steps: int,
    time_dim: int,
) -> tuple[Carry, int]:
    """The carry of leaves ``held`` after ``new`` frames, ``data``, came, to be written; how many lie there already.

    Longer calls, after which all that is held back is new, write it into the memory of two carries in turn.
    """
    slots, known = find_slots(carry, data.values(), new, n_steps), new + (carry.count if carry else 0)
    memory: dict[Any, Tensor] = {}
    spare = None
    if carry and slots.stay:
        memory = carry.leaves
    elif carry and carry.free and (slots.capacity, slots.time_first) == (carry.capacity, carry.time_first):
        memory, spare = carry.spare, carry.leaves
    if not (spare and memory):
        # Spare memory, of a carry with the same leaves, is taken over as it is.
        memory = {key: memory[key] if memory else slots.empty(data[key], time_dim) for key in held}
    return slots.carry(memory, max(known - n_steps, 0), known, spare), slots.stay
