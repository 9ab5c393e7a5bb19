"""Tasks: which leaf is what, as every backend is told it. Imports torch only."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Task:
    """Which of the leaves of a call is what.

    A task is of leaves of one layout, and the same object call after call, by which a backend knows it again.
    """

    kinds: tuple[tuple[Hashable, torch.dtype, tuple[int, ...]], ...]
    """Key, dtype and features, which are the dimensions beyond those of frames, of every leaf."""
    done_keys: tuple[Hashable, ...]
    """Flags, bool ``[*B, T]`` or ``[*B, T, 1]``, any of which ends a trajectory."""
    reward_keys: tuple[Hashable, ...] = ()
    """Leaves whose n-step return is wanted."""
    gathered_keys: frozenset[Hashable] = frozenset()
    """Leaves that are read at the end of the window."""
    mask_key: Hashable | None = None
    """The leaf, shaped as a flag, that is False where a frame is padding."""
    traj_key: Hashable | None = None
    """The leaf, shaped as a flag, of integers that tell trajectories apart."""
    only_read: frozenset[Hashable] = frozenset()
    """Leaves that neither come out nor are held back; a mask or ids that agents share may be expanded."""

    @classmethod
    def of(
        cls,
        leaves: Mapping[Hashable, Tensor],
        dims: int,
        done_keys: Sequence[Hashable],
        *,
        reward_keys: Sequence[Hashable] = (),
        gathered_keys: Collection[Hashable] = (),
        mask_key: Hashable | None = None,
        traj_key: Hashable | None = None,
        only_read: Collection[Hashable] = (),
    ) -> Task:
        """The task of leaves such as these, whose first ``dims`` dimensions are those of frames."""
        kinds = tuple([(key, leaf.dtype, tuple(leaf.shape[dims:])) for key, leaf in leaves.items()])
        sets = frozenset(gathered_keys), frozenset(only_read)
        return cls(kinds, tuple(done_keys), tuple(reward_keys), sets[0], mask_key, traj_key, sets[1])
