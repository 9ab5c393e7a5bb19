"""Functions on tensors: they check their arguments and pass them to the engine.

Compiled code calls the operators that ``operators`` registers instead. May import ``checks``, ``backends``,
``engine`` and ``task``.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

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
    """The n-step return, window length and discount of every frame.

    Example:
        >>> import torch
        >>> out = n_step_return(torch.ones(3), torch.tensor([False, True, False]), gamma=0.5, n_steps=2)
        >>> reward, steps, discount = out
        >>> out.reward, out.steps, out.discount
        (tensor([1.5000, 1.0000, 1.0000]), tensor([2, 1, 1]), tensor([0.2500, 0.5000, 0.5000]))
    """

    reward: Tensor
    """``[*B, T, *F]``, in the reward's dtype (integers and bools: ``torch.get_default_dtype()``)."""
    steps: Tensor
    """``[*B, T]``, int64: the number of frames in the window, ``1 .. n_steps``."""
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
    """Computes the n-step return of every frame of complete rows.

    .. math:: R(t) = \\sum_{i=0}^{steps(t) - 1} \\gamma^i r(t + i)

    The window of frame ``t``, of ``steps(t)`` frames, ends at the smallest of ``t + n_steps - 1``, the first boundary
    at or after ``t``, and the last frame. A frame is a boundary if it is done, or if it or the next one is invalid.

    Args:
        reward: ``[*B, T, *F]``, floating point, integer or bool, any strides: the reward after step ``t``.
            float16, bfloat16 and float32 are accumulated in float32, float64 in float64.
        done: ``[*B, T]`` or ``[*B, T, 1]``, bool, on the reward's device: True where step ``t`` ends the trajectory. If
            both shapes fit, it is ``[*B, T]`` where the reward has more dimensions, else ``[*B, T, 1]``.

    Keyword Args:
        gamma: discount per step, a finite number in [0, 1].
        n_steps: frames in a full window, an int >= 1.
        mask: ``[*B, T]`` or ``[*B, T, 1]``, bool: False where a frame is padding, which no other frame's window reads.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"verify"``.

    Returns:
        :class:`NStepReturn` in new memory on the reward's device.

    Raises:
        TypeError: an argument is of the wrong type, or a tensor of the wrong dtype or layout.
        ValueError: a shape, device or number breaks its rule.
        RuntimeError: the requested backend cannot run; or ``"verify"`` finds a difference and raises
            :class:`EquivalenceError`, a subclass.

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
    # The compiler cannot trace into functools' caches, and symbolic sizes cannot be hashed.
    keys_of = _keys.__wrapped__ if torch.compiler.is_compiling() or isinstance(reward, FakeTensor) else _keys
    kinds = tuple([(key, leaf.dtype, tuple(leaf.shape[len(lead) :])) for key, leaf in data.items()])
    keys = keys_of(kinds, reward.device)
    results = engine.n_step_extend(Task(keys, n_steps, gamma, len(lead) - 1, False), None, data, backend)
    return NStepReturn(results.returns["reward"], results.steps, results.discount)


@functools.lru_cache(maxsize=256)
def _keys(kinds: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...], device: torch.device) -> Keys:
    """Returns one ``Keys`` object for leaves of these kinds, named reward, done and optionally mask, on a device."""
    return Keys(kinds, ("done",), rewards=("reward",), mask="mask" if len(kinds) > 2 else None)


def gather_future(value: Tensor, steps: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Gathers the value at the end of every window: ``out(t) = value(t + steps(t) - 1)``, bit for bit.

    Args:
        value: ``[*B, T, *F]``, any dtype, any strides.
        steps: ``[*B, T]``, int64, on the value's device, such as :attr:`NStepReturn.steps`; ``t + steps(t) - 1``
            must lie within ``t .. T - 1``. Calls on the CPU and calls of the reference check this, for which the host
            waits for an accelerator. The kernels on an accelerator, and all calls inside a transform of ``torch.func``,
            cut windows to their rows instead.

    Keyword Args:
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"verify"``.

    Returns:
        Tensor: ``[*B, T, *F]``, in the value's dtype, in new contiguous memory on its device.

    Raises:
        TypeError: ``steps`` is not int64, or an argument is not a dense tensor.
        ValueError: a shape, device or window breaks its rule.
        RuntimeError: the requested backend cannot run; or ``"verify"`` finds a difference and raises
            :class:`EquivalenceError`, a subclass.

    Example:
        >>> import torch
        >>> gather_future(torch.tensor([10, 11, 12, 13]), torch.tensor([2, 2, 1, 1]))
        tensor([11, 12, 12, 13])
    """
    if _is_traced():
        future: Tensor = torch.ops.multistep_triton.gather_future(value, steps, backend)
        return future
    check_gather_future(value, steps)
    if torch._C._are_functorch_transforms_active() or isinstance(steps, FakeTensor):
        # Inside such a transform the host cannot read values, so it cuts windows to their rows, as the kernels do.
        steps = steps.clamp(min=1).minimum(_room(steps))
    elif not steps.is_meta and (steps.is_cpu or resolve_backend(backend, (value, steps)) != "triton"):
        _check_steps(steps)
    return engine.gather_future(value, steps, backend)


def _is_traced() -> bool:
    """Returns whether the call becomes an operator: in compiled code, outside of forward mode and ``torch.func``.

    The operators lack these derivatives; the compiler then traces into the call or breaks its graph there.
    """
    return torch.compiler.is_compiling() and not is_transformed()


def _room(steps: Tensor) -> Tensor:
    """Returns the number of frames from each frame to the end of its row, ``[T]``."""
    return torch.arange(steps.shape[-1], 0, -1, device=steps.device)


def _check_steps(steps: Tensor) -> None:
    outside = (steps < 1) | (steps > _room(steps))
    if outside.any():
        frame = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"steps must be within 1 .. T - t = {steps.shape[-1] - frame[-1]}, got {int(steps[frame])} at frame {frame}"
        )
