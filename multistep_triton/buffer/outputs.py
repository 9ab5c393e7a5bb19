"""What a sample holds: entries of a storage, and entries that windows add.

May import ``base`` and what it may, ``samples``, ``ends`` and ``eager_ring``.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDict
from torch import Tensor

from multistep_triton.base import MultiStepBase
from multistep_triton.eager_ring import EndCounts
from multistep_triton.ends import Ends
from multistep_triton.frames import Frames
from multistep_triton.groups import Group, n_step_sample_groups, steps_at
from multistep_triton.layouts import KeyPath, Layout
from multistep_triton.roles import COUNT_PATH, INDEX, ORIGINAL_REWARD_PATH, Roles, as_path, check_single_steps, key_list
from multistep_triton.samples import Samples
from multistep_triton.task import AFTER_END, CachedLeaves, Task


class Selection(dict[KeyPath, bool]):
    """Whether the keys select an entry, by its path: they name it, or a group that it lies in."""

    def __init__(self, keys: Iterable[NestedKey]) -> None:
        super().__init__()
        self.by = tuple(map(as_path, key_list("outputs", keys, ())))
        if not self.by:
            raise ValueError(f"outputs must name entries of a sample, or be None for all, got {keys!r}")

    def __missing__(self, path: KeyPath) -> bool:
        """Computes and keeps the value of a path."""
        self[path] = selected = any(path[: len(key)] == key for key in self.by)
        return selected

    def may_hold(self, path: KeyPath) -> bool:
        """Whether the group at a path is selected, or an entry in it."""
        return self[path] or any(key[: len(path)] == path for key in self.by)

    def check(self, stored: Iterable[KeyPath], roles: Roles, groups: list[Group]) -> None:
        """Checks that every key names an entry that is stored or that the windows of these groups add."""
        there = {*stored, *roles.originals.values(), INDEX}
        there.update(path for group in groups for paths, _ in group.written for path in paths)
        if len(roles.rewards) == 1:
            there.add(ORIGINAL_REWARD_PATH)
        if none := [key for key in self.by if not any(path[: len(key)] == key for path in there)]:
            raise KeyError(f"outputs must name entries of a sample, got {none}, which are none of {sorted(there)}")


def as_stored(
    group: Group,
    roles: Roles,
    selection: Selection | None,
    match_reward_shape: bool,
    twins: Container[KeyPath],
    wide: Mapping[Any, torch.dtype],
) -> Group:
    """Returns a group whose samples hold the selected outputs and n-step returns; its windows stay as they are.

    They read ``twins`` after a window's end, and cast narrowed entries to ``wide`` dtypes.
    """
    keys = group.sampled
    outputs: list[Any] = [(out, key, AFTER_END if key in twins else at) for out, key, at in keys.outputs]
    rewards: Sequence[Any] = keys.rewards
    if selection is not None:
        needed = set[KeyPath]()
        if selection[ORIGINAL_REWARD_PATH] and len(roles.rewards) == 1:
            needed.add(roles.originals[roles.rewards[0]])
        if group.written and group.agents:
            # Windows take the shape of this flag.
            needed.add(group.flags[0])
        outputs = [each for each in outputs if selection[each[0]] or each[0] in needed]
        rewards = [path for path in rewards if match_reward_shape or selection[path]]
    wide_dtypes = {key: wide[key] for key in keys.held if key in wide}
    return group._replace(
        sampled=replace(keys, outputs=tuple(outputs), rewards=tuple(rewards), wide_dtypes=wide_dtypes)
    )


class StoredLayout(NamedTuple):
    """The leaves, roles and groups of a storage, read once for samples of all entries or of the selected ones."""

    of: tuple[Any, ...]
    """What the layout depends on: entries, ``Order.changes()``, ``_changes``, ``indexed``, ends and wide dtypes."""
    frames: Frames
    objects: dict[KeyPath, Any]
    roles: Roles
    groups: list[Group]
    indexed: bool
    """Whether the writer keeps every frame's slot in the entry ``INDEX``."""
    ends: Ends | None
    """The ends of a storage that keeps observations once; else None."""

    @property
    def device(self) -> torch.device:
        """The device of the leaves."""
        return self.frames.leaves[self.roles.done].device

    @classmethod
    def read(cls, of: tuple[Any, ...], buffer: MultiStepBase, selection: Selection | None) -> StoredLayout:
        """Reads a storage, with the arguments of ``buffer``."""
        entries, _, _, indexed, ends, wide = of
        ndim, written = entries.batch_dims, buffer._roles_in(()).written
        # The writer's entry ``INDEX`` holds slots, which the samples tell without reading it.
        frames, objects = Frames.read_storage(entries, ndim, written | {INDEX} if indexed else written)
        check_single_steps(frames.left_out)
        if ends is not None:
            # A twin that is kept once is the root's entry, read at another frame.
            frames.leaves.update((path, frames.leaves[path[1:]]) for path in ends.rows)
            frames.leaves[COUNT_PATH] = ends.count
            frames.structure.layout = Layout.of_leaves(frames.leaves, ndim, frames.structure.layout.nodes)
        roles = buffer._roles_in(frames.leaves)
        every, structure, match = buffer._groups_in(frames, roles), frames.structure, buffer._match_reward_shape
        twins: tuple[KeyPath, ...] = () if ends is None else tuple(ends.rows)
        wide = {**wide, **{path: wide[path[1:]] for path in twins if path[1:] in wide}}
        depends_on = roles, match, twins, tuple(wide.items()), None if selection is None else selection.by
        groups: list[Group] = structure.layout.compute_once(
            depends_on, lambda: [as_stored(each, roles, selection, match, twins, wide) for each in every]
        )
        if selection is not None:
            selection.check({*frames.leaves, *objects} - {COUNT_PATH}, roles, every)
            nodes = {path: node for path, node in structure.layout.nodes.items() if selection.may_hold(path)}
            structure.layout = Layout.of(structure.layout.kinds, nodes)
        frames.leaves = CachedLeaves(frames.leaves)
        return cls(of, frames, objects, roles, groups, indexed, ends)

    def sample(
        self, samples: Samples, high: int, buffer: MultiStepBase, selection: Selection | None, with_index: bool
    ) -> tuple[TensorDict, Tensor | None]:
        """Computes the n-step transitions of samples, of at most ``high`` steps, and their index, if it was drawn here.

        ``with_index``, the entry ``INDEX`` holds this index; otherwise the slot, if the storage has such an entry.
        """
        frames, objects, roles, groups, indexed, ends = self[1:]
        if ends is not None:
            samples = samples._replace(ends=ends)
        task = Task(groups[0].sampled, high, float(buffer._gamma), 0, False)
        results, windows = n_step_sample_groups(task, groups, samples, frames.leaves, buffer._backend)
        index = results.indices
        entries: dict[KeyPath, Any] = buffer._output_leaves(results, roles, groups, windows)
        if with_index and index is not None and index.shape[1] > 1:
            entries[INDEX] = index
        elif with_index or indexed:
            entries[INDEX] = samples.indices[0] if index is None else index.select(1, 0)
        if selection is not None:
            entries = {path: value for path, value in entries.items() if selection[path]}
            objects = {path: value for path, value in objects.items() if selection[path]}
        if objects:
            where = (samples if index is None else samples._replace(indices=index.unbind(1))).read()
            time, *others = where.indices
            if ends is not None:
                sizes = frames.batch_size
                counted = EndCounts(ends, where.newest, where.live, sizes[1:].numel(), where.rows_in(sizes))
                time, *others = torch.unravel_index(counted.rows, sizes)
            for path, value in objects.items():
                ahead = steps_at(path, groups, windows) - 1 if roles.is_gathered(path) else 0
                entries[path] = value[((time + ahead) % where.live, *others)]
        return frames.structure.build(entries, results.steps.shape[:1]), index
