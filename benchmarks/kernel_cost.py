"""What the kernels cost a GPU, counted on compiled code that a machine of ours executes, without a GPU.

Usage: ``python -m benchmarks.kernel_cost``; needs Triton, in a process without ``TRITON_INTERPRET``. Writes
``benchmarks/results/kernel-cost.md`` and prints it; exits with 1 where a figure to reach is missed, and says which.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import numpy as np
import pandas as pd
import ptx_driver
import torch
import triton
from ptx_costs import CLOCK, ISSUES, L2_BANDWIDTH, MEMORY_BANDWIDTH, MULTIPROCESSORS, Counts
from tensordict import TensorDict
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchrl.data import LazyTensorStorage
from torchrl.envs.transforms import MultiStepTransform as TorchRLMultiStepTransform

from benchmarks.cases import GAMMA, PIXELS, Case, make_rollout
from benchmarks.machine import installed
from benchmarks.measure import Operators, memory_of, set_up
from benchmarks.report import table
from multistep_triton import MultiStepTransform, NStepReplayBuffer

OUT = Path(__file__).parent / "results" / "kernel-cost.md"
CAPABILITY = 90
P_DONE = 0.01
MOST_LAUNCHES = 2
PERFECT = MEMORY_BANDWIDTH / (MULTIPROCESSORS * ISSUES * CLOCK)
"""Bytes that memory moves in the time in which the GPU can issue one instruction of a warp."""


class Target(NamedTuple):
    """A case and what its kernels are to reach."""

    case: Case
    bytes_per_instruction: float
    bus: float
    """Bytes over the bus, at most as many times the least."""
    compact: bool = False
    """Whether the buffer keeps observations once."""

    def __str__(self) -> str:
        case = self.case
        width = f"uint8[{', '.join(map(str, PIXELS))}]" if case.kind == "pixels" else f"f32[{case.width}]"
        what = f"sample {case.batch} of" if case.batch else "store" if case.kind == "storing" else "extend"
        return f"{what} {case.envs}x{case.frames} {width} n={case.n_steps}{', compact' if self.compact else ''}"


TARGETS = [
    Target(Case("state", 256, 32, P_DONE, 3, 17), 8, 1.15),
    Target(Case("state", 256, 32, P_DONE, 3, 64), 12, 1.15),
    Target(Case("state", 256, 32, P_DONE, 10, 17), 8, 1.3),
    Target(Case("streaming", 1024, 1, P_DONE, 3, 17), 5, 2.1),
    Target(Case("streaming", 1024, 1, P_DONE, 3, 64), 10, 2.1),
    Target(Case("pixels", 8, 16, P_DONE, 3, int(np.prod(PIXELS))), 14, 1.2),
    Target(Case("storing", 1024, 1, P_DONE, 3, 17), 5, 1.15),
    Target(Case("storing", 1024, 1, P_DONE, 3, 64), 10, 1.15),
    Target(Case("storing", 256, 32, P_DONE, 3, 17), 5, 1.15),
    Target(Case("sampling", 256, 32, P_DONE, 3, 100, 2048), 12, 1.15),
    Target(Case("sampling", 256, 64, P_DONE, 3, 64, 2048), 12, 1.2),
    Target(Case("sampling", 256, 64, P_DONE, 8, 48, 2048), 8, 1.3),
    Target(Case("storing", 1024, 1, P_DONE, 3, 64), 10, 1.15, compact=True),
    Target(Case("storing", 256, 32, P_DONE, 3, 17), 2.5, 1.15, compact=True),
    Target(Case("sampling", 256, 32, P_DONE, 3, 100, 2048), 12, 1.15, compact=True),
    Target(Case("sampling", 256, 64, P_DONE, 8, 48, 2048), 7, 1.3, compact=True),
]


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write: of each, its tensors, inputs and outputs, every one of them once.

    Views are left out: operators that change nothing and whose outputs share memory with an input; so are those that
    only allocate. An element that a tensor repeats by a stride of zero counts once, and what is written in place counts
    once, too, though it may be read before. Caches between operators are not considered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs, outputs = tensors((args, kwargs)), tensors(out)
        owned = {each.untyped_storage().data_ptr() for each in inputs}
        is_view = any(each.untyped_storage().data_ptr() in owned for each in outputs)
        if not (is_view and not function._schema.is_mutable) and "empty" not in function.name():
            # Not by address alone: a tensor and a part of it begin at the same one.
            distinct = {(each.data_ptr(), each.shape, each.stride()): each for each in (*inputs, *outputs)}
            self.bytes += sum(map(bytes_of, distinct.values()))
        return out


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def bytes_of(tensor: Tensor) -> int:
    elements = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return int(np.prod(list(elements), dtype=np.int64)) * tensor.itemsize


class Cost(NamedTuple):
    """Of one call, and of what torchrl does instead, if there is such a thing."""

    launches: list[Counts]
    least: int
    """Bytes of inputs and outputs."""
    least_once: int
    """The same, where a tensor that is returned under two names counts once."""
    torchrl_bytes: int | None = None
    torchrl_operators: int | None = None

    def total(self, name: str) -> float:
        return sum(getattr(each, name) for each in self.launches)

    @property
    def bytes_per_instruction(self) -> float:
        return self.total("bus_bytes") / self.total("machine_instructions")

    @property
    def bus(self) -> float:
        return self.total("bus_bytes") / self.least

    def bound(self) -> tuple[str, float]:
        """What takes longest in the model, over all launches, and how many microseconds."""
        bounds = pd.DataFrame([each.microseconds() for each in self.launches]).sum()
        return str(bounds.idxmax()), float(bounds.max())


def leaves(tensordict: TensorDict) -> list[Tensor]:
    return list(tensordict.values(True, True))


def calls_of(case: Case) -> int:
    """Until a call gives out as many frames as it takes, in memory that is there."""
    return 2 + 2 * -(-case.n_steps // case.frames)


def a_call(case: Case, rollout: TensorDict, compact: bool) -> Callable[[], TensorDict]:
    """What is measured: a call that gives out as many frames as it takes, or a sample of a ring that is full."""
    if case.kind == "storing":
        storage = LazyTensorStorage(8 * case.envs * case.frames, ndim=2)
        buffer = NStepReplayBuffer(
            storage=storage, n_steps=case.n_steps, gamma=GAMMA, backend="triton", compact=compact
        )
        for _ in range(2):
            buffer.extend(rollout)
        return partial(buffer.extend, rollout)
    if not case.batch:
        transform = MultiStepTransform(case.n_steps, GAMMA, backend="triton")
        for _ in range(calls_of(case) - 1):
            transform.inv(rollout)
        return partial(transform.inv, rollout)
    torch.manual_seed(0)
    buffer = NStepReplayBuffer(
        storage=LazyTensorStorage(case.envs * case.frames, ndim=2, device=rollout.device),
        n_steps=case.n_steps,
        gamma=GAMMA,
        batch_size=case.batch,
        backend="triton",
        compact=compact,
    )
    buffer.extend(rollout)
    return buffer.sample


def measure(driver: ptx_driver.Driver, target: Target) -> Cost:
    """One call, and torchrl's beside it."""
    case = target.case
    rollout = make_rollout(case)
    call = a_call(case, rollout, target.compact)
    driver.launches.clear()
    out = call()
    launches = list(driver.launches)
    if case.batch:
        least = least_of_sample(case, out)
        return Cost(launches, least, least)
    if case.kind == "storing":
        # What is read is written, and besides the index that is returned, and every frame's slot.
        least = 2 * memory_of(leaves(rollout)) + out.nbytes + out[:, 0].numel() * out.itemsize
        return Cost(launches, least, least)
    least = sum(leaf.nbytes for leaf in leaves(rollout) + leaves(out))
    least_once = memory_of(leaves(rollout)) + memory_of(leaves(out))
    theirs = TorchRLMultiStepTransform(case.n_steps, GAMMA)
    for _ in range(calls_of(case)):
        with Traffic() as traffic, Operators() as operators:
            theirs.inv(rollout)
    return Cost(launches, least, least_once, traffic.bytes, operators.names.total())


def least_of_sample(case: Case, sample: TensorDict) -> int:
    """What is returned and the rows that are picked; of their windows, rewards and dones: every one of them once.

    Frames are drawn more than once, and windows overlap, so that fewer rows are read than are written.
    """
    slot, env = sample["index"].unbind(-1)
    steps, ahead = sample["steps_to_next_obs"], torch.arange(case.n_steps)
    frame = slot * case.envs + env
    # The oldest frame is in the first slot: no window goes around the ring.
    window = (frame[:, None] + ahead * case.envs)[ahead < steps[:, None]]
    frames, ends, windows = (len(each.unique()) for each in (frame, frame + (steps - 1) * case.envs, window))
    action, observation, reward = sample["action"], sample["observation"], sample["next", "reward"]
    flags = ("terminated", "truncated")
    row = (action.nbytes + observation.nbytes + sum(sample["next", each].nbytes for each in flags)) // case.batch
    of_window = (reward.nbytes + sample["next", "done"].nbytes) // case.batch
    read = frames * row + ends * (observation.nbytes // case.batch) + windows * of_window
    # The index is drawn before, by operators of torch: the kernels read it.
    return memory_of(leaves(sample)) + read


def missed(target: Target, cost: Cost) -> list[str]:
    """What falls short, in words."""
    short = []
    if cost.bytes_per_instruction < target.bytes_per_instruction:
        short.append(f"{cost.bytes_per_instruction:.2f} bytes per instruction, to reach {target.bytes_per_instruction}")
    if cost.bus > target.bus:
        short.append(f"{cost.bus:.3f} times the least over the bus, at most {target.bus}")
    if len(cost.launches) > MOST_LAUNCHES:
        short.append(f"{len(cost.launches)} launches, at most {MOST_LAUNCHES}")
    return [f"{target}: {each}" for each in short]


def row(target: Target, cost: Cost) -> dict[str, str | float]:
    bound, microseconds = cost.bound()
    theirs = cost.torchrl_bytes is not None
    return {
        "case": str(target),
        "launches": len(cost.launches),
        "instructions of a warp": round(cost.total("machine_instructions")),
        "bytes per instruction": cost.bytes_per_instruction,
        "to reach": target.bytes_per_instruction,
        "bus / least": cost.bus,
        "at most": target.bus,
        "a tensor once": cost.total("bus_bytes") / cost.least_once,
        "sectors per load": cost.total("load_sectors") / cost.total("load_requests"),
        "sectors per store": cost.total("store_sectors") / cost.total("store_requests"),
        "bound by": bound,
        "bound, us": microseconds,
        "torchrl / least": f"{cost.torchrl_bytes / cost.least:.3g}" if theirs else "-",
        "torchrl's operators": str(cost.torchrl_operators) if theirs else "-",
    }


def markdown(costs: Iterable[tuple[Target, Cost]]) -> str:
    costs = list(costs)
    rows = pd.DataFrame([row(*each) for each in costs])
    short = [each for target, cost in costs for each in missed(target, cost)]
    issues = f"{MULTIPROCESSORS} multiprocessors x {ISSUES} instructions of a warp x {CLOCK / 1e9:g} GHz"
    return "\n\n".join(
        [
            "# What the kernels cost",
            f"Counted, not timed: kernels as Triton {triton.__version__} compiles them for sm_{CAPABILITY}, their PTX "
            f"executed on CPU memory (torch {torch.__version__}, torchrl {installed('torchrl')}). The model is of an "
            f"H100: {issues}, memory of {MEMORY_BANDWIDTH / 1e12:.1f}e12 B/s, a second-level cache of "
            f"{L2_BANDWIDTH / 1e12:.1f}e12 B/s; at perfect issue, memory moves {PERFECT:.1f} bytes per instruction, "
            "and kernels of fewer are bound by instructions. It does not model latency, occupancy, or what caches keep "
            "between launches, so that its microseconds are a lower bound.",
            "`bus / least`: bytes of the distinct 32-byte sectors that launches read and write, over those of inputs "
            "and outputs; of a sample, inputs are the distinct rows that it needs. `a tensor once`: the same, where "
            "`original_reward` and `reward_orig`, one tensor of two names, do not count twice as outputs. Frames that "
            "are held back are in no least, but are read and written. `sectors per load`, `sectors per store`: per "
            "request of a warp. `torchrl / least`: bytes of the tensors that the operators of torchrl's "
            "`MultiStepTransform` read and write on the same rollout, views left out; it has none for samples.",
            table(rows),
            "Missed:\n\n" + "\n".join(f"- {each}" for each in short) if short else "All is reached.",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(arguments)
    set_up()
    driver = ptx_driver.install(CAPABILITY)
    costs = [(target, measure(driver, target)) for target in TARGETS]
    text = markdown(costs)
    OUT.write_text(text + "\n")
    print(text)
    if short := [each for target, cost in costs for each in missed(target, cost)]:
        sys.exit("fell short: " + "; ".join(short))


if __name__ == "__main__":
    main()
