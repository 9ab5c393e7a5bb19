"""What a GPU takes for a call: how many kernels it runs and for how long, as the profiler tells it, each of ours apart.

Usage: ``python -m benchmarks.device_time --out DIR``; needs a GPU. Time of the host is not in it. What is measured has
passed the gate. Inputs are the same in every call: those of the first cases, with what comes out, do not fit in the
second-level cache, the small ones stay in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tensordict import TensorDict
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import PIXELS, Case, make_rollout
from benchmarks.compare import bytes_of, prepare
from benchmarks.contenders import COMPILED, CONTENDERS, FLOORS, SAMPLE, STORE_AND_SAMPLE, TRANSFORM, Subject, applies
from benchmarks.machine import about, sentence
from benchmarks.measure import set_up
from benchmarks.report import table

CASES = [
    *(Case("state", 8192, 64, 0.01, n_steps, width) for n_steps, width in ((3, 17), (10, 17), (50, 17), (3, 64))),
    Case("pixels", 256, 16, 0.01, width=PIXELS[0] * PIXELS[1] * PIXELS[2]),
    Case("state", 256, 64, 0.01),
    Case("state", 1, 64, 0.01),
    Case("streaming", 4096, 1, 0.01),
    Case("streaming", 16384, 1, 0.01, width=64),
    *(Case("sampling", 4096, 32, 0.01, n_steps, width, 32768) for n_steps, width in ((3, 100), (8, 48))),
    Case("sampling", 1024, 64, 0.01, 3, 64, 2048),
]
CALLS = 10
OURS = ("store_rows_kernel", "n_step_windows_kernel", "n_step_rows_kernel")


def kernels_of(subject: Subject, rollout: TensorDict) -> list[FunctionEvent]:
    """What the GPU ran in ``CALLS`` calls."""
    for _ in range(3):
        subject.call(rollout)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            subject.call(rollout)
        torch.cuda.synchronize()
    return [event for event in profiler.events() if event.device_type == DeviceType.CUDA]


def microseconds(kernels: Iterable[FunctionEvent]) -> float:
    """Those of one call."""
    return sum(kernel.time_range.elapsed_us() for kernel in kernels) / CALLS


def operations_of(case: Case) -> list[str]:
    """Storing is measured with one frame of every environment, as a replay step stores it."""
    return [SAMPLE] if case.kind == "sampling" else [TRANSFORM, *[STORE_AND_SAMPLE] * (case.kind == "streaming")]


def rows_of(case: Case, operation: str, device: torch.device) -> list[dict[str, Any]]:
    """One row per contender."""
    rollout, rows, floor = make_rollout(case, device), [], float("nan")
    for contender in CONTENDERS:
        if not applies(contender, operation, case) or contender.name == COMPILED:
            continue
        subject, verdict = prepare(contender, case, operation, rollout, {})
        row = {
            "case": str(case),
            "row bytes": case.row_bytes,
            "operation": operation,
            "contender": contender.name,
            "status": verdict["status"],
            "us": float("nan"),
        }
        if subject:
            kernels = kernels_of(subject, rollout)
            row["us"], row["launches"] = microseconds(kernels), len(kernels) // CALLS
            row["GB/s"] = sum(bytes_of(subject, rollout)) / row["us"] / 1e3
            ours = [[kernel for kernel in kernels if kernel.name == name] for name in OURS]
            row["store + windows + rows, us"] = " + ".join(f"{microseconds(each):.1f}" for each in ours if each)
            floor = row["us"] if contender.name in FLOORS else floor
        rows.append(row)
    return [row | {"this / floor": row["us"] / floor} for row in rows]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(".benchmarks"), metavar="DIR")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    set_up()
    device = torch.device("cuda")
    machine = about(device)
    rows = pd.DataFrame(
        [row for case in CASES for operation in operations_of(case) for row in rows_of(case, operation, device)]
    )
    text = "\n\n".join(
        (
            "# Time on the GPU",
            sentence(machine),
            f"Means of {CALLS} calls, as the profiler tells them. GB/s: bytes of the input and of the output, or twice "
            "those of the rows that are sampled, per second. The floor is a clone of the input, or reading the rows "
            "of a sample alone.",
            table(rows),
        )
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cuda-device-time.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
