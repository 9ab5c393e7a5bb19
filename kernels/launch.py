"""Launchers: from the tensors of a call to the arguments of its two launches, and to what it returns, in new memory."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from multistep_triton.kernels import rows, windows
from multistep_triton.ring import Ring, Samples, find_place, lie_alike, strides_in_order

# Which addresses are multiples of 16 is compiled into a kernel. Rows are counted in 31 bits, units of a leaf in 32.
ALIGNMENT, MOST_ROWS, MOST_UNITS = 16, 2**31 - 1, 2**32 - 1


class _Plan(NamedTuple):
    """What of a call depends on its leaves, and not on how many frames or environments there are."""

    returns: list[tuple[Hashable, torch.Size, torch.dtype]]
    """Key, features and dtype of each n-step return."""
    copies: list[tuple[Hashable, torch.Size, torch.dtype]]
    """The same of each leaf that is copied."""
    order: list[Hashable]
    """Those that have rows, the widest first."""
    units: tuple[tuple[Any, ...], ...]
    """How these are copied; see ``rows.units_of``."""
    gathered: tuple[bool, ...]
    compiled: dict[Any, Any]
    """Kernels, by what else they are compiled for."""


@functools.lru_cache(maxsize=256)
def _plan(
    kinds: tuple[tuple[Hashable, torch.dtype, torch.Size, int], ...],
    reward_keys: tuple[Hashable, ...],
    gathered_keys: frozenset[Hashable],
    only_read: frozenset[Hashable],
    every: bool,
    default_dtype: torch.dtype,
) -> _Plan:
    """The plan for leaves of these keys, dtypes, features and addresses; ``every`` one is copied, or those gathered."""
    kind = {key: (features, dtype) for key, dtype, features, _ in kinds}
    units = {
        key: rows.units_of(features.numel() * dtype.itemsize, address)
        for key, dtype, features, address in kinds
        if (every or key in gathered_keys) and key not in only_read
    }
    order = sorted([key for key in units if units[key][2]], key=lambda key: -units[key][2])
    returns = [(key, *kind[key]) for key in reward_keys]
    return _Plan(
        [(key, features, dtype if dtype.is_floating_point else default_dtype) for key, features, dtype in returns],
        [(key, *kind[key]) for key in units],
        order,
        tuple([units[key] for key in order]),
        tuple([key in gathered_keys for key in order]),
        {},
    )


def launch_n_step_extend(
    carry: Ring | None,
    data: Mapping[Hashable, Tensor],
    *,
    time_dim: int,
    done_keys: Sequence[Hashable],
    n_steps: int,
    hold: bool,
    only_read: Collection[Hashable] = (),
    **arguments: Any,
) -> tuple[Any, ...]:
    """Computes :func:`multistep_triton.dispatch.n_step_extend`."""
    *lead, new = data[done_keys[0]].shape[: time_dim + 1]
    carried = carry.count if carry else 0
    known = carried + new
    if carry and any([leaf.data_ptr() % ALIGNMENT for leaf in carry.leaves.values()]):
        carry = carry.with_leaves({key: leaf.clone() for key, leaf in carry.leaves.items()}, carry.free)
    place = find_place(carry, data.values(), new, n_steps) if hold else None
    emitted, stay = (max(known - n_steps, 0), place.stay) if place else (known, 0)
    own = {key: leaf for key, leaf in carry.leaves.items() if key not in only_read} if carry and stay else {}
    held = place.ring(own, emitted, known) if place else None
    counts = carried, known, emitted, known - emitted - stay if place else 0, 0, max(new, 1)
    arguments.update(done_keys=done_keys, only_read=only_read)
    return *_launch(data, lead, time_dim, carry, held, None, n_steps, counts, **arguments), held


def launch_n_step_sample(
    samples: Samples, data: Mapping[Hashable, Tensor], *, n_steps: int, **arguments: Any
) -> tuple[Any, ...]:
    """Computes :func:`multistep_triton.dispatch.n_step_sample`."""
    live, count = samples.live, samples.indices[0].shape[0]
    _, *lead = next(iter(data.values())).shape[: len(samples.indices)]
    counts = 0, live, count, 0, (samples.newest + 1) % live, live
    return _launch(data, lead, 0, None, None, samples, n_steps, counts, **arguments)


def launch_gather_future(value: Tensor, steps: Tensor) -> Tensor:
    """Computes :func:`multistep_triton.gather_future`; a window that leaves its row is cut at the row's end."""
    value, steps = (_aligned(each.resolve_neg().resolve_conj().contiguous()) for each in (value, steps))
    gathered, count = torch.empty_like(value), steps.numel()
    ends = torch.empty(count, dtype=torch.int32, device=value.device)
    plan = _plan(((0, value.dtype, value.shape[steps.ndim :], 0),), (), frozenset(), frozenset(), True, torch.float32)
    if count:
        arguments = steps, ends, count, steps.shape[-1], rows.TILE
        _run(plan, rows.future_rows_kernel, value.device, (), -(-count // rows.TILE), *arguments)
        _copy_rows(plan, [(value, value, gathered, gathered)], True, ends, count, 0, 0, 0, 0)
    return gathered


def _launch(
    data: Mapping[Hashable, Tensor],
    lead: Sequence[int],
    time_dim: int,
    carry: Ring | None,
    held: Ring | None,
    picked: Samples | None,
    n_steps: int,
    counts: tuple[int, ...],
    *,
    reward_keys: Collection[Hashable],
    gathered_keys: Collection[Hashable],
    done_keys: Sequence[Hashable],
    mask_key: Hashable | None,
    traj_key: Hashable | None,
    only_read: Collection[Hashable] = (),
    gamma: float,
) -> tuple[Any, ...]:
    """Leaves, returns, steps, discount and nonterminal; the leaves of ``held`` are made if there are none yet."""
    carried, known, emitted, count_held, first, slots = counts
    dims, device, envs = len(lead) + 1, data[done_keys[0]].device, math.prod(lead)
    shape = (emitted,) if picked else (*lead, emitted)
    count, held_rows = (emitted, 0) if picked else (envs * emitted, envs * count_held)
    if (most := max(count, envs * max(known, slots, carry.capacity if carry else 0))) > MOST_ROWS:
        raise RuntimeError(f"the kernels take at most {MOST_ROWS} frames in a call, got {most}")
    marks = [key for key in (mask_key, traj_key) if key in only_read]
    data, inner, agents = lie_alike(data, dims, time_dim, marks)
    kinds = tuple([(key, leaf.dtype, leaf.shape[dims:], leaf.data_ptr() % ALIGNMENT) for key, leaf in data.items()])
    every, default_dtype = picked is not None or held is not None, torch.get_default_dtype()
    plan = _plan(kinds, (*reward_keys,), frozenset(gathered_keys), frozenset(only_read), every, default_dtype)

    def new(sizes: tuple[int, ...], dtype: torch.dtype, outermost: int = 0) -> Tensor:
        return torch.empty_strided(sizes, strides_in_order(sizes, outermost), dtype=dtype, device=device)

    leaves = {key: leaf for key, leaf in data.items() if key not in only_read}
    returns = {key: new(shape + features, dtype) for key, features, dtype in plan.returns}
    steps, discount, nonterminal = new(shape, torch.int64), new(shape, torch.float32), new(shape, torch.bool)
    leaves.update([(key, new(shape + features, dtype)) for key, features, dtype in plan.copies])
    if held and not held.leaves:
        sizes, outermost = (*lead, held.capacity), time_dim if held.time_first else 0
        held.leaves.update([(key, new(sizes + features, dtype, outermost)) for key, features, dtype in plan.copies])
    if not count and not held_rows:
        return leaves, returns, steps, discount, nonterminal

    olds = carry.leaves if carry else data
    dones, rewards = (tuple([(data[key], olds[key]) for key in keys]) for keys in (done_keys, reward_keys))
    widened: dict[Hashable, Tensor] = {}
    if windows.INTERPRETED:
        # The interpreter neither converts subnormal bfloat16 nor rounds to it.
        rewards = tuple([(_widened(leaf), _widened(old)) for leaf, old in rewards])
        widened = {key: _widened(each) for key, each in returns.items() if each.dtype == torch.bfloat16}
    masks, ids = (() if key is None else ((data[key], olds[key]),) for key in (mask_key, traj_key))
    index = tuple([_aligned(dim.contiguous()) for dim in picked.indices]) if picked else ()
    limits = (_aligned(picked.n_steps.contiguous()),) if picked and picked.n_steps is not None else ()
    others = tuple(lead[1:]) if picked else ()
    longest = min(n_steps, known)
    levels, piece, blocks = windows.shape_blocks(longest, emitted, picked is not None)
    # Half as many windows a program where each takes more registers.
    tile = windows.TILE // 2 if longest > 1 << piece or masks or ids else windows.TILE
    lanes = (count if picked else envs * blocks) << levels
    lists = new((2 * count + held_rows if plan.copies else 0,), torch.int32)
    widths = tuple([features.numel() for _, features, _ in plan.returns])
    where = 1 < inner < envs, picked is not None
    kind = levels, piece, longest > 1 << piece, inner > 1 and not picked, picked is not None, where, bool(plan.copies)
    carry_ring, (held_first, held_slots, held_inner) = _ring(carry, envs), _ring(held, envs)
    _run(
        *(plan, windows.n_step_windows_kernel, device, (kind, *done_keys, mask_key, traj_key, len(limits), others)),
        -(-max(lanes, held_rows) // tile),
        *(dones, masks, ids, rewards, tuple({**returns, **widened}.values()), index, limits, others),
        *(steps, discount, nonterminal, lists, _powers(gamma, min(n_steps, 1 << longest.bit_length()), device)),
        *(envs, agents, carried, known, emitted, held_rows, longest, blocks, held_inner),
        *(*carry_ring, first, slots, inner),
        *(widths, *kind, tile),
    )
    if plan.order:
        outs = held.leaves if held else leaves
        jobs = [(data[key], olds[key], leaves[key], outs[key]) for key in plan.order]
        # Of the frames held back, those that do not lie there already.
        slot = (held_first + (held.count - count_held if held else 0)) % held_slots
        ring = slot * held_inner, held_slots * envs
        _copy_rows(plan, jobs, picked is None, lists, count, held_rows, carry_ring[1] * envs, *ring)
    for key, wide in widened.items():
        returns[key] = wide.to(torch.bfloat16)
    return leaves, returns, steps, discount, nonterminal


def _copy_rows(
    plan: _Plan, jobs: Sequence[Sequence[Tensor]], carried: bool, lists: Tensor, count: int, held: int, *scalars: int
) -> None:
    """Copies rows, of each leaf those of its data and its carry to where they come out and are held back."""
    widths = tuple([width for _, _, width in plan.units])
    if (most := max(count, held) * widths[0]) > MOST_UNITS:
        raise RuntimeError(f"the kernels take at most {MOST_UNITS} units of a leaf in a call, got {most}")
    if any([each[0].is_complex() for each in jobs]):
        # Triton knows no complex numbers.
        jobs = [[torch.view_as_real(each) if each.is_complex() else each for each in job] for job in jobs]
    _run(
        *(plan, rows.n_step_rows_kernel, lists.device, (carried, _is_amd())),
        sum([-(-count * width // rows.TILE) - (-held * width // rows.TILE) for width in widths]),
        *zip(*jobs, strict=True),
        *(lists, count, held, *scalars, plan.units, widths, plan.gathered, carried, rows.TILE, not _is_amd()),
    )


@functools.lru_cache(maxsize=64)
def _powers(gamma: float, n_steps: int, device: torch.device) -> Tensor:
    """``gamma ** k`` for ``k = 0 .. n_steps``, float64."""
    return torch.tensor([gamma**k for k in range(n_steps + 1)], dtype=torch.float64, device=device)


def _ring(ring: Ring | None, envs: int) -> tuple[int, int, int]:
    """A ring's first slot, its slots, and how many environments are inner."""
    return (ring.first, ring.capacity, envs if ring.time_first else 1) if ring else (0, 1, 1)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _run(plan: _Plan, kernel: Any, device: torch.device, kind: Any, programs: int, *arguments: Any) -> None:
    """Launches a kernel, which is not looked for among all that were compiled."""
    with _current(device):
        compiled = plan.compiled.get((kernel, device, kind))
        if compiled is None:
            # Fused multiply-adds may be used in the sums; the reference's are the compiler's choice, too.
            options = {"num_warps": 4, "enable_fp_fusion": True}
            if kernel is rows.n_step_rows_kernel and not windows.INTERPRETED and not _is_amd():
                # Many leaves would take more, to no use.
                options["maxnreg"] = rows.MOST_REGISTERS
            compiled = kernel[(programs,)](*arguments, **options)
            plan.compiled[kernel, device, kind] = compiled
        else:
            compiled[(programs, 1, 1)](*arguments)


@functools.cache
def _is_amd() -> bool:
    return not windows.INTERPRETED and triton.runtime.driver.active.get_current_target().backend == "hip"


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes the device the current one, on which Triton launches."""
    if device.type == "cpu" or device.index == torch.accelerator.current_device_index():
        return contextlib.nullcontext()
    return torch.accelerator.device_index(device.index)
