"""What MultiStepTransform and MultiStep share: one call from frames to n-step transitions.

Owns what is written where; no maths. May import ``arguments``, ``checks``, ``roles``, ``frames``, ``carry``, ``groups``
and ``task``.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from multistep_triton.arguments import Arguments
from multistep_triton.checks import check_not_captured
from multistep_triton.carry import Carry
from multistep_triton.frames import Frames, KeyPath, hold_back
from multistep_triton.groups import Group, Windows, find_groups, n_step_extend_groups
from multistep_triton.roles import (
    AUTO,
    DEFAULT_MASK_KEY,
    MASK_PATH,
    ORIGINAL_REWARD_PATH,
    TRAJ_PATH,
    WINDOW_PATHS,
    Roles,
    check_single_steps,
    find_roles,
)
from multistep_triton.task import Results, Task

Place = tuple[int, KeyPath, Sequence[KeyPath], list[KeyPath]]
"""Where windows are written: of which group, under which name, as which entries, and with which rewards."""


class MultiStepBase(Arguments):
    """The call, with these arguments."""

    def _roles_in(self, entries: Container[KeyPath]) -> Roles:
        """The roles in data of these entries."""
        traj, mask = self._traj_key, self._mask_key
        if traj == AUTO:
            traj = TRAJ_PATH if TRAJ_PATH in entries else None
        if mask == DEFAULT_MASK_KEY and (mask,) not in entries and MASK_PATH in entries:
            mask = MASK_PATH
        roles = find_roles(self._done_key, mask, traj, tuple(self._reward_keys), tuple(self._done_keys), self._done_at)
        if self._match_reward_shape and not roles.rewards:
            raise ValueError("match_reward_shape must be False where reward_keys is empty, got True")
        return roles

    def _n_step(
        self, data: TensorDictBase | Frames, carry: Carry | None, *, hold: bool
    ) -> tuple[TensorDict, Carry | None]:
        """The frames of ``carry`` and ``data`` whose windows are known, and those that are held back.

        Without ``hold`` windows are cut at the last frame, all frames come out, and with no carry either an entry
        that does not change is the data's own.
        """
        if hold:
            check_not_captured("a MultiStepTransform")
        if isinstance(data, Frames):
            frames = data
        else:
            frames = Frames.read(data, without=self._roles_in(()).written)
            check_single_steps(frames.left_out)
        roles = self._roles_in(frames.leaves)
        groups, places = self._groups_in(frames, roles)
        if carry is not None:
            frames.follow(carry)
        time_dim, structure = len(frames.batch_size) - 1, frames.structure
        task = Task(groups[0].keys, self._n_steps, float(self._gamma), time_dim, hold)
        results, windows = n_step_extend_groups(task, groups, carry, frames.leaves, self._backend)
        shape = results.steps.shape[: time_dim + 1]
        emitted = structure.build(self._output_leaves(results, roles, groups, places, windows), shape)
        held = results.carry
        return emitted, hold_back(held, structure) if held is not None and held.count else None

    def _groups_in(self, frames: Frames, roles: Roles) -> tuple[list[Group], list[Place]]:
        """The groups of the entries, and where their windows are written."""

        def find() -> tuple[list[Group], list[Place]]:
            groups = find_groups(frames, roles)
            return groups, self._find_places(groups, roles, frames.structure.layout.kinds)

        found: tuple[list[Group], list[Place]] = frames.structure.layout.find((roles, self._match_reward_shape), find)
        return found

    def _find_places(self, groups: Sequence[Group], roles: Roles, leaves: Container[KeyPath]) -> list[Place]:
        """Where windows are written.

        Those of the done key's group are at the root; those of another, ``("next", *name)``, under its name if it has
        flags of its own and rewards, of agents or, if there are none, those that agents share. If they are to be in the
        shape of the first reward, its are at the root.
        """
        root = groups[0]
        places: list[Place] = []
        if self._match_reward_shape:
            # What agents share with the done key at theirs is of another shape than its windows, which is told.
            of_first = next(group for group in groups if roles.rewards[0] in group.paths)
            root = root if of_first.flags == root.flags else of_first
        for at, group in enumerate(groups):
            name, own = group.flags[0][1:-1], [path for path in roles.rewards if path in group.paths]
            if group is root:
                places.append((at, (), WINDOW_PATHS, [*roles.rewards]))
            taken = group.flags == groups[0].flags or any(place[1] == name for place in places)
            if name and own and not (taken if group.shared else group is root and not at):
                places.append((at, name, [(*name, *path) for path in WINDOW_PATHS], own))
                if name in leaves:
                    raise ValueError(
                        f"data must not hold a tensor at {name}, where the windows of that group are written"
                    )
        return places

    def _output_leaves(
        self,
        results: Results,
        roles: Roles,
        groups: Sequence[Group],
        places: Sequence[Place],
        windows: Sequence[Windows],
    ) -> dict[KeyPath, Tensor]:
        """What comes out, by path."""
        leaves = results.leaves
        for at, _, paths, rewards in places:
            written: Sequence[Tensor] = windows[at]
            if (groups[at].agents and not groups[at].shared) or self._match_reward_shape:
                like = results.returns[rewards[0]] if self._match_reward_shape else leaves[groups[at].flags[0]]
                written = [_expand(window, like.shape) for window in written]
            leaves.update(zip(paths, written, strict=True))
        for path, returns in results.returns.items():
            leaves[roles.originals[path]] = leaves[path]
            leaves[path] = returns
        if len(roles.rewards) == 1:
            leaves[ORIGINAL_REWARD_PATH] = leaves[roles.originals[roles.rewards[0]]]
        return leaves


def _expand(window: Tensor, shape: torch.Size) -> Tensor:
    """What there is for every window, repeated for every reward of the window."""
    if shape[: window.ndim] != window.shape:
        raise ValueError(
            f"match_reward_shape must be False where done is per agent and the first reward key is not, got rewards "
            f"{list(shape)} and windows {list(window.shape)}"
        )
    return window[(..., *[None] * (len(shape) - window.ndim))].expand(shape).contiguous()
