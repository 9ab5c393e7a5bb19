"""Launchers: from the tensors of a call to the arguments of its two launches, and to what it returns, in new memory."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from multistep_triton.carry import Carry, next_carry
from multistep_triton.kernels import rows, windows
from multistep_triton.kernels.layout import lie_alike
from multistep_triton.samples import Samples
from multistep_triton.task import Keys, Leaves, Results, Task

# Which addresses are multiples of 16 is compiled into a kernel. Rows are counted in 31 bits, units of a leaf in 32.
ALIGNMENT, MOST_ROWS, MOST_UNITS = 16, 2**31 - 1, 2**32 - 1


class _Plan(NamedTuple):
    """What of a call depends on its leaves, and not on how many frames or environments there are."""

    returns: list[tuple[Hashable, tuple[int, ...], torch.dtype]]
    """Key, features and dtype of each n-step return."""
    elements: tuple[int, ...]
    """Those of each."""
    copies: list[tuple[Hashable, Hashable, tuple[int, ...], torch.dtype]]
    """Of each output that is copied its key, that of its leaf, features and dtype."""
    order: list[tuple[Hashable, Hashable]]
    """Keys of output and leaf of those that have rows, the widest first."""
    units: tuple[tuple[Any, ...], ...]
    """How these are copied; see ``rows.units_of``."""
    widths: tuple[int, ...]
    """Units of a row of each."""
    gathered: tuple[bool, ...]
    has_complex: bool
    compiled: dict[Any, Any]
    """Kernels, by what else they are compiled for."""


@functools.lru_cache(maxsize=256)
def _plan(
    keys: Keys, addresses: tuple[int, ...], every: bool, default_dtype: torch.dtype, device: torch.device
) -> _Plan:
    """The plan for leaves at such addresses; ``every`` output is copied, or those gathered."""
    kinds = {
        key: (features, dtype, rows.units_of(math.prod(features) * dtype.itemsize, address))
        for (key, dtype, features), address in zip(keys.kinds, addresses, strict=True)
    }
    copied = [output for output in keys.outputs if every or output[2]]
    wide = sorted([each for each in copied if kinds[each[1]][2][2]], key=lambda each: -kinds[each[1]][2][2])
    returns = [(key, *kinds[key][:2]) for key in keys.rewards]
    return _Plan(
        [(key, features, dtype if dtype.is_floating_point else default_dtype) for key, features, dtype in returns],
        tuple([math.prod(features) for _, features, _ in returns]),
        [(out, key, *kinds[key][:2]) for out, key, _ in copied],
        [(out, key) for out, key, _ in wide],
        tuple([kinds[key][2] for _, key, _ in wide]),
        tuple([kinds[key][2][2] for _, key, _ in wide]),
        tuple([at_end for _, _, at_end in wide]),
        any(kinds[key][1].is_complex for _, key, _ in wide),
        {},
    )


def n_step_extend(task: Task, carry: Carry | None, data: Leaves) -> Results:
    """Computes :func:`multistep_triton.engine.n_step_extend`."""
    keys, n_steps, _, time_dim, hold = task
    *lead, new = data[keys.done[0]].shape[: time_dim + 1]
    carried = carry.count if carry else 0
    known = carried + new
    if carry and any([address % ALIGNMENT for address in map(Tensor.data_ptr, carry.leaves.values())]):
        carry = carry.clone()
    held, stay = next_carry(carry, data, keys.held, new, n_steps, time_dim) if hold else (None, 0)
    emitted = known - (held.count if held else 0)
    counts = carried, known, emitted, known - emitted - stay, 0, max(new, 1)
    return _launch(task, data, (*lead,), carry, held, None, counts)


def n_step_sample(task: Task, samples: Samples, data: Leaves) -> Results:
    """Computes :func:`multistep_triton.engine.n_step_sample`."""
    live, count = samples.live, samples.indices[0].shape[0]
    _, *lead = next(iter(data.values())).shape[: len(samples.indices)]
    counts = 0, live, count, 0, (samples.newest + 1) % live, live
    return _launch(task, data, (*lead,), None, None, samples, counts)


@functools.lru_cache(maxsize=64)
def _gather_plan(dtype: torch.dtype, features: tuple[int, ...], device: torch.device) -> _Plan:
    return _plan(Keys(((0, dtype, features),), (), outputs=((0, 0, False),)), (0,), True, dtype, device)


def gather_future(value: Tensor, steps: Tensor) -> Tensor:
    """Computes :func:`multistep_triton.gather_future`; a window that leaves its row is cut at the row's end."""
    value, steps = (_aligned(each.resolve_neg().resolve_conj().contiguous()) for each in (value, steps))
    gathered, count = torch.empty_like(value), steps.numel()
    ends = torch.empty(count, dtype=torch.int32, device=value.device)
    plan = _gather_plan(value.dtype, tuple(value.shape[steps.ndim :]), value.device)
    if count and plan.order:
        jobs = [[each] for each in (value, value, gathered, gathered)]
        arguments = steps, ends, count, steps.shape[-1], rows.TILE
        with _current(value.device):
            _run(plan.compiled, rows.future_rows_kernel, (), -(-count // rows.TILE), *arguments)
            _copy_rows(plan, jobs, True, ends, count, 0, 0, 0, 0)
    return gathered


def _launch(
    task: Task,
    data: Leaves,
    lead: tuple[int, ...],
    carry: Carry | None,
    held: Carry | None,
    picked: Samples | None,
    counts: tuple[int, ...],
) -> Results:
    keys, n_steps, gamma, time_dim, _ = task
    carried, known, emitted, count_held, first, slots = counts
    dims, device, envs = len(lead) + 1, next(iter(data.values())).device, math.prod(lead)
    shape = (emitted,) if picked else (*lead, emitted)
    count, held_rows = (emitted, 0) if picked else (envs * emitted, envs * count_held)
    if (most := max(count, envs * max(known, slots, *[ring.capacity for ring in (carry, held) if ring]))) > MOST_ROWS:
        raise RuntimeError(f"the kernels take at most {MOST_ROWS} frames in a call, got {most}")
    data, inner, agents = lie_alike(data, dims, time_dim, keys)
    every, addresses = picked is not None or held is not None, [leaf.data_ptr() % ALIGNMENT for leaf in data.values()]
    plan = _plan(keys, tuple(addresses), every, torch.get_default_dtype(), device)

    # In a stream as many frames come out as go in, and what is like these is the cheapest to make.
    alike = not picked and emitted == known - carried and inner == 1
    leaves = {} if every else {out: data[key] for out, key, _ in keys.outputs}
    results = _allocate(plan, data, leaves, held, shape, device, alike)
    if not count and not held_rows:
        return results
    _, returns, steps, discount, nonterminal, _ = results
    olds = carry.leaves if carry else data
    dones, rewards = [tuple([(data[key], olds[key]) for key in of_kind]) for of_kind in (keys.done, keys.rewards)]
    masks, ids = [() if key is None else ((data[key], olds[key]),) for key in (keys.mask, keys.traj)]
    widened: dict[Hashable, Tensor] = {}
    if windows.INTERPRETED:
        # The interpreter neither converts subnormal bfloat16 nor rounds to it.
        rewards = tuple([(_widened(leaf), _widened(old)) for leaf, old in rewards])
        widened = {key: _widened(each) for key, each in returns.items() if each.dtype == torch.bfloat16}
    index = tuple([_aligned(dim.contiguous()) for dim in picked.indices]) if picked else ()
    limits = (_aligned(picked.n_steps.contiguous()),) if picked and picked.n_steps is not None else ()
    others = lead[1:] if picked else ()
    # Before windows come out, rows are listed alone.
    longest = min(n_steps, known) if emitted else 1
    levels, piece, blocks = windows.shape_blocks(longest, emitted, picked is not None)
    # Half as many windows a program where each takes more registers.
    tile = windows.TILE // 2 if longest > 1 << piece or masks or ids else windows.TILE
    lanes = (count if picked else envs * blocks) << levels
    lists = torch.empty((2 * count + held_rows if plan.copies else 0,), dtype=torch.int32, device=device)
    where = 1 < inner < envs, picked is not None
    kind = levels, piece, longest > 1 << piece, inner > 1 and not picked, picked is not None, where, bool(plan.copies)
    carry_ring, (held_first, held_slots, held_inner) = _ring(carry, envs), _ring(held, envs)
    with _current(device):
        _run(
            *(plan.compiled, windows.n_step_windows_kernel, (kind, len(index), len(limits), others)),
            -(-max(lanes, held_rows) // tile),
            *(dones, masks, ids, rewards, tuple({**returns, **widened}.values()), index, limits, others),
            *(steps, discount, nonterminal, lists, _powers(gamma, min(n_steps, 1 << longest.bit_length()), device)),
            *(envs, agents, carried, known, emitted, held_rows, longest, blocks, held_inner),
            *(*carry_ring, first, slots, inner),
            *(plan.elements, *kind, tile),
        )
        if plan.order:
            # Of the frames held back, those that do not lie there already.
            slot = (held_first + (held.count - count_held if held else 0)) % held_slots
            held_leaves = held.leaves if held else data
            jobs = [[each[key] for _, key in plan.order] for each in (data, olds, held_leaves)]
            jobs.insert(2, [leaves[out] for out, _ in plan.order])
            ring = slot * held_inner, held_slots * envs
            _copy_rows(plan, jobs, picked is None, lists, count, held_rows, carry_ring[1] * envs, *ring)
    for key, wide in widened.items():
        returns[key] = wide.to(torch.bfloat16)
    return results


def _allocate(
    plan: _Plan,
    data: Leaves,
    leaves: dict[Any, Tensor],
    held: Carry | None,
    shape: tuple[int, ...],
    device: torch.device,
    alike: bool,
) -> Results:
    """Memory for what comes out besides ``leaves``; of the shape of the data if it is ``alike``."""
    if alike:
        leaves.update([(out, torch.empty_like(data[key])) for out, key, _, _ in plan.copies])
        returns = {key: torch.empty_like(data[key], dtype=dtype) for key, _, dtype in plan.returns}
    else:
        leaves.update([(out, torch.empty(shape + f, dtype=dtype, device=device)) for out, _, f, dtype in plan.copies])
        returns = {key: torch.empty(shape + f, dtype=dtype, device=device) for key, f, dtype in plan.returns}
    steps = torch.empty(shape, dtype=torch.int64, device=device)
    discount, nonterminal = torch.empty_like(steps, dtype=torch.float32), torch.empty_like(steps, dtype=torch.bool)
    return Results(leaves, returns, steps, discount, nonterminal, held)


def _copy_rows(
    plan: _Plan,
    jobs: Sequence[list[Tensor]],
    carried: bool,
    lists: Tensor,
    count: int,
    held: int,
    carry_rows: int,
    first: int,
    slots: int,
) -> None:
    """Copies rows of leaves of the data and of the carry to where they come out and where they are held back."""
    # A place in the ring is counted from its first slot on, and up to once round.
    if (most := max(count, first + held, slots if held else 0) * plan.widths[0]) > MOST_UNITS:
        raise RuntimeError(f"the kernels take at most {MOST_UNITS} units of a leaf in a call, got {most}")
    if plan.has_complex:
        # Triton knows no complex numbers.
        jobs = [[torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in leaves] for leaves in jobs]
    amd, tile = _is_amd(), rows.TILE
    _run(
        *(plan.compiled, rows.n_step_rows_kernel, (carried, amd)),
        sum([-(-count * width // tile) - (-held * width // tile) for width in plan.widths]),
        *(*map(tuple, jobs), lists, count, held, carry_rows, first, slots),
        *(plan.units, plan.widths, plan.gathered, carried, tile, not amd),
    )


@functools.lru_cache(maxsize=64)
def _powers(gamma: float, n_steps: int, device: torch.device) -> Tensor:
    """``gamma ** k`` for ``k = 0 .. n_steps``, float64."""
    return torch.tensor([gamma**k for k in range(n_steps + 1)], dtype=torch.float64, device=device)


def _ring(ring: Carry | None, envs: int) -> tuple[int, int, int]:
    """A ring's first slot, its slots, and how many environments are inner."""
    return (ring.first, ring.capacity, envs if ring.time_first else 1) if ring else (0, 1, 1)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _run(known: dict[Any, Any], kernel: Any, kind: tuple[Any, ...], programs: int, *arguments: Any) -> None:
    """Launches a kernel, which is not looked for among all that were compiled."""
    if (compiled := known.get((kernel.__name__, *kind))) is not None:
        compiled[(programs, 1, 1)](*arguments)
        return
    # Fused multiply-adds may be used in the sums; the reference's are the compiler's choice, too.
    options = {"num_warps": 4, "enable_fp_fusion": True}
    if kernel is rows.n_step_rows_kernel and not windows.INTERPRETED and not _is_amd():
        # Many leaves would take more, to no use.
        options["maxnreg"] = rows.MOST_REGISTERS
    known[(kernel.__name__, *kind)] = kernel[(programs,)](*arguments, **options)


@functools.cache
def _is_amd() -> bool:
    return not windows.INTERPRETED and triton.runtime.driver.active.get_current_target().backend == "hip"


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes the device the current one, on which Triton launches."""
    if device.type == "cpu" or device.index == torch.accelerator.current_device_index():
        return contextlib.nullcontext()
    return torch.accelerator.device_index(device.index)
