"""Layouts: the entries of tensordicts without their values; one reading of a tensordict finds its layout.

Owns names, kinds, devices and nested batch dimensions. May import tensordict, torch and ``task``.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from tensordict import (
    LazyStackedTensorDict,
    TensorDict,
    TensorDictBase,
    UnbatchedTensor,
    is_non_tensor,
    is_tensor_collection,
    is_tensorclass,
)
from torch import Tensor

from multistep_triton.task import Cache

KeyPath = tuple[str, ...]
Kind = tuple[Any, ...]
"""The dtype, trailing shape and device of a leaf; for a non-tensor, ``OBJECT``, its trailing shape and None."""
OBJECT = "non-tensor"


class Node(NamedTuple):
    """A (nested) tensordict without its entries; ``tail`` is its batch shape beyond ``[*B, T]``."""

    kind: type | None
    """The tensorclass to build; None for a tensordict."""
    tail: tuple[int, ...]
    names: tuple[str | None, ...] | None
    device: torch.device | None


class Layout(Cache):
    """Kinds and nodes of tensordicts. Frames of equal kinds can be joined; equal layouts are mostly one object."""

    def __init__(self, kinds: tuple[tuple[KeyPath, Kind], ...], nodes: tuple[tuple[KeyPath, Node], ...]) -> None:
        super().__init__()
        self.kinds, self.nodes = dict(kinds), dict(nodes)
        """The kind of every leaf and the node of every tensordict, by path; parents come before their children."""
        self.objects = [path for path, kind in kinds if kind[0] == OBJECT]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles kinds and nodes without the cache; a process that knows the layout unpickles its own object."""
        return _layout, (tuple(self.kinds.items()), tuple(self.nodes.items()))

    @classmethod
    def of(cls, kinds: Mapping[KeyPath, Kind], nodes: Mapping[KeyPath, Node]) -> Layout:
        """Returns the layout of these kinds and nodes; equal arguments mostly give the same object."""
        return _layout(tuple(kinds.items()), tuple(nodes.items()))

    @classmethod
    def of_leaves(
        cls,
        leaves: Mapping[KeyPath, Tensor],
        dims: int,
        nodes: Mapping[KeyPath, Node],
        objects: Collection[KeyPath] = (),
    ) -> Layout:
        """Returns the layout of leaves with ``dims`` dimensions of frames first; ``objects`` are the non-tensors."""
        kinds: dict[KeyPath, Kind]
        kinds = {path: (leaf.dtype, leaf.shape[dims:], leaf.device) for path, leaf in leaves.items()}
        kinds.update({path: (OBJECT, kinds[path][1], None) for path in objects})
        return cls.of(kinds, nodes)

    def without(self, paths: Collection[KeyPath]) -> tuple[Layout, list[KeyPath], list[KeyPath]]:
        """Returns the layout without ``paths``, the leaves that this removes, and those of ``paths`` that exist."""

        def is_left(path: KeyPath) -> bool:
            return not any(path[:names] in paths for names in range(1, len(path) + 1))

        kinds = {path: kind for path, kind in self.kinds.items() if is_left(path)}
        nodes = {path: node for path, node in self.nodes.items() if is_left(path)}
        left_out = [path for path in (*self.kinds, *self.nodes) if path in paths]
        return Layout.of(kinds, nodes), [path for path in self.kinds if path not in kinds], left_out

    def arrange(self, leaves: tuple[KeyPath, ...]) -> list[tuple[Node, list[tuple[str, int]]]]:
        """Returns the nodes to build, children before parents, each with ``(name, position)`` of its entries.

        A position counts through ``leaves`` and then the nodes built so far. Groups that only ``leaves`` mention get a
        node. In a node, leaves that were read come first, in the order of reading.
        """
        order = [*self.kinds, *(path for path in leaves if path not in self.kinds)]
        paths = dict.fromkeys(self.nodes)
        paths.update((leaf[:names], None) for leaf in leaves for names in range(1, len(leaf)))
        nodes = [*reversed(paths)]
        at = {path: index for index, path in enumerate((*leaves, *nodes))}
        entries: dict[KeyPath, list[tuple[str, int]]] = {path: [] for path in nodes}
        for path in (*sorted(leaves, key=order.index), *nodes):
            if path:
                entries[path[:-1]].append((path[-1], at[path]))
        # A group may hold written entries alone: reading found no node for it.
        written = Node(None, (), None, self.nodes[()].device)
        return [(self.nodes.get(path, written), each) for path, each in entries.items()]


@functools.lru_cache(maxsize=256)
def _layout(kinds: tuple[tuple[KeyPath, Kind], ...], nodes: tuple[tuple[KeyPath, Node], ...]) -> Layout:
    return Layout(kinds, nodes)


def is_plain(data: Any) -> bool:
    """Returns whether ``data`` is a TensorDict of tensors and plain TensorDicts alone, no lazy stack or tensorclass."""
    return type(data) is TensorDict and all(isinstance(each, Tensor) or is_plain(each) for each in data.values())


def read_layout(data: TensorDictBase, ndim: int) -> tuple[Layout, list[Any]]:
    """Returns the layout of a tensordict of ``ndim`` batch dimensions, and its leaves in the layout's order."""
    values: list[Any] = []
    return _layout_of(_read(without_leftovers(data), ndim, values)), values


def without_leftovers(data: TensorDictBase, time_dim: int | None = None) -> TensorDictBase:
    """Returns frames ``[*B, T]`` without what their first ones hold of the last rollout, if they are a lazy stack.

    The first frame of ``env.rollout(tensordict=last["next"], auto_reset=False)`` has a reward at its root. It is left
    out, as tensordict's stack does with all that some elements lack, where every further entry of the first frames
    lies under "next", too.
    """
    if not isinstance(data, LazyStackedTensorDict) or not data.tensordicts:
        return data
    time_dim = data.batch_dims - 1 if time_dim is None else time_dim
    elements, dim = [*data.tensordicts], data.stack_dim
    if dim != time_dim:
        elements = [without_leftovers(each, time_dim - (dim < time_dim)) for each in elements]
    elif len(elements) > 1:
        first, second = (_paths_of(each) for each in elements[:2])
        further = first - second
        if further and {("next", *path) for path in further} <= second:
            elements[0] = elements[0].exclude(*further)
    if all(map(operator.is_, elements, data.tensordicts)):
        return data
    without = data.copy()
    without.tensordicts[:] = elements
    return without


def _paths_of(data: TensorDictBase) -> set[KeyPath]:
    """Returns the paths of entries and groups; of a lazy stack, those of its first element."""
    while isinstance(data, LazyStackedTensorDict):
        data = data.tensordicts[0]
    return {(key,) if isinstance(key, str) else key for key in data.keys(True)}


def _read(data: Any, ndim: int, values: list[Any], above: KeyPath = ()) -> tuple[Any, ...]:
    """Returns a tensordict's node, ``(name, *kind)`` per leaf, ``(name, read)`` per group; fills ``values``."""
    names, sizes, items = data.names, data.batch_size, data.items
    kind = None
    if type(data) is not TensorDict:
        kind = type(data) if is_tensorclass(data) else None
        if isinstance(data, LazyStackedTensorDict):
            items = functools.partial(_lazy_items, data, above)
    found: list[Any] = [(kind, sizes[ndim:] if len(sizes) > ndim else (), tuple(names), data.device)]
    for name, value in items():
        if isinstance(value, Tensor):
            if value.layout is not torch.strided or value.is_nested or type(value) is UnbatchedTensor:
                raise TypeError(f"entry {(*above, name)} must be a dense tensor, got {_kind_of(value)}")
            found.append((name, value.dtype, value.shape[ndim:], value.device))
            values.append(value)
        elif type(value) is not TensorDict and is_non_tensor(value):
            found.append((name, OBJECT, value.batch_size[ndim:], None))
            values.append(value)
        elif is_tensor_collection(value):
            found.append((name, _read(value, ndim, values, (*above, name))))
        else:
            raise TypeError(f"entry {(*above, name)} must be a tensor or a tensordict, got {type(value).__name__}")
    return tuple(found)


def _kind_of(value: Tensor) -> str:
    if type(value) is UnbatchedTensor:
        return "an UnbatchedTensor, which has no value of each frame"
    return "a nested one" if value.is_nested else f"one of {value.layout}"


@functools.lru_cache(maxsize=256)
def _layout_of(read: tuple[Any, ...]) -> Layout:
    kinds, nodes = dict[KeyPath, Kind](), dict[KeyPath, Node]()

    def add(read: tuple[Any, ...], path: KeyPath) -> None:
        kind, tail, names, device = read[0]
        nodes[path] = Node(kind, tail, names if any(names) else None, device)
        for name, *entry in read[1:]:
            if len(entry) == 1:
                add(entry[0], (*path, name))
            else:
                kinds[(*path, name)] = tuple(entry)

    add(read, ())
    return Layout.of(kinds, nodes)


def _lazy_items(data: LazyStackedTensorDict, path: KeyPath) -> Iterator[tuple[str, Any]]:
    """Yields the entries of a lazy stack; raises for those that some elements lack, which the stack would skip."""
    keys = _key_sets(data)
    if some := set[str]().union(*keys) - keys[0].intersection(*keys):
        entries = [(*path, key) for key in sorted(some)]
        raise ValueError(f"entries {entries} must be in every element of a lazily stacked tensordict, got some without")
    for key in data.tensordicts[0].keys():  # noqa: SIM118  # iterating a tensordict goes over its frames
        try:
            yield key, data.get(key)
        except RuntimeError as error:
            raise ValueError(
                f"entry {(*path, key)} must have one shape in every element of a lazily stacked tensordict, got {error}"
            ) from error


def _key_sets(data: TensorDictBase) -> list[set[str]]:
    """Returns the names of the entries of each element of a lazy stack, of lazy stacks or not."""
    if isinstance(data, LazyStackedTensorDict):
        return [keys for element in data.tensordicts for keys in _key_sets(element)]
    return [set(data.keys())]
