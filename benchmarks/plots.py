"""Pictures of a comparison: ratio to torchrl by case, time against p(done) and n, bandwidth against row width."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from benchmarks.contenders import (
    BUFFER_REFERENCE,
    BUFFER_TRITON,
    CLONE,
    COMPILED,
    GATHERS,
    REFERENCE,
    RING,
    SAMPLE,
    SB3,
    SELECTING_RING,
    TORCHRL,
    TRITON,
)
from benchmarks.report import RATIO, ROWS

COLORS = {
    TORCHRL: "#b5484a",
    COMPILED: "#e39a6b",
    REFERENCE: "#2a6f97",
    TRITON: "#1b998b",
    BUFFER_REFERENCE: "#61a5c2",
    BUFFER_TRITON: "#7bc8a4",
    SB3: "#8d6a9f",
    RING: "#c9a227",
    SELECTING_RING: "#e3cf87",
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
        "sample": sampling,
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
    """A number per case, one panel per operation and contender; shapes downwards, n and p(done) to the right."""
    rows = rows[rows[RATIO].notna() & ~rows["contender"].isin([TORCHRL, COMPILED, CLONE]) & (rows["kind"] != "rows")]
    rows = rows[rows["operation"] != SAMPLE]
    if rows.empty:
        return None
    rows = rows.assign(shape=rows["case"].str.replace(r" p=.*", "", regex=True))
    shown = [
        (title, group.pivot(index="shape", columns=["n_steps", "p_done"], values=RATIO))
        for title, group in rows.groupby(["operation", "contender"], sort=False)
    ]
    columns = sorted(set().union(*(ratios.columns for _, ratios in shown)))
    heights = [len(ratios) for _, ratios in shown]
    figure, panels = plt.subplots(
        len(shown),
        1,
        figsize=(2 + 0.6 * len(columns), 1 + 0.75 * len(shown) + 0.25 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axes, ((operation, contender), ratios) in zip(panels[:, 0], shown, strict=True):
        ratios = ratios.reindex(
            columns=columns, index=[shape for shape in rows["shape"].unique() if shape in ratios.index]
        )
        axes.imshow(np.log10(ratios), aspect="auto", cmap="RdBu", norm=TwoSlopeNorm(0, -1, 2))
        for (row, column), ratio in np.ndenumerate(ratios):
            text = "" if np.isnan(ratio) else f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"
            axes.text(column, row, text, ha="center", va="center", color="white" if ratio > 20 else "black")
        axes.set_xticks(range(len(columns)), [f"n={n}\np={p:g}" for n, p in columns], fontsize=7)
        axes.set_yticks(range(len(ratios)), ratios.index)
        axes.set_title(f"{operation}: {contender}", loc="left")
        axes.grid(visible=False)
    figure.suptitle("Times faster than torchrl")
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


def sampling(rows: pd.DataFrame) -> Figure | None:
    """A bar per case and contender: what sampling takes, in times of reading the rows alone."""
    rows = rows[(rows["operation"] == SAMPLE) & rows[ROWS].notna() & (rows["contender"] != GATHERS)]
    if rows.empty:
        return None
    times = rows.pivot(index="case", columns="contender", values=ROWS)
    times = times.reindex(index=rows["case"].unique()[::-1], columns=rows["contender"].unique()[::-1])
    figure, axes = plt.subplots(figsize=(7, 1 + 0.18 * times.size))
    times.plot.barh(ax=axes, color=COLORS, width=0.8, legend=False)
    for bars in axes.containers:
        axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
    axes.axvline(1, color=COLORS[CLONE], linewidth=1)
    axes.set(xscale="log", xlabel="times as long as reading the rows of the sample alone", ylabel="")
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.grid(visible=False, axis="y")
    axes.set_title("One sample", loc="left")
    figure.tight_layout()
    handles, labels = axes.get_legend_handles_labels()
    legend_below(figure, handles[::-1], labels[::-1])
    return figure


def legend_below(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4)
