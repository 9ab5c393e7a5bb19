"""The carry: frames held back between calls, in slots that the next call may write into.

Owns which frame lies in which slot, and no maths. May import torch only.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True, eq=False)
class Carry:
    """Frames held back, in a ring of slots.

    A leaf ``[*B, C, ...]`` has ``C`` slots. The oldest of ``count`` frames lies in slot ``first``, each other frame in
    the slot after its predecessor's, and the first slot follows the last. A call that continues a carry writes into
    its free slots, its spare leaves or new memory, and returns another carry. It leaves the frames of the given carry
    as they are, even if it fails; the next call may overwrite them.
    """

    leaves: dict[Any, Tensor]
    first: int
    count: int
    capacity: int
    time_first: bool = False
    """Whether memory holds the frames slot by slot, ``[C, *B, ...]``, and not environment by environment."""
    free: bool = True
    """Whether a call may write into the slots that hold no frame."""
    spare: dict[Any, Tensor] = field(default_factory=dict)
    """Leaves of an earlier carry, laid out alike in memory, whose frames nobody needs any more."""
    structure: Any = None
    """The ``Structure`` of the leaves, from which a caller builds tensordicts; backends do not read it."""
    stream: Any = None
    """The accelerator's stream that wrote the leaves; None on the CPU."""

    @classmethod
    def of(cls, leaves: Mapping[Any, Tensor], count: int, structure: Any = None) -> Carry:
        """Copies leaves ``[*B, count, ...]`` into a carry."""
        copies = {key: leaf.clone(memory_format=torch.contiguous_format) for key, leaf in leaves.items()}
        return cls(copies, 0, count, count, structure=structure, stream=current_stream(copies.values()))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles all but the stream and spare leaves; a copy takes the stream that is current where it is made."""
        self.follow()
        return _copied, (self.leaves, self.first, self.count, self.capacity, self.time_first, self.structure)

    def follow(self) -> None:
        """Makes the current stream wait for the one that wrote the frames, and records it as a user of their memory.

        Users cannot do so: they see neither the leaves nor when their memory is freed.
        """
        if self.stream is not None and (stream := current_stream(self.leaves.values())) != self.stream:
            stream.wait_stream(self.stream)
            for leaf in (*self.leaves.values(), *self.spare.values()):
                leaf.record_stream(stream)

    def may_write(self, frames: Iterable[Tensor]) -> bool:
        """Returns whether a call may write leaves ``frames`` into the free slots."""
        if not self.free or any([frame.requires_grad for frame in frames]):
            return False
        # torch does not write into inference tensors outside of inference mode.
        mine = *self.leaves.values(), *self.spare.values()
        return torch.is_inference_mode_enabled() or not any([leaf.is_inference() for leaf in mine])

    def view(self, leaves: dict[Any, Tensor], free: bool = True) -> Carry:
        """Returns a carry with the same slots and other leaves."""
        return replace(self, leaves=leaves, free=free, spare={})

    def clone(self) -> Carry:
        """Returns a copy, including the free slots."""
        return self.view({key: leaf.clone() for key, leaf in self.leaves.items()}, self.free)

    def compact(self) -> Carry:
        """Returns a copy of the frames alone, oldest first."""
        self.follow()
        count, dim = self.count, self.structure.time_dim
        return Carry.of({key: self.frames(key, dim) for key in self.leaves}, count, self.structure)

    def arrange(self, leaf: Tensor, time_dim: int) -> Tensor:
        """Returns a leaf ``[*B, C, ...]`` whose order in memory is that of the carry's leaves."""
        return leaf.movedim(time_dim, 0).contiguous().movedim(0, time_dim) if self.time_first else leaf.contiguous()

    def runs(self, begin: int, count: int) -> list[tuple[int, int]]:
        """Returns the runs of slots that ``count`` frames from ``begin`` on fill, see :func:`runs_of`."""
        return runs_of((self.first + begin) % max(self.capacity, 1), count, self.capacity)

    def pieces(self, key: Hashable, time_dim: int, begin: int = 0, count: int | None = None) -> list[Tensor]:
        """Returns views ``[*B, k, ...]`` of the frames from ``begin`` on, oldest first."""
        leaf, count = self.leaves[key], self.count - begin if count is None else count
        if count == self.capacity and not self.first:
            return [leaf]
        return [leaf.narrow(time_dim, *run) for run in self.runs(begin, count)]

    def frames(self, key: Hashable, time_dim: int) -> Tensor:
        """Returns the frames, ``[*B, count, ...]``, oldest first; a view if they lie in one run of slots."""
        pieces = self.pieces(key, time_dim)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, time_dim)


def _copied(
    leaves: dict[Any, Tensor], first: int, count: int, capacity: int, time_first: bool, structure: Any
) -> Carry:
    stream = current_stream(leaves.values())
    return Carry(leaves, first, count, capacity, time_first, structure=structure, stream=stream)


def runs_of(slot: int, frames: int, slots: int) -> list[tuple[int, int]]:
    """Returns first slot and length of each run that frames from ``slot`` on fill; the first slot follows the last."""
    near = min(frames, slots - slot)
    return [(slot, near)] if near == frames else [(slot, near), (0, frames - near)]


def current_stream(leaves: Iterable[Tensor]) -> Any:
    """Returns the current stream of the leaves' device; None if that is the CPU or meta, or if there are no leaves."""
    leaf = next(iter(leaves), None)
    if leaf is None or leaf.device.type in ("cpu", "meta"):
        return None
    return torch.accelerator.current_stream(leaf.device)


def next_carry(
    carry: Carry | None,
    data: Mapping[Hashable, Tensor],
    held: Iterable[Hashable],
    new: int,
    n_steps: int,
    time_dim: int,
) -> tuple[Carry, int]:
    """Chooses the slots of the frames held back after ``new`` frames ``data``.

    Calls of fewer than ``n_steps`` frames write these into the free slots, so that each frame is written twice,
    whatever ``n_steps``: into a slot, and into an output. Longer calls hold back new frames alone, and use the memory
    of two carries in turn.

    Returns:
        Carry: of leaves ``held``, for the caller to fill.
        int: how many of its oldest frames lie in their slots already; 0 if these are in other memory than the carry's.
    """
    known, time_first = new + (carry.count if carry else 0), new < n_steps
    emitted = max(known - n_steps, 0)
    # Into memory of longer calls the kernels alone write, to which torch's rules of writing do not apply.
    writes = carry is not None and (carry.may_write(data.values()) if time_first else carry.free)
    if carry and writes and time_first and carry.time_first and known <= carry.capacity <= 2 * (n_steps + new):
        first = (carry.first + emitted) % carry.capacity
        memory = {key: carry.leaves[key] for key in held}
        return Carry(memory, first, known - emitted, carry.capacity, True), carry.count - emitted
    capacity = max(min(n_steps, 2 * known) + new, 1) if time_first else n_steps
    memory, spare = dict[Any, Tensor](), dict[Any, Tensor]()
    if carry and writes and (capacity, time_first) == (carry.capacity, carry.time_first):
        memory, spare = carry.spare, carry.leaves
    if not memory:
        memory = {key: _new_slots(data[key], capacity, time_dim, time_first) for key in held}
    return Carry(memory, 0, known - emitted, capacity, time_first, spare=spare), 0


def _new_slots(leaf: Tensor, capacity: int, time_dim: int, time_first: bool) -> Tensor:
    """Allocates ``capacity`` slots of a leaf ``[*B, T, ...]``."""
    sizes = [*leaf.shape[:time_dim], capacity, *leaf.shape[time_dim + 1 :]]
    if not time_first:
        return leaf.new_empty(sizes)
    return leaf.new_empty([sizes.pop(time_dim), *sizes]).movedim(0, time_dim)
