"""Launchers: make the arguments of a call's two launches from its tensors, and allocate the memory of its results."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from multistep_triton.carry import Carry, next_carry
from multistep_triton.kernels import rows, windows
from multistep_triton.kernels.layout import lie_alike
from multistep_triton.kernels.plan import Plan, copy_rows, find_plan, powers, roles_of, tile_of, widened
from multistep_triton.kernels.run import ALIGNMENT, aligned, check_fits, on, run
from multistep_triton.kernels.sample import n_step_sample as n_step_sample
from multistep_triton.kernels.store import store_frames as store_frames
from multistep_triton.task import Keys, Leaves, Results, Task


def n_step_extend(task: Task, carry: Carry | None, data: Leaves) -> Results:
    """Computes :func:`multistep_triton.engine.n_step_extend`."""
    keys, n_steps, gamma, time_dim, hold = task
    done = data[keys.done[0]]
    *lead, new = done.shape[: time_dim + 1]
    carried, envs, device = carry.count if carry else 0, math.prod(lead), done.device
    known = carried + new
    if carry and not carry.time_first and not all(map(Tensor.is_contiguous, carry.leaves.values())):
        # Another backend, or a call of other groups, has made it.
        carry = carry.view({key: leaf.contiguous() for key, leaf in carry.leaves.items()}, carry.free)
    if carry and any([address % ALIGNMENT for address in map(Tensor.data_ptr, carry.leaves.values())]):
        carry = carry.clone()
    held, stay = next_carry(carry, data, keys.held, new, n_steps, time_dim) if hold else (None, 0)
    emitted = known - (held.count if held else 0)
    # The second launch moves only held frames that do not lie in the new carry's slots already.
    count, moved = envs * emitted, known - emitted - stay
    held_rows = envs * moved
    carry_ring, (held_first, held_slots, held_inner) = _ring(carry, envs), _ring(held, envs)
    check_fits(max(count, envs * max(known, carry_ring[1], held_slots)), 0)
    given, (data, inner, agents) = data, lie_alike(data, time_dim + 1, time_dim, keys)
    addresses = tuple([leaf.data_ptr() % ALIGNMENT for leaf in data.values()])
    plan = find_plan(keys, addresses, held is not None)
    # In mid-stream a call emits as many frames as come in, and torch.empty_like is the cheapest allocation.
    alike = emitted == new and inner == 1
    copied = plan.take(data)
    outs, returns, windows_of = _allocate(plan, data, copied, (*lead, emitted), device, alike)
    leaves = plan.blank.copy() if held else {out: given[key] for out, key, _ in keys.outputs}
    leaves.update(zip(plan.outs, outs, strict=True))
    results = Results(leaves, returns, *windows_of, held)
    if not count and not held_rows:
        return results
    olds = carry.leaves if carry else data
    *flags, rewards = roles_of(keys, data, olds)
    summed = returns
    if windows.INTERPRETED:
        summed = {key: widened(each) for key, each in returns.items()}
    # A call that emits no window only lists the rows to hold back.
    longest = min(n_steps, known) if emitted else 1
    levels, piece, blocks = windows.shape_blocks(longest, emitted, False)
    tile = tile_of(longest, piece, bool(flags[1] or flags[2]))
    lists = torch.empty(2 * count + held_rows if outs else 0, dtype=torch.int32, device=device)
    where = 1 < inner < envs, False, agents > 1
    kind = levels, piece, longest > 1 << piece, inner > 1, False, False, 1, where, bool(outs)
    programs = -(-max((envs * blocks) << levels, held_rows) // tile)
    with on(device):
        run(
            *(plan.compiled, windows.n_step_windows_kernel, kind, programs),
            *(*flags, rewards, tuple(summed.values()), (), (), (), None, None, None),
            *(*windows_of, lists, powers(gamma, min(n_steps, 1 << longest.bit_length()), device)),
            *(envs, agents, carried, known, emitted, held_rows, longest, blocks, held_inner, 0),
            *(*carry_ring, 0, max(new, 1), inner),
            *(plan.elements, *kind, tile),
        )
        if units := len(plan.units):
            slot = (held_first + (held.count - moved if held else 0)) % held_slots
            jobs = [each[:units] for each in (copied, plan.take(olds), tuple(outs))]
            jobs.append(plan.take(held.leaves)[:units] if held else jobs[0])
            ring = slot * held_inner, held_slots * envs
            copy_rows(plan, jobs, True, lists, count, held_rows, carry_ring[1] * envs, *ring)
    if windows.INTERPRETED:
        returns.update({key: each.to(returns[key].dtype) for key, each in summed.items()})
    return results


@functools.lru_cache(maxsize=64)
def _gather_plan(dtype: torch.dtype, features: tuple[int, ...], device: torch.device) -> Plan:
    return find_plan(Keys(((0, dtype, features),), (), outputs=((0, 0, False),)), (0,))


def gather_future(value: Tensor, steps: Tensor) -> Tensor:
    """Computes :func:`multistep_triton.gather_future`; the kernel cuts windows at the end of their ``[*B, T]`` row."""
    value, steps = (aligned(each.resolve_neg().resolve_conj().contiguous()) for each in (value, steps))
    gathered, count = torch.empty_like(value), steps.numel()
    check_fits(count, 0)
    ends = torch.empty(count, dtype=torch.int32, device=value.device)
    plan = _gather_plan(value.dtype, tuple(value.shape[steps.ndim :]), value.device)
    if count and plan.units:
        jobs = [(each,) for each in (value, value, gathered, gathered)]
        arguments = steps, ends, count, steps.shape[-1], rows.TILE
        with on(value.device):
            run(plan.compiled, rows.future_rows_kernel, (), -(-count // rows.TILE), *arguments)
            copy_rows(plan, jobs, True, ends, count, 0, 0, 0, 0)
    return gathered


def _allocate(
    plan: Plan,
    data: Leaves,
    copied: tuple[Tensor, ...],
    shape: tuple[int, ...],
    device: torch.device,
    alike: bool,
) -> tuple[list[Tensor], dict[Any, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Allocates outputs for the leaves ``copied``, returns and windows, of ``shape``; if ``alike``, like the data."""
    if alike:
        outs = [*map(torch.empty_like, copied)]
        returns = {key: torch.empty_like(data[key], dtype=dtype) for key, _, dtype in plan.returns}
    else:
        outs = [torch.empty(*shape, *features, dtype=dtype, device=device) for features, dtype in plan.kinds]
        returns = {key: torch.empty(*shape, *f, dtype=dtype, device=device) for key, f, dtype in plan.returns}
    steps = torch.empty(*shape, dtype=torch.int64, device=device)
    discount, nonterminal = torch.empty_like(steps, dtype=torch.float32), torch.empty_like(steps, dtype=torch.bool)
    return outs, returns, (steps, discount, nonterminal)


def _ring(ring: Carry | None, envs: int) -> tuple[int, int, int]:
    """Returns a carry's first slot, its slots, and ``inner``, the environments that lie side by side in a slot."""
    return (ring.first, ring.capacity, envs if ring.time_first else 1) if ring else (0, 1, 1)
