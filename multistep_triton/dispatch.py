"""The seam between the transform or the buffer and what computes: leaves in, leaves out, by whichever backend.

``n_step_extend`` takes the leaves of carry and data, and gives back those that come out and the new carry;
``n_step_sample`` those of a storage. May import ``task``, ``ring``, ``backends``, ``reference``, ``sampling``,
``verify`` and, inside the branch that runs them, the kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multistep_triton import reference, sampling, verify
from multistep_triton.backends import resolve_backend
from multistep_triton.ring import Ring, Samples
from multistep_triton.task import Task


class Extension(NamedTuple):
    """What one call of :func:`n_step_extend` yields; ``E`` frames are emitted."""

    leaves: dict[Any, Tensor]
    """Every leaf of the data, ``[*B, E, ...]``: gathered keys from frame ``e(t)``, the others from frame ``t``."""
    returns: dict[Any, Tensor]
    """The n-step return ``[*B, E, *F]`` of every reward key."""
    steps: Tensor
    """``[*B, E]``, int64."""
    discount: Tensor
    """``[*B, E]``, float32."""
    nonterminal: Tensor
    """``[*B, E]``, bool: False where the frame is a boundary."""
    carry: Ring | None
    """The ``min(n_steps, c + T)`` frames held back; None without ``hold``."""


def n_step_extend(
    carry: Ring | None,
    data: Mapping[Any, Tensor],
    task: Task,
    *,
    time_dim: int,
    n_steps: int,
    gamma: float,
    hold: bool = True,
    backend: str = "auto",
) -> Extension:
    """One step of the stream: ``c`` carried frames and ``T`` new ones in, the ``c + T - n_steps`` oldest out.

    Args:
        carry: the ``c`` frames held back by the call before, or None. Its free slots and its spare leaves may be
            written into.
        data: leaves ``[*B, T, ...]``, the same keys, dtypes, devices and trailing shapes.
        task: which leaf is what; one done key at least.

    Keyword Args:
        time_dim: the position of the time dimension, ``len(B)``.
        n_steps, gamma, backend: as for :func:`multistep_triton.n_step_return`.
        hold: whether to hold back the last ``n_steps`` frames. If not, there must be none of a call before, all ``T``
            come out, with windows cut at the last one, and a leaf that is not gathered is the data's own.

    Returns:
        :class:`Extension`, in new memory but for that case; neither the frames of ``carry`` nor ``data`` are modified.
    """
    extend: Callable[..., tuple[Any, ...]] = reference.n_step_extend_reference
    chosen = resolve_backend(backend, data.values(), [data[key] for key in task.reward_keys])
    if chosen == "triton":
        extend = _launchers().launch_n_step_extend
    elif chosen == "verify":
        extend = verify.n_step_extend_verified
    return Extension(*extend(carry, data, task, time_dim=time_dim, n_steps=n_steps, gamma=gamma, hold=hold))


def n_step_sample(
    samples: Samples,
    data: Mapping[Any, Tensor],
    task: Task,
    *,
    n_steps: int,
    gamma: float,
    backend: str = "auto",
) -> Extension:
    """n-step transitions of sampled frames; no window goes beyond the newest frame.

    Args:
        samples: the frames.
        data: leaves of the storage, ``[C, *R, ...]``; only slots that hold frames are read.
        task: which leaf is what, with ``[C, *R]`` in place of ``[*B, T]``.

    Keyword Args:
        n_steps: frames in a full window, or if ``samples`` has numbers of its own, the largest of them.
        gamma, backend: as for :func:`n_step_extend`.

    Returns:
        :class:`Extension` with ``[N]`` in place of ``[*B, E]``, in new memory, and no carry.

    Raises:
        IndexError: an index is that of no frame, on the CPU. On an accelerator the host does not wait to know: such a
            sample has 0 steps, NaN as its return, discount 1, and zeros for all else.
    """
    sample: Callable[..., tuple[Any, ...]] = sampling.n_step_sample_reference
    chosen = resolve_backend(backend, [*data.values(), *samples.indices], [data[key] for key in task.reward_keys])
    _check_indices(samples, next(iter(data.values())).shape)
    if chosen == "triton":
        sample = _launchers().launch_n_step_sample
    elif chosen == "verify":
        sample = verify.n_step_sample_verified
    leaves, returns, steps, discount, nonterminal = sample(samples, data, task, n_steps=n_steps, gamma=gamma)
    return Extension(leaves, returns, steps, discount, nonterminal, None)


@functools.cache
def _launchers() -> Any:
    """The kernels, which are imported where they run alone; an import statement takes its time in every call."""
    from multistep_triton.kernels import launch

    return launch


def _check_indices(samples: Samples, sizes: torch.Size) -> None:
    """Checks that frames lie where they were drawn, but on an accelerator, for which the host would wait."""
    for index, size in zip(samples.indices, (samples.live, *sizes[1:]), strict=False):
        if index.is_cpu and index.numel():
            low, high = (int(each) for each in index.aminmax())
            if low < 0 or high >= size:
                raise IndexError(f"a sampler must draw indices within 0 .. {size - 1}, got {low} .. {high}")
