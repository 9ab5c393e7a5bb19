"""Prints runs of the suite as a Markdown table, and keeps them as CSV.

Usage: ``python benchmarks/table.py [--csv OUT.csv] FILE [FILE ...]``; a FILE is a JSON that ``pytest benchmarks
--benchmark-json=FILE`` wrote, one run each, or a CSV that this script wrote. Times are medians in ms with, in brackets,
interquartile ranges; a ratio is of two medians of one run. Of several runs the median is shown, and of the ratios the
smallest and largest too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

CLONE, OURS, TORCHRL = "clone of the input", "multistep_triton", "torchrl"


def read(path: Path) -> pd.DataFrame:
    """One row per run, case and contender."""
    if path.suffix == ".csv":
        return pd.read_csv(path)
    run = json.loads(path.read_text())
    machine, commit = run["machine_info"], run["commit_info"]
    about = {
        "cpu": f"{machine['cpu']['brand_raw']}, {machine['cpu']['count']} cores",
        "date": run["datetime"][:10],
        "commit": commit["id"] + ("-dirty" if commit["dirty"] else ""),
        **{name: machine[name] for name in ("threads", "python_version", "torch", "torchrl", "tensordict")},
    }
    return pd.DataFrame(
        {
            "run": run["datetime"],
            "case": entry["group"],
            "contender": entry["extra_info"]["contender"],
            "input_MB": round(entry["extra_info"]["input_bytes"] / 1e6, 3),
            "median_ms": round(entry["stats"]["median"] * 1e3, 4),
            "iqr_ms": round(entry["stats"]["iqr"] * 1e3, 4),
            "min_ms": round(entry["stats"]["min"] * 1e3, 4),
            "rounds": entry["stats"]["rounds"],
            **about,
        }
        for entry in run["benchmarks"]
    )


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per case, as text."""
    times = rows.pivot(index=["case", "run"], columns="contender", values="median_ms")
    shown = pd.DataFrame(index=rows["case"].drop_duplicates())
    shown["input MB"] = rows.groupby("case")["input_MB"].first().map("{:.2f}".format)
    for name in (TORCHRL, OURS, CLONE):
        median = rows[rows["contender"] == name].groupby("case")[["median_ms", "iqr_ms"]].median()
        shown[f"{name}, ms"] = median["median_ms"].map("{:.3f}".format) + median["iqr_ms"].map(" [{:.3f}]".format)
    for name, ratio in {
        "torchrl / ours": times[TORCHRL] / times[OURS],
        "ours / clone": times[OURS] / times[CLONE],
    }.items():
        by_case = ratio.groupby("case").agg(["median", "min", "max"])
        shown[name] = by_case.apply("{median:.1f} ({min:.1f} to {max:.1f})".format_map, axis=1)
    return shown


def markdown(table: pd.DataFrame) -> str:
    rows = [["envs x frames", *table.columns], ["---"] + ["---:"] * len(table.columns)]
    rows += [[str(index), *values] for index, values in zip(table.index, table.to_numpy().tolist(), strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--csv", type=Path, metavar="OUT", help="write the rows of all files to OUT")
    options = parser.parse_args()
    rows = pd.concat([read(path) for path in options.files], ignore_index=True)
    if options.csv:
        rows.to_csv(options.csv, index=False)
    print(markdown(summarize(rows)))


if __name__ == "__main__":
    main()
