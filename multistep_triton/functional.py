"""Functions on tensors: validate the arguments, hand them to the engine.

What is compiled calls the operators instead, which ``operators`` registers. May import ``checks``, ``backends``,
``engine`` and ``task``.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from multistep_triton import engine
from multistep_triton.backends import Backend, resolve_backend
from multistep_triton.checks import (
    check_gamma,
    check_gather_future,
    check_n_step_return,
    check_positive_int,
    is_transformed,
)
from multistep_triton.task import Keys, Task


class NStepReturn(NamedTuple):
    """n-step return, window length and discount of every frame.

    Example:
        >>> import torch
        >>> out = n_step_return(torch.ones(3), torch.tensor([False, True, False]), gamma=0.5, n_steps=2)
        >>> reward, steps, discount = out
        >>> out.reward, out.steps, out.discount
        (tensor([1.5000, 1.0000, 1.0000]), tensor([2, 1, 1]), tensor([0.2500, 0.5000, 0.5000]))
    """

    reward: Tensor
    """``[*B, T, *F]``, the reward's dtype (integers and bools: ``torch.get_default_dtype()``)."""
    steps: Tensor
    """``[*B, T]``, int64: number of frames in the window, ``1 .. n_steps``."""
    discount: Tensor
    """``[*B, T]``, float32: ``gamma ** steps``."""


def n_step_return(
    reward: Tensor,
    done: Tensor,
    *,
    gamma: float,
    n_steps: int,
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> NStepReturn:
    """n-step returns of complete rows; windows are cut at boundaries and at the last frame.

    .. math:: R(t) = \\sum_{i=0}^{steps(t) - 1} \\gamma^i r(t + i)

    where the window of ``steps(t)`` frames ends at the smallest of ``t + n_steps - 1``, the first boundary at or
    after ``t`` and the last frame; a boundary is a frame that is done, invalid, or followed by an invalid one.

    Args:
        reward: ``[*B, T, *F]``, floating point, integer or bool, any strides; the reward after step ``t``.
            float16, bfloat16 and float32 are accumulated in float32, float64 in float64.
        done: ``[*B, T]`` or ``[*B, T, 1]``, bool, on the reward's device; the trajectory ends with step ``t``. If both
            readings fit, it is ``[*B, T]`` where the reward has more dimensions, else ``[*B, T, 1]``.

    Keyword Args:
        gamma: discount per step, a finite number in [0, 1].
        n_steps: frames in a full window, an int >= 1.
        mask: ``[*B, T]`` or ``[*B, T, 1]``, bool; False marks padding, which no other frame's window reads.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"verify"``.

    Returns:
        :class:`NStepReturn` on the reward's device, new memory.

    Raises:
        TypeError: an argument that must be a tensor of a certain kind is not.
        ValueError: a shape, device or number breaks its rule.
        RuntimeError: the backend asked for cannot run; :class:`EquivalenceError`, one of these, if ``"verify"`` finds a
            difference.

    Source: R. S. Sutton, Learning to predict by the methods of temporal differences, Machine Learning 3, 1988.

    Example:
        >>> import torch
        >>> done = torch.tensor([False, False, True, False])
        >>> n_step_return(torch.tensor([1.0, 2.0, 4.0, 8.0]), done, gamma=0.5, n_steps=2).reward
        tensor([2., 4., 4., 8.])
    """
    check_positive_int("n_steps", n_steps)
    gamma = float(check_gamma(gamma))
    if _is_traced():
        return NStepReturn(*torch.ops.multistep_triton.n_step_return(reward, done, mask, gamma, n_steps, backend))
    lead = check_n_step_return(reward, done, mask)
    data = {"reward": reward, "done": done} if mask is None else {"reward": reward, "done": done, "mask": mask}
    # The compiler does not look into caches.
    keys_of = _keys.__wrapped__ if torch.compiler.is_compiling() else _keys
    kinds = tuple([(key, leaf.dtype, tuple(leaf.shape[len(lead) :])) for key, leaf in data.items()])
    keys = keys_of(kinds, reward.device)
    results = engine.n_step_extend(Task(keys, n_steps, gamma, len(lead) - 1, False), None, data, backend)
    return NStepReturn(results.returns["reward"], results.steps, results.discount)


@functools.lru_cache(maxsize=256)
def _keys(kinds: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...], device: torch.device) -> Keys:
    """Of leaves on a device, named reward, done and, if there is one, mask."""
    return Keys(kinds, ("done",), rewards=("reward",), mask="mask" if len(kinds) > 2 else None)


def gather_future(value: Tensor, steps: Tensor, *, backend: Backend = "auto") -> Tensor:
    """The value at the end of every window: ``out(t) = value(t + steps(t) - 1)``, bit for bit.

    Args:
        value: ``[*B, T, *F]``, any dtype, any strides.
        steps: ``[*B, T]``, int64, on the value's device, such as :attr:`NStepReturn.steps`; ``t + steps(t) - 1``
            must lie within ``t .. T - 1``. That is checked on the CPU and by the reference, which on an accelerator
            waits for the device; the kernels do not wait there, and cut a window at the end of its row, as is done in
            a transform of ``torch.func``, too.

    Keyword Args:
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"verify"``.

    Returns:
        Tensor: ``[*B, T, *F]``, the value's dtype and device, new contiguous memory.

    Raises:
        TypeError: ``steps`` is not int64.
        ValueError: a shape, device or window breaks its rule.
        RuntimeError: the backend asked for cannot run; :class:`EquivalenceError`, one of these, if ``"verify"`` finds a
            difference.

    Example:
        >>> import torch
        >>> gather_future(torch.tensor([10, 11, 12, 13]), torch.tensor([2, 2, 1, 1]))
        tensor([11, 12, 12, 13])
    """
    if _is_traced():
        future: Tensor = torch.ops.multistep_triton.gather_future(value, steps, backend)
        return future
    check_gather_future(value, steps)
    if torch._C._are_functorch_transforms_active():
        # What is in a tensor cannot be asked there. Windows are cut, as the kernels cut them.
        steps = steps.clamp(min=1).minimum(_room(steps))
    elif not steps.is_meta and (steps.is_cpu or resolve_backend(backend, (value, steps)) != "triton"):
        _check_steps(steps)
    return engine.gather_future(value, steps, backend)


def _is_traced() -> bool:
    """Whether an operator stands for the call: in what is compiled, but where derivatives are wanted that it lacks.

    Those of forward mode and of ``torch.func``; the compiler then looks into the call, or leaves it out of its graph.
    """
    return torch.compiler.is_compiling() and not is_transformed()


def _room(steps: Tensor) -> Tensor:
    """Frames from each to the end of its row, ``[T]``."""
    return torch.arange(steps.shape[-1], 0, -1, device=steps.device)


def _check_steps(steps: Tensor) -> None:
    outside = (steps < 1) | (steps > _room(steps))
    if outside.any():
        frame = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"steps must be within 1 .. T - t = {steps.shape[-1] - frame[-1]}, got {int(steps[frame])} at frame {frame}"
        )
