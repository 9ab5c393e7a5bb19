"""Frames: a rollout as flat leaves, and back.

Reads a tensordict of batch shape ``[*B, T]``, nested in any way, into one flat dict of tensors, and builds a
tensordict of the same structure from such a dict. Owns the structure (nested batch dimensions, names, devices,
tensorclasses, non-tensor entries) and no maths. May import tensordict, torch, ``carry`` and ``layouts``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from tensordict import (
    NonTensorData,
    NonTensorStack,
    TensorDict,
    TensorDictBase,
)
from torch import Tensor

from multistep_triton.carry import Carry, current_stream
from multistep_triton.layouts import KeyPath, Layout, read_layout


@dataclass(slots=True)
class Structure:
    """What a rollout has besides its leaves, and what it takes to build the tensordict again."""

    batch: torch.Size
    """``*B``."""
    layout: Layout
    objects: dict[KeyPath, list[Any]] = field(default_factory=dict)
    """The objects that the leaf of a non-tensor entry, int64 ``[*B, T]``, counts into."""

    @property
    def time_dim(self) -> int:
        """The position of the time dimension."""
        return len(self.batch)

    def differences(self, other: Structure) -> Iterator[str]:
        """Why frames of this structure cannot go on from those of another."""
        if self.batch != other.batch:
            yield f"*B must be {list(other.batch)}, got {list(self.batch)}"
        carried, new = other.layout.kinds, self.layout.kinds
        for path in {**carried, **new}:
            expected, got = carried.get(path), new.get(path)
            if expected != got:
                yield f"{path} must be {_describe(expected)}, got {_describe(got)}"

    def build(self, leaves: Mapping[KeyPath, Tensor], batch_size: torch.Size) -> TensorDict:
        """A tensordict ``[*B, E]`` of this structure; ``leaves`` may hold more entries than were read."""
        built: list[Any] = [*leaves.values()]
        if self.objects:
            built = [self._stack_objects(*each) if each[0] in self.objects else each[1] for each in leaves.items()]
        paths = tuple(leaves)
        for node, entries in self.layout.compute_once(paths, lambda: self.layout.arrange(paths)):
            shape = torch.Size((*batch_size, *node.tail)) if node.tail else batch_size
            names = node.names and [*node.names]
            held = {name: built[at] for name, at in entries}
            # The constructor would check every entry once more, and with a device look for one of Apple's.
            each: Any = TensorDict._new_unsafe(held, shape, None, names, nested=False)
            each._device = node.device
            # A tensorclass has no room for what is written besides.
            kind: Any = node.kind if node.kind and held.keys() <= node.kind.__dataclass_fields__.keys() else None
            built.append(each if kind is None else kind.from_tensordict(each))
        return cast(TensorDict, built[-1])

    def _stack_objects(self, path: KeyPath, indices: Tensor) -> NonTensorData | NonTensorStack:
        objects = self.objects[path]
        if len(objects) == 1 or not indices.numel():
            return NonTensorData(objects[0] if objects else None, batch_size=indices.shape)
        stacked = NonTensorStack(*(NonTensorData(objects[index]) for index in indices.reshape(-1).tolist()))
        return stacked.view(indices.shape)


@dataclass(slots=True)
class Frames:
    """The leaves of a rollout by path, and its structure."""

    batch_size: torch.Size
    """``[*B, T]``."""
    leaves: dict[KeyPath, Tensor]
    structure: Structure
    left_out: list[KeyPath] = field(default_factory=list)
    """Entries that are there and were not to be read."""

    @classmethod
    def read(cls, data: TensorDictBase, without: frozenset[KeyPath] = frozenset()) -> Frames:
        """Reads a tensordict, ``without`` some entries; the leaves are its own tensors, stacked where they are lazy.

        Raises:
            TypeError: an entry is neither a tensor nor a tensordict nor a non-tensor.
            ValueError: the elements of a lazy stack differ in their keys or shapes.
        """
        frames = cls._read_all(data, len(data.batch_size), without)
        for path in frames.structure.layout.objects:
            frames._read_objects(frames.leaves[path], path)
        return frames

    @classmethod
    def read_storage(
        cls, data: TensorDictBase, ndim: int, without: frozenset[KeyPath]
    ) -> tuple[Frames, dict[KeyPath, Any]]:
        """Reads the tensordict of a storage of ``ndim`` dimensions; its non-tensor entries apart, as they are."""
        frames = cls._read_all(data, ndim, without)
        layout = frames.structure.layout
        non_tensors = {path: frames.leaves.pop(path) for path in layout.objects}
        # What is sampled has one dimension in the place of these, which has no name.
        nodes = {path: node._replace(names=None) for path, node in layout.nodes.items()}
        frames.structure.layout = Layout.of_leaves(frames.leaves, ndim, nodes)
        return frames, non_tensors

    @classmethod
    def _read_all(cls, data: TensorDictBase, ndim: int, without: frozenset[KeyPath]) -> Frames:
        sizes = data.batch_size
        layout, values = read_layout(data, ndim)
        leaves = dict(zip(layout.kinds, values, strict=True))
        layout, dropped, left_out = layout.compute_once(("without", without), lambda: layout.without(without))
        for path in dropped:
            del leaves[path]
        return cls(sizes[:ndim], leaves, Structure(sizes[: ndim - 1], layout), left_out)

    def _read_objects(self, value: Any, path: KeyPath) -> None:
        """Counts into the objects of an entry."""
        shape = value.batch_size
        device = next((leaf.device for leaf in self.leaves.values() if isinstance(leaf, Tensor)), None)
        if isinstance(value, NonTensorStack):
            objects = [entry.data for entry in value.reshape(-1).unbind(0)] if shape.numel() else []
            indices = torch.arange(shape.numel(), device=device).view(shape)
        else:
            objects, indices = [value.data], torch.zeros(shape, dtype=torch.int64, device=device)
        self.structure.objects[path], self.leaves[path] = objects, indices

    def follow(self, carry: Carry) -> None:
        """Makes these frames the ones after the carry's: one index counts into the objects of both, the carry's first.

        Raises:
            ValueError: they cannot be joined to the carry's.
        """
        mine, carried = self.structure, carry.structure
        if mine.batch != carried.batch or (
            mine.layout is not carried.layout and mine.layout.kinds != carried.layout.kinds
        ):
            raise ValueError(
                "data must continue the frames held back from the last call (clear() drops them and starts anew): "
                + "; ".join(mine.differences(carried))
            )
        for path, objects in mine.objects.items():
            before = carried.objects[path]
            if not (len(before) == len(objects) == 1 and _same(before[0], objects[0])):
                mine.objects[path] = before + objects
                self.leaves[path] = self.leaves[path] + len(before)
        carry.follow()


def hold_back(carry: Carry, structure: Structure) -> Carry:
    """A carry that was written just now, of this structure, with no more objects than its frames count into."""
    if structure.objects:
        structure = replace(structure, objects=dict(structure.objects))
    for path, objects in structure.objects.items():
        if len(objects) > 1:
            used = carry.frames(path, structure.time_dim).unique()
            # Free slots hold anything.
            counted = torch.bucketize(carry.leaves[path].contiguous(), used)
            carry.leaves[path] = carry.arrange(counted, structure.time_dim)
            structure.objects[path] = [objects[index] for index in used.tolist()]
    carry.structure, carry.stream = structure, current_stream(carry.leaves.values())
    return carry


def frames_of(carry: Carry) -> Frames:
    """A copy of the frames of a carry, ``[*B, c]``, in order."""
    copy = carry.compact()
    return Frames(torch.Size((*copy.structure.batch, copy.count)), copy.leaves, copy.structure)


def moved(carry: Carry, device_of: Callable[[Tensor], torch.device]) -> Carry:
    """A carry with each leaf on another device."""
    carry.follow()
    leaves = {path: leaf.to(device_of(leaf)) for path, leaf in carry.leaves.items()}
    device = next((leaf.device for leaf in leaves.values()), None)
    old: Structure = carry.structure
    nodes = {path: node._replace(device=node.device and device) for path, node in old.layout.nodes.items()}
    layout = Layout.of({path: (*kind[:2], kind[2] and device) for path, kind in old.layout.kinds.items()}, nodes)
    new = replace(old, layout=layout)
    return replace(carry, leaves=leaves, spare={}, structure=new, stream=current_stream(leaves.values()))


def _describe(kind: tuple[Any, ...] | None) -> str:
    if kind is None:
        return "absent"
    dtype, shape, device = kind
    return f"{dtype} {list(shape)}" if device is None else f"{dtype} {list(shape)} on {device}"


def _same(one: Any, other: Any) -> bool:
    """Whether one object can stand for the other, which is asked only of what cannot change; 0.0 is not -0.0."""
    return one is other or (
        type(one) is type(other) and isinstance(one, str | bytes | int | float) and repr(one) == repr(other)
    )
