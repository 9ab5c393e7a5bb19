"""Draws what an n-step window is, as ``MultiStepTransform`` returns it: ``python docs/pictures/window.py``.

Writes ``window.png`` beside this file: a stream in two calls, the window of every frame, and which call emits it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tensordict import TensorDict

from multistep_triton import MultiStepTransform

N_STEPS, GAMMA, CALLS, DONE = 3, 0.9, (6, 4), 2
"""Frames of each call, and the frame that is done."""
EMITTED, HELD, UNKNOWN, BOUNDARY = "#9ecae1", "#fdae6b", "#e0e0e0", "#d62728"


def emitted() -> tuple[list[TensorDict], TensorDict]:
    """What each call of the transform returns, and what it still holds back after the last."""
    count = sum(CALLS)
    frame = torch.arange(count)
    done = (frame == DONE).unsqueeze(-1)
    after = {"reward": torch.ones(count, 1), "frame": frame, "done": done, "terminated": done}
    transform = MultiStepTransform(N_STEPS, GAMMA)
    stream = TensorDict({"frame": frame, "next": after}, [count])
    return [transform.inv(call) for call in stream.split(list(CALLS))], transform.flush()


def draw() -> Figure:
    """A row for every frame: its window as a bar of the frames that it sums, on the stream at the top."""
    calls, held = emitted()
    count = sum(CALLS)
    figure = Figure(figsize=(8, 5.2), facecolor="white", layout="constrained")
    axes = figure.subplots()
    for t in range(count):
        _cell(axes, t, -1.3, f"{t}", "white")
    for number, (call, first) in enumerate(zip(calls, (0, CALLS[0]), strict=True), 1):
        for t, end in zip(call["frame"].tolist(), call["next", "frame"].tolist(), strict=True):
            for s in range(t, end + 1):
                factor = ("", r"\gamma\,", r"\gamma^2 ")[s - t]
                _cell(axes, s, t, f"${factor}r_{s}$", EMITTED if t >= first else HELD)
        _note(axes, [t for t in call["frame"].tolist() if t >= first], f"emitted by call {number}")
        axes.text(first + (CALLS[number - 1] - 1) / 2, -2.15, f"call {number}", ha="center", fontsize=12, weight="bold")
    _note(axes, [t for t in calls[1]["frame"].tolist() if t < CALLS[0]], "held back by call 1,\nemitted by call 2")
    for t in held["frame"].tolist():
        _cell(axes, t, t, "?", UNKNOWN)
    _note(axes, held["frame"].tolist(), "held back until\nmore is known")
    bottom = count - 0.4
    axes.plot([DONE + 0.5] * 2, [-1.8, bottom], color=BOUNDARY, linewidth=2.5, zorder=4)
    axes.text(DONE + 0.6, bottom, f"frame {DONE} is done", color=BOUNDARY, fontsize=11, va="bottom")
    axes.plot([CALLS[0] - 0.5] * 2, [-2.6, bottom], color="#333333", linewidth=1.5, linestyle="--", zorder=0)
    axes.set(xlim=(-0.6, count + 2.6), ylim=(bottom, -2.7), yticks=range(count), xticks=[])
    axes.set_yticklabels([f"return of {t}" for t in range(count)], fontsize=11)
    axes.text(-0.72, -1.3, "frames", ha="right", va="center", fontsize=11)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"Which rewards the {N_STEPS}-step return of a frame sums, and when it is emitted", fontsize=12)
    return figure


def _cell(axes: Axes, s: int, y: float, text: str, color: str) -> None:
    axes.barh(y, 0.94, left=s - 0.47, height=0.74, color=color, edgecolor="#555555", linewidth=0.6, zorder=2)
    axes.text(s, y, text, ha="center", va="center", fontsize=11, zorder=3)


def _note(axes: Axes, frames: list[int], text: str) -> None:
    """Says what the windows of adjacent frames have in common, beside them."""
    end = sum(CALLS) - 0.2
    axes.plot([end, end], [frames[0] - 0.35, frames[-1] + 0.35], color="#333333", linewidth=1.5)
    axes.text(end + 0.15, sum(frames) / len(frames), text, va="center", fontsize=11)


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_suffix(".png"), dpi=200)
