"""Running kernels: which address is aligned, which device is current, and kernels that were compiled before."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
from torch import Tensor

from multistep_triton.kernels.windows import INTERPRETED

# Which addresses are multiples of 16 is compiled into a kernel. Rows are counted in 31 bits, units of a leaf in 32.
ALIGNMENT, MOST_ROWS, MOST_UNITS = 16, 2**31 - 1, 2**32 - 1


def aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def as_real(tensor: Tensor) -> Tensor:
    """Triton knows no complex numbers."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def check_fits(rows: int, units: int) -> None:
    """Checks that the kernels can count the frames of a call, and the units of its widest leaf."""
    if rows > MOST_ROWS:
        raise RuntimeError(f"the kernels take at most {MOST_ROWS} frames in a call, got {rows}")
    if units > MOST_UNITS:
        raise RuntimeError(f"the kernels take at most {MOST_UNITS} units of a leaf in a call, got {units}")


def run(
    known: dict[Any, Any], kernel: Any, kind: tuple[Any, ...], programs: int, *arguments: Any, registers: int = 0
) -> None:
    """Launches a kernel, which is not looked for among all that were compiled; with so many registers at most."""
    if (compiled := known.get((kernel.__name__, *kind))) is not None:
        compiled[(programs, 1, 1)](*arguments)
        return
    # Fused multiply-adds may be used in the sums; the reference's are the compiler's choice, too.
    options = {"num_warps": 4, "enable_fp_fusion": True}
    if registers and not INTERPRETED and not is_amd():
        options["maxnreg"] = registers
    known[(kernel.__name__, *kind)] = kernel[(programs,)](*arguments, **options)


@functools.cache
def is_amd() -> bool:
    return not INTERPRETED and triton.runtime.driver.active.get_current_target().backend == "hip"


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes the device the current one, on which Triton launches."""
    if device.type == "cpu" or device.index == torch.accelerator.current_device_index():
        return contextlib.nullcontext()
    return torch.accelerator.device_index(device.index)
