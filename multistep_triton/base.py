"""What MultiStepTransform and MultiStep share: one call from frames to n-step transitions.

Owns what is written where; no maths. May import ``arguments``, ``roles``, ``frames``, ``dispatch`` and ``agents``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from multistep_triton.agents import n_step_extend_agents
from multistep_triton.arguments import Arguments
from multistep_triton.dispatch import Extension, n_step_extend
from multistep_triton.frames import Frames, Held, KeyPath
from multistep_triton.roles import (
    ORIGINAL_REWARD_PATH,
    WINDOW_PATHS,
    Roles,
    agent_paths,
    check_entries,
    find_roles,
    original,
    with_saved,
)


class MultiStepBase(Arguments):
    """The call, with these arguments."""

    @property
    def _roles(self) -> Roles:
        return find_roles(
            self._done_key,
            self._mask_key,
            self._traj_key,
            tuple(self._reward_keys),
            tuple(self._done_keys),
            self._done_at,
        )

    def _n_step(
        self, data: TensorDictBase | Frames, carry: Held | None, *, hold: bool
    ) -> tuple[TensorDict, Held | None]:
        """The frames of ``carry`` and ``data`` whose windows are known, and those that are held back.

        Without ``hold`` windows are cut at the last frame, all frames come out, and with no carry either an entry
        that does not change is the data's own.
        """
        roles = self._checked_roles()
        frames = data if isinstance(data, Frames) else Frames.read(data, without=roles.written)
        agents = check_entries(frames, roles)
        if carry is not None:
            frames.follow(carry.structure)
        time_dim, leaves, before = len(frames.batch_size) - 1, frames.leaves, None if carry is None else carry.ring
        arguments = {**self._arguments(roles, leaves), "time_dim": time_dim, "n_steps": self._n_steps, "hold": hold}
        saved = roles.saved_in(leaves)
        if saved:
            leaves = with_saved(leaves, saved)
            if before is not None:
                before = before.with_leaves(with_saved(before.leaves, saved))
        if agents:
            keys = agent_paths(leaves, roles, frames.batch_size, agents)
            extension = n_step_extend_agents(before, leaves, agent_dims=len(agents), agent_keys=keys, **arguments)
        else:
            extension = n_step_extend(before, leaves, **arguments)

        shape = torch.Size((*frames.batch_size[:-1], extension.steps.shape[time_dim]))
        emitted = frames.build(self._output_leaves(extension, roles, agents), shape)
        held = extension.carry
        if held is None or not held.count:
            return emitted, None
        for kept in saved:
            del held.leaves[kept]
        return emitted, frames.hold(held)

    def _checked_roles(self) -> Roles:
        roles = self._roles
        if self._match_reward_shape and not roles.rewards:
            raise ValueError("match_reward_shape must be False where reward_keys is empty, got True")
        return roles

    def _arguments(self, roles: Roles, leaves: Mapping[KeyPath, Tensor]) -> dict[str, Any]:
        """What to compute with these leaves, in the words of the seam."""
        return {
            "reward_keys": roles.rewards,
            "gathered_keys": frozenset([path for path in leaves if roles.is_gathered(path)]),
            "done_key": roles.done,
            "mask_key": roles.mask if roles.mask in leaves else None,
            "traj_key": roles.traj,
            "gamma": float(self._gamma),
            "backend": self._backend,
        }

    def _output_leaves(self, extension: Extension, roles: Roles, agents: torch.Size) -> dict[KeyPath, Tensor]:
        leaves = extension.leaves
        windows = [extension.steps, extension.discount, extension.nonterminal]
        if agents or self._match_reward_shape:
            shape = extension.returns[roles.rewards[0]].shape if self._match_reward_shape else leaves[roles.done].shape
            windows = [_expand(window, shape) for window in windows]
        leaves.update(zip(WINDOW_PATHS, windows, strict=True))
        for path, returns in extension.returns.items():
            leaves[original(path)] = leaves[path]
            leaves[path] = returns
        if len(roles.rewards) == 1:
            leaves[ORIGINAL_REWARD_PATH] = leaves[original(roles.rewards[0])]
        return leaves


def _expand(window: Tensor, shape: torch.Size) -> Tensor:
    """What there is for every window, repeated for every reward of the window."""
    if shape[: window.ndim] != window.shape:
        raise ValueError(
            f"match_reward_shape must be False where done is per agent and the first reward key is not, got rewards "
            f"{list(shape)} and windows {list(window.shape)}"
        )
    return window[(..., *[None] * (len(shape) - window.ndim))].expand(shape).contiguous()
