"""Tasks: what is to be computed, which is all that travels to a backend beside the frames. May import torch only."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from multistep_triton.carry import Carry

Leaves = Mapping[Any, Tensor]
"""Tensors of the same frames, by keys that mean nothing to what computes."""


OWN, AT_END, AFTER_END = range(3)
"""Of a window, its first frame, its last, and the one after that, for which another row may stand; see ``Ends``."""


_MOST_FOUND = 256


class Cache:
    """What is the same call after call, of which is kept what was found out."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}

    def compute_once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What is found out under a key, once, unless that is None, or much else was found out since."""
        if (found := self._found.get(key)) is None:
            found = compute()
            if len(self._found) >= _MOST_FOUND:
                self._found.clear()
            self._found[key] = found
        return found


class CachedLeaves(Cache, dict[Any, Tensor]):
    """Leaves that are the same tensors call after call."""

    def __init__(self, leaves: Leaves) -> None:
        dict.__init__(self, leaves)
        super().__init__()


def compute_once(leaves: Leaves, key: Hashable, compute: Callable[[], Any]) -> Any:
    """What is found out about leaves: of those that are known, once."""
    return leaves.compute_once(key, compute) if isinstance(leaves, CachedLeaves) else compute()


@dataclass(frozen=True, eq=False)
class Keys(Cache):
    """Which of the leaves of a call is what.

    Keys are of leaves of one layout, on the same devices, and the same object call after call.
    """

    kinds: tuple[tuple[Hashable, torch.dtype, tuple[int, ...]], ...]
    """Key, dtype and features, which are the dimensions beyond those of frames, of every leaf."""
    done: tuple[Hashable, ...]
    """Flags, bool ``[*B, T]`` or ``[*B, T, 1]``, any of which ends a trajectory."""
    rewards: tuple[Hashable, ...] = ()
    """Leaves whose n-step return is wanted."""
    outputs: tuple[tuple[Hashable, Hashable, int], ...] = ()
    """What comes out: under which key, which leaf, and where it is read: ``OWN``, ``AT_END`` or ``AFTER_END``.

    A leaf that does not come out is only read, and is not held back; a mask or ids that agents share may be expanded.
    """
    mask: Hashable | None = None
    """The leaf, shaped as a flag, that is False where a frame is padding."""
    traj: Hashable | None = None
    """The leaf, shaped as a flag, of integers that tell trajectories apart."""
    count: Hashable | None = None
    """The leaf, shaped as a flag, that is ``Ends.count``, if observations are kept once."""
    wide_dtypes: Mapping[Hashable, torch.dtype] = field(default_factory=dict)
    """The floating dtypes that leaves come out as, of those that are stored as others."""
    held: tuple[Hashable, ...] = field(init=False)
    """Leaves that come out, each once."""
    has_complex: bool = field(init=False)

    def __post_init__(self) -> None:
        """Finds them."""
        object.__setattr__(self, "has_complex", any([dtype.is_complex for _, dtype, _ in self.kinds]))
        object.__setattr__(self, "_found", {})
        object.__setattr__(self, "held", tuple(dict.fromkeys([key for _, key, _ in self.outputs])))

    @property
    def flags(self) -> list[Hashable]:
        """Leaves that decide where windows end."""
        return [*self.done, *(key for key in (self.mask, self.traj, self.count) if key is not None)]

    @classmethod
    def of(cls, leaves: Leaves, dims: int, done: tuple[Hashable, ...], **others: Any) -> Keys:
        """Keys of leaves such as these, whose first ``dims`` dimensions are those of frames."""
        return cls(tuple([(key, leaf.dtype, tuple(leaf.shape[dims:])) for key, leaf in leaves.items()]), done, **others)


class Task(NamedTuple):
    """What is to be computed."""

    keys: Keys
    n_steps: int
    """Frames in a full window; where sampled frames have numbers of their own, the largest."""
    gamma: float
    """Discount per step."""
    time_dim: int
    """The position of the time dimension in ``[*B, T]``, ``len(B)``."""
    hold: bool = True
    """Whether the last ``n_steps`` frames are held back. If not, windows are cut at the last frame."""


class Results(NamedTuple):
    """What comes of a call: ``E`` frames ``[*B, E]``, or of ``N`` samples ``[N]``."""

    leaves: dict[Any, Tensor]
    """The outputs of the keys, ``[*B, E, ...]``: from frame ``e(t)`` or from frame ``t``."""
    returns: dict[Any, Tensor]
    """The n-step return ``[*B, E, *F]`` of every reward."""
    steps: Tensor
    """``[*B, E]``, int64."""
    discount: Tensor
    """``[*B, E]``, float32: ``gamma ** steps``."""
    nonterminal: Tensor
    """``[*B, E]``, bool: False where the frame is a boundary."""
    carry: Carry | None = None
    """The ``min(n_steps, c + T)`` frames held back."""
    indices: Tensor | None = None
    """int64 ``[N, 1 + len(R)]``: where frames lie that were drawn."""


def return_dtype(reward: Tensor) -> torch.dtype:
    """That of the n-step return of a reward."""
    return reward.dtype if reward.is_floating_point() else torch.get_default_dtype()


def summed_dtype(reward: Tensor) -> torch.dtype:
    """That in which a reward is summed."""
    return torch.float64 if return_dtype(reward) == torch.float64 else torch.float32
