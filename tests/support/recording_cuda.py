"""Triton's own CUDA driver and launcher without a GPU: what a GPU would be handed, the machine executes.

``install()`` compiles ``recording_cuda.c``, a libcuda.so.1 of one page (it needs gcc), and makes Triton's CudaDriver,
on top of it, the driver of this process. So the arguments of a launch are those that Triton's launcher, in C, packs out
of nested tuples. For a process in which Triton is not interpreted: import this before anything imports Triton.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import ptx_driver
import torch
import triton
from ptx_costs import WARP
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

SOURCE = Path(__file__).with_suffix(".c")
ARGUMENTS = {
    **{f"{letter}64": ctypes.c_uint64 for letter in "ub"},
    **{f"{letter}32": ctypes.c_uint32 for letter in "ub"},
    **{f"{letter}16": ctypes.c_uint16 for letter in "ub"},
    **{f"{letter}8": ctypes.c_uint8 for letter in "ub"},
    **{"s64": ctypes.c_int64, "s32": ctypes.c_int32, "s16": ctypes.c_int16, "s8": ctypes.c_int8},
    **{"f64": ctypes.c_double, "f32": ctypes.c_float},
}
# Function, grid, threads of a program, and where each argument is.
LAUNCH = ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_uint] * 4, ctypes.POINTER(ctypes.c_void_p))


def install(capability: int = 90) -> RecordingDriver:
    """Makes it the driver of this process, for a GPU of that compute capability, times 10."""
    folder = Path(tempfile.mkdtemp(prefix="recording-cuda-"))
    atexit.register(shutil.rmtree, folder)
    library = _build(folder)
    # Triton links its own modules to what it finds here, and they find what is loaded already.
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    driver = RecordingDriver(capability, ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))
    triton.runtime.driver.set_active(driver)
    return driver


def _build(folder: Path) -> Path:
    library = folder / "libcuda.so.1"
    headers = Path(nvidia.__file__).parent / "include"
    options = ["-shared", "-fPIC", "-O1", f"-I{headers}", f"-Wl,-soname,{library.name}"]
    subprocess.run(["gcc", *options, "-o", library, SOURCE], check=True)
    (folder / "libcuda.so").symlink_to(library.name)
    return library


class RecordingDriver(ptx_driver.Launches, nvidia.CudaDriver):
    """Triton's driver for CUDA, whose launches are executed."""

    def __init__(self, capability: int, library: ctypes.CDLL) -> None:
        # Not CudaDriver's, which asks torch for a GPU.
        ptx_driver.Launches.__init__(self)
        self.capability, self.utils = capability, nvidia.CudaUtils()
        self._sources: dict[int, Any] = {}
        self._failures: list[Exception] = []
        # Kept, as C has no part in counting who refers to it.
        self._callback = LAUNCH(self._record)
        library.record_launches(self._callback)
        driver = self

        class Launcher(nvidia.CudaLauncher):
            def __init__(self, src, metadata):
                super().__init__(src, metadata)
                self.src = src

            def __call__(self, x, y, z, stream, function, *arguments):
                driver._sources[function] = self.src
                super().__call__(x, y, z, stream, function, *arguments)
                if driver._failures:
                    raise driver._failures.pop()

        self.launcher_cls = Launcher

    def _record(self, function: int, x: int, y: int, z: int, threads: int, parameters: Any) -> None:
        # An exception does not pass through C.
        try:
            src = self._sources[function]
            kernel = self.program(src).kernel
            assert threads == kernel.threads, (threads, kernel.threads)
            kinds = enumerate(kernel.parameters.values())
            arguments = [ARGUMENTS[kind].from_address(parameters[k]).value for k, kind in kinds]
            self.execute(src, (x, y, z), arguments)
        except Exception as error:
            self._failures.append(error)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, WARP)

    def get_active_torch_device(self):
        return torch.device("cpu")
