"""Plans: what of a call depends on its leaves alone, and what launchers share: the second launch, which copies rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multistep_triton.kernels import rows, windows
from multistep_triton.kernels.run import as_real, check_fits, is_amd, run
from multistep_triton.task import Keys, Leaves


class Plan(NamedTuple):
    """What of a call depends on its leaves."""

    returns: list[tuple[Hashable, tuple[int, ...], torch.dtype]]
    """Key, features and dtype of each n-step return."""
    elements: tuple[int, ...]
    """Those of each."""
    blank: dict[Hashable, Any]
    """Keys of the outputs, in the order in which they come out."""
    outs: list[Hashable]
    """Keys of those that are copied, the widest first."""
    kinds: list[tuple[tuple[int, ...], torch.dtype]]
    """Features and dtype of each."""
    take: Callable[[Leaves], tuple[Tensor, ...]]
    """Their leaves."""
    take_rows: Callable[[Leaves], tuple[Tensor, ...]]
    """Those of them that have rows, which come first."""
    units: tuple[tuple[Any, ...], ...]
    """How these are copied; see ``rows.units_of``."""
    widths: tuple[int, ...]
    """Units of a row of each."""
    gathered: tuple[int, ...]
    has_complex: bool
    compiled: dict[Any, Any]
    """Kernels, by what else they are compiled for."""


def getter(keys: Sequence[Hashable]) -> Callable[[Leaves], tuple[Tensor, ...]]:
    """What takes the leaves of these keys."""
    return itemgetter(*keys) if len(keys) > 1 else lambda leaves: tuple([leaves[key] for key in keys])


def dtype_of(keys: Keys, key: Hashable, dtype: torch.dtype) -> torch.dtype:
    """That in which a leaf comes out of the kernels; the interpreter does not convert as GPUs do."""
    return dtype if windows.INTERPRETED else keys.wide_dtypes.get(key, dtype)


def _units(keys: Keys, key: Hashable, dtype: torch.dtype, count: int, address: int) -> tuple[Any, ...]:
    wide = keys.wide_dtypes.get(key)
    if wide is None or windows.INTERPRETED:
        return rows.units_of(count * dtype.itemsize, address)
    return rows.units_as(count, (address, 0), dtype, wide)


def find_plan(keys: Keys, addresses: tuple[int, ...], every: bool = True) -> Plan:
    """The plan for leaves at such addresses; ``every`` output is copied, or those gathered."""
    default_dtype = torch.get_default_dtype()
    plan: Plan = keys.compute_once(
        ("plan", addresses, every, default_dtype), lambda: _make_plan(keys, addresses, every, default_dtype)
    )
    return plan


def _make_plan(keys: Keys, addresses: tuple[int, ...], every: bool, default_dtype: torch.dtype) -> Plan:
    kinds = {
        key: (features, dtype, _units(keys, key, dtype, math.prod(features), address))
        for (key, dtype, features), address in zip(keys.kinds, addresses, strict=True)
    }
    copied = [output for output in keys.outputs if every or output[2]]
    order = [*kinds]
    copied.sort(key=lambda output: (-kinds[output[1]][2][2], order.index(output[1])))
    wide = [output for output in copied if kinds[output[1]][2][2]]
    returns = [(key, *kinds[key][:2]) for key in keys.rewards]
    return Plan(
        [(key, features, dtype if dtype.is_floating_point else default_dtype) for key, features, dtype in returns],
        tuple([math.prod(features) for _, features, _ in returns]),
        dict.fromkeys([out for out, _, _ in keys.outputs]),
        [out for out, _, _ in copied],
        [(kinds[key][0], dtype_of(keys, key, kinds[key][1])) for _, key, _ in copied],
        getter([key for _, key, _ in copied]),
        getter([key for _, key, _ in wide]),
        tuple([kinds[key][2] for _, key, _ in wide]),
        tuple([kinds[key][2][2] for _, key, _ in wide]),
        tuple([int(at) for _, _, at in wide]),
        any(kinds[key][1].is_complex for _, key, _ in wide),
        {},
    )


def roles_of(keys: Keys, data: Leaves, olds: Leaves) -> tuple[tuple[tuple[Tensor, Tensor], ...], ...]:
    """Done flags, masks, ids and rewards, pairs of data and carry."""
    dones, rewards = (tuple([(data[key], olds[key]) for key in each]) for each in (keys.done, keys.rewards))
    masks, ids = (() if key is None else ((data[key], olds[key]),) for key in (keys.mask, keys.traj))
    if windows.INTERPRETED:
        # The interpreter neither converts subnormal bfloat16 nor rounds to it.
        rewards = tuple([(widened(leaf), widened(old)) for leaf, old in rewards])
    return dones, masks, ids, rewards


def widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def tile_of(longest: int, piece: int, marks: bool) -> int:
    """Lanes of a program: half as many windows where each takes more registers."""
    return windows.TILE // 2 if longest > 1 << piece or marks else windows.TILE


@functools.lru_cache(maxsize=64)
def powers(gamma: float, n_steps: int, device: torch.device) -> Tensor:
    """``gamma ** k`` for ``k = 0 .. n_steps``, float64."""
    return torch.tensor([gamma**k for k in range(n_steps + 1)], dtype=torch.float64, device=device)


def copy_rows(
    plan: Plan,
    jobs: Sequence[tuple[Tensor, ...]],
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
    check_fits(0, max(count, first + held, slots if held else 0) * plan.widths[0])
    tile = rows.TILE
    if plan.has_complex:
        jobs = [tuple(map(as_real, leaves)) for leaves in jobs]
    programs = -sum([-count * width // tile + -held * width // tile for width in plan.widths])
    amd = is_amd()
    run(
        *(plan.compiled, rows.n_step_rows_kernel, (carried, amd), programs),
        *(*jobs, lists, count, held, carry_rows, first, slots),
        *(plan.units, plan.widths, plan.gathered, carried, tile, not amd),
        # Many leaves would take more, to no use.
        registers=rows.MOST_REGISTERS,
    )
