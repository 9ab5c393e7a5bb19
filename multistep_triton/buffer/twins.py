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


def find_twins(roles: Roles, leaves: Leaves) -> list[KeyPath]:
    """Finds the twins that can be kept once: neither rewards nor flags, of the dtype and shape of the root's entry."""

    def is_twin(path: KeyPath, leaf: Any) -> bool:
        twin = leaves.get(path[1:]) if path[0] == "next" and len(path) > 1 else None
        if not isinstance(leaf, Tensor) or not isinstance(twin, Tensor) or roles.is_role(path, leaf):
            return False
        above = any(path[: len(done)] == done for done in roles.dones)
        return not above and path[1:] != INDEX and (leaf.dtype, leaf.shape) == (twin.dtype, twin.shape)

    return [path for path, leaf in leaves.items() if is_twin(path, leaf)]


def marks_of(roles: Roles, leaves: Leaves) -> tuple[tuple[KeyPath, ...], KeyPath | None, KeyPath | None]:
    """Finds the paths that define ends: the done flags of all groups; mask and trajectory ids, each None if absent."""
    mask, traj = (path if path in leaves else None for path in (roles.mask, roles.traj))
    return tuple([path for path, leaf in leaves.items() if roles.is_flag(path, leaf)]), mask, traj


def tensors_of(data: TensorDictBase) -> dict[KeyPath, Tensor]:
    """Returns the tensors of frames by path; it stacks lazy stacks."""
    frames = Frames.read(data)
    return {path: leaf for path, leaf in frames.leaves.items() if path not in frames.structure.objects}
