"""Frames: a rollout as flat leaves, and back.

Reads a tensordict of batch shape ``[*B, T]``, nested in any way, into one flat dict of tensors, and builds a
tensordict of the same structure from such a dict. Owns the structure (nested batch dimensions, names, devices,
tensorclasses, non-tensor entries) and no maths. May import tensordict and torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from tensordict import (
    NonTensorData,
    NonTensorStack,
    TensorDict,
    TensorDictBase,
    is_non_tensor,
    is_tensor_collection,
    is_tensorclass,
)
from torch import Tensor

Path = tuple[str, ...]


class Node(NamedTuple):
    """What a (nested) tensordict has besides its entries; ``tail`` is its batch shape beyond ``[*B, T]``."""

    kind: type | None
    """The tensorclass to build, if it is one."""
    tail: tuple[int, ...]
    names: list[str | None] | None
    device: torch.device | None


@dataclass(slots=True)
class Frames:
    """The leaves of a rollout by path, and what it takes to build the tensordict again."""

    batch_size: torch.Size
    """``[*B, T]``."""
    leaves: dict[Path, Tensor] = field(default_factory=dict)
    nodes: dict[Path, Node] = field(default_factory=dict)
    """Parents come before their children."""
    objects: dict[Path, list[Any]] = field(default_factory=dict)
    """The objects that the leaf of a non-tensor entry, int64 ``[*B, T]``, counts into."""
    kinds: dict[Path, tuple[Any, ...]] = field(default_factory=dict)
    """What every leaf has but its frames: dtype, trailing shape, device. Frames of equal kinds can be joined."""

    @classmethod
    def read(cls, data: TensorDictBase) -> Frames:
        """Reads a tensordict; the leaves are its own tensors, a lazily stacked one's are stacked."""
        frames = cls(data.batch_size)
        frames._read(data, (), len(data.batch_size))
        return frames

    def _read(self, data: Any, path: Path, ndim: int) -> None:
        names = data.names
        self.nodes[path] = Node(
            kind=type(data) if is_tensorclass(data) else None,
            tail=data.batch_size[ndim:],
            names=names if any(names) else None,
            device=data.device,
        )
        for key, value in data.items():
            entry = (*path, key)
            if isinstance(value, Tensor):
                self.leaves[entry] = value
                self.kinds[entry] = (value.dtype, value.shape[ndim:], value.device)
            elif is_non_tensor(value):
                self._read_objects(value, entry)
            elif is_tensor_collection(value):
                self._read(value, entry, ndim)
            else:
                raise TypeError(f"entry {entry} must be a tensor or a tensordict, got {type(value).__name__}")

    def _read_objects(self, value: Any, path: Path) -> None:
        if isinstance(value, NonTensorData):
            self.objects[path] = [value.data]
            indices = torch.zeros(self.batch_size, dtype=torch.int64)
        else:
            self.objects[path] = [entry.data for entry in value.reshape(-1).unbind(0)]
            indices = torch.arange(self.batch_size.numel()).view(self.batch_size)
        self.leaves[path] = indices.to(value.device)
        self.kinds[path] = ("non-tensor", torch.Size(()), value.device)

    def count_on(self, carry: Frames) -> None:
        """Puts the carry's objects before these, so that one index counts into both."""
        for path, objects in self.objects.items():
            carried = carry.objects[path]
            if not (len(carried) == len(objects) == 1 and _same(carried[0], objects[0])):
                self.objects[path] = carried + objects
                self.leaves[path] = self.leaves[path] + len(carried)

    def hold(self, leaves: dict[Path, Tensor], batch_size: torch.Size) -> Frames:
        """Frames ``[*B, c]`` of this structure, with no more objects than they count into."""
        held = Frames(batch_size, leaves, self.nodes, kinds=self.kinds)
        for path, objects in self.objects.items():
            used, leaves[path] = leaves[path].unique(return_inverse=True)
            held.objects[path] = [objects[index] for index in used.tolist()]
        return held

    def build(self, leaves: Mapping[Path, Tensor], batch_size: torch.Size) -> TensorDict:
        """A tensordict ``[*B, E]`` of this structure; ``leaves`` may hold more entries than were read."""
        entries: dict[Path, dict[str, Any]] = {path: {} for path in self.nodes}
        for path, leaf in leaves.items():
            entries[path[:-1]][path[-1]] = self._stack_objects(path, leaf) if path in self.objects else leaf
        for path, node in reversed(self.nodes.items()):
            # The constructor would check every entry once more, a tenth of a small extend.
            shape = torch.Size((*batch_size, *node.tail))
            built: Any = TensorDict._new_unsafe(entries[path], shape, names=node.names, device=node.device)
            if node.kind is not None:
                built = cast(Any, node.kind).from_tensordict(built)
            if path:
                entries[path[:-1]][path[-1]] = built
        return cast(TensorDict, built)

    def _stack_objects(self, path: Path, indices: Tensor) -> NonTensorData | NonTensorStack:
        objects = self.objects[path]
        if len(objects) == 1 or not indices.numel():
            return NonTensorData(objects[0], batch_size=indices.shape, device=indices.device)
        stacked = NonTensorStack(*(NonTensorData(objects[index]) for index in indices.view(-1).tolist()))
        return stacked.view(indices.shape)


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    try:
        return type(one) is type(other) and bool(one == other)
    except (TypeError, ValueError, RuntimeError):  # an array's == has no truth value
        return False
