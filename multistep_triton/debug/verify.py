"""The backend ``verify``: runs the kernels or the fast path beside the specification, and raises if they differ.

Owns the comparison. May import ``engine``, ``spec`` and what they may, ``ends``, ``differences``, ``rounding`` and
``tables``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multistep_triton import spec, spec_ring
from multistep_triton.backends import EquivalenceError, find_obstacle
from multistep_triton.carry import Carry
from multistep_triton.debug.differences import COPIED, Output, check, different_bits, items_of
from multistep_triton.debug.rounding import float64_returns
from multistep_triton.debug.tables import Row, number
from multistep_triton.ends import Ends
from multistep_triton.engine import implementation_of
from multistep_triton.samples import Ring, Samples, find_there
from multistep_triton.task import Leaves, Results, Task


def n_step_extend(task: Task, carry: Carry | None, data: Leaves) -> Results:
    """Computes :func:`multistep_triton.engine.n_step_extend` with the tested backend and the specification.

    Returns:
        The results of the tested backend.

    Raises:
        EquivalenceError: the results of both differ, or the tested backend wrote into its inputs.
    """
    tested = _tested(data.values(), [data[key] for key in task.keys.rewards])
    expected = spec.n_step_extend(task, carry, data)
    held = {key: carry.pieces(key, task.time_dim) for key in data} if carry else {}
    read = {"frames held back": held, "data": {key: [leaf] for key, leaf in data.items()}}
    before = {what: {key: [each.clone() for each in views] for key, views in of.items()} for what, of in read.items()}
    got: Results = tested.compute.n_step_extend(task, carry, data)
    for what, leaves in read.items():
        _check_unchanged(leaves, before[what], what, tested)
    call = _Call(tested, task, carry, data, got.steps, expected.steps)
    check(tested[:2], call.outputs(got, expected), expected.steps.ndim, call.window)
    return got


def n_step_sample(task: Task, samples: Samples, data: Leaves) -> Results:
    """Computes :func:`multistep_triton.engine.n_step_sample` with both; returns and raises as :func:`n_step_extend`."""
    tested = _tested([*data.values(), *samples.indices], [data[key] for key in task.keys.rewards])
    got: Results = tested.compute.n_step_sample(task, samples, data)
    expected = spec.n_step_sample(task, samples, data)
    # Each sampled frame becomes the first frame of a row that holds the frames after it.
    _, there = find_there(samples, next(iter(data.values())).shape)
    slots, after = spec_ring.rows_of(there, min(task.n_steps + 1, samples.live))
    rows = {key: data[key][slots] for key in dict.fromkeys((*task.keys.flags, *task.keys.rewards, next(iter(data))))}
    computed = [_one_frame(each) for each in (got, expected)]
    call = _Call(tested, task._replace(time_dim=1), None, rows, computed[0].steps, computed[1].steps)

    def window(output: Output, frame: tuple[int, ...], item: int) -> str:
        (j,) = frame
        known = min(int(after[j]) + 1, task.n_steps + 1)
        row = {key: leaf[j : j + 1, :known] for key, leaf in rows.items()}
        own = task.n_steps if samples.n_steps is None else int(samples.n_steps[j])
        steps = call.got_steps[j : j + 1], call.steps[j : j + 1]
        one = _Call(tested, call.task._replace(n_steps=own), None, row, *steps)
        index = tuple(int(dim[j]) for dim in samples.indices)
        return f"  sampled    at index {index} of the storage\n{one.window(output, (0, 0), item)}"

    def of_sample(output: Output) -> Output:
        squeezed: dict[str, Any] = {
            name: each.squeeze(1) for name, each in output._asdict().items() if isinstance(each, Tensor)
        }
        return output._replace(**squeezed)

    check(tested[:2], map(of_sample, call.outputs(*computed)), 1, window, "sample")
    return got


def store_frames(data: Leaves, ring: Ring, slot: int | Tensor) -> Tensor:
    """Computes :func:`multistep_triton.engine.store_frames`, and checks that every frame lies in its slot."""
    leaves, numbers, dims, time_dim, _ = ring
    tested = _tested([*data.values(), *leaves.values()])
    (slots, *lead), device = next(iter(leaves.values())).shape[:dims], next(iter(leaves.values())).device
    at, *others = (torch.arange(size, device=device) for size in (next(iter(data.values())).shape[time_dim], *lead))
    at = (at + int(slot)) % slots
    index: Tensor = tested.compute.store_frames(data, ring, slot)
    expected = torch.cartesian_prod(at, *others).view(-1, dims)
    stored = [Output("index", "where frames lie", index, expected.to(index.device), COPIED)]
    for key, leaf in leaves.items():
        came, lies = (each.flatten(0, dims - 1) for each in (data[key].transpose(0, time_dim), leaf[at]))
        output = Output(key, f"{key} as it is stored", lies, came.to(leaf.dtype), COPIED)
        if leaf.dtype != came.dtype:
            # A NaN may get any of several bit patterns in another dtype, so that values are compared and not bits.
            equal = torch.zeros_like(lies, dtype=torch.float64)
            output = output._replace(source="what is stored is rounded once", tolerance=equal, exact=came.double())
        stored.append(output)
    if numbers is not None:
        lies = numbers[at].flatten()
        stored.append(Output("numbers", "slots of frames", lies, expected[:, 0], COPIED))
    check(tested[:2], stored, 1, lambda output, frame, item: f"  stored at  {expected[frame[0]].tolist()}", "frame")
    return index


def check_kept_once(ends: Ends, data: Leaves, ended: Tensor) -> None:
    """Checks that each frame has at the root what the one before, if it is no end, has under "next".

    Args:
        ends: the ends of the storage before it stores the frames.
        data: leaves of the frames, ``[T, *R, ...]``.
        ended: the result of :meth:`Ends.find_ended`.

    Raises:
        EquivalenceError: a frame does not.
    """
    dims, outputs = ended.ndim, []
    for path, rows in ends.rows.items():
        key, features = path[1:], [1] * (rows.ndim - ended.ndim)
        after = torch.cat((rows[-1:], data[path][:-1]))
        own = torch.where(ended.view(*ended.shape, *features), after, data[key])
        own, after = (each.movedim(0, dims - 1) for each in (own, after))
        outputs.append(Output(key, f"{key}, which is kept once", own, after, "what comes after a frame the next holds"))

    def window(output: Output, frame: tuple[int, ...], item: int) -> str:
        before = "the frame before this call" if frame[-1] == 0 else f"t = {frame[-1] - 1}"
        return (
            f"  after      {before}, which no flag ends: an observation was altered in between, or an environment "
            f"reset without one"
        )

    check(("entry at the root", "one under 'next' of the frame before"), outputs, dims, window)


def gather_future(value: Tensor, steps: Tensor) -> Tensor:
    """Computes :func:`multistep_triton.gather_future` with both; returns and raises as :func:`n_step_extend`."""
    tested = _tested((value, steps))
    got: Tensor = tested.compute.gather_future(value, steps)
    expected = spec.gather_future(value, steps)

    def window(output: Output, frame: tuple[int, ...], item: int) -> str:
        return f"  its window ends at t = {frame[-1] + int(steps[frame]) - 1}, as steps is {int(steps[frame])} there"

    check(tested[:2], [Output("value", "value at the end of the window", got, expected, COPIED)], steps.ndim, window)
    return got


class _Tested(NamedTuple):
    """The backend that is compared with the specification."""

    name: str
    against: str
    """The name of the specification in messages about this backend."""
    end: str
    """The verb "end" in the form that agrees with ``name``."""
    compute: Any


def _tested(tensors: Collection[Tensor], rewards: Iterable[Tensor] = ()) -> _Tested:
    if find_obstacle(tensors, rewards):
        return _Tested("reference", "specification", "ends", implementation_of("reference"))
    return _Tested("kernels", "reference", "end", implementation_of("triton"))


def _one_frame(results: Results) -> Results:
    """Returns the results of samples ``[N, ...]`` as results of rows of one frame, ``[N, 1, ...]``."""
    leaves, returns = ({key: leaf.unsqueeze(1) for key, leaf in of.items()} for of in results[:2])
    steps, discount, nonterminal = (each.unsqueeze(1) for each in results[2:5])
    return Results(leaves, returns, steps, discount, nonterminal)


@dataclass
class _Call:
    """The arguments of one call and the steps that both computed; its stream is the carry's frames, then the data's."""

    tested: _Tested
    task: Task
    carry: Carry | None
    data: Leaves
    got_steps: Tensor
    steps: Tensor

    def stream(self, key: Hashable) -> Tensor:
        leaf, dim = self.data[key], self.task.time_dim
        return torch.cat((self.carry.frames(key, dim), leaf), dim) if self.carry else leaf

    def outputs(self, got: Results, expected: Results) -> Iterator[Output]:
        """Yields the outputs that both computed; those whose differences explain the others come first."""
        keys, _, gamma, time_dim, _ = self.task
        steps, discount, nonterminal = expected[2:5]
        yield Output("steps_to_next_obs", "steps (steps_to_next_obs)", got[2], steps, "frames are counted")
        yield Output("nonterminal", "nonterminal", got[4], nonterminal, "flags are flags")
        ulp = torch.finfo(discount.dtype).eps * discount + torch.finfo(discount.dtype).tiny
        exact = gamma ** steps.double()
        yield Output("gamma", "discount (gamma)", got[3], discount, "one ulp, as both round the power once", ulp, exact)
        for key, sums in _pairs(self.tested, got.returns, expected.returns):
            exact, bound, overflows = float64_returns(self.stream(key), steps, gamma, sums[1].dtype)
            source = "twice the error against float64 that a sum of these rewards may have"
            yield Output(key, f"the n-step return of {key}", *sums, source, 2 * bound, exact, overflows)
        sources = {out: (key, " at the end of the window" if at_end else "") for out, key, at_end in keys.outputs}
        for out, leaves in _pairs(self.tested, got.leaves, expected.leaves):
            key, end = sources[out]
            yield Output(key, f"{key}{end}", *leaves, COPIED)
        held = [
            {} if each is None else {key: each.frames(key, time_dim) for key in each.leaves}
            for each in (got.carry, expected.carry)
        ]
        for key, leaves in _pairs(self.tested, *held):
            yield Output(key, f"{key} of the frames held back", *leaves, COPIED, first=steps.shape[-1])

    def window(self, output: Output, frame: tuple[int, ...], item: int) -> str:
        """Tabulates the window of frame ``(*b, t)`` of an output, and the frame after the window."""
        keys, n_steps, *_ = self.task
        at, begin = frame[:-1], frame[-1] + output.first
        mask, traj = (None if key is None else self.stream(key)[at] for key in (keys.mask, keys.traj))
        dones = {str(key[-1] if isinstance(key, tuple) else key): self.stream(key)[at] for key in keys.done}
        # Without done keys, the table shows a flag that is never set.
        row = Row.read(dones or {"done": torch.zeros(self.stream(next(iter(self.data))).shape[len(at)])}, mask, traj)
        steps, got_steps = self.steps[at].tolist(), self.got_steps[at].tolist()
        notes: dict[int, list[str]] = {begin: ["this frame"]}
        last = begin
        if begin < len(steps):
            end, got_end = begin + steps[begin] - 1, begin + got_steps[begin] - 1
            # The steps of a wrong backend may be any number.
            last = min(max(end, got_end, begin), begin + n_steps)
            notes.setdefault(end, []).append(f"the {self.tested.against} ends it: {row.why(begin, end, n_steps)}")
            if got_end != end:
                notes.setdefault(got_end, []).append(f"the {self.tested.name} {self.tested.end} it")

        columns: dict[str, Callable[[int], str]] = {}
        if self.carry:
            carried = self.carry.count
            columns["frame"] = lambda t: f"held back [{t}]" if t < carried else f"data [{t - carried}]"
        for key in keys.rewards:
            rewards = items_of(self.stream(key)[at], 1)
            of = item if key == output.key and item < rewards.shape[1] else 0
            columns[f"{key}" if rewards.shape[1] == 1 else f"{key} [{of}]"] = partial(_cell, rewards, of)
        columns[f"steps ({self.tested.against})"] = lambda t: str(steps[t]) if t < len(steps) else "-"
        columns[f"steps ({self.tested.name})"] = lambda t: str(got_steps[t]) if t < len(steps) else "-"
        table = row.table(begin, min(last + 1, len(row.done) - 1), columns, notes)
        return f"  its window, n_steps = {n_steps}, t = 0 the first frame that this call returned:\n{table}"


def _cell(items: Tensor, item: int, t: int) -> str:
    return number(items[t, item].item())


def _pairs(tested: _Tested, got: Leaves, expected: Leaves) -> Iterator[tuple[Hashable, tuple[Tensor, Tensor]]]:
    """Pairs the tensors under each key, except where both are the same tensor; raises if the keys differ."""
    if got.keys() != expected.keys():
        made, expects = list(got), list(expected)
        raise EquivalenceError(f"the {tested.name} made the entries {made}, the {tested.against} {expects}")
    return ((key, (got[key], leaf)) for key, leaf in expected.items() if got[key] is not leaf)


def _check_unchanged(
    leaves: Mapping[Any, list[Tensor]], before: Mapping[Any, list[Tensor]], what: str, tested: _Tested
) -> None:
    """Checks that a backend did not write into its inputs; if it did, restores them and raises an error."""
    pairs = {key: list(zip(views, before[key], strict=True)) for key, views in leaves.items()}
    if written := [key for key, each in pairs.items() if any(different_bits(*pair).any() for pair in each)]:
        for key in written:
            for view, copy in pairs[key]:
                view.copy_(copy)
        raise EquivalenceError(f"the {tested.name} wrote into {written} of the {what}", key=written[0], what=what)
