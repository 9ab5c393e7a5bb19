"""Compiles the kernels ahead of time for a GPU that need not be there, and checks what the compiler made of them.

Usage: ``python tests/support/compile_ahead.py TARGET``, one of ``stub_driver.TARGETS``. Exit 1 if a check fails: no
spills and no stack, no more registers than ``REGISTERS``, and rows copied by accesses of 16 bytes where they allow
them, of no more bytes than their alignment where they do not.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)
import stub_driver
import torch
import triton
from rollouts import make_rollout
from torchrl.data import LazyTensorStorage

from multistep_triton import MultiStepTransform, NStepReplayBuffer, functional, gather_future, layouts, n_step_return
from multistep_triton.kernels import launch

# With 64 registers, eight programs of 128 threads share a multiprocessor, and 128 kB of units of 16 bytes are on
# their way; windows are few beside the rows.
REGISTERS = {
    "n_step_rows_kernel": 64,
    "n_step_windows_kernel": 168,
    "future_rows_kernel": 64,
    "store_rows_kernel": 96,  # 64 where nothing is kept once
    "count_ends_kernel": 64,
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Case(NamedTuple):
    run: Callable[[], Any]
    widest: int | None = None
    """Bytes of the widest access of rows, where they say which it must be."""


def extend(n_steps: int, observation: torch.Tensor, **entries: torch.Tensor) -> Callable[[], Any]:
    """Calls from the first one to those in steady state."""
    rollout = make_rollout(observation.shape[:2], observation.shape[2])
    for data in (rollout, rollout["next"]):
        data["observation"] = observation
    for key, value in entries.items():
        (rollout["next"] if key.startswith("reward") else rollout)[key] = value
    traj_key = "traj" if "traj" in entries else None

    def run() -> None:
        transform = MultiStepTransform(n_steps, 0.99, backend="triton", traj_key=traj_key)
        for _ in range(2 if rollout.shape[-1] > n_steps else n_steps + 2):
            transform.inv(rollout)

    return run


def sample(
    n_steps: int | tuple[int, int],
    observation: torch.Tensor,
    capturable: bool = False,
    compact: bool = False,
    store_as: torch.dtype | None = None,
    **entries: torch.Tensor,
) -> Callable[[], Any]:
    """Samples from a storage ``[C, B]`` that is full and one that is not, into which two frames a time are stored."""
    batch, frames = observation.shape[:2]
    rollout = make_rollout([batch], frames)
    for data in (rollout, rollout["next"]):
        data["observation"] = observation
    rollout.update(entries)
    traj_key = "traj" if "traj" in entries else None

    def run() -> None:
        storage = LazyTensorStorage(rollout.numel(), ndim=2)
        buffer = NStepReplayBuffer(
            n_steps=n_steps,
            gamma=0.99,
            backend="triton",
            traj_key=traj_key,
            storage=storage,
            capturable=capturable,
            compact=compact,
            store_as=store_as and {"observation": store_as},
        )
        for part in rollout.split([frames - 3, 2, 1], 1):
            buffer.extend(part.clone())
            buffer.sample(64)

    return run


SHAPE = (2, 3, 40)
FEW, MANY, MOST = 3, 9, 300
MASK, TRAJ = torch.ones(SHAPE, dtype=torch.bool), torch.zeros(SHAPE, dtype=torch.int64)
CASES = {
    "n=1, f32[20]": Case(extend(1, torch.zeros(*SHAPE, 20)), widest=16),
    "n=3, f32[20]": Case(extend(FEW, torch.zeros(*SHAPE, 20)), widest=16),
    "n=3, f32[17], i64": Case(extend(FEW, torch.zeros(*SHAPE, 17)), widest=8),
    "n=3, f32[256]": Case(extend(FEW, torch.zeros(*SHAPE, 256)), widest=16),
    "n=3, pixels": Case(extend(FEW, torch.zeros(*SHAPE, 4, 84, 84, dtype=torch.uint8)), widest=16),
    "n=3, bf16[64]": Case(extend(FEW, torch.zeros(*SHAPE, 64, dtype=torch.bfloat16)), widest=16),
    "n=3, time-major": Case(extend(FEW, torch.zeros(40, 2, 3, 20).movedim(0, 2)), widest=16),
    "n=3, features exchanged": Case(extend(FEW, torch.zeros(*SHAPE, 8, 20).transpose(-1, -2)), widest=16),
    "n=3, environments exchanged": Case(extend(FEW, torch.zeros(3, 2, 40, 20).transpose(0, 1)), widest=16),
    "n=3, at 4": Case(extend(FEW, torch.zeros(2 * 3 * 40 * 20 + 1)[1:].view(*SHAPE, 20)), widest=8),
    "n=3, mask": Case(extend(FEW, torch.zeros(*SHAPE, 20), mask=MASK), widest=16),
    "n=3, trajectory ids": Case(extend(FEW, torch.zeros(*SHAPE, 20), traj=TRAJ), widest=16),
    "n=3, mask, trajectory ids": Case(extend(FEW, torch.zeros(*SHAPE, 20), mask=MASK, traj=TRAJ), widest=16),
    "n=3, reward f64[3]": Case(extend(FEW, torch.zeros(*SHAPE, 20), reward=torch.zeros(*SHAPE, 3).double()), widest=16),
    "n=3, reward bf16": Case(extend(FEW, torch.zeros(*SHAPE, 20), reward=torch.zeros(*SHAPE, 1).bfloat16()), widest=16),
    "n=3, reward i64": Case(extend(FEW, torch.zeros(*SHAPE, 20), reward=torch.zeros(*SHAPE, 1).long()), widest=16),
    "n=3, 12 leaves": Case(
        extend(FEW, torch.zeros(*SHAPE, 20), **{f"leaf{i}": torch.zeros(*SHAPE, 17 + i) for i in range(8)}), widest=16
    ),
    "n=9, f32[20]": Case(extend(MANY, torch.zeros(*SHAPE, 20)), widest=16),
    "n=9, mask, ids": Case(extend(MANY, torch.zeros(*SHAPE, 20), mask=MASK, traj=TRAJ), widest=16),
    "n=300": Case(extend(MOST, torch.zeros(1, 1, 301, 20)), widest=16),
    "n=300, mask, ids": Case(
        extend(
            MOST,
            torch.zeros(1, 1, 301, 20),
            mask=torch.ones(1, 1, 301, dtype=torch.bool),
            traj=torch.zeros(1, 1, 301, dtype=torch.int64),
        ),
        widest=16,
    ),
    "n=3, a frame per call": Case(extend(FEW, torch.zeros(2, 3, 1, 20)), widest=16),
    "n=3, a frame per call, mask, ids": Case(
        extend(FEW, torch.zeros(2, 3, 1, 20), mask=MASK[..., :1], traj=TRAJ[..., :1]), widest=16
    ),
    "n=9, a frame per call": Case(extend(MANY, torch.zeros(2, 3, 1, 20)), widest=16),
    "sampled, n=3, f32[20]": Case(sample(FEW, torch.zeros(*SHAPE[1:], 20)), widest=16),
    "sampled, n=3, f32[17]": Case(sample(FEW, torch.zeros(*SHAPE[1:], 17)), widest=8),
    "sampled, n=3, pixels": Case(sample(FEW, torch.zeros(*SHAPE[1:], 4, 84, 84, dtype=torch.uint8)), widest=16),
    "sampled, n=3, mask, ids": Case(sample(FEW, torch.zeros(*SHAPE[1:], 20), mask=MASK[0], traj=TRAJ[0]), widest=16),
    "sampled, capturable": Case(sample(FEW, torch.zeros(*SHAPE[1:], 20), capturable=True), widest=16),
    "sampled, compact": Case(sample(FEW, torch.zeros(*SHAPE[1:], 20), compact=True), widest=16),
    "sampled, compact, capturable, mask, ids": Case(
        sample(FEW, torch.zeros(*SHAPE[1:], 20), capturable=True, compact=True, mask=MASK[0], traj=TRAJ[0]), widest=16
    ),
    "sampled, compact, n=9": Case(sample(MANY, torch.zeros(*SHAPE[1:], 20), compact=True), widest=16),
    "sampled, bf16 of f32": Case(
        sample(FEW, torch.zeros(*SHAPE[1:], 20), compact=True, store_as=torch.bfloat16), widest=8
    ),
    "sampled, n=9": Case(sample(MANY, torch.zeros(*SHAPE[1:], 20)), widest=16),
    "sampled, n of (1, 8)": Case(sample((1, 8), torch.zeros(*SHAPE[1:], 20)), widest=16),
    "sampled, n of (1, 9), mask, ids": Case(
        sample((1, MANY), torch.zeros(*SHAPE[1:], 20), mask=MASK[0], traj=TRAJ[0]), widest=16
    ),
    "n_step_return": Case(
        lambda: n_step_return(
            torch.zeros(2, 40), torch.zeros(2, 40, dtype=torch.bool), gamma=0.9, n_steps=5, backend="triton"
        )
    ),
    "gather_future f32[64]": Case(
        lambda: gather_future(torch.zeros(2, 40, 64), torch.ones(2, 40, dtype=torch.int64), backend="triton"), widest=16
    ),
}


class Resources(NamedTuple):
    registers: int
    spills: int
    """Bytes of stack and local memory, or registers that were spilled."""
    widest: int
    """Bytes of the widest access of a thread to global memory, loads and stores."""
    kilobytes: int


def resources(kernel: Any) -> Resources:
    if "ptx" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
            machine = subprocess.run([TOOLS / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
        registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
        widths = [
            max((int(bits) // 8 for bits in re.findall(rf"\b{access}\.E\.(?:\w+\.)*?(\d+)\b", machine)), default=4)
            for access in ("LDG", "STG")
        ]
        return Resources(int(registers), int(stack) + int(local), min(widths), len(kernel.asm["cubin"]) // 1024)
    code = kernel.asm["amdgcn"]
    registers, *spills = (
        int(re.search(rf"\.{name}:\s*(\d+)", code).group(1))
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    )
    widths = [
        max((4 * int(words or 1) for words in re.findall(rf"_{access}_dword(?:x(\d))?", code)), default=1)
        for access in ("load", "store")
    ]
    return Resources(registers, sum(spills), min(widths), len(kernel.asm["hsaco"]) // 1024)


def main(target: str) -> list[str]:
    stub_driver.install(target)
    logging.getLogger("torchrl").setLevel(logging.WARNING)  # it logs to stdout what each storage allocates
    failures = []
    lines = [f"Triton {triton.__version__}, {target}: registers, bytes of the widest access, kB of code"]
    for name, case in CASES.items():
        for kernel in stub_driver.kernels():
            kernel.device_caches.clear()
        for found in (layouts._layout, layouts._layout_of, functional._keys, launch._gather_plan):
            found.cache_clear()
        case.run()
        compiled = [(kernel.name, resources(kernel)) for kernel in stub_driver.compiled_kernels()]
        for kernel, most in REGISTERS.items():
            found = [each for called, each in compiled if called == kernel]
            if not found:
                continue
            registers = max(each.registers for each in found)
            widest = max(each.widest for each in found)
            code = "+".join(str(each.kilobytes) for each in found)
            lines.append(f"    {name:34}{kernel:24}{registers:4} {widest:3} {code:>8}")
            if any(each.spills for each in found):
                failures.append(f"{target}, {name}, {kernel}: spills {[each.spills for each in found]}")
            if registers > most:
                failures.append(f"{target}, {name}, {kernel}: {registers} registers, more than {most}")
            copies = kernel in ("n_step_rows_kernel", "store_rows_kernel")
            if copies and case.widest not in (None, widest):
                failures.append(f"{target}, {name}: rows are copied {widest} bytes at a time, not {case.widest}")
    print("\n".join([*lines, *failures]), flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(bool(main(*sys.argv[1:])))
