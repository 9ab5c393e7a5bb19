"""Would the tests notice? Alters a line of the kernels or of the core at a time, in a copy, and runs tests there.

Usage: ``python tests/support/mutate.py [--only REGEX] [--jobs N]``. The lines are those that decide a boundary, an
index or a discount. Prints a table, and exits with 1 if the tests pass with any of them, or fail without. Not among
them: that offsets are 64 bits wide, which takes gigabytes to notice (``test_gpu.py``), that addresses are aligned,
which the interpreter does not ask for, that no row is written twice, and what changes speed alone.
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

ROOT = Path(__file__).parents[2]
# What most of them are noticed by, in seconds.
BOUNDS = "tests/kernels/test_kernel_bounds.py"
STREAMS = f"{BOUNDS}::test_random_streams_are_as_the_reference_has_them_and_touch_no_other_memory"
FIRST = (
    "tests/spec/test_hand_computed.py",
    "tests/spec/test_group_properties.py",
    *(f"{STREAMS}[{seed}-False]" for seed in (0, 4, 8, 9, 11, 14, 16, 17, 18)),
)
CORE = (
    "tests/buffer/test_storing.py",
    "tests/buffer/test_capturable.py",
    "tests/buffer/test_checkpoints.py",
    "tests/buffer/test_outputs.py",
    "tests/buffer/test_writing.py",
    "tests/buffer/test_prefetching.py",
    "tests/spec/test_spec.py",
    "tests/spec/test_structure.py",
    "tests/transform/test_threads.py",
    "tests/transform/test_ring.py",
    "-k",
    "not kernels and not rings and not recorded",
)
TESTS = (
    "tests/buffer/test_storing.py",
    "tests/buffer/test_capturable.py",
    "tests/buffer/test_indices.py",
    "tests/kernels/test_kernels.py",
    BOUNDS,
    "tests/spec/test_hand_computed.py",
    "tests/transform/test_ring.py",
    "tests/buffer/test_replay_buffer.py",
    "tests/buffer/test_entries.py",
)
# Where observations are kept once, or as narrower dtypes, nothing else is what it was but this.
KEPT = ("tests/buffer/test_compact.py", "tests/buffer/test_store_as.py")
TURNS = (
    "tests/buffer/test_turns.py",
    "tests/buffer/test_storing.py",
    "tests/buffer/test_samplers.py",
    "tests/buffer/test_without_next.py",
    "tests/transform/test_refused_at_once.py",
)
ARRIVES = (
    "tests/spec/test_parity_torchrl.py",
    "tests/buffer/test_storing.py",
    "tests/buffer/test_checkpoints.py",
    "tests/buffer/test_position.py",
    "tests/buffer/test_without_next.py",
    "tests/buffer/test_prefetching.py",
    "tests/buffer/test_replay_buffer.py::test_no_operator_waits_for_threads_that_other_processes_keep_busy",
    "tests/integrations/test_neighbours.py::test_a_trainer_that_sets_a_flag_in_every_frame",
    "tests/integrations/test_prioritized.py",
    "tests/transform/test_flush.py",
)
DEVICES = ("tests/integrations/test_devices.py",)
LIES = ("tests/kernels/test_memory_layouts.py", "tests/kernels/test_kernels.py")
# By how the description of a mutation begins; the others are noticed by tests of the core, or of the kernels.
OWN = {
    **dict.fromkeys(("kept once", "keep", "ends", "narrow"), KEPT),
    **{"turns": TURNS, "lies": LIES, "arrives": ARRIVES, "devices": DEVICES},
}
SECONDS = 600


class Mutation(NamedTuple):
    decides: str
    file: str
    line: str
    altered: str


MUTATIONS = (
    # boundaries
    Mutation("boundary: done", "windows", "ends |= load_row(dones[k], row, carry_rows, live, 0) != 0", "pass"),
    Mutation("boundary: another done flag", "windows", "tl.static_range(len(dones))", "tl.static_range(1)"),
    Mutation("boundary: last known frame", "windows", "ends = frame + 1 >= known", "ends = frame >= known"),
    Mutation("boundary: padding", "windows", "~(valid & (load_row(masks[k], next_row",
             "~((load_row(masks[k], next_row"),
    Mutation("boundary: before padding", "windows",
             "~(valid & (load_row(masks[k], next_row, carry_rows, followed, 1) != 0))", "~valid"),
    Mutation("boundary: which frame follows", "windows", "row_of_frame(env, frame + 1, stream",
             "row_of_frame(env, frame, stream"),
    Mutation("boundary: trajectory", "windows", "ends |= traj != load_row", "ends |= traj < load_row"),
    Mutation("boundary: nothing follows", "windows", "followed = live & (frame + 1 < known)", "followed = live"),
    Mutation("boundary: what is known", "windows", "live & (frame < stream[1]), flags", "live, flags"),
    Mutation("marks: frame of agents", "windows", "row = tl.where(row < 0, row, row // agents)", "row += 0"),
    Mutation("marks: next frame of agents", "windows", "tl.where(next_row < 0, next_row, next_row // agents)",
             "next_row + 0"),
    Mutation("marks: of agents in the carry", "windows", "tl.where(row < 0, row, row // agents)", "row // agents"),
    # where windows end
    Mutation("end: the first", "windows", "tl.static_range(LEVELS)", "tl.static_range(1, LEVELS)"),
    Mutation("end: none in a block", "windows", "end = tl.where(ends, lane, 1 << LEVELS)",
             "end = tl.where(ends, lane, (1 << LEVELS) - 1)"),
    Mutation("end: last lane", "windows", "tl.minimum(lane + by, lanes - 1)", "tl.minimum(lane + by, lanes - 2)"),
    Mutation("steps", "windows", "tl.minimum(end - lane + 1, done)", "tl.minimum(end - lane, done)"),
    Mutation("steps: n frames", "windows", "steps = tl.minimum(end - lane + 1, done)", "steps = end - lane + 1"),
    Mutation("steps: long, goes on", "windows", "goes_on = end >= lane + done", "goes_on = end > lane + done"),
    Mutation("steps: long, goes on again", "windows", ">= lane + count", "> lane + count"),
    Mutation("steps: long, after an end", "windows", "goes_on &= ", "goes_on |= "),
    Mutation("nonterminal", "windows", "~boundary, mask", "steps > 1, mask"),
    # returns
    Mutation("sum: binary digits", "windows", "tl.static_range(PIECE)", "tl.static_range(PIECE - 1)"),
    Mutation("sum: the longest first", "windows", "(count & ((1 << level) - 1)) != 0", "level > 0"),
    Mutation("sum: a whole piece", "windows", "if count == 1 << PIECE:", "if count > 1 << PIECE:"),
    Mutation("sum: discount", "windows", "weight = tl.load(powers_ptr + (1 << level))",
             "weight = tl.load(powers_ptr + level)"),
    Mutation("sum: end", "windows", "goes_on = end >= lane + (1 << level)", "goes_on = end > lane + (1 << level)"),
    Mutation("sum: select", "windows",
             "total = tl.where(goes_on, value + weight * ahead(total, lane, 1 << level), value)",
             "total = value + tl.where(goes_on, weight, 0.0) * ahead(total, lane, 1 << level)"),
    Mutation("sum: select what doubles", "windows",
             "tl.where(goes_on, value + weight * ahead(value, lane, 1 << level), value)",
             "value + tl.where(goes_on, weight, 0.0) * ahead(value, lane, 1 << level)"),
    Mutation("return: of doubles", "windows", "tl.float64 if returns_ptr", "tl.float32 if returns_ptr"),
    Mutation("return: what is known", "windows", "live & (frame < known), 0", "live, 0"),
    Mutation("return: long, last piece", "windows", "                count = tl.minimum(n_steps - done,",
             "                count = tl.minimum(n_steps,"),
    Mutation("return: long, ended before", "windows", "steps > done, ", "steps >= done, "),
    # discounts
    Mutation("discount: of steps", "windows", "powers_ptr + steps", "powers_ptr + steps - 1"),
    Mutation("discount: of the longest window", "multistep_triton/windows", "range(n_steps + 1)", "range(n_steps)"),
    Mutation("discount: gamma in float64", "plan", "device, torch.float64)", "device, torch.float32)"),
    # where frames lie
    Mutation("ring: first slot", "ring", "slot += first", "slot += 0"),
    Mutation("ring: after the last slot", "ring", "slot < slots, slot, slot - slots",
             "slot <= slots, slot, slot - slots"),
    Mutation("ring: outer environment", "ring", "env // inner * slots + slot", "env // inner + slot"),
    Mutation("ring: slot, time first", "ring", "slot * inner + env * tl", "slot + env * tl"),
    Mutation("ring: which is nested", "launch", "where = 1 < inner < envs", "where = False"),
    Mutation("lies: carries of other calls", "launch", "not carry.time_first and not all(", "False and not all("),
    Mutation("lies: slots outermost", "layout", "range(dims if time_dim else 1)", "range(dims)"),
    Mutation("lies: frames whose future is gathered", "launch", "check_fits(count, 0)", "pass"),
    Mutation("lies: powers of a graph", "plan", "_CAPTURED.add(found)", "pass"),
    Mutation("lies: where time lies of what is shared", "layout", "sum(dim < time_dim for dim in shared)", "0"),
    Mutation("seam: which side", "windows", "tl.where(frame < carried, held", "tl.where(frame <= carried, held"),
    Mutation("seam: frame of the data", "windows", "frame - carried, data, DATA[0]", "frame, data, DATA[0]"),
    Mutation("seam: rows of the carry", "windows", "carry_slots * envs, data", "carry_slots, data"),
    Mutation("seam: reward at it", "windows", "either_pointer(row < 0, ", "either_pointer(row <= 0, "),
    # blocks of windows
    Mutation("programs of all blocks", "launch", "envs * blocks) << levels", "envs) << levels"),
    Mutation("windows of a block", "windows", "length = LANES + 1 -", "length = LANES + 2 -"),
    Mutation("windows inside a block", "windows", "(lane < length)", "(lane < length - 1)"),
    Mutation("windows that come out", "windows", "(begin + lane < emitted)", "(begin + lane <= emitted)"),
    Mutation("begin of a block", "windows", "block % blocks * length", "block % blocks"),
    Mutation("begin of a block, time first", "windows", "block // envs * length", "block // envs"),
    Mutation("environments inside", "windows", "live = (env < envs) & ", "live = "),
    # frames that are sampled
    Mutation("sampled: inside", "windows", "exists = block < emitted", "exists = block <= emitted"),
    Mutation("sampled: below the first slot", "ring", "(index >= 0) & (index < known)", "(index < known)"),
    Mutation("sampled: beyond the last one", "ring", "(index >= 0) & (index < known)", "(index >= 0)"),
    Mutation("sampled: from the oldest on", "ring", "begin = slot - first", "begin = slot"),
    Mutation("sampled: before the oldest", "ring", "tl.where(begin < 0, ", "tl.where(begin <= 0, "),
    Mutation("sampled: below the first row", "ring", "(index >= 0) & (index < size)", "(index < size)"),
    Mutation("sampled: beyond the last row", "ring", "(index >= 0) & (index < size)", "(index >= 0)"),
    Mutation("sampled: rows of the outermost", "ring", "outermost = outermost // others[d]", "outermost += 0"),
    Mutation("sampled: row", "ring", "env = env * size + index", "env = env + index"),
    Mutation("sampled: n of its own", "windows", "other=1), n_steps)", "other=1) + 1, n_steps)"),
    Mutation("sampled: end at it", "windows", "(step + 1 >= limit)", "(step >= limit)"),
    Mutation("sampled: end at it, long", "windows", "env, frame + done, done + lane",
             "env, frame + done, lane"),
    Mutation("sampled: no frame, steps", "windows", "steps = tl.where(live, steps, 0)", "steps += 0"),
    Mutation("sampled: no frame, nonterminal", "windows", "boundary |= ~live", "pass"),
    Mutation("sampled: no frame, return", "windows", 'tl.where(live, total, float("nan"))', "total"),
    Mutation("sampled: no frame, row", "windows", "tl.where(live, row, -1)", "row"),
    Mutation("sampled: no frame, zeros", "rows", "read &= source >= 0", "read &= source >= -1"),
    # frames that were drawn, and stored
    Mutation("drawn: slot of a row", "ring", "slot = row // envs", "slot = row // (envs + 1)"),
    Mutation("drawn: environment of a row", "ring", "env = row - slot * envs", "env = row"),
    Mutation("drawn: shares of all", "ring", "(index * rows).to(tl.int64), rows - 1)",
             "(index * envs).to(tl.int64), rows - 1)"),
    Mutation("drawn: below one", "ring", "tl.minimum((index * rows).to(tl.int64), rows - 1)",
             "(index * rows).to(tl.int64) + 1"),
    Mutation("written: slots that hold frames", "ring", "tl.minimum(written, slots)", "tl.maximum(written, slots)"),
    Mutation("index: later dimensions", "ring", "pointers + (DIMS - 1 - d)", "pointers + 1"),
    Mutation("index: the first dimension", "ring", "(env - outer * size)", "env"),
    Mutation("store: slot of the next frame", "keep", "tl.load(written_ptr) % slots",
             "tl.load(written_ptr) % (slots + 1)"),
    Mutation("store: time last", "rows", "(top + row) % envs * frames + (top + row) // envs", "(top + row)"),
    Mutation("store: index after the last slot", "store", "tl.where(at < slots, at, at - slots)", "at"),
    Mutation("store: environment", "store", "row - frame * envs", "row"),
    Mutation("store: slots of frames", "store", "at.to(tl.int64) * envs.to(tl.int64) + env", "at.to(tl.int64) + env"),
    Mutation("store: which is time last", "store", "frames > 1 and time_dim > 0", "False"),
    Mutation("store: dimensions exchanged", "store", "(dims > 2 and time_dim) or ", ""),
    # lists of rows
    Mutation("list: row at an end", "windows", "frame + steps - 1, stream", "frame + steps, stream"),
    Mutation("list: first row held back", "windows", "stream[1] - count + slot", "slot"),
    Mutation("list: order of slots", "windows", "tl.where(inner == 1, count, envs)", "envs"),
    Mutation("list: inside", "windows", "mask=index < rows)", "mask=index <= rows)"),
    Mutation("list: programs", "launch", "max((envs * blocks) << levels, held_rows)", "(envs * blocks) << levels"),
    # rows that are copied
    Mutation("rows: inside", "rows", "inside = offset < tl", "inside = offset <= tl"),
    Mutation("rows: unit of the first row", "rows", "unit = begin - top * WIDTH + offset", "unit = offset"),
    Mutation("rows: of the carry", "rows", "_pointer(source < 0, carry_end", "_pointer(source <= 0, carry_end"),
    Mutation("rows: where they come out", "rows", "begin.to(tl.int64) * PARTS", "begin.to(tl.int64)"),
    Mutation("rows: where they are held back", "rows", "first.to(tl.uint32) * WIDTH", "first.to(tl.uint32)"),
    Mutation("rows: after the last slot", "rows", "tl.where(to < slots.to(tl.uint32) * WIDTH",
             "tl.where(to <= slots.to(tl.uint32) * WIDTH"),
    Mutation("store: after the last slot", "rows", "tl.where(to < slots.to(tl.uint32),",
             "tl.where(to <= slots.to(tl.uint32),"),
    Mutation("store: first slot", "rows", "top + row + first.to(tl.uint32)", "top + row"),
    Mutation("rows: tiles that come out", "rows", "        tiles = tl.cdiv(rows * UNITS[k][2], TILE)",
             "        tiles = rows * UNITS[k][2] // TILE"),
    Mutation("rows: leaf that is gathered", "rows", "held_rows if GATHERED[k]", "held_rows if GATHERED[0]"),
    Mutation("rows: programs, held back", "plan", "+ -held * unit[2] // tile", "+ held * unit[2] // tile"),
    Mutation("rows: slot of a frame that came", "launch", "held_first + (held.count - moved if held else 0)",
             "held_first"),
    Mutation("rows: first row of a slot", "launch", "ring = slot * held_inner", "ring = slot"),
    Mutation("unit: divides a row", "rows", "row % each == 0 and ", ""),
    Mutation("unit: its items", "rows", "max(unit // 8, 1)", "1"),
    # gather_future
    Mutation("future: steps beyond the row", "rows", "frames - row % frames)", "frames)"),
    Mutation("future: steps below one", "rows", "tl.maximum(steps, 1)", "steps"),
    Mutation("future: inside", "rows", "row + steps - 1, mask=row < rows", "row + steps - 1, mask=row <= rows"),
    # what is launched, and how leaves lie
    Mutation("several pieces", "launch", "longest > 1 << piece, ", "False, "),
    Mutation("layout: leaf that lies otherwise", "layout", "if not leaf.movedim(time_dim, at).is_contiguous() and",
             "if not leaf.is_contiguous() and"),
    Mutation("layout: inner environments", "layout", "if dim != time_dim][at:]", "if dim != time_dim][at + 1 :]"),
    Mutation("layout: bytes of a view", "layout", "leaf.resolve_neg().resolve_conj()", "leaf.resolve_neg()"),
    Mutation("layout: agents that share a mark", "layout", "math.prod([mark.shape[dim] for dim in shared]) if",
             "math.prod(mark.shape) if"),
    Mutation("layout: one number for mask and ids", "layout", "sharing.pop() if len(sharing) == 1",
             "max(sharing) if sharing"),
    Mutation("layout: marks that lie otherwise", "layout", "for dim in shared]) if alone else 1",
             "for dim in shared])"),
    Mutation("layout: inner environments, in order", "layout", "math.prod(sizes[time_dim + 1 :])", "1"),
    Mutation("rings: of other slots", "multistep_triton/carry",
             "(capacity, time_first) == (carry.capacity, carry.time_first)", "True"),
    Mutation("rings: which is read", "multistep_triton/carry", "memory, spare = carry.spare, carry.leaves",
             "memory, spare = carry.leaves, carry.leaves"),
    Mutation("rings: taken twice", "multistep_triton/carry", "memory, spare = carry.spare, carry.leaves",
             "memory, spare = carry.spare, carry.spare"),
    Mutation("outputs like the data", "launch", "emitted == new and inner == 1", "inner == 1"),
    Mutation("layout: slots that are free", "multistep_triton/carry", "known <= carry.capacity <=",
             "known <= carry.capacity + 1 <="),
    # the fast path, the carry, and the buffer
    Mutation("fast: stored after the last slot", "multistep_triton/carry", "near), (0, frames", "near), (1, frames"),
    Mutation("fast: index after the last slot", "multistep_triton/eager_ring", ".remainder_(slots)",
             ".remainder_(slots + 1)"),
    Mutation("drawn: in eager mode", "multistep_triton/samples", "others.append(slot % size)", "others.append(slot)"),
    Mutation("buffer: alike, kinds", "multistep_triton/buffer/repeated", "layout is not self.layout or ", ""),
    Mutation("buffer: alike, rows", "multistep_triton/buffer/repeated",
             " or _rows_of(data, self.ring.time_dim) != self.rows", ""),
    Mutation("buffer: alike, what others wrote", "multistep_triton/buffer/storing",
             " and call.other_writes == order.changes()", ""),
    Mutation("buffer: alike, more than slots", "multistep_triton/buffer/storing", "not 0 < frames <= call.most",
             "not 0 < frames"),
    Mutation("buffer: frames that are written", "multistep_triton/buffer/storage_order",
             "writer._write_count = writer.n_step_seen = writer._write_count + frames",
             "pass"),
    Mutation("buffer: who is told", "multistep_triton/buffer/storing", "entity.mark_update(index)", "pass"),
    Mutation("order: newest", "multistep_triton/buffer/storage_order", "(newest + frames) % slots, min(before",
             "newest, min(before"),
    Mutation("order: torn", "multistep_triton/buffer/storage_order",
             "mended(self.torn, position.newest, frames, slots)", "self.torn"),
    Mutation("device: what it was told", "multistep_triton/buffer/capturable", "position.newest + 1 + (",
             "position.newest + ("),
    Mutation("device: a full ring", "multistep_triton/buffer/capturable", "position.live == position.slots else 0",
             "False else 0"),
    Mutation("device: frames it wrote", "multistep_triton/buffer/capturable", "written.add_(frames)", "pass"),
    Mutation("device: what the host had read", "multistep_triton/buffer/capturable",
             "self._read_last += frames", "pass"),
    Mutation("outputs: a reward as it came", "multistep_triton/buffer/outputs", " or each[0] in needed", ""),
    Mutation("fast: done", "multistep_triton/windows", "done = join(*keys.done)", "done = join(keys.done[0])"),
    Mutation("fast: emitted", "multistep_triton/eager", "max(known - n_steps, 0)", "max(known - n_steps + 1, 0)"),
    Mutation("fast: last frame", "multistep_triton/windows", "_pad(goes_on.narrow(dim, 0, known - 1), n_steps, dim)",
             "_pad(goes_on, n_steps - 1, dim)"),
    Mutation("fast: seam", "multistep_triton/eager", "seam, near = min(carried, emitted), ", "seam, near = 0, "),
    Mutation("fast: rows of the data", "multistep_triton/eager", "known - carried, -carried)", "known - carried, 0)"),
    Mutation("fast: slots", "multistep_triton/eager", "(ring.first - 1) * envs", "ring.first * envs"),
    Mutation("fast: newest frame", "multistep_triton/eager_ring", "(samples.newest - own // envs) % live",
             "live"),
    Mutation("fast: once round", "multistep_triton/windows", "slots, alpha=envs) % (live * envs)",
             "slots, alpha=envs).clamp(0, live * envs - 1)"),
    Mutation("fast: newest frame of a whole ring", "multistep_triton/eager_ring", "sizes = (samples.newest + 1)",
             "sizes = 0 * (samples.newest + 1)"),
    Mutation("fast: rows of a whole ring", "multistep_triton/eager_ring", "move_rows(own, -oldest,",
             "move_rows(own, oldest,"),
    Mutation("fast: n of its own", "multistep_triton/eager_ring", "else samples.n_steps) - 1", "else samples.n_steps)"),
    Mutation("fast: beyond the window", "multistep_triton/eager_ring", "ahead > length", "ahead > length + 1"),
    Mutation("fast: sums of samples", "multistep_triton/eager_ring", "alpha=gamma**half", "alpha=gamma"),
    Mutation("fast: one frame ahead", "multistep_triton/eager_ring", "min(max(n_steps, 2) + (",
             "min(n_steps + ("),
    Mutation("fast: mask", "multistep_triton/windows", "boundary = boundary | ~mask", "boundary = boundary.clone()"),
    Mutation("fast: padding follows", "multistep_triton/windows", "logical_or_(~mask.narrow(dim, frames - before,",
             "logical_or_(~mask.narrow(dim, 0,"),
    Mutation("fast: trajectory", "multistep_triton/windows", ") != traj.narrow", ") > traj.narrow"),
    Mutation("fast: select", "multistep_triton/windows", "total.ndim - on.ndim)), longer, total)",
             "total.ndim - on.ndim)), longer, longer)"),
    Mutation("fast: discounts", "multistep_triton/windows", "gamma**k for k", "gamma * k for k"),
    Mutation("carry: first slot", "multistep_triton/carry", "runs_of((self.first + begin)", "runs_of((begin)"),
    Mutation("carry: oldest frame", "multistep_triton/carry", "first = (carry.first + emitted) % carry.capacity",
             "first = carry.first"),
    Mutation("carry: graph", "multistep_triton/carry", "frame.requires_grad for frame", "False for frame"),
    Mutation("carry: inference", "multistep_triton/carry", "leaf.is_inference() for leaf", "False for leaf"),
    Mutation("engine: indices", "multistep_triton/engine", "if low < 0 or high >= size:", "if high > size:"),
    Mutation("objects: counted on", "multistep_triton/frames", "self.leaves[path] + len(before)",
             "self.leaves[path] + 0"),
    Mutation("groups: any agent", "multistep_triton/groups", "data[key].flatten(dims).any(-1)",
             "data[key].flatten(dims).all(-1)"),
    Mutation("groups: shortest of agents", "multistep_triton/groups", "each.steps.view(shape).flatten(1).amin(1), ",
             "each.steps.view(shape).flatten(1).amax(1), "),
    Mutation("transform: its lock", "multistep_triton/transform",
             "        with self._lock:\n            emitted, held", "        if True:\n            emitted, held"),
    Mutation("buffer: locks of a write", "multistep_triton/buffer/storing",
             "with self._replay_lock, self._write_lock:\n            order, (entries",
             "if True:\n            order, (entries"),
    Mutation("buffer: locks of a sample", "multistep_triton/buffer/sampled",
             "with self._replay_lock, self._write_lock:\n            position",
             "if True:\n            position"),
    Mutation("buffer: interrupted on the device", "multistep_triton/buffer/capturable",
             "self._tear(self._order.position(), frames)", "pass"),
    Mutation("buffer: a state of nothing", "multistep_triton/buffer/storage_order",
             "storage._storage if storage.initialized", "storage._storage if True"),
    # who takes turns, and what is left where something fails
    Mutation("turns: the position after a failure", "multistep_triton/buffer/storage_order",
             "self.cursor, self.known_position = self.storage._last_cursor, None",
             "self.cursor = self.storage._last_cursor"),
    Mutation("turns: torn before a failure", "multistep_triton/buffer/storing",
             "self._storage._len, order.writes, order.torn = length, writes, torn",
             "self._storage._len, order.writes = length, writes"),
    Mutation("turns: the host and the device", "multistep_triton/buffer/capturable",
             "with self._replay_lock:\n            self._pull()\n            yield",
             "if True:\n            self._pull()\n            yield"),
    Mutation("turns: sampling nothing", "multistep_triton/buffer/sampled",
             "if position is None:\n            # torchrl", "if False:\n            # torchrl"),
    Mutation("turns: a copy's lock", "multistep_triton/buffer/ordered", "self._replay_lock = lock", "pass"),
    Mutation("turns: a frame that waits", "multistep_triton/buffer/ordered", "self._order.pending = None", "pass"),
    Mutation("turns: who joins the frame that waits", "multistep_triton/buffer/arriving", "with self._replay_lock:",
             "if True:"),
    Mutation("turns: priorities of another storage", "multistep_triton/buffer/ordered",
             "self._initialize_prioritized_sampler()", "pass"),
    Mutation("turns: whose call it is", "multistep_triton/torchrl_internals",
             "if user is not (of := user if of is None else of):", "if False:"),
    Mutation("turns: asked twice", "multistep_triton/carrying", " or self._owner() is buffer", ""),
    # what arrives with frames, and what is kept of it
    Mutation("arrives: further entries of first frames", "multistep_triton/layouts",
             'if further and {("next", *path) for path in further} <= second', "if further"),
    Mutation("arrives: along time alone", "multistep_triton/layouts", "if dim != time_dim:", "if False:"),
    Mutation("arrives: an index of the caller's", "multistep_triton/buffer/storing",
             "part.copy() if part is given else part", "part"),
    Mutation("arrives: flags that a trainer has not set", "multistep_triton/torchrl_internals", " and flag.all()", ""),
    Mutation("arrives: where a trainer may set them", "multistep_triton/neighbours", "of._n_steps == 1 or ", ""),
    Mutation("arrives: sizes of a checkpoint", "multistep_triton/buffer/checkpointed", "if shape and (",
             "if False and ("),
    Mutation("arrives: batch sizes of a frame that waits", "multistep_triton/buffer/checkpointed",
             "order.pending.get(path).batch_size = each", "pass"),
    Mutation("arrives: entries that a checkpoint adds", "multistep_triton/buffer/checkpointed",
             "for path in added:", "for path in ():"),
    Mutation("arrives: another n or gamma", "multistep_triton/replay_buffer", ' - {"n_steps", "gamma"}', ""),
    Mutation("arrives: what was prefetched", "multistep_triton/replay_buffer",
             "(self._changes, self._n_steps, self._gamma)", "(self._changes,)"),
    Mutation("arrives: threads", "multistep_triton/eager_ring",
             "torch.where(last, ahead, count).amin(0).to(torch.int64)", "last.max(0).indices"),
    Mutation("arrives: batches that failed", "multistep_triton/buffer/sampled", " or was_torn(queue[0])", ""),
    Mutation("arrives: batches that failed, saved", "multistep_triton/buffer/ordered",
             "self._prefetch_queue.remove(future)", "pass"),
    Mutation("arrives: no frames without next", "multistep_triton/buffer/arriving", "not data.batch_size.numel():",
             "not data.numel():"),
    Mutation("arrives: no frames with priorities", "multistep_triton/buffer/sampled", "update_priority = False",
             "pass"),
    Mutation("arrives: added in another order", "multistep_triton/carrying", "buffer.storage.ndim > 2", "False"),
    Mutation("arrives: put in another order", "multistep_triton/carrying", '("add" in calling or "put" in calling)',
             '"add" in calling'),
    # devices
    Mutation("devices: data of another", "multistep_triton/buffer/stored",
             "data if is_there else data.to(device, non_blocking=False)", "data"),
    Mutation("devices: what data says", "multistep_triton/buffer/stored",
             '(device.type == "cpu" or not told) and _lies_on', "_lies_on"),
    Mutation("devices: of every element", "multistep_triton/buffer/stored",
             "_lies_on(element, device) for element in data.tensordicts",
             "_lies_on(element, device) for element in data.tensordicts[:1]"),
    Mutation("devices: a storage that says none", "multistep_triton/buffer/storing",
             "device_of(entries), entries.device is not None", "device_of(entries), True"),
    Mutation("devices: of the index", "multistep_triton/buffer/repeated",
             "(numbers.dtype, numbers.device) != (torch.int64, stored[0].device)", "numbers.dtype != torch.int64"),
    Mutation("devices: where frames are drawn", "multistep_triton/buffer/sampled",
             "position, layout.device", "position, self._storage.device"),
    Mutation("devices: of a checkpoint", "multistep_triton/buffer/checkpointed",
             "entries = move_to(entries, *place)", "entries"),
    Mutation("devices: of flags and entries", "multistep_triton/groups",
             "if leaf.device != device and", "if False and"),
    Mutation("devices: waits for copies", "multistep_triton/buffer/stored", ", non_blocking=False)", ")"),
    Mutation("devices: one by default", "multistep_triton/buffer/storage_order",
             'storage._last_cursor], device="cpu")', "storage._last_cursor])"),
    # observations kept once
    Mutation("kept once: gone in a block", "windows", "ends |= ahead(lost.", "ends |= False & ahead(lost."),
    Mutation("kept once: gone, the newest is not", "ends", "followed = mask & (frame + 1 < known)", "followed = mask"),
    Mutation("kept once: gone, an end is", "ends", "return gone & (count_at(", "return gone & (0 * count_at("),
    Mutation("kept once: gone behind a piece", "windows", "ends |= (lane == (1 << LEVELS) - 1) & lost", "pass"),
    Mutation("kept once: how many ends", "ends", "gone = followed & (total - own > slots)",
             "gone = followed & (total - own >= slots)"),
    Mutation("kept once: stands in", "ends", "(begin == 0) | (other != own), known - 1, begin",
             "begin == 0, known - 1, begin"),
    Mutation("kept once: the oldest", "ends", "(begin == 0) | (other != own), known", "other != own, known"),
    Mutation("kept once: what follows an end", "ends", "& (total - own <= slots)", "& (total - own < slots)"),
    Mutation("kept once: what follows the newest", "ends", "kept | (last + 1 >= known)", "kept"),
    Mutation("kept once: rows of ends", "ends", "own % slots, slots)", "own % (slots + 1), slots)"),
    Mutation("kept once: of another environment", "ends", "(end - slots - 1) * envs + env", "(end - slots - 1) * envs"),
    Mutation("keep: the frame before", "keep", "tl.where(slot == 0, slots, slot) - 1",
             "tl.where(slot == 0, 1, slot) - 1"),
    Mutation("keep: any flag", "keep", "tl.static_range(len(dones))", "tl.static_range(1)"),
    Mutation("keep: any agent", "keep", "for item in range(WIDTHS[k])", "for item in range(1)"),
    Mutation("keep: padding", "keep", "ended |= ~(valid & (", "ended |= ~(("),
    Mutation("keep: another trajectory", "keep", "ended |= traj != tl.load", "ended |= traj > tl.load"),
    Mutation("keep: counted on", "keep", "count += tl.sum(ended, 1)[:, None]", "pass"),
    Mutation("keep: the newest", "keep", "to = tl.where(is_newest, end_slots, own % end_slots)",
             "to = own % end_slots"),
    Mutation("buffer: interrupted, kept once", "multistep_triton/buffer/storing",
             "if wrote or before[-1][len(call.ring.leaves) :] != versions_of(kept):", "if False:"),
    Mutation("ends: lost", "multistep_triton/ends", "- self.slots).clamp", "- self.slots - 1).clamp"),
    Mutation("ends: stands in", "multistep_triton/eager_ring", "torch.where(is_end, self.newest, around[0])",
             "around[0]"),
    Mutation("ends: gone", "multistep_triton/eager_ring", "- number > self.ends.slots",
             "- number >= self.ends.slots"),
    Mutation("ends: any gone", "multistep_triton/eager_ring", "self.oldest] > ends.slots",
             "self.oldest] > ends.slots + 1"),
    Mutation("ends: before one that is gone", "multistep_triton/eager_ring", "last[:-2] |= ",
             "last[:-2] |= False & "),
    Mutation("ends: another writer", "multistep_triton/buffer/compact", "order.ends_writes != order.writes or",
             "False or"),
    Mutation("ends: of what arguments", "multistep_triton/buffer/compact",
             "order.ends_keys != (by := self._ends_keys())", "(by := self._ends_keys()) != by"),
    Mutation("narrow: of what came", "multistep_triton/buffer/arriving", "elif wide != {path:",
             "elif False and {path:"),
    Mutation("narrow: rewards", "multistep_triton/buffer/arriving", "roles.is_role(path, leaf) or not is_wide",
             "not is_wide"),
)  # fmt: skip


def source(mutation: Mutation, root: Path = ROOT) -> Path:
    """A file of the kernels, or of the core, by its folder."""
    return root / f"{mutation.file if '/' in mutation.file else f'kernels/{mutation.file}'}.py"


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
        for name in ("benchmarks", "kernels", "multistep_triton", "tests"):
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


def run_tests(copy: Path, mutation: Mutation | None = None) -> str:
    """What fails first; empty if nothing does."""
    for begins, tests in OWN.items():
        if mutation is not None and mutation.decides.startswith(begins):
            return fails_of(copy, tests)
    core = fails_of(copy, CORE) if mutation is None or "/" in mutation.file else ""
    return core or fails_of(copy, FIRST) or fails_of(copy, TESTS)


def fails_of(copy: Path, tests: tuple[str, ...]) -> str:
    done = run_python(copy, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests)
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
            return run_tests(copy, mutation)
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
