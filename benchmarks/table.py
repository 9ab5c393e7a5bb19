"""Prints a run of the suite as a Markdown table.

Usage: ``python benchmarks/table.py FILE [FILE ...]``, files written by ``pytest benchmarks --benchmark-json=FILE``.
Medians and, in brackets, interquartile ranges, in ms; ratios of medians are of one run each, and with several
files the median ratio over the runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

CLONE, OURS, TORCHRL = "clone of the input", "multistep_triton", "torchrl"


def read(path: Path) -> pd.DataFrame:
    """One row per case of one run."""
    benchmarks = json.loads(path.read_text())["benchmarks"]
    rows = pd.DataFrame(
        {
            "case": entry["group"],
            "contender": entry["extra_info"]["contender"],
            "MB": entry["extra_info"]["input_bytes"] / 1e6,
            "median": entry["stats"]["median"] * 1e3,
            "iqr": entry["stats"]["iqr"] * 1e3,
        }
        for entry in benchmarks
    )
    table = rows.drop_duplicates("case").set_index("case")[["MB"]]
    for name in (TORCHRL, OURS, CLONE):
        of_name = rows[rows["contender"] == name].set_index("case")
        table[f"{name}, ms"], table[f"{name} iqr"] = of_name["median"], of_name["iqr"]
    table["torchrl / ours"] = table[f"{TORCHRL}, ms"] / table[f"{OURS}, ms"]
    table["ours / clone"] = table[f"{OURS}, ms"] / table[f"{CLONE}, ms"]
    return table


def combine(runs: list[pd.DataFrame]) -> pd.DataFrame:
    """The median over the runs of every figure, as text."""
    median = pd.concat(runs).groupby(level=0, sort=False).median()
    shown = pd.DataFrame({"input MB": median["MB"].map("{:.2f}".format)})
    for name in (f"{TORCHRL}, ms", f"{OURS}, ms", f"{CLONE}, ms"):
        spread = median[name.replace(", ms", " iqr")]
        shown[name] = median[name].map("{:.3f}".format) + spread.map(" [{:.3f}]".format)
    for name in ("torchrl / ours", "ours / clone"):
        shown[name] = median[name].map("{:.1f}".format)
    return shown


def markdown(table: pd.DataFrame) -> str:
    rows = [["envs x frames", *table.columns], ["---"] + ["---:"] * len(table.columns)]
    rows += [[str(index), *values] for index, values in zip(table.index, table.to_numpy().tolist(), strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    print(markdown(combine([read(path) for path in parser.parse_args().files])))


if __name__ == "__main__":
    main()
