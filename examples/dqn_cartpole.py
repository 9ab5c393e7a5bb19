"""DQN on CartPole with n-step transitions, and what their targets need to be right.

Trains three arms with the same seeds: n=1; n=3 with ``done_at="start"``, torchrl's rule, with which the last n - 1
targets before a termination bootstrap from where the episode ended; and n=3 with ``done_at="end"``. ``train`` is the
part to copy. Writes returns of the greedy policy to DIR/dqn_cartpole.csv and draws them as DIR/dqn_cartpole.png.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gymnasium
import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
import torch
from console import Parser, machine
from matplotlib import pyplot as plt
from matplotlib import ticker
from tensordict.nn import TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv
from torchrl.modules import MLP, EGreedyModule, QValueActor
from torchrl.objectives import DQNLoss, SoftUpdate
from tqdm import tqdm

from multistep_triton import MultiStepTransform
from multistep_triton.backends import BACKENDS, resolve_backend
from multistep_triton.checks import check_gamma, check_positive_int

ENVIRONMENT = "CartPole-v1"
FRAMES_PER_BATCH, UPDATES_PER_BATCH, BATCH_SIZE = 50, 20, 64
EVALUATIONS, EPISODES, FINAL = 20, 10, 4
"""Evaluations of a run, episodes of each, and how many of the last make up the final return, as one alone is noisy."""
RESAMPLES = 10_000
"""Of the seeds, with replacement: the interval of a mean holds 95% of their means."""
COLUMNS = ["arm", "n_steps", "done_at", "seed", "frames", "return"]
COLORS = ["#4d4d4d", "#2a6f97", "#b5484a"]


def train(
    n_steps: int, done_at: str, seed: int, *, frames: int, gamma: float, backend: str, device: torch.device
) -> Iterator[tuple[int, float]]:
    """One run; yields, at every evaluation, the frames collected so far and the mean return of the greedy policy."""
    torch.manual_seed(seed)
    env = GymEnv(ENVIRONMENT, categorical_action_encoding=True, device=device)
    env.set_seed(seed)
    network = MLP(in_features=4, out_features=2, num_cells=[128, 128], device=device)
    actor = QValueActor(network, in_keys=["observation"], spec=env.action_spec)
    explore = EGreedyModule(env.action_spec, eps_init=1.0, eps_end=0.05, annealing_num_steps=max(frames // 5, 1))
    # Batches [T] of one environment, each of which goes on where the one before ended: the windows of the last n frames
    # of a batch are completed from the next. Several environments, [B, T], take a storage of ndim=2.
    collector = Collector(
        env,
        TensorDictSequential(actor, explore),
        frames_per_batch=FRAMES_PER_BATCH,
        total_frames=frames,
        auto_register_policy_transforms=False,  # the policy needs none
    )
    buffer = make_buffer(n_steps, done_at, gamma, backend, device)
    loss = make_loss(actor, gamma)
    target = SoftUpdate(loss, tau=0.05)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    evaluate = make_evaluation(network, seed, device)
    batches_per_evaluation = max(frames // FRAMES_PER_BATCH // EVALUATIONS, 1)
    for number, batch in enumerate(collector, 1):
        explore.step(batch.numel())
        buffer.extend(batch)
        if len(buffer) >= BATCH_SIZE:
            for _ in range(UPDATES_PER_BATCH):
                loss(buffer.sample())["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
                target.step()
        if number % batches_per_evaluation == 0:
            yield number * FRAMES_PER_BATCH, evaluate()
    # n frames are still held back. Nothing samples them any more; a buffer that is to be kept as a data set would get
    # them by buffer.transform[0].flush_into(buffer).
    collector.shutdown()


def make_buffer(n_steps: int, done_at: str, gamma: float, backend: str, device: torch.device) -> TensorDictReplayBuffer:
    return TensorDictReplayBuffer(
        storage=LazyTensorStorage(50_000, device=device),
        transform=MultiStepTransform(n_steps, gamma, done_at=done_at, backend=backend),
        batch_size=BATCH_SIZE,
    )


def make_loss(actor: QValueActor, gamma: float) -> DQNLoss:
    """A loss whose target is ``reward + gamma ** steps_to_next_obs * (1 - terminated) * value of next``.

    Reward, next, terminated and ``steps_to_next_obs`` are those of the n-step transition; gamma is that of one step.
    """
    loss = DQNLoss(actor, loss_function="smooth_l1", delay_value=True, double_dqn=True)
    # Without this the estimator takes 0.99, whatever gamma the transform summed rewards with.
    loss.make_value_estimator(gamma=gamma)
    return loss


def make_evaluation(
    network: Callable[[torch.Tensor], torch.Tensor], seed: int, device: torch.device
) -> Callable[[], float]:
    """The mean return of the greedy policy, over episodes of gymnasium's vectorized environment, which is quicker."""
    envs = gymnasium.make_vec(ENVIRONMENT, EPISODES, vectorization_mode="vector_entry_point")
    envs.reset(seed=10_000 + seed)

    @torch.no_grad()
    def evaluate() -> float:
        observation, _ = envs.reset()
        returns, running = np.zeros(EPISODES), np.ones(EPISODES, dtype=bool)
        while running.any():
            values = network(torch.as_tensor(observation, device=device))
            observation, reward, terminated, truncated, _ = envs.step(values.argmax(-1).cpu().numpy())
            returns += reward * running
            running &= ~(terminated | truncated)
        return float(returns.mean())

    return evaluate


def run(arm: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one run, in a process of its own."""
    torch.set_num_threads(1)
    logging.getLogger("torchrl").setLevel(logging.WARNING)  # it logs to stdout what each storage allocates
    evaluations = train(arm["n_steps"], arm["done_at"], arm["seed"], **settings)
    return [{**arm, "frames": frames, "return": value} for frames, value in evaluations]


def run_all(seeds: int, n_steps: int, jobs: int, settings: dict[str, Any]) -> pd.DataFrame:
    arms = [("n=1", 1, "end"), *((f"n={n_steps}, done_at={at}", n_steps, at) for at in ("start", "end"))]
    # Seed by seed, so that what drifts on a machine hits all arms alike.
    runs = [dict(zip(COLUMNS, (*arm, seed), strict=False)) for seed in range(seeds) for arm in arms]
    rows: list[dict[str, Any]] = []
    latest: dict[str, str] = {}
    with get_context("spawn").Pool(jobs) as pool:
        found_by_run = pool.imap_unordered(partial(run, settings=settings), runs)
        for found in (bar := tqdm(found_by_run, total=len(runs), unit="run", disable=None)):
            rows += found
            latest[found[-1]["arm"]] = f"{found[-1]['return']:.0f}"
            bar.set_postfix(latest)
        # To end by themselves: leaving the block would stop workers that have semaphores to clear away.
        pool.close()
        pool.join()
    return pd.DataFrame(rows).sort_values(["n_steps", "done_at", "seed", "frames"])


def read(path: Path) -> pd.DataFrame:
    rule = f"redraw must be a CSV with rows of {', '.join(COLUMNS)}"
    try:
        rows = pd.read_csv(path, comment="#", dtype={"seed": int, "frames": int, "return": float})
    except ValueError as error:
        raise ValueError(f"{rule}, got {path}: {error}") from error
    if rows.empty or not set(COLUMNS) <= set(rows) or rows.duplicated(["arm", "seed", "frames"]).any():
        raise ValueError(f"{rule}, each once, got {path}")
    whole = rows.pivot(index=["seed", "frames"], columns="arm", values="return")
    if len(whole.columns) > len(COLORS) or whole.isna().any(axis=None):
        raise ValueError(f"redraw must have at most {len(COLORS)} arms, with the same seeds and frames, got {path}")
    return rows


def curves_of(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By arm, the returns: a row per seed, a column per evaluation."""
    return {arm: group.pivot(index="seed", columns="frames", values="return") for arm, group in rows.groupby("arm")}


def interval(values: np.ndarray) -> np.ndarray:
    """The bootstrapped 95% interval of the mean over seeds ``[S, ...]``: ``[2, ...]``, within the values' range."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    return np.percentile(values[drawn].mean(1), [2.5, 97.5], axis=0)


def with_interval(values: pd.Series) -> str:
    mean, (low, high) = values.mean(), interval(values.to_numpy())
    return f"{round(mean)} [{round(low)}, {round(high)}]" if len(values) > 1 else f"{round(mean)} (one seed)"


MEASURES: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "final return": lambda curves: curves.iloc[:, -FINAL:].mean(axis=1),
    "area under the curve": lambda curves: curves.mean(axis=1),
}
"""Of every seed; the area is divided by the frames, which is the mean over the evaluations."""


def summary(rows: pd.DataFrame) -> str:
    """A table of the arms, and whether the seeds tell the two of the same n apart."""
    curves = curves_of(rows)
    found = {name: {arm: of(each) for arm, each in curves.items()} for name, of in MEASURES.items()}
    table = pd.DataFrame(found).map(with_interval)
    lines = [
        table.to_string(),
        f"(mean over seeds [bootstrapped 95% interval]; final: the mean of the last {FINAL} evaluations)",
    ]
    start, end = (next((arm for arm in curves if arm.endswith(at)), None) for at in ("start", "end"))
    for name, by_arm in found.items() if start and end else ():
        difference = by_arm[end] - by_arm[start]
        low, high = interval(difference.to_numpy())
        separate = "separate" if len(difference) > 1 and (low > 0 or high < 0) else "do not separate"
        lines.append(f"{name}, {end} minus {start}, paired by seed: {with_interval(difference)}: seeds {separate} them")
    return "\n".join(lines)


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Learning curves: mean over seeds and its interval, a panel for each arm with the others' means behind."""
    curves = curves_of(rows)
    figure, panels = plt.subplots(1, len(curves), figsize=(9, 3.6), sharey=True, squeeze=False, layout="constrained")
    for axes, arm, color in zip(panels.flat, curves, COLORS, strict=False):
        for other in curves:
            axes.plot(curves[other].mean(), color="#c4c4c4", linewidth=1)
        low, high = interval(curves[arm].to_numpy())
        axes.fill_between(curves[arm].columns, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(curves[arm].mean(), color=color, linewidth=2)
        axes.set_title(arm, color=color, fontsize=11, loc="left")
        axes.set(ylim=(0, 510), xlim=(0, None), xlabel=f"frames of {ENVIRONMENT}")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
        axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        axes.grid(color="#e5e5e5")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel(f"greedy return, mean of {EPISODES} episodes\n(500 is the maximum)")
    seeds = f"mean of {rows['seed'].nunique()} seeds; band: its bootstrapped 95% interval; grey: the other means"
    figure.suptitle(f"DQN: {seeds}", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="runs of each arm")
    parser.add_argument("--frames", type=int, default=20_000, help=f"of each run, a multiple of {FRAMES_PER_BATCH}")
    parser.add_argument("--n-steps", type=int, default=3, help="n of two of the arms")
    parser.add_argument("--gamma", type=float, default=0.99, help="discount per step")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of the transform")
    parser.add_argument("--device", default="cpu", help="of the networks and the buffer")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--out", type=Path, default=Path(".benchmarks"), metavar="DIR", help="where the files go")
    parser.add_argument("--redraw", type=Path, metavar="CSV", help="train nothing; draw and sum up these rows")
    options = parser.parse_args(arguments)
    try:
        for name in ("seeds", "frames", "n_steps", "jobs"):
            check_positive_int(name, getattr(options, name))
        check_gamma(options.gamma)
        if options.frames % FRAMES_PER_BATCH:
            raise ValueError(f"frames must be a multiple of {FRAMES_PER_BATCH}, got {options.frames}")
        if not 2 <= options.n_steps < options.frames:
            raise ValueError(f"n_steps must be at least 2 and less than the frames, got {options.n_steps}")
        options.device = torch.device(options.device)
        resolve_backend(options.backend, [torch.ones(1, device=options.device).cpu().to(options.device)])
        options.rows = read(options.redraw) if options.redraw else None
        options.out.mkdir(parents=True, exist_ok=True)
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:  # the first: torch without CUDA
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    rows = options.rows
    if rows is None:
        settings = {name: getattr(options, name) for name in ("frames", "gamma", "backend", "device")}
        about, start = machine(options.device), time.perf_counter()
        rows = run_all(options.seeds, options.n_steps, options.jobs, settings)
        about += [
            f"{ENVIRONMENT}, gamma {options.gamma}, {EPISODES} episodes in each evaluation, device {options.device}, "
            f"backend {options.backend}",
            f"wall time {time.perf_counter() - start:.0f} s, {options.jobs} jobs of one thread",
        ]
        lines = "".join(f"# {line}\n" for line in about)
        (options.out / "dqn_cartpole.csv").write_text(lines + rows.to_csv(index=False))
    draw(rows, options.out / "dqn_cartpole.png")
    print(f"{summary(rows)}\nwritten to {options.out}")


if __name__ == "__main__":
    main()
