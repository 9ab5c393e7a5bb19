"""The picture of a row's windows. May import ``explain`` and matplotlib."""

from __future__ import annotations

import math

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from multistep_triton.debug.explain import Windows

# Frames in a picture, more if the window needs them; lanes that there is room to label.
FRAMES, LABELLED = 64, 24
FULL, CUT, REWARD, PADDING, BOUNDARY, CHOSEN = "#9ecae1", "#fdae6b", "#c7c7c7", "#e0e0e0", "#d62728", "#08306b"


@rc_context({"text.parse_math": False})
def draw_windows(windows: Windows, t: int, title: str) -> Figure:
    """The windows of the row around frame ``t``, and below them its first reward and the returns of that.

    Raises:
        ValueError: there is no reward.
    """
    if not windows.rewards:
        raise ValueError("the row must have a reward to be drawn, got none")
    row, count = windows.row, len(windows.steps)
    width = max(FRAMES, windows.steps[t] + FRAMES // 4)
    first = max(0, min(t - (width - windows.steps[t]) // 2, count - width))
    shown = range(first, min(first + width, count))
    # Windows that begin as many frames apart as they are long at most do not overlap: one lane for each remainder.
    lanes = max(windows.steps[max(0, first - windows.n_steps + 1) : shown.stop])
    inches = min(4.5 + 0.17 * len(shown), 24), 3.0 + 0.2 * min(lanes, LABELLED)
    figure = Figure(figsize=inches, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1 + 0.14 * min(lanes, LABELLED), 1))
    above.set_title(title, loc="left", fontsize=10)

    for begin in range(max(0, first - lanes + 1), shown.stop):
        lane, length = begin % lanes, windows.steps[begin]
        above.barh(
            lane,
            length - 0.2,
            left=begin - 0.4,
            height=0.66,
            color=FULL if length == windows.n_steps else CUT,
            edgecolor=CHOSEN if begin == t else "none",
            linewidth=2,
            zorder=3 if begin == t else 2,
        )
        if begin in shown and lanes <= LABELLED and len(shown) <= 2 * FRAMES:
            above.text(begin, lane, str(begin), ha="center", va="center", fontsize=6, zorder=4)
    above.set_ylim(lanes - 0.4, -0.6)
    above.set_yticks([])
    above.set_ylabel("windows")

    name, rewards = next(iter(windows.rewards.items()))
    returns = windows.returns[name]
    heights = [reward if math.isfinite(reward) else 0 for reward in rewards[shown.start : shown.stop]]
    below.bar(shown, heights, width=0.55, color=REWARD, zorder=2)
    below.plot(shown, returns[shown.start : shown.stop], "o", color="#3182bd", markersize=4, zorder=3)
    below.plot([t], [returns[t]], "o", color=CHOSEN, markersize=8, zorder=4)
    infinite = [s for s in shown if not math.isfinite(returns[s])]
    below.plot(infinite, [0] * len(infinite), "x", color=BOUNDARY, markersize=6, zorder=5)
    box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    at = t, returns[t] if math.isfinite(returns[t]) else 0
    below.annotate(f"{returns[t]:.6g}", at, (7, 5), textcoords="offset points", fontsize=8, bbox=box)
    below.margins(y=0.2)
    below.axhline(0, color="black", linewidth=0.6, zorder=1)
    below.set_ylabel(name)
    below.set_xlabel("t, in frames")
    below.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))

    for axes in (above, below):
        axes.axvspan(t - 0.5, windows.end(t) + 0.5, color=CHOSEN, alpha=0.1, zorder=0, linewidth=0)
        for s in shown:
            if row.valid is not None and not row.valid[s]:
                axes.axvspan(s - 0.5, s + 0.5, color=PADDING, zorder=0, linewidth=0)
            if row.boundary(s):
                axes.axvline(s + 0.5, color=BOUNDARY, linewidth=1.4, linestyle="-" if row.ended(s) else ":", zorder=1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(shown.start - 0.6, shown.stop - 0.4)

    others = any(row.boundary(s) and not row.ended(s) for s in shown)
    keys = [
        Patch(color=FULL, label=f"full window, n_steps = {windows.n_steps}"),
        Patch(color=CUT, label="window that is cut"),
        Patch(facecolor="none", edgecolor=CHOSEN, linewidth=2, label=f"window of t = {t}"),
        Line2D([], [], color=BOUNDARY, linewidth=1.4, label="done"),
        *([Line2D([], [], color=BOUNDARY, linewidth=1.4, linestyle=":", label="other boundary")] if others else []),
        *([] if row.valid is None else [Patch(color=PADDING, label="padding")]),
    ]
    above.legend(handles=keys, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    values = [
        Line2D([], [], color="#3182bd", marker="o", linestyle="", markersize=4, label="n-step return"),
        Patch(color=REWARD, label="reward"),
        *([Line2D([], [], color=BOUNDARY, marker="x", linestyle="", label="not finite")] if infinite else []),
    ]
    below.legend(handles=values, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    return figure
