"""n-step transitions of sampled frames: the windows are walked in the storage, from where each frame lies.

``n_step_sample`` is the seam between a replay buffer and what computes; ``n_step_sample_reference`` does it in eager
PyTorch, which defines what is correct. May import ``reference``, ``backends`` and, where they run, the kernels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multistep_triton import reference, verify
from multistep_triton.backends import resolve_backend
from multistep_triton.functional import Extension


class Samples(NamedTuple):
    """Frames that were sampled from a ring of ``capacity`` slots, in which time is the first dimension."""

    index: Sequence[Tensor]
    """Where they lie: of every dimension, time first, int64 ``[N]``, on the device of the leaves."""
    newest: int
    """The slot of the newest frame, after which comes the oldest, or nothing yet."""
    live: int
    """Slots that hold frames: all, or those up to the newest."""
    n_steps: Tensor | None = None
    """int64 ``[N]``: frames in the full window of each, if that is not one number for all."""


def n_step_sample(
    samples: Samples,
    data: Mapping[Any, Tensor],
    *,
    reward_keys: Collection[Hashable],
    gathered_keys: Collection[Hashable],
    done_key: Hashable,
    mask_key: Hashable | None,
    traj_key: Hashable | None,
    n_steps: int,
    gamma: float,
    backend: str = "auto",
) -> Extension:
    """n-step transitions of sampled frames; no window goes beyond the newest frame.

    Args:
        samples: the frames.
        data: leaves of the storage, ``[C, *R, ...]``; only slots that hold frames are read.

    Keyword Args:
        n_steps: frames in a full window, or if ``samples`` has numbers of its own, the largest of them.
        reward_keys, gathered_keys, done_key, mask_key, traj_key, gamma, backend: as for
            :func:`multistep_triton.functional.n_step_extend`, with ``[C, *R]`` in place of ``[*B, T]``.

    Returns:
        :class:`Extension` with ``[N]`` in place of ``[*B, E]``, in new memory, and no carry.
    """
    sample: Callable[..., tuple[Any, ...]] = n_step_sample_reference
    chosen = resolve_backend(backend, [*data.values(), *samples.index], [data[key] for key in reward_keys])
    if chosen == "triton":
        from multistep_triton.kernels.extend import launch_n_step_sample as sample
    elif chosen == "verify":
        sample = verify.n_step_sample_verified
    computed = sample(
        samples,
        data,
        reward_keys=reward_keys,
        gathered_keys=gathered_keys,
        done_key=done_key,
        mask_key=mask_key,
        traj_key=traj_key,
        n_steps=n_steps,
        gamma=gamma,
    )
    return Extension(*computed, None)


def n_step_sample_reference(
    samples: Samples,
    data: Mapping[Hashable, Tensor],
    *,
    reward_keys: Collection[Hashable],
    gathered_keys: Collection[Hashable],
    done_key: Hashable,
    mask_key: Hashable | None,
    traj_key: Hashable | None,
    n_steps: int,
    gamma: float,
) -> tuple[dict[Hashable, Tensor], dict[Hashable, Tensor], Tensor, Tensor, Tensor]:
    """Computes :func:`n_step_sample`.

    Windows are those of a flat stream (see ``reference``): of the whole ring or, where that is more, of the frames
    that windows may have, ``[K, N]``.
    """
    time, *_ = index = samples.index
    sizes = data[done_key].shape[: len(index)]
    rows, count, live = math.prod(sizes[1:]), time.shape[0], samples.live
    n_steps = min(n_steps, live)
    # One frame ahead, even if n is 1, tells where a trajectory goes on.
    ahead = min(max(n_steps, 2), live)
    place = time
    for size, each in zip(sizes[1:], index[1:], strict=True):
        place = torch.add(each, place, alpha=size)

    def wrapped(places: Tensor) -> Tensor:
        return torch.where(places < live * rows, places, places - live * rows)

    whole = samples.n_steps is None and live <= -(-ahead * count // max(rows, 1))
    if whole:
        stride = rows

        def stream(key: Hashable) -> Tensor:
            """The ring once round, and on until the window of its last slot ends, ``[M, *F]``."""
            leaf = data[key]
            return torch.cat((leaf[:live], leaf[: ahead - 1])).flatten(0, len(index) - 1)

        def of_samples(value: Tensor) -> Tensor:
            return reference.take(value, place)
    else:
        stride = count
        walk = wrapped(torch.arange(ahead, device=time.device).unsqueeze(1) * rows + place).flatten()

        def stream(key: Hashable) -> Tensor:
            """What windows may have, the first frames of all, then the next ones, ``[K * N, *F]``."""
            return take_places(data[key], walk, sizes)

        def of_samples(value: Tensor) -> Tensor:
            return value[:count].clone()

    mask, traj = (None if key is None else stream(key).flatten() for key in (mask_key, traj_key))
    inside = ~reference.find_boundaries(stream(done_key).flatten(), mask, traj, stride)
    if whole:
        for newest in (samples.newest, live + samples.newest):
            inside[newest * rows : (newest + 1) * rows] = False
    else:
        after = samples.newest - time
        after = torch.where(after < 0, after + live, after)
        goes_on = torch.arange(ahead, device=time.device).unsqueeze(1)
        inside = inside.view(ahead, count) & (goes_on < after)
    nonterminal = of_samples(inside.flatten())
    if samples.n_steps is not None:
        inside = inside & (goes_on + 1 < samples.n_steps)
    rewards = [stream(key) for key in reward_keys]
    lengths, totals = reference.sum_windows(inside.flatten(), rewards, n_steps, stride, gamma)
    steps = of_samples(lengths).to(torch.int64)
    returns = {
        key: of_samples(total).to(reference.return_dtype(data[key]))
        for key, total in zip(reward_keys, totals, strict=True)
    }
    end = wrapped(torch.add(place - rows, steps, alpha=rows))
    leaves = {key: take_places(leaf, end if key in gathered_keys else place, sizes) for key, leaf in data.items()}
    return leaves, returns, steps, reference.discounts(steps, n_steps, gamma), nonterminal


def take_places(leaf: Tensor, places: Tensor, sizes: torch.Size) -> Tensor:
    """Rows of a leaf ``[*sizes, *F]``, counted over ``sizes``, as a new ``[N, *F]``; no other row is read."""
    strides, dims = leaf.stride(), [dim for dim, size in enumerate(sizes) if size != 1]
    if all(strides[outer] == strides[inner] * sizes[inner] for outer, inner in itertools.pairwise(dims)):
        return reference.take(leaf.flatten(0, len(sizes) - 1), places)
    if signed := reference.SIGNED.get(leaf.dtype):
        return take_places(leaf.view(signed), places, sizes).view(leaf.dtype)
    return leaf[torch.unravel_index(places, sizes)]
