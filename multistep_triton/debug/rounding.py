"""Owns the float64 value of an n-step return and the bound of a backend's rounding error. May import torch only."""

from __future__ import annotations

import torch
from torch import Tensor


def float64_returns(stream: Tensor, steps: Tensor, gamma: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the n-step returns of ``stream`` ``[*B, S, *F]`` in float64, ``[*B, E, *F]``, and a bound of the error.

    The third result, bool, marks the returns of which a partial sum of finite terms may overflow in some order.

    The bound holds for sums in any order. A sum joins two parts of a window ``steps - 1`` times, and each time rounds a
    power of gamma, a product and a sum. In a precision of unit roundoff ``u`` the error is, to first order, at most
    ``3 (steps - 1) u`` times the sum of the absolute terms. A backend then rounds the sum to ``dtype``. It may lose a
    reward whose power of gamma is below the smallest normal number. The bound is infinite if such a reward is
    infinite, and NaN for any other window with an infinity or a NaN.

    Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1.
    """
    time_dim, frames = steps.ndim - 1, steps.shape[-1]
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    unit, tiny = torch.finfo(accumulated).eps / 2, torch.finfo(accumulated).tiny
    longest = int(steps.max()) if steps.numel() else 0
    rewards = stream.to(accumulated).double()
    beyond = rewards.new_zeros((*rewards.shape[:time_dim], longest, *rewards.shape[time_dim + 1 :]))
    rewards = torch.cat((rewards, beyond), time_dim)
    lengths = steps[(..., *[None] * (rewards.ndim - steps.ndim))]
    total = magnitude = lost = partial = peak = torch.zeros_like(rewards.narrow(time_dim, 0, frames))
    for i in reversed(range(longest)):
        here = rewards.narrow(time_dim, i, frames)
        total = torch.where(lengths > i, here + gamma * total, 0.0)
        magnitude = torch.where(lengths > i, here.abs() + gamma * magnitude, 0.0)
        # Sums from the back join terms that are not discounted yet.
        partial = torch.where(lengths > i, here.abs().masked_fill(~here.isfinite(), 0.0) + gamma * partial, 0.0)
        peak = torch.maximum(peak, partial)
        if gamma > 0 and gamma**i < tiny:
            lost = torch.where(lengths > i, lost + max(gamma**i, 5e-324) * here.abs(), lost)
    error = 3 * (lengths - 1) * (unit * magnitude + tiny) + lost
    error = torch.where(magnitude.isfinite() | lost.isinf(), error, torch.nan)
    if dtype != accumulated:
        unit, tiny = torch.finfo(dtype).eps / 2, torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        error = error + unit * (total.abs() + error) + tiny
    return total, error, peak > torch.finfo(accumulated).max
