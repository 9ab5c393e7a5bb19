"""The backend ``verify``: the kernels and the reference on every call, and what is said where they differ.

Owns the comparison. May import ``task``, ``ring``, ``reference``, ``sampling``, ``rounding``, ``windows`` and, where
they run, the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multistep_triton import reference, sampling
from multistep_triton.ring import Ring, Samples
from multistep_triton.rounding import float64_returns
from multistep_triton.task import Task
from multistep_triton.windows import Row, number

COPIED = "what is copied is equal, bit for bit"


class EquivalenceError(RuntimeError):
    """The kernels and the reference differ.

    The message names the entry, the first frame that differs, both values and the tolerance, and shows the rewards,
    flags and steps of the frame's window. After it the frames held back are those before the call.

    Attributes:
        key: the leaf's key, or ``"steps_to_next_obs"``, ``"nonterminal"`` or ``"gamma"``, the discount.
        what: which tensor of that key: the n-step return of a reward, the leaf itself, or the leaf held back.
        frame: indices ``(*b, t)`` of the first frame that differs, in that tensor; with a done flag per agent,
            ``(*b, agent, t)``; of a sample, its number.
        kernels, reference: the two values of the first element that differs there.
        tolerance: how far apart they may be; 0 where they must be equal.

    Example:
        >>> try:  # in place of a call with backend="verify"
        ...     raise EquivalenceError("they differ", key="gamma", frame=(0, 21), kernels=0.75, reference=0.5)
        ... except EquivalenceError as error:
        ...     print(error.key, error.frame, error.kernels - error.reference)
        gamma (0, 21) 0.25
    """

    def __init__(self, message: str, **attributes: Any) -> None:
        super().__init__(message)
        self.key: Hashable = None
        self.what = ""
        self.frame: tuple[int, ...] = ()
        self.kernels: Any = None
        self.reference: Any = None
        self.tolerance = 0.0
        self.__dict__.update(attributes)


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


def n_step_extend_verified(
    carry: Ring | None, data: Mapping[Any, Tensor], task: Task, *, time_dim: int, n_steps: int, gamma: float, hold: bool
) -> tuple[Any, ...]:
    """Computes :func:`multistep_triton.dispatch.n_step_extend` twice.

    Returns:
        What the kernels computed.

    Raises:
        EquivalenceError: it is not what the reference computed.
    """
    from multistep_triton.kernels import launch

    arguments: dict[str, Any] = {"time_dim": time_dim, "n_steps": n_steps, "gamma": gamma, "hold": hold}
    expected = reference.n_step_extend_reference(carry and carry.clone(), data, task, **arguments)
    held = {key: carry.pieces(key, time_dim) for key in data} if carry else {}
    read = {"frames held back": held, "data": {key: [leaf] for key, leaf in data.items()}}
    before = {what: {key: [each.clone() for each in views] for key, views in of.items()} for what, of in read.items()}
    got = launch.launch_n_step_extend(carry, data, task, **arguments)
    for what, leaves in read.items():
        _check_unchanged(leaves, before[what], what)
    call = _Call(carry, data, task, got[2], expected[2], time_dim, n_steps, gamma)
    _check(call.outputs(got, expected), expected[2].ndim, call.window)
    return got


def n_step_sample_verified(
    samples: Samples, data: Mapping[Any, Tensor], task: Task, *, n_steps: int, gamma: float
) -> tuple[Any, ...]:
    """Computes :func:`multistep_triton.dispatch.n_step_sample` twice; returns and raises as for extend."""
    from multistep_triton.kernels import launch

    expected = sampling.n_step_sample_reference(samples, data, task, n_steps=n_steps, gamma=gamma)
    got = launch.launch_n_step_sample(samples, data, task, n_steps=n_steps, gamma=gamma)
    # What the frames of a window are to those of a row in which it is the first one.
    read = dict.fromkeys((*task.done_keys, task.mask_key, task.traj_key, *task.reward_keys, next(iter(data))))
    ahead = min(n_steps + 1, samples.live)
    rows, known = sampling.windows_of(samples, {key: data[key] for key in read if key is not None}, ahead)
    computed = [[_one_frame(each) for each in (*results, None)] for results in (got, expected)]
    call = _Call(None, rows, task, computed[0][2], computed[1][2], 1, n_steps, gamma)

    def window(output: _Output, frame: tuple[int, ...], item: int) -> str:
        (j,) = frame
        row = {key: leaf[j : j + 1, : int(known[j])] for key, leaf in rows.items()}
        own = n_steps if samples.n_steps is None else int(samples.n_steps[j])
        one = replace(call, data=row, got_steps=call.got_steps[j : j + 1], steps=call.steps[j : j + 1], n_steps=own)
        index = tuple(int(dim[j]) for dim in samples.indices)
        return f"  sampled    at index {index} of the storage\n{one.window(output, (0, 0), item)}"

    def of_sample(output: _Output) -> _Output:
        squeezed: dict[str, Any] = {
            name: each.squeeze(1) for name, each in output._asdict().items() if isinstance(each, Tensor)
        }
        return output._replace(**squeezed)

    _check(map(of_sample, call.outputs(*computed)), 1, window, "sample")
    return got


def _one_frame(each: Any) -> Any:
    """What came of samples ``[N, ...]`` as if it came of rows of one frame, ``[N, 1, ...]``."""
    if isinstance(each, Tensor):
        return each.unsqueeze(1)
    return None if each is None else {key: leaf.unsqueeze(1) for key, leaf in each.items()}


def gather_future_verified(value: Tensor, steps: Tensor) -> Tensor:
    """Computes :func:`multistep_triton.gather_future` twice; returns and raises alike."""
    from multistep_triton.kernels import launch

    expected = reference.gather_future_reference(value, steps)
    got = launch.launch_gather_future(value, steps)

    def window(output: _Output, frame: tuple[int, ...], item: int) -> str:
        return f"  its window ends at t = {frame[-1] + int(steps[frame]) - 1}, as steps is {int(steps[frame])} there"

    _check([_Output("value", "value at the end of the window", got, expected, COPIED)], steps.ndim, window)
    return got


@dataclass
class _Call:
    """The arguments of one call and the steps that came of it; its stream is the frames of carry and data."""

    carry: Ring | None
    data: Mapping[Any, Tensor]
    task: Task
    got_steps: Tensor
    steps: Tensor
    time_dim: int
    n_steps: int
    gamma: float

    def stream(self, key: Hashable) -> Tensor:
        leaf = self.data[key]
        return torch.cat((self.carry.frames(key, self.time_dim), leaf), self.time_dim) if self.carry else leaf

    def outputs(self, got: Sequence[Any], expected: Sequence[Any]) -> Iterator[_Output]:
        """What both computed; what explains the rest comes first."""
        steps, discount, nonterminal = expected[2:5]
        yield _Output("steps_to_next_obs", "steps (steps_to_next_obs)", got[2], steps, "frames are counted")
        yield _Output("nonterminal", "nonterminal", got[4], nonterminal, "flags are flags")
        ulp = torch.finfo(discount.dtype).eps * discount + torch.finfo(discount.dtype).tiny
        exact = self.gamma ** steps.double()
        yield _Output(
            "gamma", "discount (gamma)", got[3], discount, "one ulp, as both round the power once", ulp, exact
        )
        for key, sums in _pairs(got[1], expected[1]):
            exact, bound = float64_returns(self.stream(key), steps, self.gamma, sums[1].dtype)
            source = "twice the error against float64 that a sum of these rewards may have"
            yield _Output(key, f"the n-step return of {key}", *sums, source, 2 * bound, exact)
        for key, leaves in _pairs(got[0], expected[0]):
            end = " at the end of the window" if key in self.task.gathered_keys else ""
            yield _Output(key, f"{key}{end}", *leaves, COPIED)
        rings = [
            {} if each is None else {key: each.frames(key, self.time_dim) for key in each.leaves}
            for each in (got[5], expected[5])
        ]
        for key, leaves in _pairs(*rings):
            yield _Output(key, f"{key} of the frames held back", *leaves, COPIED, first=steps.shape[-1])

    def window(self, output: _Output, frame: tuple[int, ...], item: int) -> str:
        """The window of a frame ``(*b, t)`` of an output, and the frame after it, as a table."""
        at, begin = frame[:-1], frame[-1] + output.first
        mask, traj = (None if key is None else self.stream(key)[at] for key in (self.task.mask_key, self.task.traj_key))
        dones = {str(key[-1] if isinstance(key, tuple) else key): self.stream(key)[at] for key in self.task.done_keys}
        # Where no flag ends windows, none is set.
        row = Row.read(dones or {"done": torch.zeros(self.stream(next(iter(self.data))).shape[len(at)])}, mask, traj)
        steps, got_steps = self.steps[at].tolist(), self.got_steps[at].tolist()
        notes: dict[int, list[str]] = {begin: ["this frame"]}
        last = begin
        if begin < len(steps):
            end, got_end = begin + steps[begin] - 1, begin + got_steps[begin] - 1
            # What the kernels counted may be anything.
            last = min(max(end, got_end, begin), begin + self.n_steps)
            notes.setdefault(end, []).append(f"the reference ends it: {row.why(begin, end, self.n_steps)}")
            if got_end != end:
                notes.setdefault(got_end, []).append("the kernels end it")

        columns: dict[str, Callable[[int], str]] = {}
        if self.carry:
            carried = self.carry.count
            columns["frame"] = lambda t: f"held back [{t}]" if t < carried else f"data [{t - carried}]"
        for key in self.task.reward_keys:
            rewards = _items(self.stream(key)[at], 1)
            of = item if key == output.key and item < rewards.shape[1] else 0
            columns[f"{key}" if rewards.shape[1] == 1 else f"{key} [{of}]"] = partial(_cell, rewards, of)
        columns["steps (reference)"] = lambda t: str(steps[t]) if t < len(steps) else "-"
        columns["steps (kernels)"] = lambda t: str(got_steps[t]) if t < len(steps) else "-"
        table = row.table(begin, min(last + 1, len(row.done) - 1), columns, notes)
        return f"  its window, n_steps = {self.n_steps}, t = 0 the first frame that this call returned:\n{table}"


def _check(
    outputs: Iterable[_Output], dims: int, window: Callable[[_Output, tuple[int, ...], int], str], name: str = "t"
) -> None:
    """Raises the error of the first output that differs; ``dims`` are those of ``[*B, E]``, ``name`` the last one's."""
    found = []
    for output in outputs:
        got, expected = output.got, output.expected
        if (got.shape, got.dtype) != (expected.shape, expected.dtype):
            raise EquivalenceError(
                f"the kernels and the reference differ at {output.what}: {got.dtype} {list(got.shape)} and "
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
        f"the kernels and the reference differ at {output.what}, frame {tuple(frame)}: {values[0]} and {values[1]}",
        f"  frame      {batch}{name} = {frame[-1]}{below}{element}; {_count(different)}",
        f"  kernels    {values[0]}",
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


def _check_unchanged(leaves: Mapping[Any, list[Tensor]], before: Mapping[Any, list[Tensor]], what: str) -> None:
    """Raises an error if the kernels wrote where they read, and undoes it."""
    pairs = {key: list(zip(views, before[key], strict=True)) for key, views in leaves.items()}
    if written := [key for key, each in pairs.items() if any(different_bits(*pair).any() for pair in each)]:
        for key in written:
            for view, copy in pairs[key]:
                view.copy_(copy)
        raise EquivalenceError(f"the kernels wrote into {written} of the {what}", key=written[0], what=what)


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
    got: Mapping[Any, Tensor], expected: Mapping[Any, Tensor]
) -> Iterator[tuple[Hashable, tuple[Tensor, Tensor]]]:
    """What both have under each key; a tensor that is passed through as it is needs no comparison."""
    if got.keys() != expected.keys():
        raise EquivalenceError(f"the kernels made the entries {list(got)}, the reference {list(expected)}")
    return ((key, (got[key], leaf)) for key, leaf in expected.items() if got[key] is not leaf)
