"""Tasks: what a backend receives beside the frames, and what it returns. May import torch and ``carry``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multistep_triton.carry import Carry

Leaves = Mapping[Any, Tensor]
"""Tensors of the same frames, by keys that backends do not interpret."""


OWN, AT_END, AFTER_END = range(3)
"""Frames of a window to read: the first, the last, or the one after, which a row of ``Ends`` may replace."""


_MOST_FOUND = 256


class Cache:
    """An object that stays the same call after call, and caches what is computed from it."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}

    def compute_once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Returns the cached value of a key, or computes and caches it; never caches None, and empties a full cache."""
        if (found := self._found.get(key)) is None:
            found = compute()
            if len(self._found) >= _MOST_FOUND:
                self._found.clear()
            self._found[key] = found
        return found


class CachedLeaves(Cache, dict[Any, Tensor]):
    """Leaves that are the same tensors call after call, with a cache."""

    def __init__(self, leaves: Leaves) -> None:
        dict.__init__(self, leaves)
        super().__init__()


def compute_once(leaves: Leaves, key: Hashable, compute: Callable[[], Any]) -> Any:
    """Returns what ``compute`` returns; calls it once per key for ``CachedLeaves``, and every time for others."""
    return leaves.compute_once(key, compute) if isinstance(leaves, CachedLeaves) else compute()


@dataclass(frozen=True, eq=False)
class Keys(Cache):
    """The roles of the leaves of a call.

    One object describes leaves of one layout, on the same devices, call after call.
    """

    kinds: tuple[tuple[Hashable, torch.dtype, tuple[int, ...]], ...]
    """Key, dtype and features (the sizes of dimensions beyond those of frames) of every leaf."""
    done: tuple[Hashable, ...]
    """Flags, bool ``[*B, T]`` or ``[*B, T, 1]``; each of them ends trajectories."""
    rewards: tuple[Hashable, ...] = ()
    """Leaves whose n-step returns the backend computes."""
    outputs: tuple[tuple[Hashable, Hashable, int], ...] = ()
    """The key of each output, the leaf to read, and the frame to read it at: ``OWN``, ``AT_END`` or ``AFTER_END``.

    A call does not hold back a leaf that no output reads; a mask or ids that agents share may be expanded views.
    """
    mask: Hashable | None = None
    """The leaf, shaped as a flag, that is False where a frame is padding."""
    traj: Hashable | None = None
    """The leaf, shaped as a flag, of integer trajectory ids."""
    count: Hashable | None = None
    """The leaf, shaped as a flag, that holds ``Ends.count``, if observations are kept once."""
    wide_dtypes: Mapping[Hashable, torch.dtype] = field(default_factory=dict)
    """The output dtypes of leaves that the storage holds as other floating dtypes."""
    held: tuple[Hashable, ...] = field(init=False)
    """Leaves that outputs read, each once."""
    has_complex: bool = field(init=False)

    def __post_init__(self) -> None:
        """Sets ``held`` and ``has_complex``, and makes the cache."""
        object.__setattr__(self, "has_complex", any([dtype.is_complex for _, dtype, _ in self.kinds]))
        object.__setattr__(self, "_found", {})
        object.__setattr__(self, "held", tuple(dict.fromkeys([key for _, key, _ in self.outputs])))

    @property
    def flags(self) -> list[Hashable]:
        """Leaves that decide where windows end."""
        return [*self.done, *(key for key in (self.mask, self.traj, self.count) if key is not None)]

    @classmethod
    def of(cls, leaves: Leaves, dims: int, done: tuple[Hashable, ...], **others: Any) -> Keys:
        """Returns the keys of leaves whose first ``dims`` dimensions are those of frames."""
        return cls(tuple([(key, leaf.dtype, tuple(leaf.shape[dims:])) for key, leaf in leaves.items()]), done, **others)


class Task(NamedTuple):
    """The parameters of a call."""

    keys: Keys
    n_steps: int
    """Frames in a full window; if each sampled frame has its own number, the largest of them."""
    gamma: float
    """The discount per step."""
    time_dim: int
    """The position of the time dimension in ``[*B, T]``, ``len(B)``."""
    hold: bool = True
    """Whether the call holds back the last ``n_steps`` frames. If not, it cuts windows at the last frame."""


class Results(NamedTuple):
    """The result of a call that emits ``E`` frames, ``[*B, E]``, or samples ``N`` frames, ``[N]``."""

    leaves: dict[Any, Tensor]
    """The outputs, ``[*B, E, ...]``: leaves at the window's end ``e(t)``, its first frame ``t``, or ``e(t) + 1``."""
    returns: dict[Any, Tensor]
    """The n-step return ``[*B, E, *F]`` of every reward."""
    steps: Tensor
    """The frames in the window, int64 ``[*B, E]``."""
    discount: Tensor
    """``gamma ** steps``, float32 ``[*B, E]``."""
    nonterminal: Tensor
    """False where the frame is a boundary, bool ``[*B, E]``."""
    carry: Carry | None = None
    """The ``min(n_steps, c + T)`` frames held back."""
    indices: Tensor | None = None
    """The indices of the frames that the call drew, int64 ``[N, 1 + len(R)]``."""


def return_dtype(reward: Tensor) -> torch.dtype:
    """Returns the dtype of a reward's n-step return."""
    return reward.dtype if reward.is_floating_point() else torch.get_default_dtype()


def summed_dtype(reward: Tensor) -> torch.dtype:
    """Returns the dtype in which a reward is summed."""
    return torch.float64 if return_dtype(reward) == torch.float64 else torch.float32
