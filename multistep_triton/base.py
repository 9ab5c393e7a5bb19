"""The call from frames to n-step transitions, which MultiStepTransform and MultiStep share.

Owns which entry is written where; no maths. May import ``arguments``, ``checks``, ``roles``, ``layouts``, ``frames``,
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
    """The arguments, and the call from frames to n-step transitions."""

    def _roles_in(self, entries: Container[KeyPath]) -> Roles:
        """Returns the roles for data that holds ``entries``, which decide the default mask and trajectory ids."""
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
        """Turns all frames of ``carry`` and ``data`` but the last ``n_steps`` into transitions; holds back the rest.

        Without ``hold``, it cuts windows at the last frame and returns the transitions of all frames; without a carry
        as well, entries that do not change are the tensors of ``data``.
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
        """Returns the groups of the entries, found once per layout."""
        layout, match = frames.structure.layout, self._match_reward_shape
        groups: list[Group] = layout.compute_once((roles, match), lambda: find_groups(frames, roles, match))
        return groups

    def _output_leaves(
        self, results: Results, roles: Roles, groups: Sequence[Group], windows: Sequence[Windows]
    ) -> dict[KeyPath, Tensor]:
        """Returns the leaves of the transitions by path: the outputs, the returns, and the windows of every group."""
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
    """Repeats a value of every window along the trailing dimensions of ``shape``."""
    return window[(..., *[None] * (len(shape) - window.ndim))].expand(shape).contiguous()
