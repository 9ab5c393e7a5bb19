"""Groups: entries whose windows end at the same frames, because the same done flags govern them.

The done flags of one shape in a group under "next" govern the entries of that group; the flags of the nearest group
above govern the entries of a group without flags. Where each agent has flags, each agent becomes a row: backends get
views ``[*B, *A, T, ...]`` of leaves ``[*B, T, *A, ...]``, and know neither groups nor agents. May import ``roles``,
``layouts``, ``frames``, ``carry``, ``task``, ``samples``, ``checks`` and ``engine``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multistep_triton.carry import Carry
from multistep_triton.checks import check_flag, check_ids, check_reward, is_per_frame
from multistep_triton.engine import n_step_extend, n_step_sample
from multistep_triton.frames import Frames
from multistep_triton.layouts import KeyPath
from multistep_triton.roles import COUNT_PATH, WINDOW_PATHS, Roles
from multistep_triton.samples import Samples
from multistep_triton.task import Keys, Leaves, Results, Task


class Group(NamedTuple):
    """Entries governed by the same done flags."""

    flags: tuple[KeyPath, ...]
    """The done flags, all of one shape; each of them ends windows."""
    agents: torch.Size
    """The agents' dimensions ``A`` if each agent has flags, ``[*B, T, *A]`` or ``[*B, T, *A, 1]``; else empty."""
    paths: list[KeyPath]
    shared: bool = False
    """Whether agents share the entries, whose windows then end where the window of any agent ends."""
    marks: tuple[KeyPath, ...] = ()
    """Leaves to read beside ``paths``: mask, trajectory ids, count of ends and, if ``shared``, the agents' flags."""
    keys: Keys = Keys((), ())
    """The roles of ``paths`` and ``marks`` in calls that extend."""
    sampled: Keys = Keys((), ())
    """Their roles in calls that sample."""
    written: Sequence[tuple[Sequence[KeyPath], KeyPath]] = ()
    """The paths to write the windows to, and the reward whose shape they take with ``match_reward_shape``."""

    @property
    def counted(self) -> tuple[KeyPath, ...]:
        """The mark that counts ends, if a storage keeps observations once."""
        return tuple([mark for mark in self.marks if mark == COUNT_PATH])


Windows = tuple[Tensor, Tensor, Tensor]
"""Steps, discount and nonterminal, ``[*B, E, *A]``."""


def find_groups(frames: Frames, roles: Roles, match_reward_shape: bool = False) -> list[Group]:
    """Checks the entries that play a role, and finds all groups; the first one is that of the done key.

    Raises:
        KeyError: the data lacks an entry that is needed.
        TypeError: an entry has the wrong dtype, or is no dense tensor.
        ValueError: an entry has the wrong shape or device, or a group's windows cannot be written.
    """
    _check_entries(frames, roles)
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
    for path, leaf in leaves.items():
        if path == COUNT_PATH:
            continue
        parent = next((path[:k] for k in range(len(path) - 1, 0, -1) if path[:k] in own), top)
        device = leaves[flag := own[parent].flags[0]].device
        if leaf.device != device and (path[0] == "next" or path in (roles.mask, roles.traj)):
            raise ValueError(f"{path} must be on {device}, as {flag}, got {leaf.device}")
        sizes = (*lead, *own[parent].agents)
        of_agent = path[: len(parent)] == parent and leaf.shape[: len(sizes)] == sizes
        (own if of_agent or parent not in shared else shared)[parent].paths.append(path)
    groups = [group for parent in own for group in (own[parent], shared.get(parent)) if group and group.paths]
    groups = [_with_keys(group, leaves, len(lead), roles) for group in groups]
    return _with_written(groups, frames, roles, match_reward_shape)


def _with_written(groups: list[Group], frames: Frames, roles: Roles, match_reward_shape: bool) -> list[Group]:
    """Adds to each group the paths that its windows are written to.

    The windows of the done key's group go to the root; with ``match_reward_shape``, those of the first reward's group
    do. Windows of any other group ``("next", *name)`` with rewards go to ``name``: those of its agents or, if no agent
    has a reward, those of what agents share.
    """
    first, root, leaves = groups[0], 0, frames.leaves
    if match_reward_shape:
        reward = roles.rewards[0]
        of_first = next(at for at, group in enumerate(groups) if reward in group.paths)
        root = 0 if groups[of_first].flags == first.flags else of_first
        if groups[of_first].shared and root != of_first:
            raise ValueError(
                f"match_reward_shape must be False where done is per agent and the first reward key is not, got "
                f"rewards {list(leaves[reward].shape)} and windows {[*frames.batch_size, *first.agents]}"
            )
    names: list[KeyPath] = []
    for at, group in enumerate(groups):
        name, own = group.flags[0][1:-1], [path for path in roles.rewards if path in group.paths]
        written: list[tuple[Sequence[KeyPath], KeyPath]] = []
        if at == root:
            written.append((WINDOW_PATHS, (roles.rewards or ((),))[0]))
        taken = group.flags == first.flags or name in names
        if name and own and not (taken if group.shared else at == root == 0):
            if name in leaves:
                raise ValueError(f"data must not hold a tensor at {name}, where the windows of that group are written")
            node, shape = frames.structure.layout.nodes.get(name), () if group.shared else group.agents
            if node and shape[: len(tail := node.tail)] != tail:
                raise ValueError(
                    f"{name} must have a batch size of its windows, {[*frames.batch_size, *shape]}, got "
                    f"{[*frames.batch_size, *tail]}"
                )
            written.append((tuple((*name, *path) for path in WINDOW_PATHS), own[0]))
            names.append(name)
        groups[at] = group._replace(written=written)
    return groups


def _check_entries(frames: Frames, roles: Roles) -> None:
    lead, leaves, objects = frames.batch_size, frames.leaves, frames.structure.objects
    if missing := [path for path in roles.needed if path not in leaves]:
        raise KeyError(f"data must hold a tensor at {missing[0]}, got the entries {list(leaves)}")
    named: dict[KeyPath | None, str] = {roles.mask: "mask_key", roles.traj: "traj_key"}
    named.update({path: "reward_keys" for path in roles.rewards})
    named.update({path: "done_keys" for path in roles.dones})
    if odd := [path for path in objects if path in named]:
        raise TypeError(f"{odd[0]}, named by {named[odd[0]]}, must be a tensor, got a non-tensor")
    for path in roles.rewards:
        check_reward(f"reward {path}", leaves[path], lead)
    if roles.mask in leaves:
        otherwise = "; if it is something else, name an entry that is not there as mask_key"
        check_flag(f"mask {roles.mask}, named by mask_key,", leaves[roles.mask], lead, otherwise)
    if roles.traj is not None:
        check_ids(f"trajectory ids {roles.traj}, named by traj_key,", leaves[roles.traj], lead)
    if wrong := [path for path in roles.dones if path in leaves and leaves[path].dtype != torch.bool]:
        raise TypeError(f"done {wrong[0]} must be bool, got {leaves[wrong[0]].dtype}")


def _find_agents(frames: Frames, roles: Roles, path: KeyPath) -> torch.Size:
    """Returns the agents' dimensions of a done flag; checks that ``done`` per agent is shaped as a reward beside it."""
    lead, shape = frames.batch_size, frames.leaves[path].shape
    if is_per_frame(frames.leaves[path], lead):
        return torch.Size()
    rewards = [reward for reward in roles.rewards if reward[: len(path) - 1] == path[:-1]]
    if path == roles.done and shape not in [frames.leaves[reward].shape for reward in rewards]:
        check_flag(f"done {path}", frames.leaves[path], lead, " or, per agent, that of a reward beside it")
    agents = shape[len(lead) :]
    return agents[:-1] if len(agents) > 1 and agents[-1] == 1 else agents


def n_step_extend_groups(
    task: Task, groups: Sequence[Group], carry: Carry | None, data: Leaves, backend: str
) -> tuple[Results, list[Windows]]:
    """Calls :func:`multistep_triton.engine.n_step_extend` for every group.

    Args:
        task: the task of the first group; the other groups change its keys.
        groups: the groups of all leaves.
        carry, data, backend: as for that function.

    Returns:
        Results: all leaves and returns; steps, discount and nonterminal of the first group. Leaves of agents are
            views with permuted dimensions.
        list: steps, discount and nonterminal of every group.
    """
    if len(groups) == 1 and not groups[0].agents:
        results = n_step_extend(task, carry, data, backend)
        return results, [results[2:5]]
    time_dim = task.time_dim

    def move(leaf: Tensor, source: int, to: int) -> Tensor:
        # Where time stays in place, the leaf itself is passed on, and no view.
        return leaf if source == to else leaf.movedim(source, to)

    # Either all groups write into the carry's memory, or none does.
    free = carry is not None and carry.may_write(data.values())
    leaves: dict[Any, Tensor] = {}
    returns: dict[Any, Tensor] = {}
    held: dict[Any, Tensor] = {}
    windows: list[Windows] = []
    for group in groups:
        after = time_dim + (0 if group.shared else len(group.agents))

        def view(leaves: Mapping[Any, Tensor], group: Group = group, after: int = after) -> dict[Any, Tensor]:
            viewed = _view(group, group.marks, leaves, time_dim + 1)
            return {key: move(leaf, time_dim, after) for key, leaf in viewed.items()}

        before = None
        if carry is not None:
            olds = {key: carry.arrange(leaf, after) for key, leaf in view(carry.leaves).items()}
            before = carry.view(olds, free)
        each = n_step_extend(task._replace(keys=group.keys, time_dim=after), before, view(data), backend)
        returns.update((key, move(value, after, time_dim)) for key, value in each.returns.items())
        leaves.update((key, move(leaf, after, time_dim)) for key, leaf in each.leaves.items())
        steps, discount, nonterminal = (move(window, after, time_dim) for window in each[2:5])
        windows.append((steps, discount, nonterminal))
        if each.carry is not None:
            held.update((key, move(each.carry.leaves[key], after, time_dim)) for key in group.paths)
            after_all = each.carry
    return Results(leaves, returns, *windows[0], after_all.view(held) if held else None), windows


def n_step_sample_groups(
    task: Task, groups: Sequence[Group], samples: Samples, data: Leaves, backend: str
) -> tuple[Results, list[Windows]]:
    """Calls :func:`multistep_triton.engine.n_step_sample` for every group, as :func:`n_step_extend_groups` does."""
    if len(groups) == 1 and not groups[0].agents:
        results = n_step_sample(task, samples, data, backend)
        return results, [results[2:5]]
    samples, drawn = samples.found(), samples.sizes is not None
    dims, count = len(samples.indices), samples.indices[0].shape[0]
    leaves: dict[Any, Tensor] = {}
    returns: dict[Any, Tensor] = {}
    windows: list[Windows] = []
    shortest: dict[tuple[KeyPath, ...], tuple[Tensor, Tensor]] = {}
    for group in groups:
        chosen, shape = samples, torch.Size([count])
        if group.shared:
            # The shortest window of any agent is the window of what agents share, whatever ended it.
            chosen = samples._replace(n_steps=shortest[group.flags][0])
        elif group.agents:
            shape = torch.Size([count, *group.agents])
            chosen = _every_agent(samples, shape)
        of_group = _view(group, group.counted if group.shared else group.marks, data, dims)
        each = n_step_sample(task._replace(keys=group.sampled), chosen, of_group, backend)
        returns.update((key, value.view(*shape, *value.shape[1:])) for key, value in each.returns.items())
        leaves.update((key, leaf.view(*shape, *leaf.shape[1:])) for key, leaf in each.leaves.items())
        nonterminal = shortest[group.flags][1] if group.shared else each.nonterminal.view(shape)
        windows.append((each.steps.view(shape), each.discount.view(shape), nonterminal))
        if len(shape) > 1:
            shortest[group.flags] = each.steps.view(shape).flatten(1).amin(1), nonterminal.flatten(1).all(1)
    indices = torch.stack([*samples.indices], -1) if drawn else None
    return Results(leaves, returns, *windows[0], indices=indices), windows


def steps_at(path: KeyPath, groups: Sequence[Group], windows: Sequence[Windows]) -> Tensor:
    """Returns the steps ``[N]`` of a non-tensor entry's windows: of agents' windows, those of the shortest."""
    above = [g for g, group in enumerate(groups) if path[: len(group.flags[0]) - 1] == group.flags[0][:-1]]
    nearest = max(above, key=lambda g: len(groups[g].flags[0]), default=0)
    return windows[nearest][0].flatten(1).amin(1) if windows[nearest][0].ndim > 1 else windows[nearest][0]


def _view(group: Group, marks: Iterable[KeyPath], data: Mapping[Any, Tensor], dims: int) -> dict[Any, Tensor]:
    """Returns a group's leaves, ``dims`` dimensions of frames first, and its ``marks``, shaped to fit the leaves."""
    leaves = {path: data[path] for path in group.paths}
    for key in marks:
        leaves[key] = data[key]
        if key in group.flags:
            # Trajectories of what agents share end where that of any agent ends.
            leaves[key] = data[key].flatten(dims).any(-1)
        elif group.agents and not group.shared:
            mark = data[key].flatten(dims - 1)[(..., *[None] * len(group.agents))]
            leaves[key] = mark.expand(*mark.shape[:dims], *group.agents)
    return leaves


def _with_keys(group: Group, leaves: Mapping[Any, Tensor], dims: int, roles: Roles) -> Group:
    """Returns a group with its marks, and with the roles of its entries and marks."""
    mask, traj, count = (key if key in leaves else None for key in (roles.mask, roles.traj, COUNT_PATH))
    flags = group.flags if group.shared else ()
    group = group._replace(marks=tuple(key for key in (mask, traj, *flags, count) if key is not None))
    rewards = tuple([path for path in roles.rewards if path in group.paths])
    outputs = [(path, path, roles.is_gathered(path)) for path in group.paths if path not in rewards]
    as_they_came = dict.fromkeys(path for path in (*roles.dones, *rewards) if path in group.paths)
    outputs += [(roles.originals[path], path, False) for path in as_they_came if path in roles.originals]
    keys = partial(
        Keys.of,
        dims=dims + (0 if group.shared else len(group.agents)),
        rewards=rewards,
        outputs=tuple(outputs),
        count=count,
    )
    extend = keys(_view(group, group.marks, leaves, dims), done=group.flags, mask=mask, traj=traj)
    # When sampling, the agents' shortest window is also that of what they share, which needs no flags.
    sample = keys(_view(group, group.counted, leaves, dims), done=()) if group.shared else extend
    return group._replace(keys=extend, sampled=sample)


def _every_agent(samples: Samples, shape: torch.Size) -> Samples:
    """Returns samples of every agent of the sampled frames, ``[N, *A]`` flattened."""
    grid = torch.meshgrid(*(torch.arange(size, device=samples.indices[0].device) for size in shape), indexing="ij")
    frame, *agent = (each.flatten() for each in grid)
    return samples._replace(
        indices=[*(dim[frame] for dim in samples.indices), *agent],
        n_steps=None if samples.n_steps is None else samples.n_steps[frame],
        rows=None,
    )
