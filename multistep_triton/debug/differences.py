"""Differences between the outputs of a backend and those of the specification.

Owns how two outputs are compared and the message of the error. May import ``backends`` and ``tables``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from multistep_triton.backends import EquivalenceError
from multistep_triton.debug.tables import number

COPIED = "what is copied is equal, bit for bit"


class Output(NamedTuple):
    """One tensor ``[*B, E, *F]`` that the tested backend and the specification computed."""

    key: Hashable
    what: str
    got: Tensor
    expected: Tensor
    source: str
    """The reason for the tolerance, for the message."""
    tolerance: Tensor | None = None
    """The largest allowed distance, in the shape of ``expected``; None if the bits must be equal."""
    exact: Tensor | None = None
    """The float64 value that both results approximate; None if nothing is rounded."""
    overflows: Tensor | None = None
    """Where a partial sum may overflow, so that either side may be not finite; None if nowhere."""
    first: int = 0
    """The position of the output's first frame in the stream, the carry's frames followed by the data's."""


def check(
    names: tuple[str, str],
    outputs: Iterable[Output],
    dims: int,
    window: Callable[[Output, tuple[int, ...], int], str],
    last: str = "t",
) -> None:
    """Raises an error for the first output of a wrong shape or dtype, else for the first one whose values differ.

    The message calls the tested and the expected side ``names``, and the last of the ``dims`` of ``[*B, E]`` ``last``.
    """
    found, differ = [], f"the {names[0]} and the {names[1]} differ"
    for output in outputs:
        got, expected = output.got, output.expected
        if (got.shape, got.dtype) != (expected.shape, expected.dtype):
            raise EquivalenceError(
                f"{differ} at {output.what}: {got.dtype} {list(got.shape)} and {expected.dtype} {list(expected.shape)}",
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
    got, expected = (items_of(tensor, dims)[at] for tensor in (output.got, output.expected))
    values = [number(got), number(expected)]
    if values[0] == values[1]:
        values = [f"{number(each)}, in bytes {_bytes(each).tolist()}" for each in (got, expected)]
    tolerance = 0.0 if output.tolerance is None else float(items_of(output.tolerance, dims)[at])
    batch = f"batch index {tuple(frame[:-1])}, " if dims > 1 else ""
    element = f", element [{item}] of {different.shape[-1]}" if different.shape[-1] > 1 else ""
    below = f" of those held back, t = {output.first + frame[-1]} below" if output.first else ""
    lines = [
        f"{differ} at {output.what}, frame {tuple(frame)}: {values[0]} and {values[1]}",
        f"  frame      {batch}{last} = {frame[-1]}{below}{element}; {_count(different)}",
        *(f"  {name:<10} {value}" for name, value in zip(names, values, strict=True)),
        *([] if output.exact is None else [f"  float64    {number(items_of(output.exact, dims)[at])}"]),
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


def _different(output: Output, dims: int) -> Tensor:
    """Marks the items that differ by more than the tolerance, bool ``[*B, E, F]``."""
    got, expected = items_of(output.got, dims), items_of(output.expected, dims)
    if output.tolerance is None or output.exact is None:
        return different_bits(got, expected)
    exact, tolerance = (items_of(tensor, dims) for tensor in (output.exact, output.tolerance))
    one, other = got.double(), expected.double()
    equal = (one == other) | (one.isnan() & other.isnan())
    # If the exact sum is finite, one rounding decides on an infinity, which counts as the number after the largest.
    largest = torch.finfo(got.dtype).max
    top = largest * (1 + torch.finfo(got.dtype).eps) if got.dtype != torch.float64 else largest
    near = (one.clamp(-top, top) - other.clamp(-top, top)).abs() <= tolerance
    # Where a partial sum may overflow, or lose an infinity, either side may be not finite.
    lost = tolerance.isinf() if output.overflows is None else tolerance.isinf() | items_of(output.overflows, dims)
    lost &= ~(one.isfinite() & other.isfinite())
    return ~(equal | lost | (near & exact.isfinite() & tolerance.isfinite()))


def different_bits(one: Tensor, other: Tensor) -> Tensor:
    """Marks the elements whose bits differ in two tensors of one shape and dtype; NaNs differ by their payloads."""
    return (_bytes(one) != _bytes(other)).any(-1)


def items_of(tensor: Tensor, dims: int) -> Tensor:
    """Flattens ``[*B, E, *F]``, where ``[*B, E]`` are ``dims`` dimensions, to ``[*B, E, F]``."""
    return tensor[..., None].flatten(dims)


def _bytes(tensor: Tensor) -> Tensor:
    """Returns the bytes of every element, uint8, in a new last dimension."""
    return tensor.detach().resolve_conj().resolve_neg()[..., None].contiguous().view(torch.uint8)


def _count(different: Tensor) -> str:
    frames = different.any(-1)
    return f"{int(frames.sum())} of {frames.numel()} frames differ"
