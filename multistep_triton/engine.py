"""The engine: one task, one backend. Leaves in, leaves out, by whichever backend runs on them.

Every backend computes the same four functions: :func:`n_step_extend` of carry and data, :func:`n_step_sample` of a
storage, :func:`store_frames` into one, and :func:`gather_future`. May import ``task``, ``carry``, ``samples``,
``backends``, ``eager`` and, inside the branch that runs them, the kernels and what verifies them.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from multistep_triton import eager
from multistep_triton.backends import circumstances, resolve_backend
from multistep_triton.carry import Carry
from multistep_triton.ends import Ends
from multistep_triton.samples import Samples
from multistep_triton.task import Leaves, Results, Task, compute_once


def n_step_extend(task: Task, carry: Carry | None, data: Leaves, backend: str = "auto") -> Results:
    """One step of the stream: ``c`` carried frames and ``T`` new ones in, the ``c + T - n_steps`` oldest out.

    Args:
        task: what is to be computed; one done key at least.
        carry: the ``c`` frames held back by the call before, or None. Its free slots and its spare leaves may be
            written into.
        data: leaves ``[*B, T, ...]``, the same keys, dtypes, devices and trailing shapes.
        backend: one of ``BACKENDS``.

    Returns:
        Results: in new memory, but an output of a call that does not hold back, and is not read at the window's end,
            is the data's own. Neither the frames of ``carry`` nor ``data`` are modified.
    """
    keys, graph = task.keys, torch.is_grad_enabled() and any([leaf.requires_grad for leaf in data.values()])
    chosen: str = keys.compute_once(
        ("backend", graph, *circumstances(backend)),
        lambda: resolve_backend(backend, data.values(), [data[key] for key in keys.rewards]),
    )
    results: Results = implementation_of(chosen).n_step_extend(task, carry, data)
    return results


def n_step_sample(task: Task, samples: Samples, data: Leaves, backend: str = "auto") -> Results:
    """n-step transitions of sampled frames; no window goes beyond the newest frame.

    Args:
        task: what is to be computed, with ``[C, *R]`` in place of ``[*B, T]``.
        samples: the frames.
        data: leaves of the storage, ``[C, *R, ...]``; only slots that hold frames are read.
        backend: one of ``BACKENDS``.

    Returns:
        Results: ``[N]`` in place of ``[*B, E]``, in new memory, and no carry.

    Raises:
        IndexError: an index is that of no frame, on the CPU. On an accelerator the host does not wait to know: such a
            sample has 0 steps, NaN as its return, discount 1, and zeros for all else.
    """
    chosen = _resolve(backend, data, samples.indices, task.keys.rewards)
    if samples.sizes is None:
        _check_indices(samples, next(iter(data.values())).shape)
    drawn = samples.sizes is not None
    if chosen != "triton":
        samples = samples.read().found()
    results: Results = implementation_of(chosen).n_step_sample(task, samples, data)
    if drawn and results.indices is None:
        results = results._replace(indices=torch.stack([*samples.indices], -1))
    return results


def store_frames(
    data: Leaves,
    ring: Leaves,
    numbers: Tensor | None,
    dims: int,
    time_dim: int,
    slot: int | Tensor,
    backend: str = "auto",
    ends: Ends | None = None,
) -> Tensor:
    """Stores frames in slots one after the other, from one on, beginning anew after the last.

    Args:
        data: leaves ``[*B, T, ...]`` of at most as many frames as there are slots or, with ends, fewer.
        ring: leaves of a storage ``[C, *R, ...]`` that lie in order in memory, the same keys, dtypes and devices but
            for those of which ends have rows.
        numbers: int64 ``[C, *R]``, an entry of the storage that holds every frame's slot; or None.
        dims: dimensions of ``[C, *R]``; those of the data are the same, with the first one and time exchanged.
        time_dim: the position of the time dimension in ``[*B, T]``.
        slot: of the first frame; or int64 on the device, how many frames of an environment were ever written, for the
            kernels alone.
        backend: one of ``BACKENDS``.
        ends: those of a storage that keeps observations once; a frame lies in the slot before.

    Returns:
        Tensor: int64 ``[T * R, dims]``, where every frame lies, time first.
    """
    chosen = _resolve(backend, ring, data.values())
    index: Tensor = implementation_of(chosen).store_frames(data, ring, numbers, dims, time_dim, slot, ends)
    return index


def check_kept_once(ends: Ends, data: Leaves, ended: Tensor) -> None:
    """For ``"verify"``: checks that frames hold what came after the ones before, unless these have ended.

    Args:
        ends: those of the storage, as of before.
        data: leaves of the frames, ``[T, *R, ...]``.
        ended: what :meth:`Ends.find_ended` found.

    Raises:
        EquivalenceError: a frame does not.
    """
    implementation_of("verify").check_kept_once(ends, data, ended)


def gather_future(value: Tensor, steps: Tensor, backend: str = "auto") -> Tensor:
    """:func:`multistep_triton.gather_future` of windows that lie within their rows; the kernels cut others."""
    future: Tensor = implementation_of(resolve_backend(backend, (value, steps))).gather_future(value, steps)
    return future


def _resolve(backend: str, data: Leaves, others: Iterable[Tensor], rewards: Sequence[Hashable] = ()) -> str:
    """The backend that runs on leaves and others on their device; looked for once of leaves that are known."""
    chosen: str = compute_once(
        data,
        ("backend", *circumstances(backend)),
        lambda: resolve_backend(backend, [*data.values(), *others], [data[key] for key in rewards]),
    )
    return chosen


def implementation_of(backend: str) -> Any:
    """The module that computes what a backend does."""
    # The compiler does not look into caches.
    return eager if backend == "reference" else _import(backend)


@functools.cache
def _import(backend: str) -> Any:
    """The kernels or what verifies, which are imported where they run alone; an import takes its time in every call."""
    if backend == "verify":
        from multistep_triton.debug import verify

        return verify
    from multistep_triton.kernels import launch

    return launch


def _check_indices(samples: Samples, sizes: torch.Size) -> None:
    """Checks that frames lie where they were drawn, but on an accelerator, for which the host would wait."""
    for index, size in zip(samples.indices, (samples.live, *sizes[1:]), strict=False):
        if index.is_cpu and index.numel():
            low, high = (int(each) for each in index.aminmax())
            if low < 0 or high >= size:
                raise IndexError(f"a sampler must draw indices within 0 .. {size - 1}, got {low} .. {high}")
