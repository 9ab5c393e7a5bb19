"""Frames: converts a rollout into flat leaves and back.

The module reads a tensordict of batch shape ``[*B, T]``, nested in any way, into one flat dict of tensors, and builds
a tensordict of the same structure from such a dict. It owns the structure (nested batch dimensions, names, devices,
tensorclasses, non-tensor entries), its form in a state, and no maths. May import tensordict, torch, ``carry`` and
``layouts``.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict, TensorDictBase, is_tensorclass
from torch import Tensor

from multistep_triton.carry import Carry, current_stream
from multistep_triton.layouts import KeyPath, Layout, Node, read_layout


@dataclass(slots=True)
class Structure:
    """Everything in a rollout except its leaves; builds a tensordict again from leaves."""

    batch: torch.Size
    """The batch dimensions before time, ``*B``."""
    layout: Layout
    objects: dict[KeyPath, list[Any]] = field(default_factory=dict)
    """The objects of each non-tensor entry. Its leaf, int64 ``[*B, T, ...]``, holds indices into this list."""

    @property
    def time_dim(self) -> int:
        """The position of the time dimension."""
        return len(self.batch)

    def differences(self, other: Structure) -> Iterator[str]:
        """Yields the reasons why frames of this structure cannot continue frames of ``other``."""
        if self.batch != other.batch:
            yield f"*B must be {list(other.batch)}, got {list(self.batch)}"
        carried, new = other.layout.kinds, self.layout.kinds
        for path in {**carried, **new}:
            expected, got = carried.get(path), new.get(path)
            if expected != got:
                yield f"{path} must be {_describe(expected)}, got {_describe(got)}"

    def build(self, leaves: Mapping[KeyPath, Tensor], batch_size: torch.Size) -> TensorDict:
        """Builds a tensordict ``[*B, E]`` of this structure; ``leaves`` may hold entries that were not read."""
        built: list[Any] = [*leaves.values()]
        if self.objects:
            built = [self._stack_objects(*each) if each[0] in self.objects else each[1] for each in leaves.items()]
        paths = tuple(leaves)
        for node, entries in self.layout.compute_once(paths, lambda: self.layout.arrange(paths)):
            shape = torch.Size((*batch_size, *node.tail)) if node.tail else batch_size
            names = node.names and [*node.names]
            held = {name: built[at] for name, at in entries}
            # The constructor would check every entry once more and, given a device, look for one of Apple's.
            each: Any = TensorDict._new_unsafe(held, shape, None, names, nested=False)
            each._device = node.device
            # A tensorclass cannot hold written entries that are none of its fields; a tensordict then replaces it.
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
    """A rollout as leaves by path, and its structure."""

    batch_size: torch.Size
    """The batch dimensions and time, ``[*B, T]``."""
    leaves: dict[KeyPath, Tensor]
    structure: Structure
    left_out: list[KeyPath] = field(default_factory=list)
    """Entries that the tensordict holds and :meth:`read` was told to leave out."""

    @property
    def tensors(self) -> dict[KeyPath, Tensor]:
        """The leaves of all entries but non-tensors."""
        return {path: leaf for path, leaf in self.leaves.items() if path not in self.structure.objects}

    @classmethod
    def read(cls, data: TensorDictBase, without: frozenset[KeyPath] = frozenset()) -> Frames:
        """Reads a tensordict except the entries ``without``; the leaves are its own tensors, stacked if it is lazy.

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
        """Reads the tensordict of an ``ndim``-dimensional storage; returns non-tensor entries apart, as they are."""
        frames = cls._read_all(data, ndim, without)
        layout = frames.structure.layout
        non_tensors = {path: frames.leaves.pop(path) for path in layout.objects}
        # A sample ``[N]`` has one dimension in place of the storage's, and it has no name.
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
        """Stores the objects of a non-tensor entry and, as its leaf, the indices into them."""
        shape = value.batch_size
        # Entries under "next" are on the device of what governs them; the others may be elsewhere.
        beside = {(other[0] == "next"): leaf.device for other, leaf in self.leaves.items() if isinstance(leaf, Tensor)}
        device = beside.get(path[0] == "next", next(iter(beside.values()), None))
        if isinstance(value, NonTensorStack):
            objects = [entry.data for entry in value.reshape(-1).unbind(0)] if shape.numel() else []
            indices = torch.arange(shape.numel(), device=device).view(shape)
        else:
            objects, indices = [value.data], torch.zeros(shape, dtype=torch.int64, device=device)
        self.structure.objects[path], self.leaves[path] = objects, indices

    def follow(self, carry: Carry) -> None:
        """Makes these frames continue the carry's: puts the carry's objects before theirs, and shifts their indices.

        Raises:
            ValueError: ``*B`` or the kinds of the leaves differ from the carry's.
        """
        mine, carried = self.structure, carry.structure
        if mine.batch != carried.batch or (
            mine.layout is not carried.layout and mine.layout.kinds != carried.layout.kinds
        ):
            raise ValueError(
                "data must continue the frames held back from the last call (clear() drops them and starts anew, "
                "to(device) moves them): " + "; ".join(mine.differences(carried))
            )
        for path, objects in mine.objects.items():
            before = carried.objects[path]
            if not (len(before) == len(objects) == 1 and _same(before[0], objects[0])):
                mine.objects[path] = before + objects
                self.leaves[path] = self.leaves[path] + len(before)
        carry.follow()


def hold_back(carry: Carry, structure: Structure) -> Carry:
    """Completes a carry that a call has written: sets structure and stream, and drops objects that no frame uses."""
    if structure.objects:
        structure = replace(structure, objects=dict(structure.objects))
    for path, objects in structure.objects.items():
        if len(objects) > 1:
            used = carry.frames(path, structure.time_dim).unique()
            # Free slots hold arbitrary numbers, which bucketize accepts.
            counted = torch.bucketize(carry.leaves[path].contiguous(), used)
            carry.leaves[path] = carry.arrange(counted, structure.time_dim)
            structure.objects[path] = [objects[index] for index in used.tolist()]
    carry.structure, carry.stream = structure, current_stream(carry.leaves.values())
    return carry


def frames_of(carry: Carry) -> Frames:
    """Returns a copy of the frames of a carry, ``[*B, c]``, oldest first."""
    copy = carry.compact()
    return Frames(torch.Size((*copy.structure.batch, copy.count)), copy.leaves, copy.structure)


def moved(carry: Carry, device_of: Callable[[Tensor], torch.device]) -> Carry:
    """Returns a carry whose leaves lie on the devices that ``device_of`` returns for them."""
    carry.follow()
    leaves = {path: leaf.to(device_of(leaf)) for path, leaf in carry.leaves.items()}
    device = next((leaf.device for leaf in leaves.values()), None)
    old: Structure = carry.structure
    nodes = {path: node._replace(device=node.device and device) for path, node in old.layout.nodes.items()}
    layout = Layout.of({path: (*kind[:2], kind[2] and device) for path, kind in old.layout.kinds.items()}, nodes)
    new = replace(old, layout=layout)
    return replace(carry, leaves=leaves, spare={}, structure=new, stream=current_stream(leaves.values()))


def to_state(carry: Carry) -> dict[str, Any]:
    """Converts a carry to tensors and plain containers, which ``torch.load`` reads with ``weights_only=True``.

    Raises:
        TypeError: a non-tensor entry holds objects that ``torch.load`` refuses.
    """
    frames = frames_of(carry)
    structure = frames.structure
    for path, objects in structure.objects.items():
        _check_loadable(path, objects)
    nodes = {
        path: {
            "tensorclass": None if node.kind is None else [node.kind.__module__, node.kind.__qualname__],
            "tail": list(node.tail),
            "names": node.names and [*node.names],
            "on_device": node.device is not None,
        }
        for path, node in structure.layout.nodes.items()
    }
    copies = {path: list(objects) for path, objects in structure.objects.items()}
    return {"batch_size": list(frames.batch_size), "leaves": frames.leaves, "objects": copies, "nodes": nodes}


def from_state(state: dict[str, Any]) -> Carry:
    """Builds a carry from a copy of what :func:`to_state` returned, on the devices where its tensors are now.

    Raises:
        ValueError: the state is not one of :func:`to_state`, or names a tensorclass that has not been imported.
    """
    try:
        batch_size, leaves, objects = torch.Size(state["batch_size"]), dict(state["leaves"]), dict(state["objects"])
        device = next((leaf.device for leaf in leaves.values()), None)
        nodes = {
            path: Node(
                kind=None if node["tensorclass"] is None else _find_tensorclass(*node["tensorclass"]),
                tail=tuple(node["tail"]),
                names=node["names"] and tuple(node["names"]),
                device=device if node["on_device"] else None,
            )
            for path, node in state["nodes"].items()
        }
        whole = all(leaf.shape[: len(batch_size)] == batch_size and path[:-1] in nodes for path, leaf in leaves.items())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the state of frames held back must be one that was saved, got {state!r:.200}") from error
    if not whole or not leaves.keys() >= objects.keys() or not leaves:
        raise ValueError(f"the state of frames held back must be whole, got {state!r:.200}")
    layout = Layout.of_leaves(leaves, len(batch_size), nodes, objects)
    return Carry.of(leaves, batch_size[-1], Structure(batch_size[:-1], layout, objects))


def _check_loadable(path: KeyPath, objects: list[Any]) -> None:
    file = io.BytesIO()
    try:
        torch.save(objects, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:
        kinds = ", ".join(sorted({type(each).__name__ for each in objects}))
        raise TypeError(
            f"non-tensor entry {path} must hold what torch.load reads with weights_only=True to be part of a state, "
            f"got {kinds}: allow it with torch.serialization.add_safe_globals, or flush before"
        ) from error


def _find_tensorclass(module: str, name: str) -> type:
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type) or not is_tensorclass(found):
        raise ValueError(
            f"tensorclass {name} of the frames held back must be imported from {module} before, got {found}"
        )
    return found


def _describe(kind: tuple[Any, ...] | None) -> str:
    if kind is None:
        return "absent"
    dtype, shape, device = kind
    return f"{dtype} {list(shape)}" if device is None else f"{dtype} {list(shape)} on {device}"


def _same(one: Any, other: Any) -> bool:
    """Returns whether two objects are one, or equal strings, bytes or numbers of one type; 0.0 is not -0.0."""
    return one is other or (
        type(one) is type(other) and isinstance(one, str | bytes | int | float) and repr(one) == repr(other)
    )
