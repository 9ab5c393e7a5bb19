"""What the kernels cost by a GPU's own counters, beside what is counted of them without one.

Usage: ``python -m benchmarks.counters --out DIR``; needs a GPU whose counters may be read, and NVIDIA's ``ncu`` on the
path. Writes ``cuda-counters.md`` and prints it. The cases are those of ``benchmarks.kernel_cost``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch

from benchmarks import kernel_cost
from benchmarks.cases import make_rollout
from benchmarks.kernel_cost import TARGETS, Cost, ptx_driver
from benchmarks.machine import about, sentence
from benchmarks.measure import set_up
from benchmarks.report import table

SECTORS = "l1tex__t_sectors_pipe_lsu_mem_global_op"
REQUESTS = "l1tex__t_requests_pipe_lsu_mem_global_op"
COUNTERS = {
    "instructions": ("smsp__inst_executed.sum", "machine_instructions"),
    "load requests": (f"{REQUESTS}_ld.sum", "load_requests"),
    "load sectors": (f"{SECTORS}_ld.sum", "load_sectors"),
    "store requests": (f"{REQUESTS}_st.sum", "store_requests"),
    "store sectors": (f"{SECTORS}_st.sum", "store_sectors"),
    "bytes read": ("dram__bytes_read.sum", "read_bytes"),
}
"""What is compared: its name in ncu, and in what we count."""
DURATION, REGISTERS = "gpu__time_duration.sum", "launch__registers_per_thread"


def run() -> None:
    """Every case, its last call seen by the profiler; prints what machine this is."""
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here")
    machine = about(torch.device("cuda"))
    set_up()
    for target in TARGETS:
        call = kernel_cost.a_call(target.case, make_rollout(target.case, "cuda"))
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    print(json.dumps(machine))


def profiled(log: Path) -> tuple[dict[str, str | int], pd.DataFrame]:
    """The machine, and one row per launch of ours, in order; the log is what ncu writes."""
    metrics = [*(metric for metric, _ in COUNTERS.values()), DURATION, REGISTERS]
    ncu = [
        *("ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"),
        *("--profile-from-start", "off", "--kernel-name", "regex:n_step_", "--metrics", ",".join(metrics)),
        *("--log-file", str(log), sys.executable, "-m", "benchmarks.counters", "--run"),
    ]
    done = subprocess.run(ncu, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"ncu exits with {done.returncode}: {done.stdout}")
    return json.loads(done.stdout.splitlines()[-1]), read(log)


def read(log: Path) -> pd.DataFrame:
    lines = [line for line in log.read_text().splitlines(keepends=True) if line.startswith('"')]
    log.write_text("".join(lines))
    # Below the names are the units.
    return pd.read_csv(log, skiprows=[1], thousands=",")


def rows_of(costs: list[Cost], launches: pd.DataFrame) -> pd.DataFrame:
    """Of each kernel of a case: what the GPU counted, over what we did."""
    counted = [(target, each) for target, cost in zip(TARGETS, costs, strict=True) for each in cost.launches]
    rows = []
    for (target, counts), (_, launch) in zip(counted, launches.iterrows(), strict=True):
        assert counts.name == launch["Kernel Name"], f"{counts.name} is not {launch['Kernel Name']}"
        row: dict[str, object] = {"case": str(target), "kernel": counts.name, "registers": int(launch[REGISTERS])}
        row |= {name: launch[metric] / getattr(counts, ours) for name, (metric, ours) in COUNTERS.items()}
        bound, most = max(counts.microseconds().items(), key=lambda each: each[1])
        rows.append(row | {"us": launch[DURATION] / 1e3, "bound, us": most, "bound by": bound})
    return pd.DataFrame(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(".benchmarks"), metavar="DIR")
    parser.add_argument("--run", action="store_true", help="only the calls, for the profiler to see")
    options = parser.parse_args(arguments)
    if options.run:
        return run()
    if shutil.which("ncu") is None:
        parser.error("ncu, NVIDIA's profiler Nsight Compute, is not there")
    options.out.mkdir(parents=True, exist_ok=True)
    machine, launches = profiled(options.out / "cuda-counters.csv")
    # What we count is executed on CPU memory: none of it is the GPU's.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    set_up()
    driver = ptx_driver.install(kernel_cost.CAPABILITY)
    costs = [kernel_cost.measure(driver, target.case) for target in TARGETS]
    text = "\n\n".join(
        (
            "# Counted, and counted by a GPU",
            sentence(machine),
            "What the counters of the GPU say over what `benchmarks.kernel_cost` counts of the same kernels: 1 where "
            "they agree. `bytes read`: from memory, the caches empty beforehand; what is written stays in the "
            "second-level cache, so that no counter has it. `us`: of a launch under the profiler, the caches empty; "
            "`bound, us`: the least that the model gives it.",
            table(rows_of(costs, launches)),
        )
    )
    (options.out / "cuda-counters.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
