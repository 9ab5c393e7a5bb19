"""Sampling: computes the windows of frames that were sampled from a ring, in two launches.

A caller that samples the same leaves again and again passes them as :class:`multistep_triton.task.CachedLeaves`: the
arguments of launches that depend on the leaves and the batch size are then computed once.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multistep_triton.ends import Ends
from multistep_triton.kernels import windows
from multistep_triton.kernels.layout import lie_alike, lie_in_order
from multistep_triton.kernels.plan import Plan, copy_rows, find_plan, powers, roles_of, tile_of, widened
from multistep_triton.kernels.run import ALIGNMENT, aligned, check_fits, on, run
from multistep_triton.samples import Samples
from multistep_triton.task import AFTER_END, Leaves, Results, Task, compute_once


class _Prepared(NamedTuple):
    """The arguments of launches that leaves, n and the number of samples determine, whichever frames are sampled."""

    plan: Plan
    roles: tuple[Any, ...]
    sources: tuple[Tensor, ...]
    """The leaves of the storage whose rows are copied."""
    kept: tuple[Tensor, ...]
    """The same leaves, with the rows of final observations in place of entries kept once."""
    count_leaf: Tensor | None
    outs: list[Tensor]
    returns: list[tuple[Hashable, Tensor]]
    rest: list[Tensor]
    """Expanded elements for ``empty_like``, as in ``outs``: steps, discount, nonterminal, lists of rows, index."""
    sizes: tuple[int, ...]
    """The number of environments, and how many of them, the agents, share a mark."""
    others: tuple[int, ...]
    """The sizes of the storage's dimensions after the first two."""
    kind: tuple[Any, ...]
    programs: int
    tile: int
    inner: int


def n_step_sample(task: Task, samples: Samples, data: Leaves) -> Results:
    """Computes :func:`multistep_triton.engine.n_step_sample`."""
    indices, newest, live, own, sizes, _, written, ends = samples
    count, drawn, dims, longest = indices[0].shape[0], sizes is not None, len(sizes or indices), min(task.n_steps, live)
    # Leaves that do not lie in order are copied in every call, so that nothing of the copies may be cached.
    as_it_lies = (
        compute_once(data, "in order", lambda: lie_in_order(data.values(), task.keys.has_complex))
        and not windows.INTERPRETED
    )
    known, of = data if as_it_lies else {}, (dims, count, longest, drawn)
    kept = task.keys, torch.get_default_dtype(), of
    ready = compute_once(known, ("sample", *kept), lambda: _prepare(task, data, ends, *of))
    plan, roles, sources, of_ends, count_leaf, out_likes, likes, rest, (envs, agents), others, *launch = ready
    (*flags, rewards), (kind, programs, tile, inner) = roles, launch
    end_slots = 0 if ends is None else ends.slots
    outs = [*map(torch.empty_like, out_likes)]
    leaves = plan.blank.copy()
    leaves.update(zip(plan.outs, outs, strict=True))
    returns = {key: torch.empty_like(like) for key, like in likes}
    steps, discount, nonterminal, lists = [torch.empty_like(like) for like in rest[:4]]
    index = torch.empty_like(rest[4]) if drawn else None
    results = Results(leaves, returns, steps, discount, nonterminal, indices=index)
    if not count:
        return results
    summed = returns
    if windows.INTERPRETED:
        summed = {key: widened(each) for key, each in returns.items()}
    indices = tuple([aligned(dim.contiguous()) for dim in indices])
    limits = () if own is None else (aligned(own.contiguous()),)
    most = min(task.n_steps, 1 << longest.bit_length())
    with on(steps.device):
        run(
            *(plan.compiled, windows.n_step_windows_kernel, (kind, len(limits), others, written is None), programs),
            *(*flags, rewards, tuple(summed.values()), indices, limits, others, index, written),
            count_leaf,
            *(steps, discount, nonterminal, lists, powers(task.gamma, most, steps.device)),
            *(envs, agents, 0, live, count, 0, longest, 1, 1, end_slots),
            *(0, 1, 1, (newest + 1) % live, live, inner),
            *(plan.elements, *kind, tile),
        )
        if sources:
            jobs = sources, of_ends, tuple(outs[: len(sources)]), sources
            copy_rows(plan, jobs, False, lists, count, 0, (end_slots + 1) * envs, 0, 0)
    if windows.INTERPRETED:
        returns.update({key: each.to(returns[key].dtype) for key, each in summed.items()})
        leaves.update(
            (out, leaves[out].to(task.keys.wide_dtypes[key]))
            for out, key, _ in task.keys.outputs
            if key in task.keys.wide_dtypes
        )
    return results


def _prepare(
    task: Task, data: Leaves, ends: Ends | None, dims: int, count: int, longest: int, drawn: bool
) -> _Prepared:
    keys = task.keys
    data, inner, agents = lie_alike(data, dims, 0, keys)
    first = next(iter(data.values()))
    lead, device = first.shape[1:dims], first.device
    after = {} if ends is None else {key: ends.rows[key] for _, key, at in keys.outputs if at == AFTER_END}
    addresses = tuple([(leaf.data_ptr() | after.get(key, leaf).data_ptr()) % ALIGNMENT for key, leaf in data.items()])
    plan = find_plan(keys, addresses)
    units = len(plan.units)
    levels, piece, _ = windows.shape_blocks(longest, count, True)
    tile = tile_of(longest, piece, (keys.mask, keys.traj, keys.count) != (None, None, None))
    where = 1 < inner < lead.numel(), True, agents > 1
    check_fits(max(count, lead.numel() * max(first.shape[0], 0 if ends is None else ends.slots + 1)), 0)

    def like(features: tuple[int, ...], dtype: torch.dtype, rows: int = count) -> Tensor:
        return torch.empty(1, dtype=dtype, device=device).expand(rows, *features)

    return _Prepared(
        plan,
        roles_of(keys, data, data),
        plan.take(data)[:units],
        plan.take({**data, **after})[:units],
        None if keys.count is None else data[keys.count],
        [like(*kind) for kind in plan.kinds],
        [(reward, like(features, dtype)) for reward, features, dtype in plan.returns],
        [
            *(like((), dtype) for dtype in (torch.int64, torch.float32, torch.bool)),
            like((), torch.int32, (2 if keys.count is None else 3) * count if plan.outs else 0),
            like((dims,), torch.int64),
        ],
        (lead.numel(), agents),
        tuple(lead[1:]),
        (levels, piece, longest > 1 << piece, False, True, drawn, dims, where, bool(plan.outs)),
        -(-(count << levels) // tile),
        tile,
        inner,
    )
