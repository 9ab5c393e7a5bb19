"""GPUs that are simulated: tensors in the CPU's memory that say they are on one.

What torch refuses of tensors on several devices raises, kernels are interpreted, and what makes the host wait for a GPU
is noted. All in one thread: others see no GPU. Neither generators nor CUDA graphs are on one.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import interpret
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves, tree_map_only

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs are simulated where there is none")
NUMBERS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__", "equal", "allclose"}
WAITS = NUMBERS | {"nonzero", "argwhere", "unique", "unique_consecutive", "masked_select", "bincount", "new_tensor"}
# These take no number of the CPU beside a GPU's tensor.
STRICT = {"cat", "stack", "gather", "scatter_", "index_select", "index_copy_", "take_along_dim"}
MOVES = {"to": None, "cpu": CPU, "cuda": GPU, "as_tensor": None, "asarray": None, "tensor": None}


class GpuTensor(Tensor):
    """A tensor that says it is on a GPU."""

    simulation: Simulation | None = None
    device = property(lambda self: self.gpu)
    is_cpu, is_cuda = False, True

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {})

    def __iter__(self):
        return iter(self.unbind(0))

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), self.clone())

    def __reduce_ex__(self, protocol):
        with torch._C.DisableTorchFunction():
            return _placed, (self.clone(), str(self.gpu))


class Simulation(TorchFunctionMode):
    """Sends tensors to GPUs, and notes what happens."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[tuple[str, str]] = []
        """What the host waited for, and where."""
        self.launches: list[str] = []
        self.mixed: list[tuple[str, set[torch.device]]] = []
        """Launches with a pointer that is not the GPU's."""
        self.executes = True
        """Whether kernels run, or are noted alone."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_told = args and isinstance(args[0], Tensor) and _told(args, kwargs)
        ours = is_told or func in _device_constructors() or func in (Tensor.cuda, Tensor.pin_memory)
        # Functions of tensordicts call those of tensors.
        of_tensors = all(issubclass(each, Tensor) for each in types)
        return _call(func, args, kwargs) if ours and of_tensors else func(*args, **kwargs)


def _placed(tensor: Tensor, device: torch.device | str) -> Tensor:
    device = torch.device(device)
    if device.type == "cuda":
        with torch._C.DisableTorchFunction():
            tensor = tensor.as_subclass(GpuTensor)
        tensor.gpu = device
    return tensor


def _is_device(argument: Any) -> bool:
    return isinstance(argument, str | torch.device)


def _told(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """The device that a call names."""
    told = next(filter(_is_device, (kwargs.get("device"), *args[1:2])), None)
    return GPU if str(told) == "cuda" else told and torch.device(told)


def _wait(what: str) -> None:
    paths = [(Path(each.filename), each.lineno) for each in traceback.extract_stack()]
    where = [f"{path.name}:{line}" for path, line in paths if "torch" not in path.parts and str(path) != __file__]
    if GpuTensor.simulation is not None:
        GpuTensor.simulation.waits.append((what, " > ".join(where[-3:])))


def _copy(source: torch.device, to: torch.device, non_blocking: bool = False) -> None:
    """The host waits for a copy: unless told otherwise, and for what comes to its own memory."""
    if source != to and CPU in (source, to) and not (non_blocking and source == CPU):
        _wait(f"copy {source} -> {to}")


def _index(target: Tensor, index: Any, value: Any = None) -> None:
    indices = [each for each in (index if isinstance(index, tuple) else (index,)) if isinstance(each, Tensor)]
    for each in indices:
        if each.dtype == torch.bool or (not each.ndim and each.is_cuda):
            _wait("values of an index")
        elif each.ndim and each.device != target.device:
            # Torch copies such an index to the CPU to write there, not to read.
            if not each.is_cpu and (value is None or not target.is_cpu):
                raise RuntimeError(f"indices should be on the CPU or {target.device}, got {each.device}")
            _copy(each.device, target.device)
    if isinstance(value, Tensor) and value.device != target.device:
        if value.ndim and any(each.ndim for each in indices):
            raise RuntimeError(f"Expected all tensors to be on the same device: {value.device}, {target.device}")
        _copy(value.device, target.device)


def _call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a function of torch in the CPU's memory, and says of its results where they are."""
    name, told, moved = func.__name__, _told(args, kwargs), False
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    to = told or next((each.device for each in tensors if not each.is_cpu), CPU)
    if name in ("numpy", "__array__", "pin_memory"):
        if to != CPU:
            raise TypeError(f"can't convert a tensor on {to}: use Tensor.cpu() first")
        func = Tensor.clone
    elif name in MOVES and isinstance(args[0], Tensor):
        to = told or MOVES[name] or tensors[-1].device
        moved = args[0].device != to
        _copy(args[0].device, to, kwargs.get("non_blocking", False))
        if name == "cuda":
            func, args, kwargs = Tensor.cpu, args[:1], {}
    elif func in _device_constructors():
        to = told or torch.get_default_device()
        kwargs = {key: each for key, each in kwargs.items() if key != "pin_memory"} | {"device": to}
        _copy(CPU, to if name in MOVES else CPU)
    elif name in ("copy_", "_foreach_copy_"):
        to = tensors[0].device
        for target, source in [args[:2]] if name == "copy_" else zip(*args[:2], strict=True):
            _copy(source.device, target.device, kwargs.get("non_blocking", False))
    elif name in ("__getitem__", "__setitem__"):
        to = args[0].device
        _index(*args)
    elif told is None and name not in ("__get__", "__set__"):
        devices = {each.device for each in tensors if each.ndim or not each.is_cpu or name in STRICT}
        if len(devices) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, got {devices} ({name})")
    if name in WAITS and to != CPU:
        _wait(name)
    in_memory = {key: CPU if key == "device" and to.type == "cuda" else each for key, each in kwargs.items()}
    with torch._C.DisableTorchFunction():
        out = func(*[CPU if _is_device(each) and to.type == "cuda" else each for each in args], **in_memory)
        out = out.clone() if moved else out
    if isinstance(out, torch.Size) or not isinstance(out, Tensor | tuple | list):
        return out
    return tree_map_only(Tensor, lambda each: each if isinstance(each, GpuTensor) else _placed(each, to), out)


@contextmanager
def simulated_cuda() -> Iterator[Simulation]:
    """Within, torch has GPUs, and ``auto`` takes the kernels for tensors on the first."""
    from triton.runtime.interpreter import InterpretedFunction

    from multistep_triton import backends

    simulation, run = Simulation(), InterpretedFunction.run

    def launch(kernel, *args, **options):
        devices = {each.device for each in tree_leaves(args) if isinstance(each, Tensor)}
        simulation.launches.append(kernel.__name__)
        simulation.mixed += [(kernel.__name__, devices)] if devices != {GPU} else []
        if simulation.executes:
            with torch._C.DisableTorchFunction():
                run(kernel, *tree_map_only(Tensor, lambda each: each.as_subclass(Tensor), args), **options)

    with pytest.MonkeyPatch.context() as patch, torch.serialization.safe_globals([_placed]), simulation:
        interpret(patch)
        patch.setattr(GpuTensor, "simulation", simulation)
        patch.setattr(InterpretedFunction, "run", launch)
        patch.setattr(backends, "_triton_device_type", lambda: ("cuda", "Triton drives cuda devices"))
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        patch.setattr(torch.accelerator, "current_stream", str)
        yield simulation
