"""``n_step_return`` and ``gather_future`` as operators of torch, for ``torch.compile(fullgraph=True)``.

Registers ``torch.ops.multistep_triton.n_step_return`` and ``gather_future``, which the two functions call in compiled
code. To the compiler each is one opaque call; it runs the backend that would run without a compiler. Owns the shapes
and gradients of the operators, no maths of its own. May import ``functional`` and what it may.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from multistep_triton.backends import Backend
from multistep_triton.checks import check_gather_future, check_n_step_return
from multistep_triton.functional import gather_future, n_step_return
from multistep_triton.task import return_dtype


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
