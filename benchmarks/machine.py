"""What a reader of a result needs to know: the machine, versions, the commit and the date."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import cpuinfo
import torch

import multistep_triton
from benchmarks.measure import THREADS

PACKAGES = ("torch", "triton", "torchrl", "tensordict", "stable-baselines3")


def git(*arguments: str) -> str:
    """What git prints; empty in a tree without it."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def about(device: torch.device) -> dict[str, str | int]:
    """Columns that are the same in every row of a run; call it before, for the load that others make."""
    return {
        "cpu": f"{cpuinfo.get_cpu_info()['brand_raw']}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "device": device.type,
        "threads": THREADS,
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{package: installed(package) for package in PACKAGES},
        "multistep_triton": multistep_triton.__version__,
        "commit": git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else ""),
        "date": date.today().isoformat(),
    }


def sentence(row: dict[str, str | int]) -> str:
    """The same in words, above a table."""
    where = f"{row['gpu']} beside {row['cpu']}" if row["gpu"] else row["cpu"]
    versions = ", ".join(f"{name} {row[name]}" for name in ("python", *PACKAGES) if row[name])
    ran = f"{row['threads']} threads, load {row['load']:g} beforehand"
    return f"{where}; {ran}; {versions}; commit {row['commit'] or 'unknown'}; {row['date']}."
