"""The reference for frames that are sampled from a storage: their windows are walked where they lie.

Owns how a window goes round the ring; the sums are those of ``reference``, which it may import, and ``task`` and
``ring``.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from multistep_triton import reference
from multistep_triton.ring import Samples
from multistep_triton.task import Task

Sampled = tuple[dict[Any, Tensor], dict[Any, Tensor], Tensor, Tensor, Tensor]
"""Leaves, returns, steps, discount and nonterminal of frames ``[N]``."""


def n_step_sample_reference(
    samples: Samples, data: Mapping[Hashable, Tensor], task: Task, *, n_steps: int, gamma: float
) -> Sampled:
    """Computes :func:`multistep_triton.dispatch.n_step_sample`."""
    if samples.indices[0].is_cpu:
        # Whoever drew an index of no frame has been told.
        return _sample_frames(samples, data, task, n_steps, gamma)
    samples, inside = frames_of(samples, next(iter(data.values())).shape)
    return blanked(_sample_frames(samples, data, task, n_steps, gamma), inside)


def _sample_frames(
    samples: Samples, data: Mapping[Hashable, Tensor], task: Task, n_steps: int, gamma: float
) -> Sampled:
    """Samples of frames that are all there.

    Windows are those of a flat stream (see ``reference``): of the whole ring or, where that is more, of the frames
    that windows may have, ``[K, N]``.
    """
    time, *others = samples.indices
    sizes = next(iter(data.values())).shape[: len(samples.indices)]
    rows, count, live = math.prod(sizes[1:]), time.shape[0], samples.live
    n_steps = min(n_steps, live)
    # One frame ahead, even if n is 1, tells where a trajectory goes on.
    ahead = min(max(n_steps, 2), live)
    whole = samples.n_steps is None and 2 * live * rows <= 3 * ahead * count
    place = _places(samples, sizes)
    walked: dict[int, Tensor] = {}
    if whole:
        stride = rows

        def stream(key: Hashable) -> Tensor:
            """The ring once round, and on until the window of its last slot ends, ``[M, *F]``."""
            leaf = data[key]
            return torch.cat((leaf[:live], leaf[: ahead - 1])).flatten(0, len(others))

        def of_samples(value: Tensor) -> Tensor:
            return reference.take(value, place)
    else:
        stride = count
        offsets = torch.arange(ahead, device=time.device).unsqueeze(1)
        walk = _turned(offsets * rows + place, live * rows).flatten()

        def stream(key: Hashable) -> Tensor:
            """What windows may have: the first frames of all, then the next ones, ``[K * N, *F]``."""
            walked[id(data[key])] = leaf = take_places(data[key], walk, sizes)
            return leaf

        def of_samples(value: Tensor) -> Tensor:
            return value[:count].clone()

    mask, traj = (None if key is None else stream(key).flatten() for key in (task.mask_key, task.traj_key))
    flags = [stream(key).flatten() for key in task.done_keys]
    if not flags:
        # Nothing but its n and the newest frame ends a window.
        frames = (live + ahead - 1) * rows if whole else ahead * count
        flags = [torch.zeros(frames, dtype=torch.bool, device=time.device)]
    inside = ~reference.find_boundaries(functools.reduce(torch.bitwise_or, flags), mask, traj, stride)
    if whole:
        for newest in (samples.newest, live + samples.newest):
            inside[newest * rows : (newest + 1) * rows] = False
    else:
        inside &= (offsets < _after(samples)).flatten()
    nonterminal = of_samples(inside)
    if samples.n_steps is not None:
        inside &= (offsets + 1 < samples.n_steps).flatten()
    rewards = [stream(key) for key in task.reward_keys]
    lengths, totals = reference.sum_windows(inside, rewards, n_steps, stride, gamma)
    lengths = of_samples(lengths)
    steps = lengths.to(torch.int64)
    returns = {
        key: of_samples(total).to(reference.return_dtype(data[key]))
        for key, total in zip(task.reward_keys, totals, strict=True)
    }
    end = _turned(torch.add(place - rows, lengths, alpha=rows), live * rows)
    leaves = {}
    for key, leaf in data.items():
        if key in task.only_read:
            continue
        if key in task.gathered_keys:
            leaves[key] = take_places(leaf, end, sizes)
        elif id(leaf) in walked:
            leaves[key] = of_samples(walked[id(leaf)])
        else:
            leaves[key] = take_places(leaf, place, sizes)
    return leaves, returns, steps, reference.discounts(steps, n_steps, gamma), nonterminal


def frames_of(samples: Samples, sizes: Sequence[int]) -> tuple[Samples, Tensor]:
    """Samples of which those of no frame are of the first one, and which ones are of a frame, bool ``[N]``."""
    inside = torch.ones_like(samples.indices[0], dtype=torch.bool)
    for index, size in zip(samples.indices, (samples.live, *sizes[1:]), strict=False):
        inside = inside & (index >= 0) & (index < size)
    return samples._replace(indices=[torch.where(inside, index, 0) for index in samples.indices]), inside


def blanked(sampled: Sampled, inside: Tensor) -> Sampled:
    """What was sampled, with 0 steps and NaN as the return where there is no frame, and zeros for all else."""
    leaves, returns, steps, discount, nonterminal = sampled

    def blank(value: Tensor, other: float) -> Tensor:
        return torch.where(inside.view(-1, *[1] * (value.ndim - 1)), value, other)

    def zero(leaf: Tensor) -> Tensor:
        # By their bytes, as torch selects among few of the dtypes.
        return blank(leaf.unsqueeze(-1).view(torch.uint8), 0).view(leaf.dtype).squeeze(-1)

    return (
        {key: zero(leaf) for key, leaf in leaves.items()},
        {key: blank(value, torch.nan) for key, value in returns.items()},
        blank(steps, 0),
        blank(discount, 1),
        inside & nonterminal,
    )


def windows_of(samples: Samples, data: Mapping[Hashable, Tensor], frames: int) -> tuple[dict[Hashable, Tensor], Tensor]:
    """Leaves ``[N, frames, *F]``: every sampled frame and those after it; and ``[N]``, how many of them there are.

    In the place of frames that have not come yet is the newest.
    """
    sizes = next(iter(data.values())).shape[: len(samples.indices)]
    rows, after = math.prod(sizes[1:]), _after(samples)
    offsets = torch.arange(frames, device=after.device).minimum(after.unsqueeze(1))
    walk = _turned(offsets * rows + _places(samples, sizes).unsqueeze(1), samples.live * rows)
    leaves = {key: take_places(leaf, walk.flatten(), sizes) for key, leaf in data.items()}
    windows = {key: leaf.view(*walk.shape, *leaf.shape[1:]) for key, leaf in leaves.items()}
    return windows, after.add(1).clamp(max=frames)


def _places(samples: Samples, sizes: torch.Size) -> Tensor:
    """Where samples lie, counted over ``sizes``."""
    place, *others = samples.indices
    for size, each in zip(sizes[1:], others, strict=True):
        place = torch.add(each, place, alpha=size)
    # No window goes round more than once.
    return place.to(reference.index_dtype(2 * math.prod(sizes)))


def _turned(places: Tensor, end: int) -> Tensor:
    """Places of which those from ``end`` on are at the beginning."""
    return torch.where(places < end, places, places - end)


def _after(samples: Samples) -> Tensor:
    """How many newer frames there are in the row of each."""
    after = samples.newest - samples.indices[0]
    return torch.where(after < 0, after + samples.live, after)


def take_places(leaf: Tensor, places: Tensor, sizes: torch.Size) -> Tensor:
    """Rows of a leaf ``[*sizes, *F]``, counted over ``sizes``, as a new ``[N, *F]``; no other row is read."""
    strides, dims = leaf.stride(), [dim for dim, size in enumerate(sizes) if size != 1]
    if all(strides[outer] == strides[inner] * sizes[inner] for outer, inner in itertools.pairwise(dims)):
        return reference.take(leaf.flatten(0, len(sizes) - 1), places)
    if signed := reference.SIGNED.get(leaf.dtype):
        return take_places(leaf.view(signed), places, sizes).view(leaf.dtype)
    return leaf[torch.unravel_index(places, sizes)]
