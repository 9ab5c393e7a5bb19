"""The picture of a row's windows. May import ``explain`` and matplotlib."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from multistep_triton.explain import Windows

# Frames in a picture at most; lanes that there is room to label.
FRAMES, LABELLED = 64, 24
FULL, CUT, REWARD, PADDING, BOUNDARY, CHOSEN = "#9ecae1", "#fdae6b", "#c7c7c7", "#e0e0e0", "#d62728", "#08306b"


def draw_windows(windows: Windows, t: int, title: str) -> Figure:
    """The windows of the row around frame ``t``, and below them the rewards and the returns."""
    row, count = windows.row, len(windows.steps)
    first = max(0, min(t - FRAMES // 2, count - FRAMES))
    shown = range(first, min(first + FRAMES, count))
    # Windows that begin as many frames apart as they are long at most do not overlap: one lane for each remainder.
    lanes = max(windows.steps)
    figure = Figure(figsize=(4.5 + 0.17 * len(shown), 3.0 + 0.2 * min(lanes, LABELLED)), layout="constrained")
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
        if begin in shown and lanes <= LABELLED:
            above.text(begin, lane, str(begin), ha="center", va="center", fontsize=6, zorder=4)
    above.set_ylim(lanes - 0.4, -0.6)
    above.set_yticks([])
    above.set_ylabel("windows")

    name, rewards = next(iter(windows.rewards.items()))
    returns = windows.returns[name]
    below.bar(shown, rewards[shown.start : shown.stop], width=0.55, color=REWARD, zorder=2)
    below.plot(shown, returns[shown.start : shown.stop], "o", color="#3182bd", markersize=4, zorder=3)
    below.plot([t], [returns[t]], "o", color=CHOSEN, markersize=8, zorder=4)
    box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    below.annotate(f"{returns[t]:.6g}", (t, returns[t]), (7, 5), textcoords="offset points", fontsize=8, bbox=box)
    below.axhline(0, color="black", linewidth=0.6, zorder=1)
    below.set_ylabel(name)
    below.set_xlabel("t, in frames")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))

    for axes in (above, below):
        axes.axvspan(t - 0.5, windows.end(t) + 0.5, color=CHOSEN, alpha=0.1, zorder=0, linewidth=0)
        for s in shown:
            if row.valid is not None and not row.valid[s]:
                axes.axvspan(s - 0.5, s + 0.5, color=PADDING, zorder=0, linewidth=0)
            if row.boundary(s):
                axes.axvline(s + 0.5, color=BOUNDARY, linewidth=1.4, linestyle="-" if row.done[s] else ":", zorder=1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(shown.start - 0.6, shown.stop - 0.4)

    others = any(row.boundary(s) and not row.done[s] for s in shown)
    keys = [
        Patch(color=FULL, label=f"full window, {windows.n_steps} frames"),
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
    ]
    below.legend(handles=values, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    return figure
