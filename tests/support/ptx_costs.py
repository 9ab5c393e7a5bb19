"""What a launch would cost a GPU, counted while its PTX is executed: instructions, requests, sectors, bytes.

Imports numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from ptx_numbers import Array

# Memory is read and written in sectors of as many bytes.
SECTOR = 32
WARP = 32
# An H100 SXM: multiprocessors, instructions that each issues in a cycle, cycles per second.
MULTIPROCESSORS = 132
ISSUES = 4
CLOCK = 1.7e9
# Bytes per second, of which a copy reaches as much: memory, second-level cache.
MEMORY_BANDWIDTH = 3.0e12
L2_BANDWIDTH = 5.5e12
NO_SECTOR = np.uint64((1 << 64) - 1)


@dataclass
class Counts:
    """What one launch did.

    Attributes:
        programs: Instances of the kernel.
        warp_instructions: Of PTX, executed, per warp.
        machine_instructions: About as many does the assembler make of them, see :func:`machine_instructions`.
        load_requests: Loads from global memory, per warp of which any thread reads.
        load_sectors: Distinct sectors per such a request, summed.
        load_bytes: What the threads asked for.
        read: Distinct sectors of the launch, by number.
    """

    name: str = ""
    programs: int = 0
    warp_instructions: int = 0
    machine_instructions: float = 0.0
    load_requests: int = 0
    store_requests: int = 0
    load_sectors: int = 0
    store_sectors: int = 0
    load_bytes: int = 0
    store_bytes: int = 0
    shared_requests: int = 0
    read: Array = field(default_factory=lambda: np.zeros(0, np.uint64), repr=False)
    written: Array = field(default_factory=lambda: np.zeros(0, np.uint64), repr=False)

    @property
    def read_bytes(self) -> int:
        """Bytes of the sectors that are read, every one once."""
        return SECTOR * len(self.read)

    @property
    def bus_bytes(self) -> int:
        """Bytes that cross the memory bus at the least: every sector once."""
        return self.read_bytes + SECTOR * len(self.written)

    def microseconds(self) -> dict[str, float]:
        """Lower bounds of the time on an H100, by what it is bound by. Latency and occupancy are not modelled."""
        cycles = MULTIPROCESSORS * CLOCK
        seconds = {
            "memory": self.bus_bytes / MEMORY_BANDWIDTH,
            "L2": SECTOR * (self.load_sectors + self.store_sectors) / L2_BANDWIDTH,
            "issue": self.machine_instructions / (cycles * ISSUES),
            "requests": (self.load_requests + self.store_requests) / cycles,
        }
        return {bound: each * 1e6 for bound, each in seconds.items()}


class Counter:
    """Counts the accesses of a launch to global memory."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts
        self.sectors: dict[str, list[Array]] = {"load": [], "store": []}

    def count(self, what: str, address: Array, on: Array, size: int) -> None:
        """One request per warp: ``address`` and ``on`` are of all threads; each asks for ``size`` bytes."""
        sectors, on = (address // np.uint64(SECTOR)).reshape(-1, WARP), on.reshape(-1, WARP)
        busy = on.any(1)
        if not busy.any():
            return
        ordered = np.sort(np.where(on, sectors, NO_SECTOR)[busy], 1)
        first = np.ones(ordered.shape, bool)
        first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        distinct = ordered[first & (ordered != NO_SECTOR)]
        for name, more in (("requests", busy.sum()), ("sectors", len(distinct)), ("bytes", on.sum() * size)):
            setattr(self.counts, f"{what}_{name}", getattr(self.counts, f"{what}_{name}") + int(more))
        self.sectors[what].append(np.unique(distinct))

    def finish(self) -> None:
        for what, name in (("load", "read"), ("store", "written")):
            if self.sectors[what]:
                setattr(self.counts, name, np.unique(np.concatenate(self.sectors[what])))


def machine_instructions(opcode: str) -> float:
    """About how many instructions the assembler makes of one of PTX, as far as nvdisasm shows it for sm_90.

    For five kernels, their sum was within a tenth of nvdisasm's.
    """
    name, *rest = opcode.split(".")
    wide = bool(rest) and rest[-1] in ("s64", "u64", "b64")
    if name in ("mov", "cvta") or "param" in rest:
        # Registers are renamed, and parameters are operands.
        return 0.3
    if name in ("div", "rem"):
        return 90 if wide else 14
    if name in ("mul", "mad") and wide and rest[0] == "lo":
        return 4
    return 2 if wide and name not in ("ld", "st") else 1
