"""What the examples share: options that are refused in one line, and what is said of the machine."""

from __future__ import annotations

import argparse
import os
import platform
from datetime import date
from typing import NoReturn

import cpuinfo
import gymnasium
import tensordict
import torch
import torchrl

import multistep_triton


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong, and exits with 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def machine(device: torch.device) -> list[str]:
    """Hardware, with the load that others make just now; versions and date."""
    gpu = f"{torch.cuda.get_device_name(device)} beside " if device.type == "cuda" else ""
    cpu = f"{cpuinfo.get_cpu_info()['brand_raw']}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f} beforehand"
    packages = (multistep_triton, torch, torchrl, tensordict, gymnasium)
    versions = ", ".join(f"{package.__name__} {package.__version__}" for package in packages)
    return [f"{gpu}{cpu}", f"{versions}, Python {platform.python_version()}; {date.today().isoformat()}"]
