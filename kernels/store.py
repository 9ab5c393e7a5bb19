"""Storing: the frames of a call, all leaves in one launch, into a ring of slots; and where each of them lies."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from multistep_triton.ends import Ends
from multistep_triton.kernels import rows
from multistep_triton.kernels.layout import lie_in_order
from multistep_triton.kernels.picked import store_index
from multistep_triton.kernels.rows import copy_tile
from multistep_triton.kernels.run import ALIGNMENT, as_real, check_fits, is_amd, on, run
from multistep_triton.task import Leaves, find


@triton.jit(do_not_specialize=["rows", "frames", "envs", "slot", "slots"])
def store_rows_kernel(
    data, ring, index_ptr, numbers_ptr, written_ptr, others, rows, frames, envs, slot, slots,
    UNITS: tl.constexpr, WIDTHS: tl.constexpr, TIME_LAST: tl.constexpr, DIMS: tl.constexpr, TILE: tl.constexpr,
    RETURNS: tl.constexpr,
):  # fmt: skip
    """A program copies a tile of one leaf or, after those, writes where rows lie, and ``numbers``, their slots.

    Rows are of ``[frames, envs]``; they go to a slot and those after it or, if ``written_ptr`` has how many frames were
    ever written of an environment, to where the next one belongs.
    """
    tile = tl.program_id(0).to(tl.uint32)
    rows, frames, envs = rows.to(tl.uint32), frames.to(tl.uint32), envs.to(tl.uint32)
    if written_ptr is not None:
        slot = (tl.load(written_ptr) % slots).to(tl.int32)
    first_tile = tile * 0
    for k in tl.static_range(len(UNITS)):
        tiles = tl.cdiv(rows * WIDTHS[k], TILE)
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
        if numbers_ptr is not None:
            tl.store(numbers_ptr + (at.to(tl.int64) * envs.to(tl.int64) + env), at.to(tl.int64), mask=row < rows)


class _Plan(NamedTuple):
    """What of a call depends on the leaves' kinds and addresses."""

    order: list[int]
    """The leaves that have rows, the widest first."""
    units: tuple[tuple[Any, ...], ...]
    widths: tuple[int, ...]
    compiled: dict[Any, Any]


@functools.lru_cache(maxsize=256)
def find_plan(
    bytes_of_rows: tuple[int, ...], addresses: tuple[int, ...], ring: tuple[int, ...], device: torch.device
) -> _Plan:
    """The plan for leaves and those of a ring at such addresses, of each of which a kernel knows what divides it."""
    both = zip(bytes_of_rows, addresses, ring, strict=True)
    units = [rows.units_of(row, address | other) for row, address, other in both]
    order = sorted([k for k, unit in enumerate(units) if unit[2]], key=lambda k: -units[k][2])
    return _Plan(order, tuple([units[k] for k in order]), tuple([units[k][2] for k in order]), {})


def store_frames(
    data: Leaves,
    ring: Leaves,
    numbers: Tensor | None,
    dims: int,
    time_dim: int,
    slot: int | Tensor,
    ends: Ends | None = None,
) -> Tensor:
    """Computes :func:`multistep_triton.engine.store_frames`."""
    if ends is not None:
        from multistep_triton.eager_ring import store_frames as eager

        return eager(data, ring, numbers, dims, time_dim, slot, ends)
    kept, bytes_of_rows, ring_addresses, (slots, *lead), has_complex = find(
        ring, "store", dims, lambda: _make_ready(data, ring, dims)
    )
    leaves = [*data.values()]
    frames, envs, device = leaves[0].shape[time_dim], math.prod(lead), kept[0].device
    count, time_last = frames * envs, frames > 1 and time_dim > 0
    if (dims > 2 and time_dim) or not lie_in_order(leaves):
        leaves = [leaf.transpose(0, time_dim).resolve_conj().resolve_neg().contiguous() for leaf in leaves]
        time_last = False
    addresses = tuple([leaf.data_ptr() % ALIGNMENT for leaf in leaves])
    plan = find_plan(bytes_of_rows, addresses, ring_addresses, device)
    check_fits(max(slots * envs, count), count * plan.widths[0] if plan.widths else 0)
    index = torch.empty((count, dims), dtype=torch.int64, device=device)
    slot, written = (0, slot) if isinstance(slot, Tensor) else (slot, None)
    jobs = [tuple([of[k] for k in plan.order]) for of in (leaves, kept)]
    if has_complex:
        jobs = [tuple(map(as_real, each)) for each in jobs]
    tile, amd, others = rows.TILE, is_amd(), tuple(lead[1:])
    at = None if numbers is None else numbers.data_ptr() % ALIGNMENT
    with on(device):
        run(
            *(plan.compiled, store_rows_kernel, (time_last, dims, *others, written is None, at)),
            sum([-(-count * width // tile) for width in plan.widths]) - (-count // tile),
            *(*jobs, index, numbers, written, others, count, frames, envs, slot, slots),
            *(plan.units, plan.widths, time_last, dims, tile, not amd),
            registers=rows.MOST_REGISTERS,
        )
    return index


def _make_ready(
    data: Leaves, ring: Leaves, dims: int
) -> tuple[list[Tensor], tuple[int, ...], tuple[int, ...], torch.Size, bool]:
    """Leaves of the ring in the data's order, bytes of rows, addresses, ``[C, *R]``, and whether any is complex."""
    leaves = [ring[key] for key in data]
    sizes = leaves[0].shape[:dims]
    bytes_of_rows = tuple([leaf.nbytes // max(sizes.numel(), 1) for leaf in leaves])
    addresses = tuple([leaf.data_ptr() % ALIGNMENT for leaf in leaves])
    return leaves, bytes_of_rows, addresses, sizes, any([leaf.is_complex() for leaf in leaves])
