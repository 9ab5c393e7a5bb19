"""Frames: a rollout as flat leaves, and back.

Reads a tensordict of batch shape ``[*B, T]``, nested in any way, into one flat dict of tensors, and builds a
tensordict of the same structure from such a dict. Owns the structure (nested batch dimensions, names, devices,
tensorclasses, non-tensor entries) and no maths. May import tensordict, torch and ``ring``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
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

from multistep_triton.ring import Ring

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
class Frames:
    """The leaves of a rollout by path, and what it takes to build the tensordict again."""

    batch_size: torch.Size
    """``[*B, T]``."""
    leaves: dict[KeyPath, Tensor] = field(default_factory=dict)
    nodes: dict[KeyPath, Node] = field(default_factory=dict)
    """Parents come before their children."""
    objects: dict[KeyPath, list[Any]] = field(default_factory=dict)
    """The objects that the leaf of a non-tensor entry, int64 ``[*B, T]``, counts into."""
    layout: Layout = field(default_factory=lambda: Layout(()))
    left_out: list[KeyPath] = field(default_factory=list)
    """Entries that are there and were not to be read."""

    @classmethod
    def read(cls, data: TensorDictBase, without: Collection[KeyPath] = ()) -> Frames:
        """Reads a tensordict, ``without`` some entries; the leaves are its own tensors, stacked where they are lazy.

        Raises:
            TypeError: an entry is neither a tensor nor a tensordict nor a non-tensor.
            ValueError: the elements of a lazy stack differ in their keys or shapes.
        """
        frames = cls(data.batch_size)
        non_tensors: dict[KeyPath, Any] = {}
        frames._read(data, (), len(data.batch_size), without, non_tensors)
        for path, value in non_tensors.items():
            frames._read_objects(value, path)
        return frames.find_layout()

    @classmethod
    def read_storage(
        cls, data: TensorDictBase, ndim: int, without: Collection[KeyPath] = ()
    ) -> tuple[Frames, dict[KeyPath, Any]]:
        """Reads the tensordict of a storage of ``ndim`` dimensions; its non-tensor entries apart, as they are."""
        frames = cls(data.batch_size[:ndim])
        non_tensors: dict[KeyPath, Any] = {}
        frames._read(data, (), ndim, without, non_tensors)
        # What is sampled has one dimension in the place of these, which has no name.
        frames.nodes = {path: node._replace(names=None) for path, node in frames.nodes.items()}
        return frames.find_layout(), non_tensors

    def find_layout(self) -> Frames:
        """These frames, with the layout of their leaves."""
        ndim = len(self.batch_size)
        kinds: list[tuple[KeyPath, tuple[Any, ...]]]
        kinds = [(path, (leaf.dtype, leaf.shape[ndim:], leaf.device)) for path, leaf in self.leaves.items()]
        if self.objects:
            kinds = [
                (path, ("non-tensor", shape, None) if path in self.objects else (dtype, shape, device))
                for path, (dtype, shape, device) in kinds
            ]
        self.layout = _layout(tuple(kinds))
        return self

    def _read(
        self, data: Any, path: KeyPath, ndim: int, without: Collection[KeyPath], non_tensors: dict[KeyPath, Any]
    ) -> None:
        names, sizes, kind = data.names, data.batch_size, type(data) if is_tensorclass(data) else None
        tail = () if len(sizes) == ndim else sizes[ndim:]
        self.nodes[path] = Node(kind, tail, names if any(names) else None, data.device)
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
            self.objects[path] = [entry.data for entry in value.reshape(-1).unbind(0)] if shape.numel() else []
            indices = torch.arange(shape.numel(), device=device).view(shape)
        else:
            self.objects[path] = [value.data]
            indices = torch.zeros(shape, dtype=torch.int64, device=device)
        self.leaves[path] = indices

    def follow(self, carry: Frames) -> None:
        """Makes these frames the ones after ``carry``: one index counts into the objects of both, the carry's first.

        Raises:
            ValueError: they cannot be joined to the carry's.
        """
        kinds, carried_kinds = self.layout.kinds, carry.layout.kinds
        if (kinds is not carried_kinds and kinds != carried_kinds) or self.batch_size[:-1] != carry.batch_size[:-1]:
            raise ValueError(
                "data must continue the frames held back from the last call (clear() drops them and starts anew): "
                + "; ".join(self._differences(carry))
            )
        for path, objects in self.objects.items():
            carried = carry.objects[path]
            if not (len(carried) == len(objects) == 1 and _same(carried[0], objects[0])):
                self.objects[path] = carried + objects
                self.leaves[path] = self.leaves[path] + len(carried)

    def _differences(self, carry: Frames) -> Iterator[str]:
        if self.batch_size[:-1] != carry.batch_size[:-1]:
            yield f"*B must be {list(carry.batch_size[:-1])}, got {list(self.batch_size[:-1])}"
        carried, new = carry.layout.kinds, self.layout.kinds
        for path in {**carried, **new}:
            expected, got = carried.get(path), new.get(path)
            if expected != got:
                yield f"{path} must be {_describe(expected)}, got {_describe(got)}"

    def hold(self, ring: Ring) -> Held:
        """Frames in a ring that are of this structure, with no more objects than they count into.

        The leaves of the ring are replaced where that takes it.
        """
        time_dim, leaves = len(self.batch_size) - 1, ring.leaves
        structure = Frames(torch.Size((*self.batch_size[:-1], ring.count)), nodes=self.nodes, layout=self.layout)
        for path, objects in self.objects.items():
            structure.objects[path] = objects
            if len(objects) > 1:
                used = ring.frames(path, time_dim).unique()
                # Free slots hold anything.
                leaves[path] = ring.arrange(torch.bucketize(leaves[path].contiguous(), used), time_dim)
                structure.objects[path] = [objects[index] for index in used.tolist()]
        return Held(structure, ring)

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


@dataclass(slots=True)
class Held:
    """Frames that are held back, in a ring, and the structure that they are of, which has no leaves."""

    structure: Frames
    ring: Ring
    stream: Any = None
    """The stream of an accelerator on which they were written; None on the CPU."""

    def __post_init__(self) -> None:
        """They were written just now."""
        self.stream = current_stream(self.ring.leaves.values())

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is written on the stream that is current where it is made; streams themselves are not copied."""
        self.follow()
        return Held, (self.structure, self.ring)

    def follow(self) -> None:
        """Makes what is launched from now on come after what wrote the frames, on whatever stream either is.

        The user sees neither their memory nor when it is freed.
        """
        if self.stream is not None and (stream := current_stream(self.ring.leaves.values())) != self.stream:
            stream.wait_stream(self.stream)
            for leaf in (*self.ring.leaves.values(), *self.ring.spare.values()):
                leaf.record_stream(stream)

    @classmethod
    def of(cls, frames: Frames) -> Held:
        """Holds back a copy of frames."""
        structure = Frames(frames.batch_size, nodes=frames.nodes, objects=frames.objects, layout=frames.layout)
        return cls(structure, Ring.of(frames.leaves, frames.batch_size[-1]))

    def clone(self) -> Held:
        """A copy, of the frames alone."""
        return Held.of(self.frames())

    def frames(self) -> Frames:
        """A copy of the frames, ``[*B, c]``, in order."""
        self.follow()
        ring, structure = self.ring, self.structure
        time_dim = len(structure.batch_size) - 1
        leaves = {
            path: ring.frames(path, time_dim).clone(memory_format=torch.contiguous_format) for path in ring.leaves
        }
        return Frames(structure.batch_size, leaves, structure.nodes, structure.objects, structure.layout)

    def to(self, device_of: Callable[[Tensor], torch.device]) -> Held:
        """The frames, each leaf on another device."""
        self.follow()
        leaves = {path: leaf.to(device_of(leaf)) for path, leaf in self.ring.leaves.items()}
        device = next((leaf.device for leaf in leaves.values()), None)
        old = self.structure
        nodes = {path: node._replace(device=node.device and device) for path, node in old.nodes.items()}
        frames = Frames(old.batch_size, leaves, nodes, old.objects).find_layout()
        return Held(replace(frames, leaves={}), self.ring.with_leaves(leaves))


def current_stream(leaves: Iterable[Tensor]) -> Any:
    """The stream on which work on these leaves is launched; None if they are on the CPU, or if there are none."""
    leaf = next(iter(leaves), None)
    return (
        None if leaf is None or leaf.device.type in ("cpu", "meta") else torch.accelerator.current_stream(leaf.device)
    )


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
