"""The engine: runs a task on the backend that the caller names or that fits the leaves.

Every backend implements the same four functions: :func:`n_step_extend` of carry and data, :func:`n_step_sample` of a
storage, :func:`store_frames` into one, and :func:`gather_future`. May import ``task``, ``carry``, ``samples``,
``backends``, ``eager`` and, inside the branch that runs them, the kernels and what verifies them.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from multistep_triton import eager
from multistep_triton.backends import circumstances, resolve_backend
from multistep_triton.carry import Carry
from multistep_triton.samples import Ring, Samples
from multistep_triton.task import Leaves, Results, Task, compute_once


def n_step_extend(task: Task, carry: Carry | None, data: Leaves, backend: str = "auto") -> Results:
    """Takes ``c`` carried and ``T`` new frames; emits the ``c + T - n_steps`` oldest or, without ``hold``, all.

    Args:
        task: the parameters, with one done key at least.
        carry: the ``c`` frames that the call before held back, or None. The call may write into its free slots and
            its spare leaves.
        data: leaves ``[*B, T, ...]`` with the keys, dtypes, devices and trailing shapes of the carry's.
        backend: one of ``BACKENDS``.

    Returns:
        Results: in new memory, except that a call without ``hold`` returns the data's own leaf for an output read at
            the window's first frame. The call modifies neither the frames of ``carry`` nor ``data``.
    """
    keys, graph = task.keys, torch.is_grad_enabled() and any([leaf.requires_grad for leaf in data.values()])
    is_fake = isinstance(data[keys.done[0]], FakeTensor)
    chosen: str = keys.compute_once(
        ("backend", graph, is_fake, *circumstances(backend)),
        lambda: resolve_backend(backend, data.values(), [data[key] for key in keys.rewards]),
    )
    results: Results = implementation_of(chosen).n_step_extend(task, carry, data)
    return results


def n_step_sample(task: Task, samples: Samples, data: Leaves, backend: str = "auto") -> Results:
    """Computes n-step transitions of sampled frames; no window goes beyond the newest frame.

    Args:
        task: the parameters, with ``[C, *R]`` in place of ``[*B, T]``.
        samples: the frames to sample.
        data: leaves of the storage, ``[C, *R, ...]``; the call reads only slots that hold frames.
        backend: one of ``BACKENDS``.

    Returns:
        Results: ``[N]`` in place of ``[*B, E]``, in new memory, and no carry.

    Raises:
        IndexError: an index on the CPU points at no frame. On an accelerator the host does not wait to check: such a
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


def store_frames(data: Leaves, ring: Ring, slot: int | Tensor, backend: str = "auto") -> Tensor:
    """Stores frames in consecutive slots, from ``slot`` on; the first slot follows the last.

    Args:
        data: leaves ``[*B, T, ...]``; ``T`` is at most the number of slots or, with ``ring.ends``, less.
        ring: the storage.
        slot: the slot of the first frame; or, for the kernels alone, the number of frames ever written per
            environment, int64 on the device.
        backend: one of ``BACKENDS``.

    Returns:
        Tensor: int64 ``[T * R, dims]``, the index of every frame, time first.
    """
    chosen = _resolve(backend, ring.leaves, data.values())
    index: Tensor = implementation_of(chosen).store_frames(data, ring, slot)
    return index


def gather_future(value: Tensor, steps: Tensor, backend: str = "auto") -> Tensor:
    """Computes :func:`multistep_triton.gather_future` of windows within their rows; the kernels cut other windows."""
    future: Tensor = implementation_of(resolve_backend(backend, (value, steps))).gather_future(value, steps)
    return future


def _resolve(backend: str, data: Leaves, others: Iterable[Tensor], rewards: Sequence[Hashable] = ()) -> str:
    """Returns the backend that runs on ``data`` and ``others``; caches it for ``CachedLeaves``."""
    chosen: str = compute_once(
        data,
        ("backend", *circumstances(backend)),
        lambda: resolve_backend(backend, [*data.values(), *others], [data[key] for key in rewards]),
    )
    return chosen


def implementation_of(backend: str) -> Any:
    """Returns the module that implements a backend."""
    # torch.compile does not trace cached functions.
    return eager if backend == "reference" else _import(backend)


@functools.cache
def _import(backend: str) -> Any:
    """Imports the kernels or ``verify`` when they first run; the cache spares later calls the import statement."""
    if backend == "verify":
        from multistep_triton.debug import verify

        return verify
    from multistep_triton.kernels import launch

    return launch


def _check_indices(samples: Samples, sizes: torch.Size) -> None:
    """Checks that indices on the CPU point at frames; for an accelerator's, the host would have to wait."""
    for index, size in zip(samples.indices, (samples.live, *sizes[1:]), strict=False):
        if index.is_cpu and index.numel():
            low, high = (int(each) for each in index.aminmax())
            if low < 0 or high >= size:
                raise IndexError(f"a sampler must draw indices within 0 .. {size - 1}, got {low} .. {high}")
