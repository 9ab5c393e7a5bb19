"""Compares every contender on every case: time, memory, operators, launches; as CSV, Markdown and pictures.

Usage: ``python -m benchmarks.compare --out DIR``; ``--quick`` for a first look, ``--cases``, ``--operations`` and
``--seconds`` (0.5 unless told) for a part. Files are called after the device and "compare", or the operation if it is
only one. Nothing is timed before it has passed the gate. Inputs are the same in every call, so that small ones are in
the cache.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd
import torch
from tensordict import TensorDict
from torch._dynamo.utils import counters
from tqdm import tqdm

from benchmarks import plots, report
from benchmarks.cases import CASES, KINDS, PIXEL_SOURCE, QUICK, Case, make_rollout, select
from benchmarks.contenders import COMPILED, CONTENDERS, FLOORS, OPERATIONS, Contender, Subject, applies
from benchmarks.gate import TooSlow, check
from benchmarks.machine import about
from benchmarks.measure import command, cost, in_turns, memory_of, preemptions, set_up

QUICK_SECONDS = 0.1
NOT_QUICK = {COMPILED: "left out of --quick: each case compiles for many seconds"}


def graphs() -> int:
    """How many graphs torch.compile has made so far."""
    return counters["stats"]["unique_graphs"]


def prepare(
    contender: Contender, case: Case, operation: str, rollout: TensorDict, left_out: Mapping[str, str]
) -> tuple[Subject | None, dict[str, str]]:
    """What is ready to be timed, None if nothing is; the columns ``status`` and ``note``."""
    if reason := left_out.get(contender.name) or contender.obstacle(case, rollout.device):
        return None, {"status": f"skipped: {reason}", "note": ""}
    compiled = graphs()
    try:
        subject = contender.make(case, operation, rollout.device)
        errors = check(case, rollout, subject)
        steady = graphs()
        subject.call(rollout)
    except TooSlow as slow:
        return None, {"status": f"skipped: {slow}", "note": ""}
    # Whatever a contender fails with, out of memory among it, the others go on.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        return None, {"status": f"failed: {type(error).__name__}: {reason}", "note": ""}
    known = contender.known_errors(case)
    if wrong := [text for key, text in errors.items() if key not in known]:
        return None, {"status": f"wrong: {'; '.join(wrong)}", "note": ""}
    if graphs() > steady:
        return None, {"status": "skipped: recompiles in every call", "note": ""}
    notes = [f"{key} is wrong" for key in known if key in errors]
    if steady > compiled:
        notes.append(f"compiled to {steady - compiled} graphs")
    return subject, {"status": "ok", "note": "; ".join(notes)}


def bytes_of(subject: Subject, rollout: TensorDict) -> tuple[int, int]:
    """Bytes that a call reads and writes, of a rollout or, of a sample, as many of rows as come out."""
    transitions = subject.transitions([subject.call(rollout)])
    written = memory_of(transitions)
    if subject.store:
        return written, written
    return memory_of(rollout), written * rollout.numel() // transitions.numel()


def compare(
    case: Case,
    operation: str,
    rollout: TensorDict,
    contenders: list[Contender],
    seconds: float,
    left_out: Mapping[str, str],
) -> list[dict[str, Any]]:
    """One row per contender."""
    prepared = {
        contender.name: prepare(contender, case, operation, rollout, left_out)
        for contender in contenders
        if applies(contender, operation, case)
    }
    subjects = {name: subject for name, (subject, _) in prepared.items() if subject}
    begin, before = perf_counter(), preemptions()
    times = in_turns({name: partial(subject.call, rollout) for name, subject in subjects.items()}, seconds)
    disturbed = (preemptions() - before) / (perf_counter() - begin)
    rows = []
    for name, (subject, verdict) in prepared.items():
        row = {"case": str(case), **case._asdict(), "operation": operation, "contender": name, **verdict}
        row["pixels"] = PIXEL_SOURCE if case.kind == "pixels" else ""
        if subject:
            time = times[name]
            if subject.counted:
                row |= cost(partial(subject.call, rollout), rollout.device)._asdict()
            read, written = bytes_of(subject, rollout)
            row |= {
                "median_ms": time.median * 1e3,
                "iqr_ms": time.iqr * 1e3,
                "measurements": len(time.times),
                "GBps": (read + written) / time.median / 1e9,
                "input_bytes": read,
                "output_bytes": written,
                "row_bytes": case.row_bytes,
                report.PREEMPTIONS: disturbed,
            }
        rows.append(row)
    return rows


def run(
    cases: list[Case],
    operations: list[str],
    device: torch.device,
    seconds: float,
    left_out: Mapping[str, str],
    contenders: list[Contender] = CONTENDERS,
) -> pd.DataFrame:
    """One row per case, operation and contender."""
    wanted = [
        (case, operation)
        for case in cases
        for operation in operations
        if any(applies(contender, operation, case) for contender in contenders if contender.name not in FLOORS)
    ]
    machine = about(device)
    rows, rollout, last = [], None, None
    for case, operation in (progress := tqdm(wanted)):
        progress.set_description(f"{operation}, {case}")
        if case != last:
            rollout, last = make_rollout(case, device), case
        rows += compare(case, operation, rollout, contenders, seconds, left_out)
    return report.with_ratios(pd.DataFrame(rows)).assign(**machine)


def stem_of(rows: pd.DataFrame) -> str:
    """What the files of a run are called: a run of one operation does not take the place of one of several."""
    operations = rows["operation"].unique()
    return f"{rows['device'].iloc[0]}-{'compare' if len(operations) > 1 else operations[0].replace(' ', '-')}"


def main(arguments: list[str] | None = None) -> None:
    parser = command(__doc__, seconds=None)
    parser.add_argument("--cases", default="all", help=f"{', '.join(KINDS)}, all, or a regular expression")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--quick", action="store_true", help="a few cases of every set: a minute, on a GPU three")
    parser.add_argument("--redraw", type=Path, metavar="CSV", help="measure nothing; report and pictures of this file")
    options = parser.parse_args(arguments)
    try:
        cases = select(options.cases, QUICK if options.quick else CASES)
        device = torch.empty(0, device=options.device).device
    except (re.error, RuntimeError, AssertionError) as error:
        parser.error(str(error).partition("\n")[0])
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds must be more than 0, got {options.seconds}")
    if options.redraw:
        if not options.redraw.is_file():
            parser.error(f"--redraw must be a CSV of an earlier run, got {options.redraw}")
        rows = report.read(options.redraw)
    else:
        if not cases:
            parser.error(f"no case is named like {options.cases!r}; there are, for instance: {CASES[0]}, {CASES[-1]}")
        set_up()
        seconds = options.seconds or (QUICK_SECONDS if options.quick else 0.5)
        left_out = NOT_QUICK if options.quick else {}
        rows = run(cases, options.operations, device, seconds, left_out)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.redraw.stem if options.redraw else stem_of(rows)
    rows.to_csv(options.out / f"{stem}.csv", index=False, float_format="%.10g")
    text = report.markdown(rows)
    (options.out / f"{stem}.md").write_text(text)
    pictures = plots.draw(rows, options.out)
    print(report.summary(rows))
    print("\nWritten:", *[options.out / f"{stem}{suffix}" for suffix in (".csv", ".md")], *pictures, sep="\n    ")


if __name__ == "__main__":
    main()
