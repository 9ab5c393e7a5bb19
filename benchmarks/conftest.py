"""One set-up for every contender: two threads, and what a reader needs to know about the machine."""

import os

os.environ.pop("MULTISTEP_TRITON_BACKEND", None)

import tensordict
import torch
import torchrl

import multistep_triton

THREADS = 2

torch.set_num_threads(THREADS)

# glibc gives freed memory back to the system beyond a bound that it learns from the largest block freed so far. Until
# it has seen one, whether a contender pays a page fault for every 4 kB it writes depends on what ran before it. A
# training process has freed such blocks long ago; so has this one, before any contender runs.
torch.empty(31 << 20, dtype=torch.uint8)


def pytest_benchmark_update_machine_info(config, machine_info):
    """Keeps the kind of machine, drops its name, adds the versions that matter."""
    cpu = machine_info["cpu"]
    kept = {name: machine_info[name] for name in ("machine", "system", "python_version")}
    machine_info.clear()
    machine_info.update(
        kept,
        cpu={"brand_raw": cpu.get("brand_raw"), "count": cpu.get("count")},
        threads=THREADS,
        torch=torch.__version__,
        torchrl=torchrl.__version__,
        tensordict=tensordict.__version__,
        multistep_triton=multistep_triton.__version__,
    )
