"""Would the tests notice? Alters a line of the kernels at a time, in a copy, and runs their tests there.

Usage: ``python tests/mutate.py [--only REGEX] [--jobs N]``. The lines are those that decide a boundary, an index or a
discount. Prints a table, and exits with 1 if the tests pass with any of them, or fail without. Not among them: that
offsets are 64 bits wide, which takes gigabytes to notice (``test_gpu.py``), and what changes speed alone.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
TESTS = ("tests/test_indices.py", "tests/test_kernels.py", "tests/test_hand_computed.py", "tests/test_replay_buffer.py")
SECONDS = 600


class Mutation(NamedTuple):
    decides: str
    file: str
    line: str
    altered: str


MUTATIONS = (
    # boundaries, and where windows end
    Mutation("boundary: done", "window", "        ends |= load_any(flags[k], row, here, live, stream)",
             "        pass"),
    Mutation("boundary: another done flag", "window", "tl.static_range(1, len(data))", "tl.static_range(1, 1)"),
    Mutation("boundary: last known frame", "window", "ends = (here + 1 >= known) | ", "ends = (here >= known) | "),
    Mutation("end: n frames", "window", "(i + 1 >= n)", "(i >= n)"),
    Mutation("boundary: padding", "window", "ends |= ~(valid & followed)", "ends |= ~followed"),
    Mutation("boundary: before padding", "window", "ends |= ~(valid & followed)", "ends |= ~valid"),
    Mutation("boundary: which frame follows", "window", "        followed = valid\n", "        followed = live\n"),
    Mutation("boundary: trajectory", "window", "ends |= traj != following", "ends |= traj < following"),
    Mutation("boundary: id before it", "window", "        following = traj\n", "        following = traj * 0\n"),
    Mutation("flag of a frame", "window", "mask=live, other=0) != 0", "mask=live, other=0) == 0"),
    Mutation("what is known", "window", "live &= here < known", "live &= here < known - 1"),
    Mutation("flag: its width", "window", "frame_addresses(source, row, frame, stream, 1)",
             "frame_addresses(source, row, frame, stream, 2)"),
    Mutation("flag: which is the mask", "window", "load_flag(flags[DONES], row", "load_flag(flags[0], row"),
    Mutation("flag: which are the ids", "window", "frame_addresses(flags[DONES + MASK], row",
             "frame_addresses(flags[DONES], row"),
    Mutation("ids: their width", "window", "primitive_bitwidth // 8)", "primitive_bitwidth // 16)"),
    # lengths and returns
    Mutation("steps at an end", "window", "steps = tl.where(ends, 1, steps + 1)",
             "steps = tl.where(ends, 0, steps + 1)"),
    Mutation("steps before it", "window", "steps = tl.where(ends, 1, steps + 1)", "steps = tl.where(ends, 1, steps)"),
    Mutation("frame of a step", "window", "here = frame + i\n", "here = frame + i + 1\n"),
    Mutation("return: discount", "window", "value + gamma * returns)", "value + returns)"),
    Mutation("return: select", "window", "tl.where(ends[:, None], value, value + gamma * returns)",
             "value + tl.where(ends[:, None], 0, gamma) * returns"),
    Mutation("steps, unrolled", "window", "UNROLLED - 1 - j, tile", "UNROLLED - j, tile"),
    Mutation("steps, in a loop", "window", "i = tl.cdiv(n, turn) * turn", "i = n // turn * turn"),
    # discounts
    Mutation("power: bits", "window", "(steps & 1) != 0", "(steps & 1) == 0"),
    Mutation("power: square", "window", "        gamma = gamma * gamma\n", ""),
    Mutation("power: shift", "window", "steps = steps >> 1", "steps = steps >> 2"),
    Mutation("power: long windows", "extend", "5 if UNROLLED > 0 else 31", "5"),
    Mutation("power: short windows", "extend", "5 if UNROLLED > 0 else 31", "3 if UNROLLED > 0 else 31"),
    Mutation("discount: of steps", "extend", "power(gamma.reshape(1), steps, ", "power(gamma.reshape(1), steps - 1, "),
    # what is written for windows
    Mutation("nonterminal", "extend", "live & (steps > 1)", "live & (steps >= 1)"),
    Mutation("nonterminal at n = 1", "extend", "2 if UNROLLED == 1 else UNROLLED", "UNROLLED"),
    Mutation("steps at n = 1", "extend", "limits[0] if len(limits) > 0 else n), 0)", "tl.maximum(n, 2)), 0)"),
    Mutation("place of returns", "extend", "place = output_places(tile, emitted)[:, None] * D",
             "place = output_places(tile, emitted)[:, None]"),
    Mutation("features of returns", "extend", "item = program % chunks * BLOCK_D", "item = program % chunks"),
    # jobs
    Mutation("job of a program: windows", "extend", "if program < (starts[j + 1] << 2 >> 4):",
             "if program <= (starts[j + 1] << 2 >> 4):"),
    Mutation("job of a program: returns", "extend", "first = starts[len(WINDOWS) + j] << 2 >> 4",
             "first = starts[j] << 2 >> 4"),
    Mutation("job of a program: rows", "extend", "first = starts[len(WINDOWS) + len(RETURNS) + j] << 2 >> 4",
             "first = starts[len(WINDOWS) + j] << 2 >> 4"),
    Mutation("leaf of a program", "extend", "which = local // each", "which = local % len(data)"),
    Mutation("tile of a leaf", "extend", "                local % each, leaf", "                local, leaf"),
    Mutation("address of a leaf", "extend", "value = tl.where(which == k, values[k], value)",
             "value = tl.where(which >= k, values[0], value)"),
    Mutation("programs of a leaf", "extend", "- first).to(tl.int32) // len(data)", "- first).to(tl.int32)"),
    Mutation("alignment of the carry", "launch", "(new | old) % WIDEST", "new % WIDEST"),
    Mutation("features inside, returns", "extend", "mask = written(tile)[:, None] & (item < D)[None, :]",
             "mask = written(tile)[:, None] & (item >= 0)[None, :]"),
    # the gather
    Mutation("which frames are gathered", "gather", "early = live & (frame < emitted)", "early = live"),
    Mutation("row that is gathered", "gather", "tl.where(early, length - 1, 0)", "tl.where(early, length, 0)"),
    Mutation("steps beyond the row", "gather", "tl.minimum(tl.maximum(length, 1), known - frame)",
             "tl.maximum(length, 1)"),
    Mutation("steps below one", "gather", "tl.minimum(tl.maximum(length, 1), known - frame)",
             "tl.minimum(length, known - frame)"),
    Mutation("rows that come out", "gather", "tl.where(frame < emitted, to_out", "tl.where(frame <= emitted, to_out"),
    Mutation("place of what comes out", "gather", "(out << 2 >> 4) + output_places(tile, emitted) * (D",
             "(out << 2 >> 4) + frame * (D"),
    Mutation("place of what is held back", "gather", "slot_addresses(held, row, frame - emitted, ",
             "slot_addresses(held, row, frame, "),
    Mutation("row of what is held back", "gather", "frame - emitted, known - emitted, to",
             "frame - emitted, emitted, to"),
    Mutation("frames that stay in the ring", "gather", "tl.where(frame < emitted, 0, stay)",
             "tl.where(frame <= emitted, 0, stay)"),
    Mutation("frames of a tile, rows", "gather", "program // chunks, rows, known - stay, stream",
             "program // chunks, rows, emitted, stream"),
    Mutation("parts of a row", "gather", "item = program % chunks * BLOCK_D",
             "item = program % chunks * (BLOCK_D - 1)"),
    Mutation("items inside", "gather", "inside = live[:, None] & (item < D)[None, :]",
             "inside = live[:, None] & (item >= 0)[None, :]"),
    # where frames lie
    Mutation("place in rows", "stream", "row.to(tl.int64) * emitted + frame", "row.to(tl.int64) + frame"),
    Mutation("seam: which side", "stream", "tl.where(frame < carried, held", "tl.where(frame <= carried, held"),
    Mutation("seam: frame of the data", "stream", "slot = frame - carried\n", "slot = frame\n"),
    Mutation("seam: frame of the carry", "stream", "row.to(tl.int64) * count + frame",
             "row.to(tl.int64) * count + frame + 1"),
    Mutation("ring: first slot", "stream", "frame + (ring[1] << 2 >> 4).to(tl.int32)", "frame"),
    Mutation("ring: after the last slot", "stream", "tl.where(slot < slots, slot, slot - slots)",
             "tl.where(slot <= slots, slot, slot - slots)"),
    Mutation("ring: row of a slot", "stream", "(ring[2] << 2 >> 4) + row", "(ring[2] << 2 >> 4)"),
    # frames that are sampled
    Mutation("sampled: no frame, steps", "extend", "steps = tl.where(live, tl.minimum(",
             "steps = tl.where(True, tl.minimum("),
    Mutation("sampled: no frame, nonterminal", "extend", "live & (steps > 1)", "(steps > 1)"),
    Mutation("sampled: no frame, return", "extend", "returns, float(\"nan\"))", "returns, 0.0)"),
    Mutation("sampled: no frame, written", "stream", "return places[1] if len(places) > 0 else inside",
             "return inside"),
    Mutation("sampled: no frame, row", "gather", "wanted = written((row, frame, live, places, limits))",
             "wanted = live"),
    Mutation("sampled: below the first slot", "stream", "inside &= (slot >= 0) & ", "inside &= "),
    Mutation("sampled: beyond the last one", "stream", "(slot >= 0) & (slot < known)", "(slot >= 0)"),
    Mutation("sampled: below the first row", "stream", "inside &= (dim >= 0) & ", "inside &= "),
    Mutation("sampled: beyond the last row", "stream", "(dim >= 0) & (dim < size)", "(dim >= 0)"),
    Mutation("sampled: inside", "stream", "inside = place < (count << 2 >> 4)",
             "inside = place < (count << 2 >> 4) - 1"),
    Mutation("sampled: from the oldest on", "stream", ".to(tl.int32) - (first << 2 >> 4).to(tl.int32)",
             ".to(tl.int32)"),
    Mutation("sampled: before the oldest", "stream", "tl.where(frame < 0, frame + known, frame)",
             "tl.where(frame <= 0, frame + known, frame)"),
    Mutation("sampled: row", "stream", "row = row * size.to(tl.int32) + dim", "row = row + dim"),
    Mutation("sampled: first slot", "stream", "slot += (picked[-1] << 2 >> 4).to(tl.int32)", "slot += 0"),
    Mutation("sampled: after the last slot", "stream", "tl.where(slot < known, slot, slot - known)",
             "tl.where(slot <= known, slot, slot - known)"),
    Mutation("sampled: n of its own", "stream", "tl.minimum(load_index(own[0], place, inside), known)",
             "tl.minimum(load_index(own[0], place, inside) + 1, known)"),
    Mutation("sampled: n of its own, unrolled", "window", "limits[0] if len(limits) > 0 else UNROLLED, gamma",
             "UNROLLED, gamma"),
    Mutation("sampled: n of its own, in a loop", "window", "limits[0] if len(limits) > 0 else n, gamma", "n, gamma"),
    Mutation("sampled: nonterminal at an n of 1", "extend", "(tl.maximum(limits[0], 2),)", "(limits[0],)"),
    Mutation("sampled: steps", "gather", "(steps[0] << 2 >> 4) + output_places(tile, emitted) * 8",
             "(steps[0] << 2 >> 4) + row * 8"),
    Mutation("batch index", "stream", "index = index // size", "index = index % size"),
    Mutation("batch stride", "stream", "(strides[FIRST + d] << 2 >> 4)", "(strides[FIRST] << 2 >> 4)"),
    Mutation("row of a place", "stream", "(begin // frames).to(tl.int32) + place // frames",
             "(begin // frames).to(tl.int32)"),
    Mutation("frame of a place", "stream", "place = (begin % frames).to(tl.int32) + ", "place = "),
    Mutation("inside", "stream", "inside = row < rows\n", "inside = row < rows - 1\n"),
    Mutation("row, time-major", "stream", "program // across * height + place % height",
             "program // across + place % height"),
    Mutation("frame, time-major", "stream", "program % across * length + place // height",
             "program % across * height + place // height"),
    Mutation("inside, time-major", "stream", "(row < rows) & (frame < frames)", "(row < rows)"),
    Mutation("rows inside, time-major", "stream", "(row < rows) & (frame < frames)", "(frame < frames)"),
    Mutation("features that lie apart", "stream", "item % RUN + strided_offset(item // RUN",
             "item + strided_offset(item // RUN"),
    Mutation("features of the carry", "stream", "tl.where((frame < carried)[:, None], item[None, :], apart[None, :])",
             "apart[None, :]"),
    Mutation("frame of a place, rows", "stream", "        frame = place % frames\n", "        frame = place\n"),
    Mutation("tiles of rows", "stream", "return -(-rows * frames // block)", "return max(rows * frames // block, 1)"),
    Mutation("tiles of rows, time-major", "stream", "return across * -(-rows // (block // -(-frames // across)))",
             "return across * max(rows // (block // -(-frames // across)), 1)"),
    Mutation("batch: first dimension", "stream", "index.to(tl.int64) * (strides[FIRST] << 2 >> 4)",
             "index.to(tl.int64) * (strides[0] << 2 >> 4)"),
    Mutation("batch: which strides", "stream", "address += strided_offset(row, sizes, strides, 1)",
             "address += strided_offset(row, sizes, strides, 0)"),
    Mutation("features: which strides", "stream", "outer, strides, 1 + len(sizes))", "outer, strides, len(sizes))"),
    # what is launched
    Mutation("frames held back", "plan", "known - min(n_steps, known) if held else known",
             "known - min(n_steps - 1, known) if held else known"),
    Mutation("slots, one after the other", "plan", "(*strides[:time_dim], slot, *strides[time_dim:])",
             "(slot, *strides)"),
    Mutation("frames carried", "plan", "rows, carried, known, emitted, min(", "rows, 0, known, emitted, min("),
    Mutation("features that make one run", "plan", "if not sizes and stride == run:", "if not sizes:"),
    Mutation("features that make one dimension", "plan", "elif sizes and stride == sizes[0] * steps[0]:",
             "elif sizes:"),
    Mutation("tiles of a wide row", "plan", "programs = -(-items // block_d) *",
             "programs = max(items // block_d, 1) *"),
    Mutation("dimensions that make one", "plan", "size * leaf.strides[dim] for leaf in leaves)",
             "size * leaf.strides[dim] for leaf in leaves[:1])"),
    Mutation("units of a row", "plan", "(WIDEST, leaf.misalignment, layout.run, *layout.strides)",
             "(WIDEST, layout.run, *layout.strides)"),
)  # fmt: skip


def source(mutation: Mutation, root: Path = ROOT) -> Path:
    return root / "kernels" / f"{mutation.file}.py"


def line_number(mutation: Mutation) -> int:
    """Where the altered text begins; it is there once."""
    text = source(mutation).read_text()
    if text.count(mutation.line) != 1:
        raise ValueError(f"{mutation.line!r} must be in {source(mutation)} once, got {text.count(mutation.line)}")
    return text[: text.index(mutation.line)].count("\n") + 1


@contextmanager
def altered_copy(mutation: Mutation | None) -> Iterator[Path]:
    """A copy of what the tests need, as it is without a mutation."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("kernels", "multistep_triton", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        if mutation:
            path = source(mutation, copy)
            path.write_text(path.read_text().replace(mutation.line, mutation.altered))
        yield copy


def run_python(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs ``python ARGUMENTS`` with the packages of a copy; what it started ends with it."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "HYPOTHESIS_PROFILE": "unshrunk"}
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=copy,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def run_tests(copy: Path) -> str:
    """What fails first; empty if nothing does."""
    done = run_python(copy, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS)
    if done.returncode == 0:
        return ""
    if failed := re.search(r"^FAILED \S+?::(.+?)(?: - |$)", done.stdout, re.MULTILINE):
        return failed[1]
    if done.returncode < 0:
        return f"a test, by {signal.Signals(-done.returncode).name}"
    raise RuntimeError(f"pytest must run, got exit status {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")


def notice(mutation: Mutation) -> str:
    """The test that notices a mutation; empty if none does, or if it hangs."""
    with altered_copy(mutation) as copy:
        try:
            return run_tests(copy)
        except subprocess.TimeoutExpired:
            return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="REGEX", default="", help="those whose description matches this")
    parser.add_argument("--jobs", metavar="N", type=int, default=os.cpu_count(), help="at the same time")
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if re.search(options.only, mutation.decides)]
    if not chosen:
        parser.error(f"argument --only: must match a description, got {options.only!r}")
    places = [f"{source(mutation).name}:{line_number(mutation)}" for mutation in chosen]
    found = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for place, mutation, test in zip(places, chosen, pool.map(notice, chosen), strict=True):
            print(f"{place:<15}{mutation.decides:<35}{test or 'NOTHING FAILS'}", flush=True)
            found += bool(test)
    with altered_copy(None) as copy:
        trouble = run_tests(copy)
    print(f"{found} of {len(chosen)} mutations make a test fail; without one {trouble or 'none'} fails")
    return 0 if found == len(chosen) and not trouble else 1


if __name__ == "__main__":
    sys.exit(main())
