"""Rows of a comparison as Markdown: what it comes to, where it is worst, what was not timed and why, and every row."""

from __future__ import annotations

from pathlib import Path
from statistics import geometric_mean

import pandas as pd

from benchmarks.contenders import BUFFERS, CLONE, FLOORS, GATHERS, OURS, RING, SAMPLE, SB3, SELECTING_RING, TORCHRL
from benchmarks.machine import sentence

RATIO, COPIES, ROWS = "torchrl_over_this", "this_over_clone", "this_over_row_gathers"
FASTER = {
    RATIO: TORCHRL,
    "sb3_over_this": SB3,
    "fasttd3_over_this": RING,
    "fasttd3_index_select_over_this": SELECTING_RING,
}
"""Columns of how many times faster something is, and than whom."""
SLOWER = {COPIES: CLONE, ROWS: GATHERS}
NUMBERS = ("median_ms", "iqr_ms", *FASTER, *SLOWER, "GBps", "operators", "launches", "syncs", "peak_bytes")
PREEMPTIONS = "preemptions_per_s"
WORST = 10
DISTURBED = 50
"""Preemptions per second from which on times are those of a busy machine."""


def with_ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """Adds how many times faster than others, and how many times slower than what is least; of medians of one run."""
    rows = rows.reindex(columns=[*rows.columns, *(name for name in NUMBERS if name not in rows)])
    keys = ["case", "operation"]
    medians = rows.pivot(index=keys, columns="contender", values="median_ms")
    by_row = rows[keys].apply(tuple, axis=1)
    for name, contender in (FASTER | SLOWER).items():
        base = by_row.map(medians[contender]) if contender in medians else float("nan")
        rows[name] = base / rows["median_ms"] if name in FASTER else rows["median_ms"] / base
    return rows


def read(path: Path) -> pd.DataFrame:
    """Rows as they were written, with the ratios of today."""
    blank = [*NUMBERS, PREEMPTIONS, "measurements", "input_bytes", "output_bytes", "row_bytes"]
    return with_ratios(pd.read_csv(path, keep_default_na=False, na_values=dict.fromkeys(blank, "")))


def table(rows: pd.DataFrame) -> str:
    """Markdown of text and numbers; the numbers to the right."""
    right = [pd.api.types.is_numeric_dtype(rows[name]) for name in rows]
    lines = [list(rows.columns), ["---:" if number else "---" for number in right]]
    lines += [["" if pd.isna(value) else shown(value) for value in values] for values in rows.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: object) -> str:
    """Three digits of a number, and all of those before the point."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ratios_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Over state cases, by operation and contender: the geometric mean and the smallest ratio to torchrl."""
    timed = rows[(rows["kind"] == "state") & rows[RATIO].notna() & ~rows["contender"].isin([TORCHRL, *FLOORS])]
    found = []
    for (operation, contender), group in timed.groupby(["operation", "contender"], sort=False):
        worst = group.loc[group[RATIO].idxmin()]
        found.append(
            {
                "operation": operation,
                "contender": contender,
                "cases": len(group),
                "torchrl / it, geometric mean": geometric_mean(group[RATIO]),
                "smallest": worst[RATIO],
                "at": worst["case"],
            }
        )
    return pd.DataFrame(found)


def worst_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Of all cases, where this package gains least over torchrl; torchrl's samples were made when they were stored."""
    ours = rows[rows["contender"].isin(OURS + BUFFERS) & rows["operation"].ne(SAMPLE) & rows[RATIO].notna()]
    return ours.sort_values(RATIO).head(WORST)[["operation", "case", "contender", "median_ms", RATIO, COPIES]]


def sampling_of(rows: pd.DataFrame) -> pd.DataFrame:
    """What sampling takes this package's buffer, beside its peers and the rows alone."""
    ours = rows[rows["contender"].isin(BUFFERS) & rows["operation"].eq(SAMPLE) & rows["status"].eq("ok")]
    return ours[["case", "contender", "median_ms", "iqr_ms", ROWS, *FASTER]]


def excerpt(rows: pd.DataFrame) -> str:
    """The table of the documentation: of n=3, every shape at p=0.01 and one at every p."""
    chosen = rows[rows["contender"].isin([TORCHRL, *OURS, CLONE]) & rows["n_steps"].eq(3) & rows["status"].eq("ok")]
    chosen = chosen[chosen["operation"].ne(SAMPLE) & chosen["kind"].ne("rows")]
    chosen = chosen[chosen["p_done"].eq(0.01) | chosen["case"].str.contains("1024x128")]
    lines = []
    for case, group in chosen.groupby("case", sort=False):
        of = group.set_index(["operation", "contender"])
        ours = next(name for name in OURS if ("transform", name) in of.index)
        line = {"case": case.removesuffix(" n=3"), "input MB": f"{of['input_bytes'].iloc[0] / 1e6:.3g}"}
        for contender, name in ((TORCHRL, "torchrl"), (ours, "ours"), (CLONE, "clone")):
            row = of.loc[("transform", contender)]
            line[f"{name}, ms"] = f"{row['median_ms']:.3g} [{row['iqr_ms']:.2g}]"
        line["torchrl / ours"] = of.loc[("transform", ours), RATIO]
        line["ours / clone"] = of.loc[("transform", ours), COPIES]
        line["all of extend: torchrl / ours"] = of.loc[("extend", ours), RATIO]
        lines.append(line)
    return table(pd.DataFrame(lines))


def summary(rows: pd.DataFrame) -> str:
    """The sections that fit a screen."""
    blank = rows["status"].ne("ok")
    not_timed = rows[blank].groupby(["contender", "status"], sort=False).size().rename("rows").reset_index()
    noted = rows[rows["note"].ne("")].groupby(["contender", "note"], sort=False).size().rename("rows").reset_index()
    sections = {
        "State cases, ratio to torchrl": ratios_of(rows),
        f"The {WORST} smallest ratios to torchrl, of all cases": worst_of(rows),
        "Sampling": sampling_of(rows),
        "Not timed": not_timed,
        "Timed, with a note": noted,
    }
    text = "\n\n".join(f"## {title}\n\n{table(found)}" for title, found in sections.items() if len(found))
    if (disturbed := (rows.loc[~blank, PREEMPTIONS] > DISTURBED).mean()) > 0:
        busy = f"cores were taken from this process more than {DISTURBED} times a second"
        text = f"**In {disturbed:.0%} of what was timed, {busy}. Measure on an idle machine.**\n\n{text}"
    return text


def markdown(rows: pd.DataFrame) -> str:
    """All of it: the machine, the summary, and a table per operation."""
    pictured = f" Pixels are {rows['pixels'].max()}." if rows["pixels"].any() else ""
    lines = [
        "# Comparison",
        sentence(rows.iloc[0].to_dict()) + pictured,
        "Medians and interquartile ranges of one run in which the contenders took turns. `torchrl_over_this`: how many "
        "times faster than torchrl, and so on. `this_over_clone`: how many times slower than a clone of the input; "
        "`this_over_row_gathers`: than reading the rows of a sample alone. GB/s: bytes of the input, or of the rows "
        "that are sampled, and of the output per second. peak_bytes: at the peak, beyond what the call returns.",
        summary(rows),
    ]
    columns = ["case", "contender", *NUMBERS, "note"]
    for operation, group in rows[rows["status"].eq("ok")].groupby("operation", sort=False):
        lines += [f"## {operation}", table(group[columns].dropna(axis=1, how="all"))]
    return "\n\n".join(lines) + "\n"
