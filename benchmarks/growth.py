"""How the transform's time grows with frames, episodes per row, n and keys: torchrl's beside this package's.

Usage: ``python -m benchmarks.growth --out DIR``. A slope is the exponent of a power law, fitted to the logarithms by
least squares over the range that is named with it: 1 is proportional, 0 is no growth.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from tensordict import TensorDict
from tqdm import tqdm

from benchmarks.cases import Case, make_rollout
from benchmarks.contenders import CONTENDERS, REFERENCE, TORCHRL, TRITON
from benchmarks.gate import check
from benchmarks.machine import about, sentence
from benchmarks.measure import command, in_turns, set_up
from benchmarks.plots import STYLE, legend_below, lines, machine_of, plain_log
from benchmarks.report import table

FIT_FROM = {"frames": 1 << 14, "episodes per row": 4, "n": 8, "keys": 16}
"""Where a fit begins: below, the cost of a call hides what grows."""

SETTINGS = {
    "frames": "frames, 128 of each env, 2 episodes per row, n = 3",
    "episodes per row": "episodes per row of 256, 256 envs, n = 3",
    "n": "n, 256 envs x 256 frames, p(done) = 0.01",
    "keys": "keys of one float32, 64 envs x 64 frames, n = 3",
}
"""What pictures say of ``points``."""


class Point(NamedTuple):
    sweep: str
    value: int
    case: Case
    rollout: TensorDict


def with_episodes(rollout: TensorDict, episodes: int) -> TensorDict:
    """As many dones per row, evenly spaced."""
    done = torch.zeros_like(rollout["next", "done"])
    frames = done.shape[1]
    if episodes:
        done[:, frames // episodes - 1 :: frames // episodes] = True
    for flag in ("done", "terminated"):
        rollout["next", flag] = done.clone()
    return rollout


def with_keys(rollout: TensorDict, keys: int) -> TensorDict:
    """As many entries of an observation, of one float32 each, here and in the next frame."""
    for data in (rollout, rollout["next"]):
        for key in range(keys - 1):
            data[f"observation {key}"] = data["observation"].clone()
    return rollout


def points(device: torch.device) -> Iterator[Point]:
    for envs in (16, 32, 64, 128, 256, 512, 1024, 2048):
        case = Case("state", envs, 128, 0.0)
        yield Point("frames", envs * 128, case, with_episodes(make_rollout(case, device), 2))
    case = Case("state", 256, 256, 0.0)
    for episodes in (1, 2, 4, 8, 16, 32, 64):
        yield Point("episodes per row", episodes, case, with_episodes(make_rollout(case, device), episodes))
    for n_steps in (1, 2, 4, 8, 16, 32, 64, 128):
        case = Case("state", 256, 256, 0.01, n_steps)
        yield Point("n", n_steps, case, make_rollout(case, device))
    case = Case("state", 64, 64, 0.01, width=1)
    for keys in (1, 4, 16, 32, 64, 128, 256):
        yield Point("keys", keys, case, with_keys(make_rollout(case, device), keys))


def measure(point: Point, seconds: float) -> list[dict[str, object]]:
    """One row per contender that runs here."""
    device = point.rollout.device
    subjects = {}
    for contender in CONTENDERS:
        if contender.name in (TORCHRL, REFERENCE, TRITON) and not contender.obstacle(point.case, device):
            subject = contender.make(point.case, "transform", device)
            errors = check(point.case, point.rollout, subject)
            assert errors.keys() <= set(contender.known_errors(point.case)), (contender.name, point.case, errors)
            subjects[contender.name] = subject
    times = in_turns({name: partial(subject.call, point.rollout) for name, subject in subjects.items()}, seconds)
    return [
        {
            "sweep": point.sweep,
            "value": point.value,
            "contender": name,
            "median_ms": time.median * 1e3,
            "iqr_ms": time.iqr * 1e3,
        }
        for name, time in times.items()
    ]


def slopes(rows: pd.DataFrame) -> pd.DataFrame:
    """The exponent of every sweep and contender, and the range over which it is fitted."""
    found = []
    for (sweep, contender), group in rows.groupby(["sweep", "contender"], sort=False):
        fitted = group[group["value"] >= FIT_FROM[sweep]]
        slope, _ = np.polyfit(np.log(fitted["value"]), np.log(fitted["median_ms"]), 1)
        span = f"{fitted['value'].min()} to {fitted['value'].max()}"
        found.append({"time against": sweep, "contender": contender, "fitted over": span, "exponent": f"{slope:.2f}"})
    return pd.DataFrame(found)


def draw(rows: pd.DataFrame, path: Path) -> None:
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(2, 2, figsize=(8, 6))
        for axes, (sweep, group) in zip(panels.flat, rows.groupby("sweep", sort=False), strict=True):
            lines(axes, group, "value", "median_ms")
            axes.set(xlabel=SETTINGS[sweep], ylabel="ms per call")
            plain_log(axes, "xy")
        figure.suptitle(f"The transform ({machine_of(rows)})")
        figure.tight_layout()
        legend_below(figure, *panels[0][0].get_legend_handles_labels())
        figure.savefig(path, dpi=150, bbox_inches="tight")


def main(arguments: list[str] | None = None) -> None:
    options = command(__doc__, seconds=0.5).parse_args(arguments)
    set_up()
    device = torch.device(options.device)
    machine = about(device)
    measured = [row for point in tqdm(list(points(device))) for row in measure(point, options.seconds)]
    rows = pd.DataFrame(measured).assign(**machine)
    options.out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(options.out / f"{device.type}-growth.csv", index=False, float_format="%.6g")
    draw(rows, options.out / f"{device.type}-growth.png")
    text = f"{sentence(rows.iloc[0].to_dict())}\n\n{table(slopes(rows))}\n"
    (options.out / f"{device.type}-growth.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
