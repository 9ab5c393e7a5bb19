"""Plans: what a call's leaves alone determine, which is computed once, and the second launch, which copies rows."""

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
from multistep_triton.windows import powers_of


class Plan(NamedTuple):
    """What the keys, kinds and addresses of a call's leaves determine."""

    returns: list[tuple[Hashable, tuple[int, ...], torch.dtype]]
    """Key, features and dtype of each n-step return."""
    elements: tuple[int, ...]
    """Elements of each return in one frame."""
    blank: dict[Hashable, Any]
    """Every output key, with the value None, in the order of the results."""
    outs: list[Hashable]
    """Keys of the outputs that the second launch copies, the widest first."""
    kinds: list[tuple[tuple[int, ...], torch.dtype]]
    """Features and dtype of each of ``outs``."""
    take: Callable[[Leaves], tuple[Tensor, ...]]
    """Takes the leaf that is copied to each of ``outs``."""
    units: tuple[tuple[Any, ...], ...]
    """How those of these leaves are copied whose rows have any bytes, which come first; see ``rows.units_of``."""
    gathered: tuple[int, ...]
    """Which row of a window each is read from: 0 is ``OWN``, 1 ``AT_END``, 2 ``AFTER_END``."""
    has_complex: bool
    compiled: dict[Any, Any]
    """Compiled kernels, by name and by the ``kind`` that ``run`` takes."""


def getter(keys: Sequence[Hashable]) -> Callable[[Leaves], tuple[Tensor, ...]]:
    """Returns a function that takes the leaves of these keys."""
    return itemgetter(*keys) if len(keys) > 1 else lambda leaves: tuple([leaves[key] for key in keys])


def find_plan(keys: Keys, addresses: tuple[int, ...], every: bool = True) -> Plan:
    """Returns the plan for leaves at ``addresses``, modulo 16; it copies ``every`` output, or only gathered ones."""
    default_dtype = torch.get_default_dtype()
    plan: Plan = keys.compute_once(
        ("plan", addresses, every, default_dtype), lambda: _make_plan(keys, addresses, every, default_dtype)
    )
    return plan


def _make_plan(keys: Keys, addresses: tuple[int, ...], every: bool, default_dtype: torch.dtype) -> Plan:
    # In the interpreter, which converts unlike GPUs, each output has the dtype of its leaf.
    wide_dtypes = {} if windows.INTERPRETED else keys.wide_dtypes
    kinds, units = {}, {}
    for (key, dtype, features), address in zip(keys.kinds, addresses, strict=True):
        kinds[key] = features, wide_dtypes.get(key, dtype)
        units[key] = rows.units_of(math.prod(features), (address, 0), dtype, kinds[key][1])
    copied = [output for output in keys.outputs if every or output[2]]
    order = [*kinds]
    copied.sort(key=lambda output: (-units[output[1]][2], order.index(output[1])))
    wide = [output for output in copied if units[output[1]][2]]
    returns = [(key, *kinds[key]) for key in keys.rewards]
    return Plan(
        [(key, features, dtype if dtype.is_floating_point else default_dtype) for key, features, dtype in returns],
        tuple([math.prod(features) for _, features, _ in returns]),
        dict.fromkeys([out for out, _, _ in keys.outputs]),
        [out for out, _, _ in copied],
        [kinds[key] for _, key, _ in copied],
        getter([key for _, key, _ in copied]),
        tuple([units[key] for _, key, _ in wide]),
        tuple([int(at) for _, _, at in wide]),
        any(kinds[key][1].is_complex for _, key, _ in wide),
        {},
    )


def roles_of(keys: Keys, data: Leaves, olds: Leaves) -> tuple[tuple[tuple[Tensor, Tensor], ...], ...]:
    """Returns done flags, masks, ids and rewards, each leaf as a pair of that of ``data`` and that of ``olds``."""
    dones, rewards = (tuple([(data[key], olds[key]) for key in each]) for each in (keys.done, keys.rewards))
    masks, ids = (() if key is None else ((data[key], olds[key]),) for key in (keys.mask, keys.traj))
    if windows.INTERPRETED:
        # The interpreter neither converts subnormal bfloat16 nor rounds to bfloat16.
        rewards = tuple([(widened(leaf), widened(old)) for leaf, old in rewards])
    return dones, masks, ids, rewards


def widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def tile_of(longest: int, piece: int, marks: bool) -> int:
    """Returns the lanes of a program of windows: half of TILE if long windows or ``marks`` take more registers."""
    return windows.TILE // 2 if longest > 1 << piece or marks else windows.TILE


_CAPTURED: set[Tensor] = set()
"""Powers that CUDA graphs read, for as long as the process lives, as nobody tells when a graph ends."""


def powers(gamma: float, n_steps: int, device: torch.device) -> Tensor:
    """``gamma ** k`` for ``k = 0 .. n_steps``, float64."""
    found = _powers(gamma, n_steps, device)
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        _CAPTURED.add(found)
    return found


@functools.lru_cache(maxsize=64)
def _powers(gamma: float, n_steps: int, device: torch.device) -> Tensor:
    return powers_of(gamma, n_steps, device, torch.float64)


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
    """Launches ``rows.n_step_rows_kernel`` on ``jobs``, the leaves of data, carry, outputs and held frames."""
    # The kernel adds ``first`` to a place in the ring before it subtracts ``slots``.
    check_fits(0, max(count, first + held, slots if held else 0) * plan.units[0][2])
    tile = rows.TILE
    if plan.has_complex:
        jobs = [tuple(map(as_real, leaves)) for leaves in jobs]
    programs = -sum([-count * unit[2] // tile + -held * unit[2] // tile for unit in plan.units])
    amd = is_amd()
    run(
        *(plan.compiled, rows.n_step_rows_kernel, (carried, amd), programs),
        *(*jobs, lists, count, held, carry_rows, first, slots),
        *(plan.units, plan.gathered, carried, tile, not amd),
        # A kernel for many leaves would take more registers, and be no faster.
        registers=rows.MOST_REGISTERS,
    )
