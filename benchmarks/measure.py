"""Measurements of one call, or of several in turns: time, operators, launches, synchronizations, memory."""

from __future__ import annotations

import argparse
import logging
import os
import resource
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Measurement, Timer

THREADS = 2
ROUNDS = 3
"""How often the contenders take turns."""


def command(description: str, seconds: float | None) -> argparse.ArgumentParser:
    """A parser of what every measurement has: a device, the seconds to spend, and where files go."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=seconds, help="to spend on each measurement")
    parser.add_argument("--out", type=Path, default=Path(".benchmarks"), metavar="DIR")
    return parser


def set_up() -> None:
    """The same ground for everybody: threads, float32 that is float32, memory as a training process has it."""
    os.environ.pop("MULTISTEP_TRITON_BACKEND", None)
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    torch._logging.set_logs(dynamo=logging.ERROR)
    torch.set_num_threads(THREADS)
    # torchrl's return is a convolution, which on a GPU would round its operands to TF32.
    torch.backends.cudnn.allow_tf32 = False
    # glibc gives freed memory back to the system beyond a bound that it learns from the largest block freed so far.
    # Until it has seen one, whether a contender pays a page fault for every 4 kB it writes depends on what ran before
    # it. A training process has freed such blocks long ago; so has this one, before any contender runs.
    torch.empty(31 << 20, dtype=torch.uint8)


def preemptions() -> int:
    """How often others have taken a core from this process; two threads that wait for each other then lose 8 ms."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def in_turns(calls: dict[str, Callable[[], Any]], seconds: float, rounds: int = ROUNDS) -> dict[str, Measurement]:
    """Times calls in the order A B C A B C, so that what drifts on a machine hits all alike.

    Args:
        calls: what to time, by name.
        seconds: to spend on each, in all rounds together.
        rounds: of turns.
    """
    timers = {name: Timer("call()", globals={"call": call}, num_threads=THREADS) for name, call in calls.items()}
    turns: dict[str, list[Measurement]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, timer in timers.items():
            turns[name].append(timer.blocked_autorange(min_run_time=seconds / rounds))
    return {name: Measurement.merge(measurements)[0] for name, measurements in turns.items()}


class Operators(TorchDispatchMode):
    """How often each operator is called under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[str(function)] += 1
        return function(*args, **(kwargs or {}))


class PeakMemory(TorchDispatchMode):
    """Bytes of tensor memory allocated under it: alive now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._sizes: dict[int, int] = {}

    def _release(self, address: int) -> None:
        self.alive -= self._sizes.pop(address)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if storage.nbytes() and address not in self._sizes and address not in inputs:
                self._sizes[address] = storage.nbytes()
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._release, address)
        self.peak = max(self.peak, self.alive)
        return out


def memory_of(result: Any) -> int:
    """Bytes of the tensors in a result, each counted once."""
    tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    return sum({leaf.data_ptr(): leaf.nbytes for leaf in tensors}.values())


class Cost(NamedTuple):
    """Of one call; None where the device does not have it."""

    operators: int
    launches: int | None
    syncs: int | None
    peak_bytes: int
    """At the peak, beyond what the call returned."""


def cost(call: Callable[[], Any], device: torch.device) -> Cost:
    """What a call costs beside time."""
    with Operators() as operators:
        call()
    if device.type == "cpu":
        with PeakMemory() as memory:
            out = call()
        return Cost(operators.names.total(), None, None, memory.peak - memory_of(out))
    launches, syncs = launches_and_syncs(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    peak = torch.cuda.max_memory_allocated() - before
    return Cost(operators.names.total(), launches, syncs, peak - memory_of(out))


def launches_and_syncs(call: Callable[[], Any]) -> tuple[int, int]:
    """Kernels, copies and fills that a call makes a GPU run, and how often the host waits for it meanwhile."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function("call"):
            call()
        torch.cuda.synchronize()
    events = profiler.events()
    # The profiler draws the range on the GPU once more, beside what ran there.
    ran = [event for event in events if event.device_type == DeviceType.CUDA and event.name != "call"]
    span = next(event.time_range for event in events if event.device_type == DeviceType.CPU and event.name == "call")
    waits = [
        event for event in events if "Synchronize" in event.name and span.start <= event.time_range.start <= span.end
    ]
    return len(ran), len(waits)
