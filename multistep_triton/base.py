"""What MultiStepTransform and MultiStep share: one call from frames to n-step transitions.

Owns what is written where; no maths. May import ``arguments``, ``checks``, ``roles``, ``layouts``, ``frames``,
``carry``, ``groups`` and ``task``.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from multistep_triton.arguments import Arguments
from multistep_triton.carry import Carry
from multistep_triton.checks import check_not_captured
from multistep_triton.frames import Frames, hold_back
from multistep_triton.groups import Group, Windows, find_groups, n_step_extend_groups
from multistep_triton.layouts import KeyPath
from multistep_triton.roles import (
    AUTO,
    DEFAULT_MASK_KEY,
    MASK_PATH,
    ORIGINAL_REWARD_PATH,
    TRAJ_PATH,
    Roles,
    check_single_steps,
    find_roles,
)
from multistep_triton.task import Results, Task


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
        roles = self._roles_in(())
        if isinstance(data, Frames):
            frames = data
        else:
            frames = Frames.read(data, without=roles.written)
            check_single_steps(frames.left_out)
        if TRAJ_PATH in frames.leaves or MASK_PATH in frames.leaves:
            roles = self._roles_in(frames.leaves)
        groups = self._groups_in(frames, roles)
        if carry is not None:
            frames.follow(carry)
        time_dim, structure = len(frames.batch_size) - 1, frames.structure
        task = Task(groups[0].keys, self._n_steps, float(self._gamma), time_dim, hold)
        results, windows = n_step_extend_groups(task, groups, carry, frames.leaves, self._backend)
        shape = results.steps.shape[: time_dim + 1]
        emitted = structure.build(self._output_leaves(results, roles, groups, windows), shape)
        held = results.carry
        return emitted, hold_back(held, structure) if held is not None and held.count else None

    def _groups_in(self, frames: Frames, roles: Roles) -> list[Group]:
        """The groups of the entries."""
        layout, match = frames.structure.layout, self._match_reward_shape
        groups: list[Group] = layout.compute_once((roles, match), lambda: find_groups(frames, roles, match))
        return groups

    def _output_leaves(
        self, results: Results, roles: Roles, groups: Sequence[Group], windows: Sequence[Windows]
    ) -> dict[KeyPath, Tensor]:
        """What comes out, by path."""
        leaves, match = results.leaves, self._match_reward_shape
        for group, of_group in zip(groups, windows, strict=True):
            for paths, reward in group.written:
                written: Sequence[Tensor] = of_group
                if match or (group.agents and not group.shared):
                    like = results.returns[reward] if match else leaves[group.flags[0]]
                    written = [_expand(window, like.shape) for window in of_group]
                leaves.update(zip(paths, written, strict=True))
        leaves.update(results.returns)
        if len(roles.rewards) == 1 and (original := roles.originals[roles.rewards[0]]) in leaves:
            leaves[ORIGINAL_REWARD_PATH] = leaves[original]
        return leaves


def _expand(window: Tensor, shape: torch.Size) -> Tensor:
    """What there is for every window, repeated for every reward of the window."""
    return window[(..., *[None] * (len(shape) - window.ndim))].expand(shape).contiguous()
