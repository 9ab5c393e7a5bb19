"""A Triton driver without a GPU: kernels are compiled for one, and their PTX is executed on CPU tensors.

``install()`` makes it the driver of this process, from there on. For a process in which Triton is not interpreted:
import this before anything imports Triton.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

# Triton takes "0" for unset.
assert os.environ.get("TRITON_INTERPRET", "0") in ("", "0"), "compiling needs a process without TRITON_INTERPRET"

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from ptx_costs import MULTIPROCESSORS, WARP, Counts  # noqa: E402
from ptx_machine import Program  # noqa: E402
from ptx_numbers import Array, Fault  # noqa: E402
from ptx_text import parse  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

# What a program of an H100 can have of shared memory.
MOST_SHARED_BYTES = 227 << 10
# Generations of objects out of which a collection moves them.
YOUNG = 0, 1
# Kernels that stay bound to what executes them, of 1 to 3 MB each; the one unused for longest goes first.
BOUND = 128


class _Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": MOST_SHARED_BYTES, "warpSize": WARP, "multiprocessor_count": MULTIPROCESSORS}

    def load_binary(self, name, kernel, shared, device):
        """Module, function, registers, spills, threads per block."""
        return 0, 0, 0, 0, 1024


class LiveTensors:
    """The memory of all CPU tensors that are alive.

    Python keeps what it allocated lately in lists of its own, which are short. There they are looked for, at a launch
    and before a collection moves them away; among all objects, which takes a tenth of a second, only for an address
    that is in none of those seen.
    """

    def __init__(self) -> None:
        gc.callbacks.append(self._before_collection)
        self._seen: dict[int, weakref.ref[torch.Tensor]] = {}
        self._begins, self._ends = np.zeros(0, np.uint64), np.zeros(0, np.uint64)

    def _note(self, *generations: int | None) -> None:
        types = set(_subclasses(torch.Tensor))
        for generation in generations:
            # Types first: asking an object for its class can run code of its own.
            for each in gc.get_objects(generation):
                if type(each) in types:
                    self._seen[id(each)] = weakref.ref(each)

    def _before_collection(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] > 0:
            self._note(*YOUNG)

    def look(self, everywhere: bool = False) -> None:
        """Asks anew which memory is alive."""
        self._note(*((None,) if everywhere else YOUNG))
        spans: dict[int, int] = {}
        # Modes and subclasses have no say in where memory is.
        with torch._C.DisableTorchFunction():
            for key, reference in list(self._seen.items()):
                tensor = reference()
                if tensor is None:
                    del self._seen[key]
                elif (storage := _storage(tensor)) is not None:
                    begin, size = storage
                    spans[begin] = max(size, spans.get(begin, 0))
        self._begins = np.array(sorted(spans), np.uint64)
        self._ends = self._begins + np.array([spans[each] for each in self._begins.tolist()], np.uint64)

    def check(self, addresses: Array, size: int) -> None:
        """Raises a fault unless so many bytes from each address on lie in one tensor."""
        outside = self._outside(addresses, size)
        if outside is not None:
            self.look(everywhere=True)
            outside = self._outside(addresses, size)
        if outside is not None:
            raise Fault(f"access outside of every tensor, at {outside:#x}")

    def _outside(self, addresses: Array, size: int) -> int | None:
        if not len(self._begins):
            return int(addresses.min())
        # Most accesses are to one tensor.
        low, high = addresses.min(), addresses.max()
        at = np.searchsorted(self._begins, low, side="right") - 1
        if at >= 0 and high + np.uint64(size) <= self._ends[at]:
            return None
        at = np.searchsorted(self._begins, addresses, side="right") - 1
        outside = (at < 0) | (addresses + np.uint64(size) > self._ends[np.maximum(at, 0)])
        return int(addresses[outside][0]) if outside.any() else None


def _storage(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Where a tensor's memory begins, and how long it is; nothing, if it is one without, or not a CPU's."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return None
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except RuntimeError:
        return None


def _subclasses(kind: type) -> Iterator[type]:
    yield kind
    for each in kind.__subclasses__():
        yield from _subclasses(each)


class Launches:
    """Executes launches, and keeps what they cost.

    Attributes:
        launches: What each of them did.
        checked: Whether an access must lie in a tensor that is alive.
        counted: Whether accesses are counted, which takes a third of the time.
    """

    def __init__(self) -> None:
        self.launches: list[Counts] = []
        self.checked = self.counted = True
        self._alive = LiveTensors()
        self._programs: dict[int, tuple[Any, Program]] = {}

    def execute(self, src: Any, grid: tuple[int, int, int], arguments: list[float]) -> None:
        """Launches the kernel that Triton compiled of a source."""
        if self.checked:
            self._alive.look()
        program = self.program(src)
        # Triton appends two pointers to memory of its own, which no kernel of one launch uses.
        arguments = [*arguments, *[0] * (len(program.kernel.parameters) - len(arguments))]
        check = self._alive.check if self.checked else None
        self.launches.append(program.run(arguments, grid, check, self.counted))

    def program(self, src: Any) -> Program:
        """The kernel that Triton compiled of a source, bound."""
        # Kept with the source, as long as which no other one has its id.
        bound = self._programs.pop(id(src), None)
        if bound is None:
            caches = src.fn.device_caches.values()
            kernel = next(each for cache in caches for each in cache[0].values() if each.src is src)
            bound = src, Program(parse(kernel.asm["ptx"]), kernel.metadata.shared)
        if len(self._programs) == BOUND:
            del self._programs[next(iter(self._programs))]
        self._programs[id(src)] = bound
        return bound[1]


class Driver(Launches):
    """Triton's interface of a driver."""

    def __init__(self, capability: int = 90) -> None:
        super().__init__()
        self.target, self.utils = GPUTarget("cuda", capability, WARP), _Utils()

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def launcher_cls(self, src, metadata) -> Callable[..., None]:
        def launch(x, y, z, stream, function, kernel_metadata, launch_metadata, enter, leave, *arguments):
            self.execute(src, (x, y, z), list(_flatten(tuple(src.signature.values()), arguments)))

        return launch


def _flatten(signature: tuple, arguments: tuple) -> Iterator[float]:
    """The numbers and addresses that a kernel is given."""
    for kind, value in zip(signature, arguments, strict=True):
        if isinstance(kind, tuple | list):
            yield from _flatten(kind, value)
        elif kind != "constexpr":
            yield 0 if value is None else value.data_ptr() if isinstance(value, torch.Tensor) else value


def install(capability: int = 90) -> Driver:
    """Makes the machine the driver of this process, for a GPU of that compute capability, times 10."""
    driver = Driver(capability)
    triton.runtime.driver.set_active(driver)
    return driver


def install_as(how: str) -> Launches:
    """Makes the machine the driver: itself, or, ``recorded``, under Triton's own one and its launcher in C."""
    if how == "machine":
        return install()
    if how == "recorded":
        import recording_cuda

        return recording_cuda.install()
    raise ValueError(f"the driver must be machine or recorded, got {how!r}")
