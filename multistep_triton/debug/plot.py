"""Owns the picture of a row's windows. May import ``explain`` and matplotlib."""

from __future__ import annotations

import math
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from multistep_triton.debug.explain import Windows

# The number of frames in a picture, which a longer window raises, and the most lanes that fit labels.
FRAMES, LABELLED = 32, 24
FULL, CUT, CHOSEN, BOUNDARY, PADDING = "#9ecae1", "#fdae6b", "#08306b", "#d62728", "#e0e0e0"
RETURN, REWARD, GOES_ON = "#3182bd", "#c7c7c7", "#08306b"


@rc_context({"text.parse_math": False})
def draw_windows(windows: Windows, t: int, title: str) -> Figure:
    """Draws the windows of the row around frame ``t`` and, below them, the row's first reward and its returns.

    Raises:
        ValueError: the row has no reward.
    """
    if not windows.rewards:
        raise ValueError("the row must have a reward to be drawn, got none")
    count = len(windows.steps)
    width = max(FRAMES, windows.steps[t] + FRAMES // 4)
    first = max(0, min(t - (width - windows.steps[t]) // 2, count - width))
    shown = range(first, min(first + width, count))
    # Windows of at most L frames that begin L frames apart do not overlap: the lane is the first frame modulo L.
    lanes = max(windows.steps[max(0, first - windows.n_steps + 1) : shown.stop])
    labelled = min(lanes, LABELLED)
    figure = Figure(figsize=(min(max(7, 1 + 0.25 * len(shown)), 24), 3.4 + 0.2 * labelled), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1 + 0.14 * labelled, 1))
    above.set_title(title, loc="left", fontsize=10)
    keys = [*_draw_lanes(above, windows, t, shown, lanes), *_draw_returns(below, windows, t, shown)]
    figure.legend(handles=keys, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    for axes in (above, below):
        _draw_boundaries(axes, windows, shown)
        axes.axvspan(t - 0.5, windows.end(t) + 0.5, color=CHOSEN, alpha=0.1, zorder=0, linewidth=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(shown.start - 0.6, shown.stop - 0.4)
    return figure


def _draw_lanes(axes: Axes, windows: Windows, t: int, shown: range, lanes: int) -> list[Any]:
    """Draws a bar for every window that overlaps the frames shown, and returns the handles of the legend."""
    begins = [s for s in range(max(0, shown.start - lanes + 1), shown.stop) if windows.end(s) >= shown.start]
    lengths = [windows.steps[begin] for begin in begins]
    bars = axes.barh(
        [begin % lanes for begin in begins],
        [length - 0.2 for length in lengths],
        left=[begin - 0.4 for begin in begins],
        height=0.66,
        color=[FULL if length == windows.n_steps else CUT for length in lengths],
        edgecolor="none",
        linewidth=2,
        zorder=2,
    )
    bars[begins.index(t)].set(edgecolor=CHOSEN, zorder=3)
    if lanes <= LABELLED and len(shown) <= 2 * FRAMES:
        for begin in shown:
            axes.text(begin, begin % lanes, str(begin), ha="center", va="center", fontsize=8, zorder=4)
    # An arrow at the picture's edge marks a bar whose window goes on beyond the edge.
    before = [s % lanes for s in begins if s < shown.start]
    after = [s % lanes for s in begins if windows.end(s) >= shown.stop]
    for cut, edge, arrow in ((before, shown.start - 0.6, "<"), (after, shown.stop - 0.4, ">")):
        if cut:  # the layout cannot place an artist that is empty and not clipped
            axes.plot([edge] * len(cut), cut, arrow, color=GOES_ON, markersize=7, clip_on=False, zorder=5)
    axes.set_ylim(lanes - 0.4, -0.6)
    axes.set_yticks([])
    axes.set_ylabel("windows", labelpad=8)
    keys: list[Any] = [
        Patch(color=FULL, label=f"full window, n_steps = {windows.n_steps}"),
        Patch(color=CUT, label="window that is cut"),
        Patch(facecolor="none", edgecolor=CHOSEN, linewidth=2, label=f"window of t = {t}"),
        Line2D([], [], color=BOUNDARY, linewidth=1.4, label="done"),
    ]
    if before or after:
        keys.append(Line2D([], [], color=GOES_ON, marker=">", linestyle="", label="goes on outside the picture"))
    if any(windows.row.boundary(s) and not windows.row.ended(s) for s in shown):
        keys.append(Line2D([], [], color=BOUNDARY, linewidth=1.4, linestyle=":", label="other boundary"))
    if windows.row.valid is not None:
        keys.append(Patch(color=PADDING, label="padding"))
    return keys


def _draw_returns(axes: Axes, windows: Windows, t: int, shown: range) -> list[Any]:
    """Draws rewards as bars and n-step returns as points, and returns the handles of the legend."""
    name, rewards = next(iter(windows.rewards.items()))
    returns = windows.returns[name]
    heights = [rewards[s] if math.isfinite(rewards[s]) else 0 for s in shown]
    bars = axes.bar(shown, heights, width=0.55, color=REWARD, zorder=2, label="reward")
    points = axes.plot(
        shown, [returns[s] for s in shown], "o", color=RETURN, markersize=4, zorder=3, label="n-step return"
    )
    axes.plot([t], [returns[t]], "o", color=CHOSEN, markersize=8, zorder=4)
    infinite = [s for s in shown if not math.isfinite(returns[s])]
    crosses = axes.plot(infinite, [0] * len(infinite), "x", color=BOUNDARY, markersize=6, zorder=5, label="not finite")
    box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    at = t, returns[t] if math.isfinite(returns[t]) else 0
    axes.annotate(f"{returns[t]:.6g}", at, (7, 5), textcoords="offset points", fontsize=8, bbox=box)
    axes.margins(y=0.2)
    axes.axhline(0, color="black", linewidth=0.6, zorder=1)
    axes.set_ylabel(name)
    axes.set_xlabel("frame t of the row")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return [*points, bars, *(crosses if infinite else [])]


def _draw_boundaries(axes: Axes, windows: Windows, shown: range) -> None:
    row = windows.row
    for s in shown:
        if row.valid is not None and not row.valid[s]:
            axes.axvspan(s - 0.5, s + 0.5, color=PADDING, zorder=0, linewidth=0)
        if row.boundary(s):
            axes.axvline(s + 0.5, color=BOUNDARY, linewidth=1.4, linestyle="-" if row.ended(s) else ":", zorder=1)
