"""Backends: chooses the one that runs, and says why another cannot.

Only this module looks for Triton, and only if a backend other than the reference may run. It tells the logger
``multistep_triton`` once which backend runs and why; it logs a fallback on an accelerator as a warning.
May import ``checks``.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Collection, Hashable, Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from multistep_triton.checks import INTEGERS, check_choice, is_transformed

Backend = Literal["auto", "reference", "triton", "verify"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
BACKEND_VARIABLE = "MULTISTEP_TRITON_BACKEND"

_logger = logging.getLogger("multistep_triton")


class Choice(NamedTuple):
    """The backend that runs, and the reason."""

    backend: str
    """``"reference"``, ``"triton"`` or ``"verify"``."""
    why: str
    level: int = logging.INFO
    """The level to log the choice at."""


class EquivalenceError(RuntimeError):
    """The error that ``backend="verify"`` raises where a backend and the specification differ.

    The message names the entry, the first frame that differs, both values and the tolerance, and shows the rewards,
    flags and steps of the frame's window. The call that raises it leaves the frames held back as they were.

    Attributes:
        key: the leaf's key, or ``"steps_to_next_obs"``, ``"nonterminal"`` or ``"gamma"``, the discount.
        what: the tensor of that key: the n-step return of a reward, the leaf itself, or the leaf held back.
        frame: the indices ``(*b, t)`` of the first frame that differs, in that tensor; with a done flag per agent,
            ``(*b, agent, t)``; for samples, the sample's number.
        kernels, reference: the values of the first element that differs in that frame. ``kernels`` is the value of
            the kernels or, where they cannot run, of the reference; ``reference`` is that of the specification.
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


# The reward dtypes that the kernels sum.
_REWARDS = {torch.bool, *INTEGERS, torch.float16, torch.bfloat16, torch.float32, torch.float64}
_ON_CPU = Choice("reference", "the tensors are on the CPU, where it is the fast one")
_ON_ACCELERATOR = Choice("triton", "the tensors are where Triton runs")
_told: set[Choice] = set()


def check_backend(value: str, name: str = "backend") -> Backend:
    return check_choice(name, value, BACKENDS)


def resolve_backend(backend: str, tensors: Collection[Tensor], rewards: Iterable[Tensor] = ()) -> str:
    """Returns the backend that :func:`choose_backend` chooses; logs each choice once."""
    choice = choose_backend(backend, tensors, rewards)
    if _logger.isEnabledFor(choice.level) and choice not in _told:
        _told.add(choice)
        _logger.log(choice.level, "backend %r runs: %s", choice.backend, choice.why)
    return choice.backend


def choose_backend(backend: str, tensors: Collection[Tensor], rewards: Iterable[Tensor] = ()) -> Choice:
    """Chooses the backend that runs on ``tensors``, of which it sums ``rewards``.

    ``"auto"``, unless the environment variable names a backend, is Triton for tensors on an accelerator where Triton
    can run, else the reference. ``"verify"`` verifies the reference where the kernels cannot run; inside transforms of
    torch.func and on tensors without values, which cannot be compared, the reference runs unverified.

    Raises:
        ValueError: ``backend``, or the value of the environment variable, is none of ``BACKENDS``.
        RuntimeError: the caller or the variable asks for ``"triton"``, which cannot run.
    """
    check_backend(backend)
    asker = f"backend={backend!r}"
    if backend == "auto" and (variable := os.environ.get(BACKEND_VARIABLE)):
        asker = f"the environment variable {BACKEND_VARIABLE}"
        backend = check_backend(variable, asker.removeprefix("the "))
    asked_for = Choice(backend, f"{asker} asks for it")
    if backend == "reference":
        return asked_for
    if backend == "auto" and all(tensor.is_cpu for tensor in tensors):
        return _ON_CPU
    obstacle = find_obstacle(tensors, rewards)
    if obstacle is None:
        return asked_for if backend != "auto" else _ON_ACCELERATOR
    if backend == "verify" and (is_transformed() or any(t.is_meta or isinstance(t, FakeTensor) for t in tensors)):
        why = "inside a transform of torch.func, or for tensors without values, which cannot be compared"
        return Choice("reference", f"{asker} asks for 'verify' {why}", logging.WARNING)
    if backend == "verify":
        level = logging.INFO if all(tensor.is_cpu for tensor in tensors) else logging.WARNING
        return Choice("verify", f"{asker} asks for it, of the reference, as the kernels cannot run: {obstacle}", level)
    if backend == "auto":
        return Choice("reference", f"the kernels cannot run: {obstacle}", logging.WARNING)
    otherwise = "use backend='reference'" if asker.startswith("backend") else f"unset {BACKEND_VARIABLE}"
    raise RuntimeError(f"backend {backend!r} cannot run: {obstacle}, or {otherwise}")


def circumstances(backend: str) -> tuple[Any, ...]:
    """Returns all that a choice depends on besides the tensors."""
    return backend, backend == "auto" and os.environ.get(BACKEND_VARIABLE), torch.is_grad_enabled(), is_transformed()


def find_obstacle(tensors: Collection[Tensor], rewards: Iterable[Tensor]) -> str | None:
    """Returns why the kernels cannot run on these tensors, and a remedy; None if they can."""
    device_type, obstacle = _triton_device_type()
    if device_type is None:
        return obstacle
    devices = {tensor.device for tensor in tensors}
    for device in devices:
        if device.type != device_type:
            return f"a tensor is on {device}, and {obstacle}. Move all to one {device_type} device"
    if device_type != "cpu" and len(devices) > 1:
        return "the tensors are on several devices. Move them to one"
    if any(isinstance(tensor, FakeTensor) for tensor in tensors):
        return "a tensor is a FakeTensor, which has no values. Call it with others"
    if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors]):
        return "a tensor requires grad, and the kernels have no backward pass. Detach it or use torch.no_grad()"
    if is_transformed():
        return (
            "the call is inside forward-mode differentiation or a transform of torch.func, such as vmap, which the "
            "kernels know nothing of. Call it outside"
        )
    for reward in rewards:
        if reward.dtype not in _REWARDS:
            return f"a reward is {reward.dtype}, which the kernels do not sum. Convert it to torch.float32"
    return None


@functools.cache
def _triton_device_type() -> tuple[str | None, str]:
    """Returns the type of the devices whose memory the kernels reach, or None if there is none, and the reason."""
    # Triton and its drivers fail in more ways than they document, and no failure may stop the reference from running.
    try:
        from triton.runtime import driver

        from multistep_triton.kernels.windows import INTERPRETED
    except ImportError as error:
        return None, f"Triton is missing ({error}). Install it: pip install triton"
    except Exception as error:
        return None, f"Triton cannot be imported ({error!r}). Install one that belongs to this torch"
    if INTERPRETED:
        return "cpu", "the kernels are interpreted on the CPU, as TRITON_INTERPRET is set"
    try:
        device_type = driver.active.get_active_torch_device().type
    except Exception as error:
        return None, (
            f"Triton finds no GPU ({error}). Run where there is one, or, to debug on the CPU, set TRITON_INTERPRET=1 "
            f"before Python starts"
        )
    return device_type, f"Triton drives {device_type} devices"
