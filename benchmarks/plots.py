"""Pictures of a comparison: ratio to torchrl by case, time against n, bandwidth against row width, samples."""

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
    BUFFERS,
    CLONE,
    COMPACT_REFERENCE,
    COMPACT_TRITON,
    COMPILED,
    GATHERS,
    OURS,
    REFERENCE,
    RING,
    SAMPLE,
    SB3,
    SELECTING_RING,
    STORE_AND_SAMPLE,
    TORCHRL,
    TRANSFORM,
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
    COMPACT_REFERENCE: "#a9d6e5",
    COMPACT_TRITON: "#b7e4c7",
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
        "n-steps": time_against_n,
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


def label(contender: str, device: str) -> str:
    """What pictures call a contender."""
    eager = "CPU" if device == "cpu" else "GPU, eager"
    return {
        REFERENCE: f"ours ({eager})",
        BUFFER_REFERENCE: f"our buffer ({eager})",
        TRITON: "ours (GPU)",
        BUFFER_TRITON: "our buffer (GPU)",
        COMPACT_REFERENCE: f"our buffer, compact ({eager})",
        COMPACT_TRITON: "our buffer, compact (GPU)",
    }.get(contender, contender)


def machine_of(rows: pd.DataFrame) -> str:
    return rows["gpu"].iloc[0] or f"{rows['cpu'].iloc[0]}, {rows['threads'].iloc[0]} threads"


def lines(axes: Axes, rows: pd.DataFrame, x: str, y: str) -> None:
    for contender, group in rows.groupby("contender", sort=False):
        group = group.sort_values(x)
        name = label(contender, group["device"].iloc[0])
        axes.plot(group[x], group[y], "o-", color=COLORS[contender], label=name, markersize=4)


def ratio_by_case(rows: pd.DataFrame) -> Figure | None:
    """A number per case: of the transform alone, and of storing with our buffer and sampling as much.

    One panel for each of this package's classes. The first says what the computation gains, the second what is left of
    it when frames are stored and sampled besides, as in training.
    """
    rows = rows[rows[RATIO].notna() & rows["kind"].ne("rows")]
    shown = []
    for operation, (eager, kernels) in ((TRANSFORM, OURS), (STORE_AND_SAMPLE, BUFFERS)):
        of = rows[rows["operation"].eq(operation)]
        name = kernels if kernels in set(of["contender"]) else eager
        of = of[of["contender"].eq(name)]
        if len(of):
            of = of.assign(shape=of["kind"] + " " + of["envs"].astype(str) + "x" + of["frames"].astype(str))
            ratios = of.pivot(index="shape", columns=["n_steps", "p_done"], values=RATIO).sort_index(axis="columns")
            title = f"{operation}: {label(name, of['device'].iloc[0])}"
            shown.append((title, ratios.loc[of["shape"].unique()]))
    if not shown:
        return None
    heights = [len(ratios) for _, ratios in shown]
    size = 2 + 0.6 * max(len(ratios.columns) for _, ratios in shown), 0.9 + 1.0 * len(shown) + 0.3 * sum(heights)
    figure, panels = plt.subplots(
        len(shown), 1, figsize=size, height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axes, (title, ratios) in zip(panels[:, 0], shown, strict=True):
        axes.imshow(np.log10(ratios), aspect="auto", cmap="RdBu", norm=TwoSlopeNorm(0, -1, 2))
        for (row, column), ratio in np.ndenumerate(ratios):
            text = "" if np.isnan(ratio) else f"{ratio:.{0 if ratio >= 9.95 else 1 if ratio >= 0.995 else 2}f}"
            axes.text(column, row, text, ha="center", va="center", color="white" if ratio > 20 else "black")
        axes.set_xticks(range(len(ratios.columns)), [f"{n}\n{p:g}" for n, p in ratios.columns])
        axes.set_yticks(range(len(ratios)), ratios.index)
        axes.set(xlabel="n_steps, and below it p(done) of a frame", ylabel="envs x frames of a call")
        axes.set_title(title, loc="left")
        axes.grid(visible=False)
    figure.suptitle(f"Times faster than torchrl ({machine_of(rows)}; blank: not timed)")
    return figure


def time_against_n(rows: pd.DataFrame) -> Figure | None:
    """Median of the transform at p(done) = 0.01, one panel per shape."""
    rows = rows[(rows["operation"] == TRANSFORM) & (rows["kind"] != "rows") & (rows["p_done"] == 0.01)]
    shapes = [(shape, group) for shape, group in rows.groupby(["kind", "envs", "frames"], sort=False)]
    shapes = [(shape, group) for shape, group in shapes if group["n_steps"].nunique() > 1]
    if not shapes:
        return None
    columns = min(len(shapes), 4)
    size = max(2.4 * columns, 5), 0.6 + 2.4 * -(-len(shapes) // columns)
    figure, panels = plt.subplots(-(-len(shapes) // columns), columns, figsize=size, squeeze=False)
    for axes in panels.flat[len(shapes) :]:
        axes.remove()
    for axes, ((kind, envs, frames), group) in zip(panels.flat, shapes, strict=False):
        # A compiled transform is measured at one point only, which is no line.
        lines(axes, group[group.groupby("contender")["n_steps"].transform("nunique") > 1], "n_steps", "median_ms")
        axes.set(title=f"{kind} {envs}x{frames}", xlabel="n_steps", ylabel="ms per call")
        plain_log(axes, "xy")
        axes.set_xticks(ticks := sorted(group["n_steps"].unique()), [f"{tick:g}" for tick in ticks])
    figure.suptitle(f"The transform at p(done) = 0.01, by envs x frames of a call ({machine_of(rows)})")
    figure.tight_layout()
    legend_below(figure, *panels[0][0].get_legend_handles_labels())
    return figure


def bandwidth(rows: pd.DataFrame) -> Figure | None:
    """Input and output bytes per second of the transform, against the bytes of an observation."""
    rows = rows[(rows["operation"] == TRANSFORM) & (rows["kind"] == "rows")]
    if rows.empty:
        return None
    figure, axes = plt.subplots(figsize=(6.5, 3.8))
    lines(axes, rows, "row_bytes", "GBps")
    axes.set(xlabel="bytes of an observation", ylabel="GB/s of input and output")
    plain_log(axes, "xy")
    frames = f"{rows['frames'].iloc[0]} frames of every env"
    axes.set_title(f"The transform, n_steps = 3, p(done) = 0.01, {frames}\n({machine_of(rows)})", fontsize=10)
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
    # "sampling 8192 of 1024x64x256B p=0.01 n=3" in two lines, without what all of them share
    times.index = times.index.str.replace(r"sampling (.* of .*)x(\d+)B p=.* (n=\d+)", "\\1\n\\2 B, \\3", regex=True)
    figure, axes = plt.subplots(figsize=(7.5, 1.2 + 0.16 * times.size))
    times.plot.barh(ax=axes, color=COLORS, width=0.8, legend=False)
    for bars in axes.containers:
        axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
    axes.axvline(1, color=COLORS[CLONE], linewidth=1)
    axes.set(xlim=0, xlabel="times as long as reading the rows of the sample alone (line: as long)")
    axes.set_ylabel("transitions of envs x frames; bytes of an observation, n_steps")
    axes.grid(visible=False, axis="y")
    axes.set_title(f"One sample of a full ring, p(done) = 0.01 ({machine_of(rows)})", loc="left", fontsize=10)
    figure.tight_layout()
    handles, labels = axes.get_legend_handles_labels()
    legend_below(figure, handles[::-1], [label(name, rows["device"].iloc[0]) for name in labels[::-1]])
    return figure


def legend_below(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4)
