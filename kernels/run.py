"""Running kernels: aligns memory, makes a device the current one, and launches kernels that it has compiled once."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
from torch import Tensor

from multistep_triton.kernels.windows import INTERPRETED

# Kernels are compiled for addresses that are multiples of 16. They count rows in 31 bits, units of a leaf in 32.
ALIGNMENT, MOST_ROWS, MOST_UNITS = 16, 2**31 - 1, 2**32 - 1


def aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def as_real(tensor: Tensor) -> Tensor:
    """Returns complex numbers as pairs of real ones, conjugated if they are to be: Triton has no complex types."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def check_fits(rows: int, units: int) -> None:
    """Checks that the kernels can count ``rows`` frames in a call, and ``units`` units of its widest leaf."""
    if rows > MOST_ROWS:
        raise RuntimeError(f"the kernels take at most {MOST_ROWS} frames in a call, got {rows}")
    if units > MOST_UNITS:
        raise RuntimeError(f"the kernels take at most {MOST_UNITS} units of a leaf in a call, got {units}")


def run(
    known: dict[Any, Any], kernel: Any, kind: tuple[Any, ...], programs: int, *arguments: Any, registers: int = 0
) -> None:
    """Launches a kernel as ``known`` has it compiled for ``kind``; ``registers`` is a thread's maximum, 0 for none."""
    if (compiled := known.get((kernel.__name__, *kind))) is not None:
        compiled[(programs, 1, 1)](*arguments)
        return
    # Sums may use fused multiply-adds: in the reference, too, the compiler decides whether they do.
    options = {"num_warps": 4, "enable_fp_fusion": True}
    if registers and not INTERPRETED and not is_amd():
        options["maxnreg"] = registers
    known[(kernel.__name__, *kind)] = kernel[(programs,)](*arguments, **options)


@functools.cache
def is_amd() -> bool:
    return not INTERPRETED and triton.runtime.driver.active.get_current_target().backend == "hip"


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Returns a context that makes ``device`` the current one, as Triton launches there."""
    if device.type == "cpu" or device.index == torch.accelerator.current_device_index():
        return contextlib.nullcontext()
    return torch.accelerator.device_index(device.index)
