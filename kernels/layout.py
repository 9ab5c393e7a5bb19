"""Lays out leaves for the kernels, which count the rows of memory ``[outer, T, inner, *F]``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from multistep_triton.task import Keys


def lie_in_order(leaves: Collection[Tensor], has_complex: bool) -> bool:
    """Whether all leaves are contiguous, with no negation or conjugation that torch has yet to carry out."""
    in_order = all(map(Tensor.is_contiguous, leaves)) and not any(map(Tensor.is_neg, leaves))
    return in_order and not (has_complex and any(map(Tensor.is_conj, leaves)))


def lie_alike(
    data: Mapping[Hashable, Tensor], dims: int, time_dim: int, keys: Keys
) -> tuple[Mapping[Hashable, Tensor], int, int]:
    """Brings leaves into one memory order, ``[outer, T, inner, *F]``; copies those that lie in another.

    Returns:
        The leaves, ``inner``, and over how many inner environments (agents) masks, ids and counts are expanded.
    """
    sizes = next(iter(data.values())).shape[:dims]
    if lie_in_order(data.values(), keys.has_complex):
        return data, math.prod(sizes[time_dim + 1 :]), 1
    data = {key: leaf.resolve_neg().resolve_conj() for key, leaf in data.items()}
    most = max(data.values(), key=Tensor.numel)
    # Of a storage, which may be partly filled, slots lie outermost.
    places = range(dims if time_dim else 1)
    at = next((dim for dim in places if most.movedim(time_dim, dim).is_contiguous()), time_dim)
    inner = [dim for dim in range(dims) if dim != time_dim][at:]
    marks = [key for key in (keys.mask, keys.traj, keys.count) if key is not None]
    # Either all marks have one row for so many environments, or each mark has one for every environment.
    sharing = {_count_sharing(data[key], inner, time_dim, at) if key not in keys.held else 1 for key in marks}
    agents = sharing.pop() if len(sharing) == 1 else 1
    for key, leaf in data.items():
        if not leaf.movedim(time_dim, at).is_contiguous() and (agents == 1 or key not in marks):
            leaf = leaf.movedim(time_dim, at).clone(memory_format=torch.contiguous_format)
            data[key] = leaf.movedim(at, time_dim)
    return data, math.prod([sizes[dim] for dim in inner]), agents


def _count_sharing(mark: Tensor, inner: Sequence[int], time_dim: int, at: int) -> int:
    """Returns over how many innermost environments a mark is expanded; 1 if its other dimensions lie out of order."""
    shared = list(itertools.takewhile(lambda dim: mark.shape[dim] == 1 or not mark.stride(dim), reversed(inner)))
    each = mark[tuple([0 if dim in shared else slice(None) for dim in range(mark.ndim)])]
    alone = each.movedim(time_dim - sum(dim < time_dim for dim in shared), at).is_contiguous()
    return math.prod([mark.shape[dim] for dim in shared]) if alone else 1
