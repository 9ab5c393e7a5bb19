"""Twins: entries under "next" that are at the root, too, so that the next frame holds what comes after one.

May import ``frames``, ``layouts``, ``roles`` and ``repeated``.
"""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase
from torch import Tensor

from multistep_triton.buffer.repeated import INDEX
from multistep_triton.buffer.stored import Leaves
from multistep_triton.frames import Frames
from multistep_triton.layouts import KeyPath
from multistep_triton.roles import Roles


def find_twins(roles: Roles, leaves: Leaves) -> list[KeyPath]:
    """The entries under "next" that can be kept once: no rewards or flags, and alike at the root."""

    def is_twin(path: KeyPath, leaf: Any) -> bool:
        twin = leaves.get(path[1:]) if path[0] == "next" and len(path) > 1 else None
        if not isinstance(leaf, Tensor) or not isinstance(twin, Tensor) or roles.is_role(path, leaf):
            return False
        above = any(path[: len(done)] == done for done in roles.dones)
        return not above and path[1:] != INDEX and (leaf.dtype, leaf.shape) == (twin.dtype, twin.shape)

    return [path for path, leaf in leaves.items() if is_twin(path, leaf)]


def marks_of(roles: Roles, leaves: Leaves) -> tuple[tuple[KeyPath, ...], KeyPath | None, KeyPath | None]:
    """What tells ends: the done flags of all groups, and mask and trajectory ids, if there are such."""
    mask, traj = (path if path in leaves else None for path in (roles.mask, roles.traj))
    return tuple([path for path, leaf in leaves.items() if roles.is_flag(path, leaf)]), mask, traj


def tensors_of(data: TensorDictBase) -> dict[KeyPath, Tensor]:
    """The tensors of frames, by path, stacked where they are lazy."""
    frames = Frames.read(data)
    return {path: leaf for path, leaf in frames.leaves.items() if path not in frames.structure.objects}
