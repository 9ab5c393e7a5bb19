"""Functions on tensors: they check their arguments and pass them to the engine.

In code that ``torch.compile`` compiles they call the operators ``torch.ops.multistep_triton.n_step_return`` and
``gather_future``. To the compiler each is one opaque call; it runs the backend that would run without a compiler. Owns
the shapes and gradients of the operators, no other maths. May import ``checks``, ``backends``, ``engine`` and ``task``.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

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
from multistep_triton.task import Keys, Task, return_dtype


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


@torch.library.custom_op(
    "multistep_triton::n_step_return",
    mutates_args=(),
    schema="(Tensor reward, Tensor done, Tensor? mask, float gamma, SymInt n_steps, str backend) -> "
    "(Tensor, Tensor, Tensor)",
    # A CUDA graph of the compiler's would free the powers of gamma, which outlive the call.
    tags=(torch.Tag.cudagraph_unsafe,),
)
def _n_step_return(
    reward: Tensor, done: Tensor, mask: Tensor | None, gamma: float, n_steps: int, backend: Backend
) -> tuple[Tensor, Tensor, Tensor]:
    out = n_step_return(reward, done, gamma=gamma, n_steps=n_steps, mask=mask, backend=backend)
    return out.reward, out.steps, out.discount


@_n_step_return.register_fake
def _(
    reward: Tensor, done: Tensor, mask: Tensor | None, gamma: float, n_steps: int, backend: Backend
) -> tuple[Tensor, Tensor, Tensor]:
    lead = check_n_step_return(reward, done, mask)
    return (
        reward.new_empty(reward.shape, dtype=return_dtype(reward)),
        reward.new_empty(lead, dtype=torch.int64),
        reward.new_empty(lead, dtype=torch.float32),
    )


@torch.library.custom_op(
    "multistep_triton::n_step_return_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor steps, float gamma, SymInt n_steps, ScalarType dtype) -> Tensor",
)
def _reward_gradient(gradient: Tensor, steps: Tensor, gamma: float, n_steps: int, dtype: torch.dtype) -> Tensor:
    """Computes the reward's gradient: window ``t`` adds ``gamma ** i`` times its own to each frame ``t + i`` in it."""
    dim = steps.ndim - 1
    gradient = gradient.to(torch.float64 if gradient.dtype == torch.float64 else torch.float32)
    lengths = steps.view(*steps.shape, *[1] * (gradient.ndim - steps.ndim))
    total, frames = gradient.clone(memory_format=torch.contiguous_format), steps.shape[dim]
    for i in range(1, min(n_steps, frames)):
        reaches = torch.where(lengths > i, gradient, 0.0).narrow(dim, 0, frames - i)
        total.narrow(dim, i, frames - i).add_(reaches, alpha=gamma**i)
    return total.to(dtype)


@_reward_gradient.register_fake
def _(gradient: Tensor, steps: Tensor, gamma: float, n_steps: int, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty(gradient.shape, dtype=dtype)


def _save_windows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    reward, _, _, ctx.gamma, ctx.n_steps, _ = inputs
    ctx.dtype = reward.dtype
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    (steps,) = ctx.saved_tensors
    return _reward_gradient(gradient, steps, ctx.gamma, ctx.n_steps, ctx.dtype), None, None, None, None, None


_n_step_return.register_autograd(_backward, setup_context=_save_windows)


@torch.library.custom_op(
    "multistep_triton::gather_future", mutates_args=(), schema="(Tensor value, Tensor steps, str backend) -> Tensor"
)
def _gather_future(value: Tensor, steps: Tensor, backend: Backend) -> Tensor:
    return gather_future(value, steps, backend=backend)


@_gather_future.register_fake
def _(value: Tensor, steps: Tensor, backend: Backend) -> Tensor:
    check_gather_future(value, steps)
    return value.new_empty(value.shape)


def _save_steps(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _value_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Adds the gradient of every window to the frame at the window's end."""
    (steps,) = ctx.saved_tensors
    dim = steps.ndim - 1
    ends = torch.arange(steps.shape[dim], device=steps.device) + steps - 1
    index = ends.view(*ends.shape, *[1] * (gradient.ndim - ends.ndim)).expand_as(gradient)
    # torch adds no numbers of one byte.
    summed = gradient.float() if gradient.itemsize == 1 else gradient
    return torch.zeros_like(summed).scatter_add(dim, index, summed).to(gradient.dtype), None, None


_gather_future.register_autograd(_value_gradient, setup_context=_save_steps)
