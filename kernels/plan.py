"""Plans: from the shapes and strides of a call's leaves to the jobs of its launches; no memory, no GPU, cached.

A job covers its frames with tiles, one program each. Its first elements say how (see ``stream.tile_frames``); all of
it is compiled into the kernel, so that it holds nothing that changes with the number of frames or of environments.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton

from multistep_triton.kernels.stream import ELEMENTS, coded, count_tiles

_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Elements of a tile: with 128 threads 4 per thread, or 8 where two of them make one access. More loads would be on
# their way at once, but fewer programs would find registers.
TILE = 512
# Frames of a tile at most: 2 per thread, each of which loads a flag per step of its window.
TILE_FRAMES = 256
# Frames in time of a tile where neighbours in memory are environments: with 32 of those, a load of a warp is one
# stretch of memory, and the 8 frames of an environment fill the sectors that they are written to.
TIME_MAJOR_FRAMES = 8
# The widest access of a thread, in bytes.
WIDEST = 16
# Up to this n rows are copied in the same launch as windows are computed; beyond, computing windows for every leaf anew
# costs more than a second launch.
UNROLLED_STEPS = 8
# The same where there are trajectory ids, each of which takes two registers.
UNROLLED_STEPS_WITH_IDS = UNROLLED_STEPS // 2

# Stands for the type of trajectory ids where there are none.
_NO_IDS = -1

# What a kernel needs to find the rows of a leaf besides addresses: strides and outer sizes, coded.
Place = tuple[tuple[int, ...], tuple[int, ...]]


class Leaf(NamedTuple):
    """What a plan depends on in a leaf ``[*B, T, *F]``."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    misalignment: int = 0
    """The addresses of data and carry, or'ed, modulo WIDEST."""


class Launch(NamedTuple):
    """One launch of the kernel."""

    programs: int
    starts: tuple[int, ...]
    """First program of every job, coded, and the number of all."""
    constants: tuple[Any, ...]
    """Jobs of every kind, and flags: the last arguments of the kernel."""
    compiled: dict[torch.device, Any]
    """The compiled kernel, filled in when it was launched."""


class Plan(NamedTuple):
    """All of a call that does not depend on where its tensors lie."""

    launches: list[Launch]
    scalars: tuple[Any, ...]
    """Sizes of the batch dimensions, coded, rows, frames carried, known and emitted, n, frames that stay."""
    steps: Place
    places: dict[Hashable, Place]
    windows: list[tuple[Any, ...]]
    """Shape, strides and dtype of steps, discount and nonterminal."""
    returns: dict[Hashable, tuple[Any, ...]]
    """Shape, strides and dtype of every n-step return."""
    copies: list[tuple[Place, list[tuple[Any, ...]]]]
    """Of leaves that are copied, those that lie alike: their place, and for each its key, shape and strides of the
    frames that come out, the same of the slots of those held back, and dtype."""


class _Layout(NamedTuple):
    """How the rows of a leaf lie in memory; a row is what it holds of one frame. In bytes."""

    row: int
    strides: list[int]
    """Of time, of the batch dimensions, of the outer feature dimensions."""
    outer: list[int]
    """Sizes of the feature dimensions that do not make one run of memory with the last; mostly none."""
    run: int
    time_major: bool


class _Job(NamedTuple):
    programs: int
    constants: tuple[int, ...]


@functools.lru_cache(maxsize=256)
def plan_extend(
    leaves: tuple[tuple[Any, ...], ...],
    time_dim: int,
    reward_keys: tuple[Hashable, ...],
    gathered_keys: frozenset[Hashable],
    done_keys: tuple[Hashable, ...],
    mask_key: Hashable | None,
    traj_key: Hashable | None,
    carried: int,
    n_steps: int,
    held: tuple[int, int, bool] | None,
    picked: tuple[int, bool] | None,
    default_dtype: torch.dtype,
) -> Plan:
    """The plan of :func:`multistep_triton.dispatch.n_step_extend`; of every leaf its key and its :class:`Leaf`.

    ``held`` is a :class:`multistep_triton.ring.Place` without its first slot. With ``picked`` it is that of
    :func:`multistep_triton.dispatch.n_step_sample` for so many frames, which come out as one row; where
    each has an n of its own, the kernel is another one.
    """
    described = {key: Leaf(*leaf) for key, *leaf in leaves}
    lead, new = described[done_keys[0]].shape[:time_dim], described[done_keys[0]].shape[time_dim]
    known = carried + new
    capacity, stay, time_first = held or (0, 0, False)
    emitted = known - min(n_steps, known) if held else known
    dims, sizes = _merged(lead, described.values())
    layouts = {key: _layout(leaf, time_dim, dims) for key, leaf in described.items()}
    places = {key: _place(layout) for key, layout in layouts.items()}
    rows, copied = math.prod(lead), known - stay
    if picked is not None:
        # Neighbours in the list that was picked are none in memory.
        layouts = {key: layout._replace(time_major=False) for key, layout in layouts.items()}
        lead, rows, emitted = (), 1, picked[0]
        copied = emitted

    def frames(leaf: Leaf, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return _contiguous((*lead, count, *leaf.shape[time_dim + 1 :]))

    def slots(leaf: Leaf) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if not time_first:
            return frames(leaf, capacity)
        _, (slot, *strides) = _contiguous((capacity, *lead, *leaf.shape[time_dim + 1 :]))
        return frames(leaf, capacity)[0], (*strides[:time_dim], slot, *strides[time_dim:])

    windows = [_job(layouts[done_keys[0]], 1, TILE, rows, emitted)]
    returns, rewards = {}, []
    for key in reward_keys:
        reward = described[key]
        dtype = reward.dtype if reward.dtype.is_floating_point else default_dtype
        returns[key] = *frames(reward, emitted), dtype
        rewards.append(_returns_job(layouts[key], reward.dtype, dtype, rows, emitted))
    # Where none are held back every frame stays where it is: what is not gathered is the data's own.
    alike: dict[tuple[_Job, Place], list[tuple[Any, ...]]] = {}
    for key, leaf in described.items():
        if held or picked is not None or key in gathered_keys:
            job = _copy_job(layouts[key], leaf, key in gathered_keys, rows, copied)
            copy = key, *frames(leaf, emitted), *slots(leaf), leaf.dtype
            alike.setdefault((job, places[key]), []).append(copy)
    jobs = [_Job(job.programs * len(group), job.constants) for (job, _), group in alike.items()]

    ids = _NO_IDS if traj_key is None else ELEMENTS[described[traj_key].dtype]
    unrolled, turn = _steps_at_once(len(done_keys), mask_key is not None, traj_key is not None, picked is not None)
    ends = len({places[key] for key in done_keys}), mask_key is not None, ids, turn
    if n_steps <= (UNROLLED_STEPS if traj_key is None else UNROLLED_STEPS_WITH_IDS):
        launches = [_launch(windows, rewards, jobs, n_steps if n_steps <= unrolled else 0, ends)]
    else:
        launches = [_launch(windows, rewards, [], 0, ends), _launch([], [], jobs, 0, read=True)]
    flat = _contiguous((*lead, emitted))
    return Plan(
        launches=launches,
        scalars=(tuple(map(coded, sizes)), rows, carried, known, emitted, min(n_steps, known), stay),
        places=places,
        steps=_place(_layout(Leaf(*flat, torch.int64), len(lead), dims if lead else [])),
        windows=[(*flat, dtype) for dtype in (torch.int64, torch.float32, torch.bool)],
        returns=returns,
        copies=[(place, group) for (_, place), group in alike.items()],
    )


@functools.lru_cache(maxsize=256)
def plan_gather(value: tuple[Any, ...], steps: tuple[Any, ...]) -> Plan:
    """The plan of :func:`multistep_triton.gather_future`, of what is in :class:`Leaf` of its arguments."""
    source, lengths = Leaf(*value), Leaf(*steps)
    *lead, frames = lengths.shape
    dims, sizes = _merged(lead, (source, lengths))
    rows = math.prod(lead)
    layout = _layout(source, len(lead), dims)
    return Plan(
        launches=[_launch([], [], [_copy_job(layout, source, True, rows, frames)], 0, read=True)],
        scalars=(tuple(map(coded, sizes)), rows, 0, frames, frames, 0, 0),
        places={"value": _place(layout)},
        steps=_place(_layout(lengths, len(lead), dims)),
        windows=[],
        returns={},
        copies=[],
    )


def _merged(lead: Sequence[int], leaves: Iterable[Leaf]) -> tuple[list[int], list[int]]:
    """The dimensions of ``lead = *B`` that are left when those that make one in every leaf are merged; their sizes.

    The last of the dimensions that are merged stands for all; those of size 1 are left out. Without a batch, there is
    one element of it.
    """
    leaves = list(leaves)
    dims: list[int] = []
    sizes: list[int] = []
    for dim, size in enumerate(lead):
        if size == 1:
            continue
        if dims and all(leaf.strides[dims[-1]] == size * leaf.strides[dim] for leaf in leaves):
            dims[-1] = dim
            sizes[-1] *= size
        else:
            dims.append(dim)
            sizes.append(size)
    return dims, sizes or [1]


def _contiguous(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A shape and its strides."""
    strides = itertools.accumulate((max(size, 1) for size in shape[:0:-1]), operator.mul, initial=1)
    return shape, tuple(strides)[::-1]


def _layout(leaf: Leaf, time_dim: int, batch_dims: Sequence[int]) -> _Layout:
    strides = [stride * leaf.dtype.itemsize for stride in leaf.strides]
    time = strides[time_dim]
    batch = [strides[dim] for dim in batch_dims] or [0]
    run = leaf.dtype.itemsize
    sizes: list[int] = []
    steps: list[int] = []
    for size, stride in zip(leaf.shape[:time_dim:-1], strides[:time_dim:-1], strict=True):
        if size == 1:
            continue
        if not sizes and stride == run:
            run *= size
        elif sizes and stride == sizes[0] * steps[0]:
            sizes[0] *= size
        else:
            sizes.insert(0, size)
            steps.insert(0, stride)
    return _Layout(run * math.prod(sizes), [time, *batch, *steps], sizes, run, 0 < batch[-1] < time)


def _place(layout: _Layout) -> Place:
    return tuple(map(coded, layout.strides)), tuple(map(coded, layout.outer))


def _returns_job(layout: _Layout, dtype: torch.dtype, returns: torch.dtype, rows: int, frames: int) -> _Job:
    item, total = dtype.itemsize, torch.float64 if returns == torch.float64 else torch.float32
    items = layout.row // item
    constants = ELEMENTS[dtype], ELEMENTS[total], ELEMENTS[returns], item, max(items, 1), max(layout.run // item, 1)
    return _job(layout, items, TILE, rows, frames, *constants)


def _copy_job(layout: _Layout, leaf: Leaf, gathered: bool, rows: int, frames: int) -> _Job:
    """Copies in units of the most bytes that every address of a row, and its length, is a multiple of."""
    bits = functools.reduce(operator.or_, (WIDEST, leaf.misalignment, layout.run, *layout.strides))
    unit = bits & -bits
    item = min(unit, 8)
    items = layout.row // item
    constants = gathered, ELEMENTS[_INTS[item]], item, unit, max(items, 1), max(layout.run // item, 1)
    return _job(layout, items, TILE * 2 if unit == WIDEST else TILE, rows, frames, *constants)


def _job(layout: _Layout, items: int, tile: int, rows: int, frames: int, *constants: int) -> _Job:
    """A job on ``[rows, frames]`` of ``items`` each, beginning with how it is tiled."""
    block_d = min(triton.next_power_of_2(max(items, 1)), tile)
    block_f = min(tile // block_d, TILE_FRAMES)
    tile_f = layout.time_major, min(block_f, TIME_MAJOR_FRAMES), block_f
    programs = -(-items // block_d) * count_tiles(rows, frames, *tile_f)
    return _Job(programs, (*tile_f, block_d, *constants))


def _steps_at_once(dones: int, mask: bool, ids: bool, picked: bool) -> tuple[int, int]:
    """Up to which n every step is unrolled, n being compiled into the kernel, and how many steps a loop has in a turn.

    All their loads are on their way at once, as many as there are registers for: 96, with a mask 128.
    """
    if dones > 1 and mask and ids:
        return 2, (2 if picked else 1)
    if dones > 1:
        return (3 if ids else 4), (4 if mask and not picked else 2)
    return (UNROLLED_STEPS_WITH_IDS, 4) if ids else (UNROLLED_STEPS, 8)


def _launch(
    windows: list[_Job],
    rewards: list[_Job],
    copies: list[_Job],
    unrolled: int,
    ends: tuple[int, bool, int, int] = (0, False, _NO_IDS, 1),
    read: bool = False,
) -> Launch:
    """One launch; ``ends`` is what ends windows, see ``window.step_back``."""
    jobs = windows, rewards, copies
    starts = list(itertools.accumulate((job.programs for kind in jobs for job in kind), initial=0))
    return Launch(
        programs=starts[-1],
        starts=tuple(map(coded, starts)),
        constants=(*(tuple(job.constants for job in kind) for kind in jobs), unrolled, ends, read),
        compiled={},
    )
