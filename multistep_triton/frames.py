"""Frames: a rollout as flat leaves, and back.

Reads a tensordict of batch shape ``[*B, T]``, nested in any way, into one flat dict of tensors, and builds a
tensordict of the same structure from such a dict. Owns the structure (nested batch dimensions, names, devices,
tensorclasses, non-tensor entries) and no maths. May import tensordict, torch and ``carry``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from tensordict import (
    LazyStackedTensorDict,
    NonTensorData,
    NonTensorStack,
    TensorDict,
    TensorDictBase,
    is_non_tensor,
    is_tensor_collection,
    is_tensorclass,
)
from torch import Tensor

from multistep_triton.carry import Carry, current_stream

KeyPath = tuple[str, ...]


class Node(NamedTuple):
    """What a (nested) tensordict has besides its entries; ``tail`` is its batch shape beyond ``[*B, T]``."""

    kind: type | None
    """The tensorclass to build, if it is one."""
    tail: tuple[int, ...]
    names: list[str | None] | None
    device: torch.device | None


_MOST_FOUND = 256


class Layout:
    """What leaves have but their frames. Frames of equal kinds can be joined; equal layouts are mostly one object."""

    def __init__(self, kinds: tuple[tuple[KeyPath, tuple[Any, ...]], ...]) -> None:
        self.kinds = dict(kinds)
        """dtype, trailing shape and device of every leaf."""
        self._found: dict[Hashable, Any] = {}

    def find(self, key: Hashable, find_out: Callable[[], Any]) -> Any:
        """What is to be found out about such leaves once."""
        if (found := self._found.get(key)) is None:
            found = find_out()
            if len(self._found) >= _MOST_FOUND:
                self._found.clear()
            self._found[key] = found
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is the same object where the kinds are known, and holds nothing that was found out elsewhere."""
        return _layout, (tuple(self.kinds.items()),)


@functools.lru_cache(maxsize=256)
def _layout(kinds: tuple[tuple[KeyPath, tuple[Any, ...]], ...]) -> Layout:
    return Layout(kinds)


@dataclass(slots=True)
class Structure:
    """What a rollout has besides its leaves, and what it takes to build the tensordict again."""

    batch: torch.Size
    """``*B``."""
    nodes: dict[KeyPath, Node] = field(default_factory=dict)
    """Parents come before their children."""
    objects: dict[KeyPath, list[Any]] = field(default_factory=dict)
    """The objects that the leaf of a non-tensor entry, int64 ``[*B, T]``, counts into."""
    layout: Layout = field(default_factory=lambda: Layout(()))

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
        # A group that nothing was read of may have been written to.
        written = Node(None, (), None, self.nodes[()].device)
        built: dict[KeyPath, Any] = dict(leaves)
        for path in self.objects:
            built[path] = self._stack_objects(path, built[path])
        for path, entries in _arrange(tuple(self.nodes), tuple(leaves)):
            node = self.nodes.get(path, written)
            # The constructor would check every entry once more, a tenth of a small extend.
            shape = torch.Size((*batch_size, *node.tail)) if node.tail else batch_size
            held = {name: built[entry] for name, entry in entries}
            each: Any = TensorDict._new_unsafe(held, shape, node.device, node.names, nested=False)
            built[path] = each if node.kind is None else cast(Any, node.kind).from_tensordict(each)
        return cast(TensorDict, built[()])

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
    def read(cls, data: TensorDictBase, without: Collection[KeyPath] = ()) -> Frames:
        """Reads a tensordict, ``without`` some entries; the leaves are its own tensors, stacked where they are lazy.

        Raises:
            TypeError: an entry is neither a tensor nor a tensordict nor a non-tensor.
            ValueError: the elements of a lazy stack differ in their keys or shapes.
        """
        frames, non_tensors = cls._read_all(data, len(data.batch_size), without)
        for path, value in non_tensors.items():
            frames._read_objects(value, path)
        return frames.find_layout()

    @classmethod
    def read_storage(
        cls, data: TensorDictBase, ndim: int, without: Collection[KeyPath] = ()
    ) -> tuple[Frames, dict[KeyPath, Any]]:
        """Reads the tensordict of a storage of ``ndim`` dimensions; its non-tensor entries apart, as they are."""
        frames, non_tensors = cls._read_all(data, ndim, without)
        # What is sampled has one dimension in the place of these, which has no name.
        nodes = frames.structure.nodes
        nodes.update({path: node._replace(names=None) for path, node in nodes.items()})
        return frames.find_layout(), non_tensors

    @classmethod
    def _read_all(cls, data: TensorDictBase, ndim: int, without: Collection[KeyPath]) -> tuple[Frames, dict[Any, Any]]:
        sizes, non_tensors = data.batch_size, dict[KeyPath, Any]()
        frames = cls(sizes[:ndim], {}, Structure(sizes[: ndim - 1]))
        frames._read(data, (), ndim, without, non_tensors)
        return frames, non_tensors

    def find_layout(self) -> Frames:
        """These frames, with the layout of their leaves."""
        ndim, objects = len(self.batch_size), self.structure.objects
        kinds: list[tuple[KeyPath, tuple[Any, ...]]]
        kinds = [(path, (leaf.dtype, leaf.shape[ndim:], leaf.device)) for path, leaf in self.leaves.items()]
        if objects:
            kinds = [
                (path, ("non-tensor", shape, None) if path in objects else (dtype, shape, device))
                for path, (dtype, shape, device) in kinds
            ]
        self.structure.layout = _layout(tuple(kinds))
        return self

    def _read(
        self, data: Any, path: KeyPath, ndim: int, without: Collection[KeyPath], non_tensors: dict[KeyPath, Any]
    ) -> None:
        names, sizes, kind = data.names, data.batch_size, type(data) if is_tensorclass(data) else None
        tail = () if len(sizes) == ndim else sizes[ndim:]
        self.structure.nodes[path] = Node(kind, tail, names if any(names) else None, data.device)
        for key, value in _lazy_items(data, path) if isinstance(data, LazyStackedTensorDict) else data.items():
            entry = (*path, key)
            if entry in without:
                self.left_out.append(entry)
            elif isinstance(value, Tensor):
                self.leaves[entry] = value
            elif is_non_tensor(value):
                non_tensors[entry] = value
            elif is_tensor_collection(value):
                self._read(value, entry, ndim, without, non_tensors)
            else:
                raise TypeError(f"entry {entry} must be a tensor or a tensordict, got {type(value).__name__}")

    def _read_objects(self, value: Any, path: KeyPath) -> None:
        shape, device = value.batch_size, next((leaf.device for leaf in self.leaves.values()), None)
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
    nodes = {path: node._replace(device=node.device and device) for path, node in old.nodes.items()}
    batch_size, new = torch.Size((*old.batch, carry.count)), Structure(old.batch, nodes, old.objects)
    Frames(batch_size, leaves, new).find_layout()
    return replace(carry, leaves=leaves, spare={}, structure=new, stream=current_stream(leaves.values()))


@functools.lru_cache(maxsize=256)
def _arrange(
    nodes: tuple[KeyPath, ...], leaves: tuple[KeyPath, ...]
) -> list[tuple[KeyPath, list[tuple[str, KeyPath]]]]:
    """Names and paths of the entries of every node, those that leaves lie in besides; children before their parents."""
    paths = dict.fromkeys(nodes)
    paths.update((leaf[:names], None) for leaf in leaves for names in range(1, len(leaf)))
    entries: dict[KeyPath, list[tuple[str, KeyPath]]] = {path: [] for path in paths}
    for path in (*leaves, *reversed(paths)):
        if path:
            entries[path[:-1]].append((path[-1], path))
    return [*reversed(entries.items())]


def _describe(kind: tuple[Any, ...] | None) -> str:
    if kind is None:
        return "absent"
    dtype, shape, device = kind
    return f"{dtype} {list(shape)}" if device is None else f"{dtype} {list(shape)} on {device}"


def _same(one: Any, other: Any) -> bool:
    """Whether one object can stand for the other; equality is asked only of what cannot change."""
    return one is other or (type(one) is type(other) and isinstance(one, str | bytes | int | float) and one == other)


def _lazy_items(data: LazyStackedTensorDict, path: KeyPath) -> Iterator[tuple[str, Any]]:
    """The entries of a lazy stack, which itself passes over those that not every element has."""
    keys = [set(element.keys()) for element in data.tensordicts]
    if some := set.union(*keys) - set.intersection(*keys):
        entries = [(*path, key) for key in sorted(some)]
        raise ValueError(f"entries {entries} must be in every element of a lazily stacked tensordict, got some without")
    for key in data.tensordicts[0].keys():  # noqa: SIM118  # iterating a tensordict goes over its frames
        try:
            yield key, data.get(key)
        except RuntimeError as error:
            raise ValueError(
                f"entry {(*path, key)} must have one shape in every element of a lazily stacked tensordict, got {error}"
            ) from error
