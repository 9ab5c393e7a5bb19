"""Checks of arguments: errors say what an argument must be, and what it is. May import torch only."""

from __future__ import annotations

import numbers
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)

Name = TypeVar("Name", bound=str)


def check_positive_int(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an int >= 1, got {value!r}")
    return value


def check_steps(name: str, value: int | tuple[int, int]) -> int | tuple[int, int]:
    """Checks that ``value`` is an int >= 1, or a pair ``(low, high)`` of them with ``low <= high``."""
    pair = value if isinstance(value, tuple | list) else (value, value)
    are_ints = len(pair) == 2 and all(isinstance(each, int) and not isinstance(each, bool) for each in pair)
    if not are_ints or not 1 <= pair[0] <= pair[1]:
        raise ValueError(f"{name} must be an int >= 1 or a pair (low, high) with 1 <= low <= high, got {value!r}")
    return (pair[0], pair[1]) if isinstance(value, tuple | list) else value


def check_gamma(value: float) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"gamma must be a finite number in [0, 1], got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"gamma must be a finite number in [0, 1], got {value!r}")
    return value


def check_choice(name: str, value: str, choices: tuple[Name, ...]) -> Name:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return choices[choices.index(value)]


def check_bool(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_flag(name: str, flag: Tensor, lead: torch.Size, otherwise: str = "") -> None:
    """Checks that ``flag`` is bool, ``[*B, T]`` or ``[*B, T, 1]`` for ``lead = [*B, T]``."""
    if flag.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {flag.dtype}")
    _check_per_frame(name, flag, lead, otherwise)


def check_ids(name: str, ids: Tensor, lead: torch.Size) -> None:
    """Checks that ``ids`` are integers, ``[*B, T]`` or ``[*B, T, 1]`` for ``lead = [*B, T]``."""
    if ids.dtype not in INTEGERS:
        raise TypeError(f"{name} must be integers, got {ids.dtype}")
    _check_per_frame(name, ids, lead)


def check_reward(name: str, reward: Tensor, lead: torch.Size) -> None:
    """Checks that ``reward`` is not complex, and ``[*B, T, *F]`` for ``lead = [*B, T]``."""
    if reward.is_complex():
        raise TypeError(f"{name} must be floating point, integer or bool, got {reward.dtype}")
    if reward.shape[: len(lead)] != lead:
        raise ValueError(f"{name} must have shape [*B, T, *F] with [*B, T] = {list(lead)}, got {list(reward.shape)}")


def check_n_step_return(reward: Tensor, done: Tensor, mask: Tensor | None) -> torch.Size:
    """Checks the tensors of :func:`multistep_triton.n_step_return`, but not their values; returns ``[*B, T]``."""
    flags = {"done": done} if mask is None else {"done": done, "mask": mask}
    _check_tensors(reward=reward, **flags)
    lead = _lead(reward, done)
    if not lead:
        raise ValueError(f"done must have a time dimension, [*B, T] or [*B, T, 1], got shape {list(done.shape)}")
    for name, flag in flags.items():
        check_flag(name, flag, lead)
    check_reward("reward", reward, lead)
    return lead


def check_gather_future(value: Tensor, steps: Tensor) -> None:
    """Checks the tensors of :func:`multistep_triton.gather_future`, but not their values."""
    _check_tensors(value=value, steps=steps)
    if steps.dtype != torch.int64:
        raise TypeError(f"steps must be int64, got {steps.dtype}")
    if not steps.ndim or value.shape[: steps.ndim] != steps.shape:
        raise ValueError(
            f"steps must be [*B, T] and value [*B, T, ...] with the same [*B, T], "
            f"got steps {list(steps.shape)} and value {list(value.shape)}"
        )


def check_not_captured(call: str) -> None:
    """Checks that no CUDA graph is being captured: its replays would not move the host's position in the stream."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{call} must be called outside of the capture of a CUDA graph: how far the stream of frames has come the "
            f"host knows, and a graph that is replayed would repeat the call that was captured"
        )


def is_per_frame(value: Tensor, lead: torch.Size) -> bool:
    return value.shape == lead or value.shape == (*lead, 1)


def is_transformed() -> bool:
    """Returns whether tensors may carry forward-mode tangents, or be wrapped by transforms of ``torch.func``.

    This is not in ``backends``: torch.compile takes a path with "triton/backends" for Triton's own, and skips it.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _check_per_frame(name: str, value: Tensor, lead: torch.Size, otherwise: str = "") -> None:
    if not is_per_frame(value, lead):
        raise ValueError(
            f"{name} must have shape [*B, T] = {list(lead)} or [*B, T, 1] = {[*lead, 1]}{otherwise}, "
            f"got {list(value.shape)}"
        )


def _lead(reward: Tensor, done: Tensor) -> torch.Size:
    """Returns ``[*B, T]``: ``done.shape`` if the reward's is longer and begins with it, else that without a last 1."""
    begins = done.ndim < reward.ndim and reward.shape[: done.ndim] == done.shape
    return done.shape if begins or done.ndim == 1 or done.shape[-1:] != (1,) else done.shape[:-1]


def _check_tensors(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_nested:
            raise TypeError(f"{name} must be a dense tensor, got {'a nested' if tensor.is_nested else 'a sparse'} one")
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{' and '.join(devices)} must be on one device, got {listed}")
