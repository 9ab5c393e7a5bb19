"""Storing: copies the frames of a call, all leaves in one launch, to a ring of slots, and says where each lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from multistep_triton.ends import Ends
from multistep_triton.kernels import keep, rows
from multistep_triton.kernels.keep import count_before, find_before, has_ended, keep_tile
from multistep_triton.kernels.layout import lie_in_order
from multistep_triton.kernels.plan import getter
from multistep_triton.kernels.ring import store_index
from multistep_triton.kernels.rows import copy_tile
from multistep_triton.kernels.run import ALIGNMENT, as_real, check_fits, is_amd, on, run
from multistep_triton.kernels.windows import INTERPRETED
from multistep_triton.samples import Ring
from multistep_triton.task import Leaves, compute_once

# Of launches that keep observations, so that five programs share a multiprocessor; each keeps fewer units.
MOST_REGISTERS, KEPT_TILE = 96, rows.TILE // 2


@triton.jit(do_not_specialize=["rows", "frames", "envs", "slot", "slots", "end_slots"])
def store_rows_kernel(
    data, ring, after, kept, flags, index_ptr, numbers_ptr, written_ptr, count_ptr, others, rows, frames, envs, slot,
    slots, end_slots,
    UNITS: tl.constexpr, KEPT_UNITS: tl.constexpr, FLAG_WIDTHS: tl.constexpr, TIME_LAST: tl.constexpr,
    COUNTED: tl.constexpr, DIMS: tl.constexpr, TILE: tl.constexpr, KEPT_TILE: tl.constexpr, RETURNS: tl.constexpr,
):  # fmt: skip
    """By its id, keeps a tile of a leaf of ``after``, copies one of a leaf of ``data``, or stores where TILE rows lie.

    The ``rows`` rows, ``[frames, envs]``, go to slots of ``ring`` from ``slot`` on or, if ``written_ptr`` has the write
    count, from the slot after the newest. ``after`` goes to ``kept``; see ``keep``, for ``flags`` and TIME_LAST, too.
    UNITS are from ``units_of``. The last programs store where rows lie in ``index_ptr``, ``[rows, DIMS]``, their slots
    in ``numbers_ptr`` and, unless a launch before COUNTED them, how many ends came before in ``count_ptr``.
    """
    tile = tl.program_id(0).to(tl.uint32)
    sizes = frames, envs
    rows, frames, envs = rows.to(tl.uint32), frames.to(tl.uint32), envs.to(tl.uint32)
    slot, before = find_before(written_ptr, slot, slots)
    first_tile = tile * 0
    for k in tl.static_range(len(KEPT_UNITS)):
        tiles = tl.cdiv(rows * KEPT_UNITS[k][2], KEPT_TILE)
        mine = tile < first_tile + tiles
        if not RETURNS:
            mine &= tile >= first_tile
        if mine:
            keep_tile(
                tile - first_tile, rows, after[k], kept[k], count_ptr, slot, before, slots, end_slots, sizes, flags,
                *KEPT_UNITS[k], TIME_LAST, FLAG_WIDTHS, COUNTED, KEPT_TILE,
            )  # fmt: skip
            if RETURNS:
                return
        first_tile += tiles
    for k in tl.static_range(len(UNITS)):
        tiles = tl.cdiv(rows * UNITS[k][2], TILE)
        mine = tile < first_tile + tiles
        if not RETURNS:
            mine &= tile >= first_tile
        if mine:
            copy_tile(
                tile - first_tile, rows, data[k], data[k], 0, (frames, envs) if TIME_LAST else None, ring[k],
                slot * envs, slots * envs, *UNITS[k], False, False, True, TILE,
            )  # fmt: skip
            if RETURNS:
                return
        first_tile += tiles
    if tile >= first_tile:
        row = (tile - first_tile) * TILE + tl.arange(0, TILE).to(tl.uint32)
        frame = row // envs
        at = frame.to(tl.int32) + slot
        at = tl.where(at < slots, at, at - slots)
        env = (row - frame * envs).to(tl.int32)
        store_index(index_ptr, row, at, env, others, row < rows, DIMS)
        place = at.to(tl.int64) * envs.to(tl.int64) + env
        if numbers_ptr is not None:
            tl.store(numbers_ptr + place, at.to(tl.int64), mask=row < rows)
        if count_ptr is not None and not COUNTED:
            mask = row < rows
            ended = has_ended(env * 0 - 1, env, mask, before, sizes, flags, TIME_LAST, FLAG_WIDTHS)
            count = count_before(count_ptr, env, mask, before, sizes[1]) + ended.to(tl.int32)
            tl.store(count_ptr + place, count, mask=mask)


class _Plan(NamedTuple):
    """The arguments of launches that a ring and the addresses of the data determine."""

    take: Callable[[Leaves], tuple[Tensor, ...]]
    """Takes the leaves of the data whose rows have any bytes, the widest first."""
    ring: tuple[Tensor, ...]
    """The leaves of the ring that these are copied to."""
    units: tuple[tuple[Any, ...], ...]
    take_after: Callable[[Leaves], tuple[Tensor, ...]]
    """``take_after``, ``kept`` and ``kept_units`` are the same for entries whose final observations are kept."""
    kept: tuple[Tensor, ...]
    kept_units: tuple[tuple[Any, ...], ...]
    sizes: torch.Size
    """``[C, *R]``."""
    flags: tuple[tuple[tuple[Any, Tensor], ...], ...]
    """Key and leaf of the ring of each done flag, mask and trajectory id; none unless observations are kept once."""
    flag_widths: tuple[int, ...]
    """Elements of each done flag in one frame."""
    widest: int
    """Units of the widest row."""
    has_complex: bool
    compiled: dict[Any, Any]

    def programs(self, count: int) -> int:
        """Returns how many programs keep and copy ``count`` rows of every leaf, and store where they lie."""
        both = (self.units, rows.TILE), (self.kept_units, KEPT_TILE)
        tiles: list[int] = [-(-count * unit[2] // tile) for units, tile in both for unit in units]
        return sum(tiles) - (-count // rows.TILE)


def store_frames(data: Leaves, ring: Ring, slot: int | Tensor) -> Tensor:
    """Computes :func:`multistep_triton.engine.store_frames`."""
    leaves, numbers, dims, time_dim, ends = ring
    first = next(iter(data.values()))
    frames, device = first.shape[time_dim], first.device
    time_last = frames > 1 and time_dim > 0
    # Conjugations are carried out by as_real, below.
    if (dims > 2 and time_dim) or not lie_in_order(data.values(), False):
        moved = {key: leaf.transpose(0, time_dim).resolve_conj().resolve_neg() for key, leaf in data.items()}
        data = {key: leaf.contiguous() for key, leaf in moved.items()}
        time_last = False
    if INTERPRETED:
        # The interpreter does not convert as GPUs do.
        to = {**leaves, **({} if ends is None else ends.rows)}
        data = {key: leaf.to(to[key].dtype) if key in to else leaf for key, leaf in data.items()}
    addresses = tuple([leaf.data_ptr() % ALIGNMENT for leaf in data.values()])
    plan = compute_once(leaves, ("store", dims, ends, addresses), lambda: _make_plan(data, leaves, dims, ends))
    (slots, *lead), flags = plan.sizes, plan.flags
    envs = math.prod(lead)
    count = frames * envs
    end_slots, count_leaf = 0, None
    if ends is not None:
        end_slots, count_leaf = ends.slots, ends.count
        flags = tuple([tuple([(data[key], leaf) for key, leaf in pairs]) for pairs in flags])
    check_fits(max(envs * max(slots, end_slots + 1), count), count * plan.widest)
    index = torch.empty(count, dims, dtype=torch.int64, device=device)
    slot, written = (0, slot) if isinstance(slot, Tensor) else (slot, None)
    jobs = [plan.take(data), plan.ring, plan.take_after(data), plan.kept]
    if plan.has_complex:
        jobs = [tuple(map(as_real, each)) for each in jobs]
    others, counted = tuple(lead[1:]), ends is not None and frames > 1
    at = None if numbers is None else numbers.data_ptr() % ALIGNMENT
    with on(device):
        if counted:
            many = min(triton.next_power_of_2(frames), keep.MOST_FRAMES)
            run(
                *(plan.compiled, keep.count_ends_kernel, (many, time_last, written is None)),
                -(-envs * many // keep.TILE),
                *(flags, written, count_leaf, frames, envs, slot, slots, plan.flag_widths, time_last, many, keep.TILE),
            )
        run(
            *(plan.compiled, store_rows_kernel, (time_last, counted, dims, *others, written is None, at)),
            plan.programs(count),
            *(*jobs, flags, index, numbers, written, count_leaf, others),
            *(count, frames, envs, slot, slots, end_slots),
            *(plan.units, plan.kept_units, plan.flag_widths, time_last, counted, dims, rows.TILE, KEPT_TILE),
            not is_amd(),
            registers=rows.MOST_REGISTERS if ends is None else MOST_REGISTERS,
        )
    return index


def _make_plan(data: Leaves, ring: Leaves, dims: int, ends: Ends | None) -> _Plan:
    stored = {key: ring[key] for key in data if key in ring}
    kept: dict[Any, Tensor] = {}
    marks: tuple[tuple[Any, ...], ...] = (), (), ()
    if ends is not None:
        kept, marks = ends.rows, (ends.done, *(() if key is None else (key,) for key in (ends.mask, ends.traj)))
    both = *_find_job(data, stored, dims), *_find_job(data, kept, dims)
    sizes = next(iter(stored.values())).shape[:dims]
    flags = tuple([tuple([(key, ring[key]) for key in keys]) for keys in marks])
    widths = tuple([math.prod(leaf.shape[dims:]) for _, leaf in flags[0]])
    widest = max([unit[2] for unit in (*both[2], *both[5])], default=0)
    has_complex = any([leaf.is_complex() for leaf in (*stored.values(), *kept.values())])
    return _Plan(*both, sizes, flags, widths, widest, has_complex, {})


def _find_job(data: Leaves, to: Mapping[Any, Tensor], dims: int) -> tuple[Any, Any, Any]:
    """Returns what takes the leaves whose rows have any bytes, the widest first, where these go, and their units."""
    units = {}
    for key, leaf in to.items():
        of, addresses = data[key], (data[key].data_ptr() % ALIGNMENT, leaf.data_ptr() % ALIGNMENT)
        units[key] = rows.units_of(math.prod(leaf.shape[dims:]), addresses, of.dtype, leaf.dtype)
    order = sorted([key for key in to if units[key][2]], key=lambda key: -units[key][2])
    return getter(order), tuple([to[key] for key in order]), tuple([units[key] for key in order])
