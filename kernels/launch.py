"""Launchers: from the tensors of a call to the arguments of the kernel, and to what it returns, in new memory."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from multistep_triton.kernels.extend import n_step_extend_kernel
from multistep_triton.kernels.plan import WIDEST, Plan, plan_extend, plan_gather
from multistep_triton.kernels.stream import coded
from multistep_triton.ring import Ring, Samples, find_place

NUM_WARPS = 4


def launch_n_step_extend(
    carry: Ring | None,
    data: Mapping[Hashable, Tensor],
    *,
    time_dim: int,
    reward_keys: Collection[Hashable],
    gathered_keys: Collection[Hashable],
    done_keys: Sequence[Hashable],
    mask_key: Hashable | None,
    traj_key: Hashable | None,
    n_steps: int,
    gamma: float,
    hold: bool,
) -> tuple[Any, ...]:
    """Computes :func:`multistep_triton.dispatch.n_step_extend`."""
    device, carried = data[done_keys[0]].device, carry.count if carry else 0
    place = find_place(carry, data.values(), data[done_keys[0]].shape[time_dim], n_steps) if hold else None
    seen = _Seen(data, carry)
    plan = plan_extend(
        tuple(seen.described),
        time_dim,
        tuple(reward_keys),
        frozenset(gathered_keys),
        tuple(done_keys),
        mask_key,
        traj_key,
        carried,
        n_steps,
        place and place[1:],
        None,
        torch.get_default_dtype(),
    )
    stay = None
    if place:
        stay = carry.leaves if carry and place.stay else {}
    memory = _Memory(plan, data, seen.addresses, device, stay)
    _, rows, carried, known, emitted, *_ = plan.scalars
    ring = place.ring(memory.held, emitted, known) if place else None
    rings = _slots(carry, rows), _slots(ring, rows)
    flags = seen.flags(plan, done_keys, mask_key, traj_key)
    _run(plan, device, *plan.scalars, *rings, (), gamma, flags, *memory.arguments)
    return memory.leaves, memory.returns, *memory.windows, ring


def launch_n_step_sample(
    samples: Samples,
    data: Mapping[Hashable, Tensor],
    *,
    reward_keys: Collection[Hashable],
    gathered_keys: Collection[Hashable],
    done_keys: Sequence[Hashable],
    mask_key: Hashable | None,
    traj_key: Hashable | None,
    n_steps: int,
    gamma: float,
) -> tuple[Any, ...]:
    """Computes :func:`multistep_triton.dispatch.n_step_sample`."""
    device, dims = data[done_keys[0]].device, len(samples.indices)
    index = [each.contiguous() for each in samples.indices]
    seen = _Seen(data, None, dims)
    plan = plan_extend(
        tuple(seen.described),
        dims - 1,
        tuple(reward_keys),
        frozenset(gathered_keys),
        tuple(done_keys),
        mask_key,
        traj_key,
        0,
        n_steps,
        None,
        (len(index[0]), samples.n_steps is not None),
        torch.get_default_dtype(),
    )
    memory = _Memory(plan, data, seen.addresses, device)
    picked = (
        tuple([coded(each.data_ptr()) for each in index]),
        tuple([coded(size) for size in data[done_keys[0]].shape[:dims]]),
        () if samples.n_steps is None else (coded(samples.n_steps.data_ptr()),),
        coded(len(index[0])),
        coded((samples.newest + 1) % samples.live),
    )
    sizes, rows, carried, _, *rest = plan.scalars
    flags = seen.flags(plan, done_keys, mask_key, traj_key)
    _run(plan, device, sizes, rows, carried, samples.live, *rest, (), (), picked, gamma, flags, *memory.arguments)
    return memory.leaves, memory.returns, *memory.windows


class _Seen:
    """The leaves of a call as a launcher needs them.

    Of a ring, whose first of ``first`` dimensions is time, the frames are seen as those of data are, with time last.
    """

    def __init__(self, data: Mapping[Hashable, Tensor], carry: Ring | None, first: int = 1) -> None:
        self.described: list[tuple[Any, ...]] = []
        self.addresses: dict[Hashable, tuple[int, int]] = {}
        self.copied = []  # kept until the launch
        for key, leaf in data.items():
            if leaf.is_neg() or leaf.is_conj():
                leaf = _as_it_lies(leaf)
                self.copied.append(leaf)
            new, old = leaf.data_ptr(), 0
            if carry:
                old = carry.leaves[key].data_ptr()
            shape: tuple[int, ...] = leaf.shape
            strides = leaf.stride()
            if first > 1:
                shape, strides = ((*each[1:first], each[0], *each[first:]) for each in (shape, strides))
            self.described.append((key, shape, strides, leaf.dtype, (new | old) % WIDEST))
            self.addresses[key] = coded(new), coded(old)

    def flags(self, plan: Plan, done_keys: Sequence[Hashable], *marks: Hashable | None) -> tuple[Any, ...]:
        """Those that lie alike together, then the others one by one."""
        alike: dict[Any, list[tuple[int, int]]] = {}
        for key in done_keys:
            alike.setdefault(plan.places[key], []).append(self.addresses[key])
        dones = [(*zip(*addresses, strict=True), *place) for place, addresses in alike.items()]
        return *dones, *[(*self.addresses[key], *plan.places[key]) for key in marks if key is not None]


class _Memory:
    """What a call returns, in new memory, and the arguments of the kernel that say where it is."""

    def __init__(
        self,
        plan: Plan,
        data: Mapping[Hashable, Tensor],
        addresses: Mapping[Hashable, tuple[int, int]],
        device: torch.device,
        stay: Mapping[Hashable, Tensor] | None = None,
    ) -> None:
        """Frames are held back in ``stay`` or, if that is empty, in new memory; if it is None, there are none."""
        empty = torch.empty_strided
        self.windows = [empty(shape, strides, dtype=dtype, device=device) for shape, strides, dtype in plan.windows]
        self.returns: dict[Hashable, Tensor] = {}
        self.leaves, self.held = dict(data), {}
        windows = tuple([coded(window.data_ptr()) for window in self.windows])
        rewards, copies = [], []
        for key, (shape, strides, dtype) in plan.returns.items():
            self.returns[key] = out = empty(shape, strides, dtype=dtype, device=device)
            rewards.append(((*addresses[key], *plan.places[key]), coded(out.data_ptr())))
        for lies, group in plan.copies:
            news, olds, outs, kepts = [], [], [], []
            for key, shape, strides, held_shape, held_strides, dtype in group:
                self.leaves[key] = out = empty(shape, strides, dtype=dtype, device=device)
                kept = None if stay is None else stay.get(key)
                if stay is not None:
                    if kept is None:
                        kept = empty(held_shape, held_strides, dtype=dtype, device=device)
                    self.held[key] = kept
                new, old = addresses[key]
                news.append(new)
                olds.append(old)
                outs.append(coded(out.data_ptr()))
                kepts.append(coded(0 if kept is None else kept.data_ptr()))
            copies.append((lies, tuple(news), tuple(olds), tuple(outs), tuple(kepts)))
        steps = windows[0], windows[0], *plan.steps
        self.arguments = steps, windows, tuple(rewards), tuple(copies)


def launch_gather_future(value: Tensor, steps: Tensor) -> Tensor:
    """Computes :func:`multistep_triton.gather_future`; a window that leaves its row is cut at the row's end."""
    value, steps = _as_it_lies(value), _as_it_lies(steps)
    new, lengths = value.data_ptr(), steps.data_ptr()
    plan = plan_gather(
        (value.shape, value.stride(), value.dtype, new % WIDEST), (steps.shape, steps.stride(), steps.dtype)
    )
    gathered = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    out = (coded(gathered.data_ptr()),)
    copy = plan.places["value"], (coded(new),), (coded(0),), out, out
    windows = coded(lengths), coded(0), *plan.steps
    _run(plan, value.device, *plan.scalars, (), (), (), 0.0, (), windows, (), (), (copy,))
    return gathered


def _as_it_lies(tensor: Tensor) -> Tensor:
    """A tensor whose bytes are its values; a view can be a conjugate or a negative that is still to be taken."""
    return tensor.resolve_neg().resolve_conj()


def _slots(ring: Ring | None, rows: int) -> tuple[int, ...]:
    """Where slots lie one after the other in memory: how many there are, the first one, and their rows; coded."""
    return (coded(ring.capacity), coded(ring.first), coded(rows)) if ring and ring.time_first else ()


def _run(plan: Plan, device: torch.device, *sources: Any) -> None:
    with _current(device):
        for launch in plan.launches:
            if not launch.programs:
                continue
            arguments = launch.starts, *sources, *launch.constants
            compiled = launch.compiled.get(device)
            if compiled is None:
                # Fused multiply-adds may be used in the recursion; the reference's are the compiler's choice, too.
                kernel = n_step_extend_kernel[(launch.programs,)]
                launch.compiled[device] = kernel(*arguments, num_warps=NUM_WARPS, enable_fp_fusion=True)
            else:
                # A plan compiles to one kernel: no need to look for it again among all that were compiled.
                compiled[(launch.programs, 1, 1)](*arguments)


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes the device the current one, on which Triton launches."""
    if device.type == "cpu" or device.index == torch.accelerator.current_device_index():
        return contextlib.nullcontext()
    return torch.accelerator.device_index(device.index)
