"""Pictures of a comparison: ratio to torchrl by case, time against p(done) and n, bandwidth against row width."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.contenders import CLONE, COMPILED, REFERENCE, RING, SB3, TORCHRL, TRITON
from benchmarks.report import RATIO

COLORS = {
    TORCHRL: "#b5484a",
    COMPILED: "#e39a6b",
    REFERENCE: "#2a6f97",
    TRITON: "#1b998b",
    SB3: "#8d6a9f",
    RING: "#c9a227",
    CLONE: "#8a8a8a",
}
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
    "font.size": 9,
}


def draw(rows: pd.DataFrame, out: Path) -> list[Path]:
    """Writes every picture for which there are rows; returns where they are."""
    device = rows["device"].iloc[0]
    timed = rows[rows["status"].eq("ok")]
    pictures = {
        "ratio": ratio_by_case,
        "p-done": lambda rows: time_against(rows, "p_done"),
        "n-steps": lambda rows: time_against(rows, "n_steps"),
        "bandwidth": bandwidth,
    }
    paths = []
    with plt.rc_context(STYLE):
        for name, picture in pictures.items():
            if figure := picture(timed):
                path = out / f"{device}-{name}.png"
                figure.savefig(path, dpi=150, bbox_inches="tight")
                plt.close(figure)
                paths.append(path)
    return paths


def plain_log(axes: Axes, names: str) -> None:
    """Makes "x", "y" or "xy" logarithmic, with numbers as people write them."""
    for name in names:
        axes.set(**{f"{name}scale": "log"})
        axis = axes.xaxis if name == "x" else axes.yaxis
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=12))
        axis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}")
        axis.set_minor_formatter(ticker.NullFormatter())


def lines(axes: Axes, rows: pd.DataFrame, x: str, y: str) -> None:
    for contender, group in rows.groupby("contender", sort=False):
        group = group.sort_values(x)
        axes.plot(group[x], group[y], "o-", color=COLORS[contender], label=contender, markersize=4)


def ratio_by_case(rows: pd.DataFrame) -> Figure | None:
    """Bars, one panel per operation."""
    rows = rows[rows[RATIO].notna() & ~rows["contender"].isin([TORCHRL, CLONE])]
    if rows.empty:
        return None
    operations, cases = rows["operation"].unique(), rows["case"].unique()
    figure, panels = plt.subplots(
        1, len(operations), figsize=(2 + 3.5 * len(operations), 1.5 + 0.25 * len(cases)), sharey=True, squeeze=False
    )
    contenders = [name for name in COLORS if name in set(rows["contender"])]
    for axes, operation in zip(panels[0], operations, strict=True):
        ratios = rows[rows["operation"] == operation].pivot(index="case", columns="contender", values=RATIO)
        # Upwards, so that the first case and contender come out on top; one without a ratio leaves its place empty.
        ratios = ratios.reindex(index=cases[::-1], columns=contenders[::-1])
        (ratios - 1).plot.barh(ax=axes, left=1, color=COLORS, width=0.8, legend=False)
        plain_log(axes, "x")
        axes.axvline(1, color="#333333", linewidth=0.9)
        axes.axvline(10, color="#333333", linewidth=0.9, linestyle="--")
        axes.set(title=operation, xlabel="times faster than torchrl", ylabel="")
        axes.grid(axis="y", visible=False)
    figure.tight_layout()
    handles, labels = panels[0][-1].get_legend_handles_labels()
    legend_below(figure, handles[::-1], labels[::-1])
    return figure


def time_against(rows: pd.DataFrame, x: str) -> Figure | None:
    """Median of the transform, one panel per shape, at n=3 or at p(done)=0.01."""
    named = {"p_done": "p(done)", "n_steps": "n"}
    other, value = ("n_steps", 3) if x == "p_done" else ("p_done", 0.01)
    rows = rows[(rows["operation"] == "transform") & (rows["kind"] != "rows") & (rows[other] == value)]
    shapes = [(shape, group) for shape, group in rows.groupby(["kind", "envs", "frames"], sort=False)]
    shapes = [(shape, group) for shape, group in shapes if group[x].nunique() > 1]
    if not shapes:
        return None
    columns = min(len(shapes), 4)
    figure, panels = plt.subplots(
        -(-len(shapes) // columns),
        columns,
        figsize=(max(3 * columns, 4.5), 2.6 * -(-len(shapes) // columns)),
        squeeze=False,
    )
    for axes in panels.flat[len(shapes) :]:
        axes.remove()
    for axes, ((kind, envs, frames), group) in zip(panels.flat, shapes, strict=False):
        # A compiled transform is measured at one point only, which is no line.
        lines(axes, group[group.groupby("contender")[x].transform("nunique") > 1], x, "median_ms")
        axes.set(title=f"{kind} {envs}x{frames}", xlabel=named[x], ylabel="ms")
        plain_log(axes, "xy" if x == "n_steps" else "y")
        axes.set_xticks(ticks := sorted(group[x].unique()), [f"{tick:g}" for tick in ticks])
    figure.suptitle(f"One call of the transform against {named[x]}, {named[other]} = {value}")
    figure.tight_layout()
    legend_below(figure, *panels[0][0].get_legend_handles_labels())
    return figure


def bandwidth(rows: pd.DataFrame) -> Figure | None:
    """Input and output bytes per second of the transform, against the bytes of an observation."""
    rows = rows[(rows["operation"] == "transform") & (rows["kind"] == "rows")]
    if rows.empty:
        return None
    figure, axes = plt.subplots(figsize=(6, 3.6))
    lines(axes, rows, "row_bytes", "GBps")
    axes.set(xlabel="bytes of an observation", ylabel="GB/s, input and output")
    plain_log(axes, "xy")
    axes.set_title("Bandwidth of one call of the transform, n = 3")
    figure.tight_layout()
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def legend_below(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4)
