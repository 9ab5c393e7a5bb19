"""Groups: entries whose windows end alike, as one set of done flags governs them.

A group under "next" that has a done flag of its own is governed by it, and by the other done keys of its shape beside
it; any other entry by the flags of the nearest group above. Where the flags are one per agent, each agent is a row of
its own: leaves ``[*B, T, *A, ...]`` are read as ``[*B, *A, T, ...]``, views in another order, so that what computes
windows knows rows and neither groups nor agents. May import ``roles``, ``frames``, ``checks`` and ``dispatch``.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multistep_triton.checks import check_flag, check_ids, check_reward, is_per_frame
from multistep_triton.dispatch import Extension, n_step_extend, n_step_sample
from multistep_triton.frames import Frames, KeyPath
from multistep_triton.ring import Ring, Samples
from multistep_triton.roles import Roles, with_saved


class Group(NamedTuple):
    """Entries whose windows end alike."""

    flags: tuple[KeyPath, ...]
    """The done flags, of one shape, any of which ends a window."""
    agents: torch.Size
    """The agents' dimensions, ``A``, where each agent has flags, ``[*B, T, *A]`` or ``[*B, T, *A, 1]``; else none."""
    paths: list[KeyPath]
    shared: bool = False
    """Whether the entries are those that agents share: their windows end where that of any agent ends."""


Windows = tuple[Tensor, Tensor, Tensor]
"""Steps, discount and nonterminal, ``[*B, E, *A]``."""


# What was found in entries of one layout.
_found: dict[Any, list[Group]] = {}
_MOST_FOUND = 256


def find_groups(frames: Frames, roles: Roles) -> list[Group]:
    """Checks the entries that play a role, and finds the groups of all; the first one is that of the done key.

    Raises:
        KeyError: an entry that is needed is not there.
        TypeError: one is of the wrong kind.
        ValueError: one has the wrong shape.
    """
    ndim = len(frames.batch_size)
    layout = [(path, leaf.dtype, leaf.shape[ndim:]) for path, leaf in frames.leaves.items()]
    key = roles, *layout, *frames.objects
    if (groups := _found.get(key)) is None:
        _check_entries(frames, roles)
        groups = _find_groups(frames, roles)
        if len(_found) >= _MOST_FOUND:
            _found.clear()
        _found[key] = groups
    return groups


def _find_groups(frames: Frames, roles: Roles) -> list[Group]:
    lead, leaves = frames.batch_size, frames.leaves
    flags: dict[KeyPath, list[KeyPath]] = {roles.done[:-1]: []}
    for path, leaf in leaves.items():
        if roles.is_flag(path, leaf):
            flags.setdefault(path[:-1], []).append(path)
    own: dict[KeyPath, Group] = {}
    for parent, beside in flags.items():
        beside.sort(key=lambda path: roles.flags.index(path[-1]))
        alike = [path for path in beside if leaves[path].shape == leaves[beside[0]].shape]
        own[parent] = Group(tuple(alike), _find_agents(frames, roles, beside[0]), [])
    shared = {parent: group._replace(paths=[], shared=True) for parent, group in own.items() if group.agents}
    top = ("next",) if ("next",) in own else roles.done[:-1]
    for path, leaf in with_saved(leaves, roles.saved_in(leaves)).items():
        parent = next((path[:k] for k in range(len(path) - 1, 0, -1) if path[:k] in own), top)
        sizes = (*lead, *own[parent].agents)
        of_agent = path[: len(parent)] == parent and leaf.shape[: len(sizes)] == sizes
        (own if of_agent or parent not in shared else shared)[parent].paths.append(path)
    return [group for parent in own for group in (own[parent], shared.get(parent)) if group and group.paths]


def _check_entries(frames: Frames, roles: Roles) -> None:
    lead, leaves, objects = frames.batch_size, frames.leaves, frames.objects
    for path in roles.needed:
        if path not in leaves or path in objects:
            raise KeyError(f"data must hold a tensor at {path}, got the entries {list(leaves)}")
    for path in objects:
        if path == roles.mask or path in roles.dones:
            named = "mask_key" if path == roles.mask else "done_keys"
            raise TypeError(f"{path}, named by {named}, must be a tensor, got a non-tensor")
    for path in roles.rewards:
        check_reward(f"reward {path}", leaves[path], lead)
    if roles.mask in leaves:
        otherwise = "; if it is something else, name an entry that is not there as mask_key"
        check_flag(f"mask {roles.mask}, named by mask_key,", leaves[roles.mask], lead, otherwise)
    if roles.traj is not None:
        check_ids(f"trajectory ids {roles.traj}, named by traj_key,", leaves[roles.traj], lead)
    for path, leaf in leaves.items():
        if path in roles.dones and leaf.dtype != torch.bool:
            raise TypeError(f"done {path} must be bool, got {leaf.dtype}")


def _find_agents(frames: Frames, roles: Roles, path: KeyPath) -> torch.Size:
    """The agents' dimensions of a done flag; that of the done key is per agent if a reward beside it is."""
    lead, shape = frames.batch_size, frames.leaves[path].shape
    if is_per_frame(frames.leaves[path], lead):
        return torch.Size()
    rewards = [reward for reward in roles.rewards if reward[: len(path) - 1] == path[:-1]]
    if path == roles.done and shape not in [frames.leaves[reward].shape for reward in rewards]:
        check_flag(f"done {path}", frames.leaves[path], lead, " or, per agent, that of a reward beside it")
    agents = shape[len(lead) :]
    return agents[:-1] if len(agents) > 1 and agents[-1] == 1 else agents


def n_step_extend_groups(
    carry: Ring | None, data: Mapping[Any, Tensor], groups: Sequence[Group], *, time_dim: int, **arguments: Any
) -> tuple[Extension, list[Windows]]:
    """:func:`multistep_triton.dispatch.n_step_extend` for every group.

    Args:
        carry, data: as there.
        groups: to which the leaves belong.

    Keyword Args:
        time_dim, **arguments: as there, but for ``done_keys``.

    Returns:
        Extension: of all leaves; steps, discount and nonterminal are those of the first group. Leaves of agents are
            views in another order of dimensions.
        list: the same three of every group.
    """
    if len(groups) == 1 and not groups[0].agents:
        extension = n_step_extend(carry, data, time_dim=time_dim, done_keys=groups[0].flags, **arguments)
        return extension, [(extension.steps, extension.discount, extension.nonterminal)]

    def move(leaf: Tensor, source: int, to: int) -> Tensor:
        # What does not change is passed through as it is.
        return leaf if source == to else leaf.movedim(source, to)

    # All write into the ring, or none.
    free = carry is not None and carry.may_write(data.values())
    leaves: dict[Any, Tensor] = {}
    returns: dict[Any, Tensor] = {}
    held: dict[Any, Tensor] = {}
    windows: list[Windows] = []
    for group in groups:
        after = time_dim + (0 if group.shared else len(group.agents))

        def view(leaves: Mapping[Any, Tensor], group: Group = group, after: int = after) -> dict[Any, Tensor]:
            viewed = _of_group(group, leaves, time_dim + 1, arguments)
            if group.shared:
                viewed.update((path, leaves[path].flatten(time_dim + 1).any(-1)) for path in group.flags)
            return {key: move(leaf, time_dim, after) for key, leaf in viewed.items()}

        before = None
        if carry is not None:
            olds = {key: carry.arrange(leaf, after) for key, leaf in view(carry.leaves).items()}
            before = carry.with_leaves(olds, free)
        own, leaves_of = _of_paths(arguments, group.paths), view(data)
        own["only_read"] = leaves_of.keys() - {*group.paths}
        each = n_step_extend(before, leaves_of, time_dim=after, done_keys=group.flags, **own)
        returns.update((key, move(value, after, time_dim)) for key, value in each.returns.items())
        leaves.update((key, move(each.leaves[key], after, time_dim)) for key in group.paths)
        windows.append(
            (
                move(each.steps, after, time_dim),
                move(each.discount, after, time_dim),
                move(each.nonterminal, after, time_dim),
            )
        )
        if each.carry is not None:
            held.update((key, move(each.carry.leaves[key], after, time_dim)) for key in group.paths)
            ring = each.carry
    return Extension(leaves, returns, *windows[0], ring.with_leaves(held) if held else None), windows


def n_step_sample_groups(
    samples: Samples, data: Mapping[Any, Tensor], groups: Sequence[Group], **arguments: Any
) -> tuple[Extension, list[Windows]]:
    """:func:`multistep_triton.dispatch.n_step_sample` for every group; arguments and results as those of extend."""
    if len(groups) == 1 and not groups[0].agents:
        extension = n_step_sample(samples, data, done_keys=groups[0].flags, **arguments)
        return extension, [(extension.steps, extension.discount, extension.nonterminal)]
    dims, count = len(samples.indices), samples.indices[0].shape[0]
    leaves: dict[Any, Tensor] = {}
    returns: dict[Any, Tensor] = {}
    windows: list[Windows] = []
    shortest: dict[tuple[KeyPath, ...], Tensor] = {}
    for group in groups:
        own, picked, shape = _of_paths(arguments, group.paths), samples, torch.Size([count])
        if group.shared:
            # The shortest window of an agent is that of the frame, whatever ended it.
            picked = samples._replace(n_steps=shortest[group.flags])
            never = torch.zeros((), dtype=torch.bool, device=samples.indices[0].device)
            of_group: dict[Any, Tensor] = {path: data[path] for path in group.paths}
            of_group["never"] = never.expand(data[group.flags[0]].shape[:dims])
            own.update(done_keys=("never",), mask_key=None, traj_key=None)
        else:
            of_group = _of_group(group, data, dims, arguments)
            own["done_keys"] = group.flags
        if group.agents and not group.shared:
            shape = torch.Size([count, *group.agents])
            picked = _every_agent(samples, shape)
        own["only_read"] = of_group.keys() - {*group.paths}
        each = n_step_sample(picked, of_group, **own)
        returns.update((key, value.view(*shape, *value.shape[1:])) for key, value in each.returns.items())
        leaves.update((key, each.leaves[key].view(*shape, *each.leaves[key].shape[1:])) for key in group.paths)
        windows.append((each.steps.view(shape), each.discount.view(shape), each.nonterminal.view(shape)))
        if len(shape) > 1:
            shortest[group.flags] = windows[-1][0].flatten(1).amin(1)
    return Extension(leaves, returns, *windows[0], None), windows


def steps_at(path: KeyPath, groups: Sequence[Group], windows: Sequence[Windows]) -> Tensor:
    """Steps ``[N]`` of the windows of an entry that is no leaf: of those of agents, the shortest."""
    above = [g for g, group in enumerate(groups) if path[: len(group.flags[0]) - 1] == group.flags[0][:-1]]
    nearest = max(above, key=lambda g: len(groups[g].flags[0]), default=0)
    return windows[nearest][0].flatten(1).amin(1) if windows[nearest][0].ndim > 1 else windows[nearest][0]


def _of_group(group: Group, data: Mapping[Any, Tensor], dims: int, arguments: Mapping[str, Any]) -> dict[Any, Tensor]:
    """The leaves of a group, and beside them the mask and the ids, which hold for all, for every agent if it has some.

    The first ``dims`` dimensions of leaves are those of frames.
    """
    leaves = {path: data[path] for path in group.paths}
    for key in (arguments["mask_key"], arguments["traj_key"]):
        if key is not None and group.agents and not group.shared:
            mark = data[key].flatten(dims - 1)[(..., *[None] * len(group.agents))]
            leaves[key] = mark.expand(*mark.shape[:dims], *group.agents)
        elif key is not None:
            leaves[key] = data[key]
    return leaves


def _of_paths(arguments: Mapping[str, Any], paths: Collection[Hashable]) -> dict[str, Any]:
    """The arguments of a call, whose rewards and gathered entries are those of these paths."""
    own = dict(arguments)
    for name in ("reward_keys", "gathered_keys"):
        own[name] = [key for key in paths if key in arguments[name]]
    return own


def _every_agent(samples: Samples, shape: torch.Size) -> Samples:
    """Every agent of the frames sampled, ``[N, *A]`` in a row."""
    grid = torch.meshgrid(*(torch.arange(size, device=samples.indices[0].device) for size in shape), indexing="ij")
    frame, *agent = (each.flatten() for each in grid)
    return samples._replace(
        indices=[*(dim[frame] for dim in samples.indices), *agent],
        n_steps=None if samples.n_steps is None else samples.n_steps[frame],
    )
