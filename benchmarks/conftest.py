"""The same ground for every contender, and what a reader of the JSON needs to know about the machine."""

import torch

from benchmarks.machine import about
from benchmarks.measure import set_up

set_up()


def pytest_benchmark_update_machine_info(config, machine_info):
    """Keeps the kind of machine, drops its name, adds the versions that matter."""
    kept = {name: machine_info[name] for name in ("machine", "system", "python_version")}
    cpu = {name: machine_info["cpu"].get(name) for name in ("brand_raw", "count")}
    machine_info.clear()
    machine_info.update(about(torch.device("cuda" if torch.cuda.is_available() else "cpu")), **kept, cpu=cpu)
