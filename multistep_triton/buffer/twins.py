"""Twins: entries under "next" that also exist at the root, so that the next frame holds their values.

May import ``frames``, ``layouts``, ``roles``, ``stored`` and ``repeated``.
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


def find_pairs(roles: Roles, leaves: Leaves) -> list[KeyPath]:
    """Finds the tensors under "next" that the root has, too, in any dtype and shape, but for rewards and flags."""

    def is_pair(path: KeyPath, leaf: Any) -> bool:
        twin = leaves.get(path[1:]) if path[0] == "next" and len(path) > 1 else None
        if not isinstance(leaf, Tensor) or not isinstance(twin, Tensor) or roles.is_role(path, leaf):
            return False
        return path[1:] != INDEX and not any(path[: len(done)] == done for done in roles.dones)

    return [path for path, leaf in leaves.items() if is_pair(path, leaf)]


def find_twins(roles: Roles, leaves: Leaves) -> list[KeyPath]:
    """Finds the twins that can be kept once: pairs of one dtype and shape."""

    def are_alike(leaf: Tensor, twin: Tensor) -> bool:
        return (leaf.dtype, leaf.shape) == (twin.dtype, twin.shape)

    return [path for path in find_pairs(roles, leaves) if are_alike(leaves[path], leaves[path[1:]])]


def marks_of(roles: Roles, leaves: Leaves) -> tuple[tuple[KeyPath, ...], KeyPath | None, KeyPath | None]:
    """Finds the paths that define ends: the done flags of all groups; mask and trajectory ids, each None if absent."""
    mask, traj = (path if path in leaves else None for path in (roles.mask, roles.traj))
    return tuple([path for path, leaf in leaves.items() if roles.is_flag(path, leaf)]), mask, traj


def tensors_of(data: TensorDictBase) -> dict[KeyPath, Tensor]:
    """Returns the tensors of frames by path; it stacks lazy stacks."""
    frames = Frames.read(data)
    return {path: leaf for path, leaf in frames.leaves.items() if path not in frames.structure.objects}
