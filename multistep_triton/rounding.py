"""Rounding: what a return is in float64, and how far off a sum in its own precision may be. May import torch only."""

from __future__ import annotations

import torch
from torch import Tensor


def float64_returns(stream: Tensor, steps: Tensor, gamma: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The n-step returns of ``stream`` ``[*B, S, *F]`` in float64, ``[*B, E, *F]``, and a bound of the error.

    Back from the window's end, ``R = r(t + i) + gamma * R``. In a precision of unit roundoff ``u``, gamma and the
    product are each off by ``u gamma |R|``, the sum by ``u |r + gamma R|``, and what was off before counts gamma
    times. What is accumulated is then rounded to ``dtype``.

    Source: running error analysis, N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.3.
    """
    time_dim, frames = steps.ndim - 1, steps.shape[-1]
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    unit, tiny = torch.finfo(accumulated).eps / 2, torch.finfo(accumulated).tiny
    longest = int(steps.max()) if steps.numel() else 0
    rewards = stream.to(accumulated).double()
    beyond = rewards.new_zeros((*rewards.shape[:time_dim], longest, *rewards.shape[time_dim + 1 :]))
    rewards = torch.cat((rewards, beyond), time_dim)
    lengths = steps[(..., *[None] * (rewards.ndim - steps.ndim))]
    total = error = torch.zeros_like(rewards.narrow(time_dim, 0, frames))
    for i in reversed(range(longest)):
        future = gamma * total
        here = rewards.narrow(time_dim, i, frames) + future
        rounded = gamma * error + 2 * (unit * future.abs()) + unit * here.abs() + tiny
        error = torch.where(lengths > i + 1, rounded, 0.0)
        total = torch.where(lengths > i, here, 0.0)
    if dtype != accumulated:
        unit, tiny = torch.finfo(dtype).eps / 2, torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        error = error + unit * (total.abs() + error) + tiny
    return total, error
