"""The doctor: reports what is installed, which backends run here and why, and whether all compute the same.

Owns the report and the exit status. May import ``backends``, ``streams``, ``tables``, packaging and tqdm.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any
from unittest.mock import patch

import torch
from packaging.requirements import Requirement
from tqdm import tqdm

from multistep_triton import __version__
from multistep_triton.backends import BACKEND_VARIABLE, BACKENDS, choose_backend
from multistep_triton.debug.streams import Result, run_torchrl, run_verified
from multistep_triton.debug.tables import layout

PACKAGES = ("triton", "torchrl", "tensordict")
VARIABLES = (BACKEND_VARIABLE, "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
CPU = torch.device("cpu")


def run(*, streams: int, seed: int, as_json: bool) -> int:
    """Prints the report; every comparison runs ``streams`` random streams, whose seeds count up from ``seed``.

    Returns:
        0 if all comparisons that could run found no difference, and ``auto`` can run on every device; else 1.
    """
    devices = [CPU, *_accelerators()]
    report: dict[str, Any] = {
        "versions": {
            "python": platform.python_version(),
            "multistep_triton": __version__,
            "torch": torch.__version__,  # its metadata omit the CUDA or ROCm that it was built for
            **{name: _version(name) for name in PACKAGES},
        },
        "unsupported": _unsupported_triton(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "backends": [_backend(device, name) for device in devices for name in BACKENDS],
    }
    if not as_json:
        _print_machine(report)
    seeds = range(seed, seed + streams)
    report["equivalence"] = [_compare(seeds, *comparison) for comparison in _comparisons(devices)]
    for each in report["equivalence"]:
        if report["unsupported"] and each["result"] == "different" and each["compared"].startswith("kernels"):
            each["result"] = "unsupported"
    report["ok"] = all(each["result"] in ("equal", "skipped") for each in report["equivalence"]) and all(
        each["runs"] for each in report["backends"] if each["backend"] == "auto"
    )
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print_equivalence(report)
    return 0 if report["ok"] else 1


def _print_machine(report: dict[str, Any]) -> None:
    print("Versions\n" + layout(["package", "version"], [[*each] for each in report["versions"].items()]))
    for name, value in report["environment"].items():
        print(f"  {name}={value}")
    rows = [[value or "-" for value in each.values()] for each in report["backends"]]
    print("\nBackends\n" + layout(["device", "backend", "runs", "why"], rows) + "\n", flush=True)


def _print_equivalence(report: dict[str, Any]) -> None:
    columns = ["compared", "device", "result", "streams", "frames", "seconds"]
    rows = [[*(str(each[name]) for name in columns), each["why"]] for each in report["equivalence"]]
    print("Equivalence\n" + layout([*columns, ""], rows))
    for each in report["equivalence"]:
        if each["difference"]:
            print(f"\n{each['compared']}, {each['device']}: {each['difference']}")
    print(f"\n{_verdict(report)}")


def _verdict(report: dict[str, Any]) -> str:
    results = [each["result"] for each in report["equivalence"]]
    said = [report["unsupported"]] if report["unsupported"] else []
    what = "all else that" if "unsupported" in results else "all that"
    said.append("NOT EQUAL, see above" if "different" in results else f"{what} was compared is equal")
    if "skipped" in results:
        said.append(f"{results.count('skipped')} of {len(results)} comparisons cannot run here")
    if any(each["backend"] == "auto" and not each["runs"] for each in report["backends"]):
        said.append("auto CANNOT RUN, see above")
    return "; ".join(said)


def _unsupported_triton() -> str | None:
    """Says which Triton to install if the package's metadata exclude the one installed; None if they allow it."""
    try:
        import triton

        requirements = map(Requirement, requires("multistep_triton") or ())
        (allowed,) = (each.specifier for each in requirements if each.name == "triton")
    except Exception:  # Triton is missing or broken, which "Backends" shows, or this package has no metadata
        return None
    if allowed.contains(triton.__version__, prereleases=True):
        return None
    return f'Triton {triton.__version__} is UNSUPPORTED, install "triton{allowed}" and the torch that it belongs to'


def _accelerators() -> list[torch.device]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return [torch.device(accelerator.type, i) for i in range(torch.accelerator.device_count())] if accelerator else []


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _backend(device: torch.device, backend: str) -> dict[str, str | None]:
    """Returns which backend runs on ``device`` if a call asks for ``backend``, and why, or why none can run."""
    runs: str | None
    try:
        runs, why, _ = choose_backend(backend, [torch.empty(0, device=device)])
    except (RuntimeError, ValueError) as error:
        runs, why = None, str(error)
    return {"device": _describe(device), "backend": backend, "runs": runs, "why": why}


def _comparisons(devices: list[torch.device]) -> Iterator[tuple[Any, ...]]:
    """Yields, per comparison, its title, device, function of a seed, and a context that yields the ``map`` to use."""
    for device in devices[1:]:
        yield "kernels, compiled, with specification", device, run_verified, nullcontext(map)
    yield "kernels, interpreted, with specification", CPU, run_verified, _interpreter()
    if not _backend(CPU, "triton")["runs"]:
        yield "reference with specification", CPU, run_verified, nullcontext(map)
    for device in devices:
        yield "reference with torchrl", device, run_torchrl, nullcontext(map)


@contextmanager
def _interpreter() -> Iterator[Callable[..., Iterable[Any]]]:
    """Yields the ``map`` of processes that use Triton's interpreter, which must be chosen before Triton's import."""
    workers, spawn = min(4, os.cpu_count() or 1), multiprocessing.get_context("spawn")
    with patch.dict(os.environ, TRITON_INTERPRET="1"):
        pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,))
        try:
            yield pool.map
        finally:
            pool.shutdown(cancel_futures=True)


def _compare(
    seeds: range,
    what: str,
    device: torch.device,
    run_stream: Callable[..., Result],
    context: AbstractContextManager[Callable[..., Iterable[Any]]],
) -> dict[str, Any]:
    """Runs streams until one differs, and returns the comparison's row of the report."""
    row: dict[str, Any] = {"compared": what, "device": _describe(device), "streams": 0, "frames": 0}
    row |= {"why": "", "difference": None}
    begin = time.perf_counter()
    with context as mapped, tqdm(total=len(seeds), desc=what, unit="stream", leave=False, disable=None) as bar:
        try:
            if what.startswith("kernels"):
                (triton,) = mapped(partial(_backend, device), ["triton"])
                if not triton["runs"]:
                    return {**row, "result": "skipped", "seconds": 0.0, "why": triton["why"]}
            for result in mapped(partial(run_stream, device=device), seeds):
                bar.update()
                row["streams"] += 1
                row["frames"] += result.frames
                row["difference"] = result.difference
                if result.difference:
                    break
        except BrokenProcessPool as error:  # a wrong kernel can crash its process
            row["difference"] = f"after {row['streams']} streams: {error}"
    row["seconds"] = round(time.perf_counter() - begin, 1)
    return {**row, "result": "different" if row["difference"] else "equal"}
