"""What a GPU takes for a call: how many kernels it runs and for how long, as the profiler tells it, each of ours apart.

Usage: ``python -m benchmarks.device_time --out DIR``; needs a GPU. Time of the host is not in it. What is measured has
passed the gate. Inputs are the same in every call: those of the first cases, with what comes out, do not fit in the
second-level cache, the small ones stay in it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pandas as pd
import torch
from tensordict import TensorDict
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import PIXELS, Case, make_rollout
from benchmarks.compare import prepare
from benchmarks.contenders import CLONE, COMPILED, CONTENDERS, GATHERS, SAMPLE, TRANSFORM, Subject, applies
from benchmarks.machine import about, sentence
from benchmarks.measure import command, memory_of, set_up
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
FLOORS = {TRANSFORM: CLONE, SAMPLE: GATHERS}


def kernels_of(subject: Subject, rollout: TensorDict) -> tuple[Counter[str], Counter[str]]:
    """How often a call runs each kernel, and for how many microseconds in all; means of ``CALLS``."""
    for _ in range(3):
        subject.call(rollout)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            subject.call(rollout)
        torch.cuda.synchronize()
    launches: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            launches[event.name] += 1
            times[event.name] += event.time_range.elapsed_us()
    return launches, times


def rows_of(case: Case, operation: str, device: torch.device) -> list[dict[str, Any]]:
    """One row per contender."""
    rollout, rows = make_rollout(case, device), []
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
        }
        if subject:
            launches, times = kernels_of(subject, rollout)
            out = memory_of(subject.transitions([subject.call(rollout)]))
            moved = out + (out if operation == SAMPLE else memory_of(rollout))
            took = sum(times.values()) / CALLS
            row |= {"launches": launches.total() // CALLS, "us": took, "GB/s": moved / took / 1e3}
            ours = [name for name in ("n_step_windows_kernel", "n_step_rows_kernel") if name in times]
            row["windows + rows, us"] = " + ".join(f"{times[name] / CALLS:.1f}" for name in ours)
        rows.append(row)
    floor = next((row["us"] for row in rows if row["contender"] == FLOORS[operation] and "us" in row), float("nan"))
    return [row | {"this / floor": row.get("us", float("nan")) / floor} for row in rows]


def main(arguments: list[str] | None = None) -> None:
    parser = command(__doc__, seconds=None)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() or not options.device.startswith("cuda"):
        parser.error(f"--device must be a GPU that is there, got {options.device}")
    set_up()
    device = torch.empty(0, device=options.device).device
    machine = about(device)
    rows = pd.DataFrame(
        [row for case in CASES for row in rows_of(case, SAMPLE if case.kind == "sampling" else TRANSFORM, device)]
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
    (options.out / f"{device.type}-device-time.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
