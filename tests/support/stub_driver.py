"""A Triton driver without a GPU: kernels are compiled for any target, and launched into nothing.

What the launchers compile is what is checked, not a signature written for the check. The tensors are on the CPU, and
no kernel reads them. For a process in which Triton is not interpreted: import this before anything imports Triton.
"""

from __future__ import annotations

import os

assert not os.environ.get("TRITON_INTERPRET"), "compiling needs a process without TRITON_INTERPRET"

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 64 << 10, "warpSize": 32}

    def load_binary(self, name, kernel, shared, device):
        """Module, function, registers, spills, threads per block."""
        return 0, 0, 0, 0, 1024


class StubDriver:
    def __init__(self, target: str):
        self.target = TARGETS[target]
        self.utils = _Utils()
        self.launches = 0

    def launcher_cls(self, src, metadata):
        return self._launch

    def _launch(self, *arguments):
        self.launches += 1

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def install(target: str) -> StubDriver:
    """Makes the stub the driver of this process, from here on."""
    driver = StubDriver(target)
    triton.runtime.driver.set_active(driver)
    return driver


def kernels() -> list:
    """Those of the library."""
    from multistep_triton.kernels import keep, rows, store, windows

    return [
        windows.n_step_windows_kernel,
        rows.n_step_rows_kernel,
        rows.future_rows_kernel,
        store.store_rows_kernel,
        keep.count_ends_kernel,
    ]


def compiled_kernels() -> list:
    """Every variant of the kernels that was compiled so far."""
    caches = [cache for kernel in kernels() for cache in kernel.device_caches.values()]
    return [compiled for cache in caches for compiled in cache[0].values()]
