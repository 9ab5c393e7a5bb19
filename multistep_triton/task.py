"""Tasks: what is to be computed, which is all that travels to a backend beside the frames. May import torch only."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from multistep_triton.carry import Carry


@dataclass(frozen=True, eq=False, slots=True)
class Keys:
    """Which of the leaves of a call is what.

    Keys are of leaves of one layout, and the same object call after call, by which a backend knows them again.
    """

    kinds: tuple[tuple[Hashable, torch.dtype, tuple[int, ...]], ...]
    """Key, dtype and features, which are the dimensions beyond those of frames, of every leaf."""
    done: tuple[Hashable, ...]
    """Flags, bool ``[*B, T]`` or ``[*B, T, 1]``, any of which ends a trajectory."""
    rewards: tuple[Hashable, ...] = ()
    """Leaves whose n-step return is wanted."""
    outputs: tuple[tuple[Hashable, Hashable, bool], ...] = ()
    """What comes out: under which key, which leaf, and whether it is read at the end of the window.

    A leaf that does not come out is only read, and is not held back; a mask or ids that agents share may be expanded.
    """
    mask: Hashable | None = None
    """The leaf, shaped as a flag, that is False where a frame is padding."""
    traj: Hashable | None = None
    """The leaf, shaped as a flag, of integers that tell trajectories apart."""
    held: tuple[Hashable, ...] = field(init=False)
    """Leaves that come out, each once."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "held", tuple(dict.fromkeys([key for _, key, _ in self.outputs])))

    @property
    def flags(self) -> list[Hashable]:
        """Leaves that decide where windows end."""
        return [*self.done, *(key for key in (self.mask, self.traj) if key is not None)]

    @classmethod
    def of(cls, leaves: Mapping[Any, Tensor], dims: int, done: Sequence[Hashable], **others: Any) -> Keys:
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


class Samples(NamedTuple):
    """Frames that were sampled from a storage ``[C, *R]``, a ring of ``C`` slots."""

    indices: Sequence[Tensor]
    """Where they lie: of every dimension, time first, int64 ``[N]``, on the device of the leaves."""
    newest: int
    """The slot of the newest frame, after which comes the oldest, or nothing yet."""
    live: int
    """Slots that hold frames: all, or those up to the newest."""
    n_steps: Tensor | None = None
    """int64 ``[N]``: frames in the full window of each, if that is not one number for all."""


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


def return_dtype(reward: Tensor) -> torch.dtype:
    """That of the n-step return of a reward."""
    return reward.dtype if reward.is_floating_point() else torch.get_default_dtype()


def summed_dtype(reward: Tensor) -> torch.dtype:
    """That in which a reward is summed."""
    return torch.float64 if return_dtype(reward) == torch.float64 else torch.float32


def sampled_where_frames_are(compute: Callable[[Task, Samples, Any], Results]) -> Callable[..., Results]:
    """Of samples on an accelerator, which nobody has checked: those of no frame come out blank."""

    def n_step_sample(task: Task, samples: Samples, data: Mapping[Any, Tensor]) -> Results:
        if samples.indices[0].is_cpu:
            return compute(task, samples, data)
        there, guarded = find_there(samples, next(iter(data.values())).shape)
        return blanked(compute(task, guarded, data), there)

    n_step_sample.__doc__ = compute.__doc__
    return n_step_sample


def find_there(samples: Samples, sizes: Sequence[int]) -> tuple[Tensor, Samples]:
    """Which samples are of a frame, bool ``[N]``, and samples of which the others are of the first frame."""
    there = torch.ones_like(samples.indices[0], dtype=torch.bool)
    for index, size in zip(samples.indices, (samples.live, *sizes[1:]), strict=False):
        there = there & (index >= 0) & (index < size)
    return there, samples._replace(indices=[torch.where(there, index, 0) for index in samples.indices])


def blanked(results: Results, there: Tensor) -> Results:
    """What was sampled, with 0 steps and NaN as the return where there is no frame, and zeros for all else."""

    def blank(value: Tensor, other: float) -> Tensor:
        return torch.where(there.view(-1, *[1] * (value.ndim - 1)), value, other)

    def zero(leaf: Tensor) -> Tensor:
        # By their bytes, as torch selects among few of the dtypes.
        return blank(leaf.unsqueeze(-1).view(torch.uint8), 0).view(leaf.dtype).squeeze(-1)

    return Results(
        {key: zero(leaf) for key, leaf in results.leaves.items()},
        {key: blank(value, torch.nan) for key, value in results.returns.items()},
        blank(results.steps, 0),
        blank(results.discount, 1),
        there & results.nonterminal,
    )
