"""The backend ``verify``: the specification beside the kernels or the fast path, and what is said where they differ.

Owns the comparison. May import ``engine``, ``spec`` and what they may.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multistep_triton import spec
from multistep_triton.backends import EquivalenceError, find_obstacle
from multistep_triton.carry import Carry
from multistep_triton.debug.rounding import float64_returns
from multistep_triton.engine import implementation_of
from multistep_triton.task import Results, Samples, Task, find_there
from multistep_triton.debug.tables import Row, number

COPIED = "what is copied is equal, bit for bit"


class _Output(NamedTuple):
    """One tensor ``[*B, E, *F]`` that both computed."""

    key: Hashable
    what: str
    got: Tensor
    expected: Tensor
    source: str
    """Where the tolerance comes from."""
    tolerance: Tensor | None = None
    """Of the expected's shape; None where the bits must be equal."""
    exact: Tensor | None = None
    """What both round, in float64; None where nothing is rounded."""
    first: int = 0
    """Where its first frame lies in the stream of carry and data."""


def n_step_extend(task: Task, carry: Carry | None, data: Mapping[Any, Tensor]) -> Results:
    """Computes :func:`multistep_triton.engine.n_step_extend` twice.

    Returns:
        What the backend computed that is verified.

    Raises:
        EquivalenceError: it is not what the specification computed.
    """
    tested = _tested(data.values(), [data[key] for key in task.keys.rewards])
    expected = spec.n_step_extend(task, carry, data)
    held = {key: carry.pieces(key, task.time_dim) for key in data} if carry else {}
    read = {"frames held back": held, "data": {key: [leaf] for key, leaf in data.items()}}
    before = {what: {key: [each.clone() for each in views] for key, views in of.items()} for what, of in read.items()}
    got = tested.compute.n_step_extend(task, carry, data)
    for what, leaves in read.items():
        _check_unchanged(leaves, before[what], what, tested)
    call = _Call(tested, task, carry, data, got.steps, expected.steps)
    _check(tested, call.outputs(got, expected), expected.steps.ndim, call.window)
    return got


def n_step_sample(task: Task, samples: Samples, data: Mapping[Any, Tensor]) -> Results:
    """Computes :func:`multistep_triton.engine.n_step_sample` twice; returns and raises as for extend."""
    tested = _tested([*data.values(), *samples.indices], [data[key] for key in task.keys.rewards])
    got, expected = tested.compute.n_step_sample(task, samples, data), spec.n_step_sample(task, samples, data)
    # What the frames of a window are to those of a row in which it is the first one.
    _, there = find_there(samples, next(iter(data.values())).shape)
    slots, after = spec.rows_of(there, min(task.n_steps + 1, samples.live))
    rows = {key: data[key][slots] for key in dict.fromkeys((*task.keys.flags, *task.keys.rewards, next(iter(data))))}
    computed = [_one_frame(each) for each in (got, expected)]
    call = _Call(tested, task._replace(time_dim=1), None, rows, computed[0].steps, computed[1].steps)

    def window(output: _Output, frame: tuple[int, ...], item: int) -> str:
        (j,) = frame
        known = min(int(after[j]) + 1, task.n_steps + 1)
        row = {key: leaf[j : j + 1, :known] for key, leaf in rows.items()}
        own = task.n_steps if samples.n_steps is None else int(samples.n_steps[j])
        steps = call.got_steps[j : j + 1], call.steps[j : j + 1]
        one = _Call(tested, call.task._replace(n_steps=own), None, row, *steps)
        index = tuple(int(dim[j]) for dim in samples.indices)
        return f"  sampled    at index {index} of the storage\n{one.window(output, (0, 0), item)}"

    def of_sample(output: _Output) -> _Output:
        squeezed: dict[str, Any] = {
            name: each.squeeze(1) for name, each in output._asdict().items() if isinstance(each, Tensor)
        }
        return output._replace(**squeezed)

    _check(tested, map(of_sample, call.outputs(*computed)), 1, window, "sample")
    return got


def gather_future(value: Tensor, steps: Tensor) -> Tensor:
    """Computes :func:`multistep_triton.gather_future` twice; returns and raises alike."""
    tested = _tested((value, steps))
    got, expected = tested.compute.gather_future(value, steps), spec.gather_future(value, steps)

    def window(output: _Output, frame: tuple[int, ...], item: int) -> str:
        return f"  its window ends at t = {frame[-1] + int(steps[frame]) - 1}, as steps is {int(steps[frame])} there"

    _check(tested, [_Output("value", "value at the end of the window", got, expected, COPIED)], steps.ndim, window)
    return got


class _Tested(NamedTuple):
    """The backend that is held to the specification."""

    name: str
    end: str
    """What they do to windows."""
    compute: Any


def _tested(tensors: Collection[Tensor], rewards: Iterable[Tensor] = ()) -> _Tested:
    if find_obstacle(tensors, rewards):
        return _Tested("fast path", "ends", implementation_of("reference"))
    return _Tested("kernels", "end", implementation_of("triton"))


def _one_frame(results: Results) -> Results:
    """What came of samples ``[N, ...]`` as if it came of rows of one frame, ``[N, 1, ...]``."""
    leaves, returns = ({key: leaf.unsqueeze(1) for key, leaf in of.items()} for of in results[:2])
    return Results(leaves, returns, *(each.unsqueeze(1) for each in results[2:5]))


@dataclass
class _Call:
    """The arguments of one call and the steps that came of it; its stream is the frames of carry and data."""

    tested: _Tested
    task: Task
    carry: Carry | None
    data: Mapping[Any, Tensor]
    got_steps: Tensor
    steps: Tensor

    def stream(self, key: Hashable) -> Tensor:
        leaf, dim = self.data[key], self.task.time_dim
        return torch.cat((self.carry.frames(key, dim), leaf), dim) if self.carry else leaf

    def outputs(self, got: Results, expected: Results) -> Iterator[_Output]:
        """What both computed; what explains the rest comes first."""
        keys, _, gamma, time_dim, _ = self.task
        steps, discount, nonterminal = expected[2:5]
        yield _Output("steps_to_next_obs", "steps (steps_to_next_obs)", got[2], steps, "frames are counted")
        yield _Output("nonterminal", "nonterminal", got[4], nonterminal, "flags are flags")
        ulp = torch.finfo(discount.dtype).eps * discount + torch.finfo(discount.dtype).tiny
        exact = gamma ** steps.double()
        yield _Output(
            "gamma", "discount (gamma)", got[3], discount, "one ulp, as both round the power once", ulp, exact
        )
        for key, sums in _pairs(got[1], expected[1], self.tested.name):
            exact, bound = float64_returns(self.stream(key), steps, gamma, sums[1].dtype)
            source = "twice the error against float64 that a sum of these rewards may have"
            yield _Output(key, f"the n-step return of {key}", *sums, source, 2 * bound, exact)
        sources = {out: (key, " at the end of the window" if at_end else "") for out, key, at_end in keys.outputs}
        for out, leaves in _pairs(got[0], expected[0], self.tested.name):
            key, end = sources[out]
            yield _Output(key, f"{key}{end}", *leaves, COPIED)
        held = [
            {} if each is None else {key: each.frames(key, time_dim) for key in each.leaves}
            for each in (got.carry, expected.carry)
        ]
        for key, leaves in _pairs(*held, self.tested.name):
            yield _Output(key, f"{key} of the frames held back", *leaves, COPIED, first=steps.shape[-1])

    def window(self, output: _Output, frame: tuple[int, ...], item: int) -> str:
        """The window of a frame ``(*b, t)`` of an output, and the frame after it, as a table."""
        keys, n_steps, *_ = self.task
        at, begin = frame[:-1], frame[-1] + output.first
        mask, traj = (None if key is None else self.stream(key)[at] for key in (keys.mask, keys.traj))
        dones = {str(key[-1] if isinstance(key, tuple) else key): self.stream(key)[at] for key in keys.done}
        # Where no flag ends windows, none is set.
        row = Row.read(dones or {"done": torch.zeros(self.stream(next(iter(self.data))).shape[len(at)])}, mask, traj)
        steps, got_steps = self.steps[at].tolist(), self.got_steps[at].tolist()
        notes: dict[int, list[str]] = {begin: ["this frame"]}
        last = begin
        if begin < len(steps):
            end, got_end = begin + steps[begin] - 1, begin + got_steps[begin] - 1
            # What is tested may have counted anything.
            last = min(max(end, got_end, begin), begin + n_steps)
            notes.setdefault(end, []).append(f"the reference ends it: {row.why(begin, end, n_steps)}")
            if got_end != end:
                notes.setdefault(got_end, []).append(f"the {self.tested.name} {self.tested.end} it")

        columns: dict[str, Callable[[int], str]] = {}
        if self.carry:
            carried = self.carry.count
            columns["frame"] = lambda t: f"held back [{t}]" if t < carried else f"data [{t - carried}]"
        for key in keys.rewards:
            rewards = _items(self.stream(key)[at], 1)
            of = item if key == output.key and item < rewards.shape[1] else 0
            columns[f"{key}" if rewards.shape[1] == 1 else f"{key} [{of}]"] = partial(_cell, rewards, of)
        columns["steps (reference)"] = lambda t: str(steps[t]) if t < len(steps) else "-"
        columns[f"steps ({self.tested.name})"] = lambda t: str(got_steps[t]) if t < len(steps) else "-"
        table = row.table(begin, min(last + 1, len(row.done) - 1), columns, notes)
        return f"  its window, n_steps = {n_steps}, t = 0 the first frame that this call returned:\n{table}"


def _check(
    tested: _Tested, outputs: Iterable[_Output], dims: int, window: Callable[[_Output, tuple[int, ...], int], str], name: str = "t"
) -> None:
    """Raises the error of the first output that differs; ``dims`` are those of ``[*B, E]``, ``name`` the last one's."""
    found = []
    for output in outputs:
        got, expected = output.got, output.expected
        if (got.shape, got.dtype) != (expected.shape, expected.dtype):
            raise EquivalenceError(
                f"the {tested.name} and the reference differ at {output.what}: {got.dtype} {list(got.shape)} and "
                f"{expected.dtype} {list(expected.shape)}",
                key=output.key,
                what=output.what,
            )
        different = _different(output, dims)
        if different.any():
            found.append((output, different))
    if not found:
        return
    (output, different), *others = found
    *frame, item = at = tuple(different.nonzero()[0].tolist())
    got, expected = (_items(tensor, dims)[at] for tensor in (output.got, output.expected))
    values = [number(got), number(expected)]
    if values[0] == values[1]:
        values = [f"{number(each)}, in bytes {_bytes(each).tolist()}" for each in (got, expected)]
    tolerance = 0.0 if output.tolerance is None else float(_items(output.tolerance, dims)[at])
    batch = f"batch index {tuple(frame[:-1])}, " if dims > 1 else ""
    element = f", element [{item}] of {different.shape[-1]}" if different.shape[-1] > 1 else ""
    below = f" of those held back, t = {output.first + frame[-1]} below" if output.first else ""
    lines = [
        f"the {tested.name} and the reference differ at {output.what}, frame {tuple(frame)}: {values[0]} and {values[1]}",
        f"  frame      {batch}{name} = {frame[-1]}{below}{element}; {_count(different)}",
        f"  {tested.name:<10} {values[0]}",
        f"  reference  {values[1]}",
        *([] if output.exact is None else [f"  float64    {number(_items(output.exact, dims)[at])}"]),
        f"  tolerance  {tolerance:.3g}: {output.source}",
        *(f"  also       {other.what}: {_count(where)}" for other, where in others),
        window(output, tuple(frame), item),
    ]
    raise EquivalenceError(
        "\n".join(lines),
        key=output.key,
        what=output.what,
        frame=tuple(frame),
        kernels=got.item(),
        reference=expected.item(),
        tolerance=tolerance,
    )


def _check_unchanged(leaves: Mapping[Any, list[Tensor]], before: Mapping[Any, list[Tensor]], what: str, tested: _Tested) -> None:
    """Raises an error if a backend wrote where they read, and undoes it."""
    pairs = {key: list(zip(views, before[key], strict=True)) for key, views in leaves.items()}
    if written := [key for key, each in pairs.items() if any(different_bits(*pair).any() for pair in each)]:
        for key in written:
            for view, copy in pairs[key]:
                view.copy_(copy)
        raise EquivalenceError(f"the {tested.name} wrote into {written} of the {what}", key=written[0], what=what)


def _different(output: _Output, dims: int) -> Tensor:
    """Which items differ, ``[*B, E, F]``."""
    got, expected = _items(output.got, dims), _items(output.expected, dims)
    if output.tolerance is None or output.exact is None:
        return different_bits(got, expected)
    exact, tolerance = (_items(tensor, dims) for tensor in (output.exact, output.tolerance))
    one, other = got.double(), expected.double()
    equal = (one == other) | (one.isnan() & other.isnan())
    # Where the exact sum is finite, an infinity is the next number after the largest: one rounding decides.
    largest = torch.finfo(got.dtype).max
    top = largest * (1 + torch.finfo(got.dtype).eps) if got.dtype != torch.float64 else largest
    near = (one.clamp(-top, top) - other.clamp(-top, top)).abs() <= tolerance
    return ~(equal | (near & exact.isfinite() & tolerance.isfinite()))


def different_bits(one: Tensor, other: Tensor) -> Tensor:
    """Which elements of two tensors of one shape and dtype differ, NaNs by their payloads."""
    return (_bytes(one) != _bytes(other)).any(-1)


def _items(tensor: Tensor, dims: int) -> Tensor:
    """``[*B, E, *F]``, of which ``dims`` are ``[*B, E]``, as ``[*B, E, F]``."""
    return tensor[..., None].flatten(dims)


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of every element, in one dimension more."""
    return tensor.detach().resolve_conj().resolve_neg()[..., None].contiguous().view(torch.uint8)


def _count(different: Tensor) -> str:
    frames = different.any(-1)
    return f"{int(frames.sum())} of {frames.numel()} frames differ"


def _cell(items: Tensor, item: int, t: int) -> str:
    return number(items[t, item].item())


def _pairs(
    got: Mapping[Any, Tensor], expected: Mapping[Any, Tensor], name: str
) -> Iterator[tuple[Hashable, tuple[Tensor, Tensor]]]:
    """What both have under each key; a tensor that is passed through as it is needs no comparison."""
    if got.keys() != expected.keys():
        raise EquivalenceError(f"the {name} made the entries {list(got)}, the reference {list(expected)}")
    return ((key, (got[key], leaf)) for key, leaf in expected.items() if got[key] is not leaf)
