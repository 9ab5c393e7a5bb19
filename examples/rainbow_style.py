"""Rainbow's learner on CartPole, of torchrl's own parts, with n-step transitions computed when they are sampled.

Usage: ``python examples/rainbow_style.py --n-steps 1 3 10:3 --out DIR``. C51's distribution of returns, double DQN,
n-step returns and, where torchrl's C++ extension loads, prioritized replay; noisy and dueling networks of M. Hessel et
al., Rainbow (https://arxiv.org/abs/1710.02298), are left out. ``train`` is the part to copy. ``10:3`` anneals n from 10
to 3 during the run: as the buffer computes transitions when it is *sampled*, another n is that of every frame it holds.
Appends the runs that DIR/rainbow_cartpole.csv lacks to it, and draws all that it holds as DIR/rainbow_cartpole.png.
Needs ``pip install "multistep_triton[examples]"``.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from console import Parser, machine
from dqn_cartpole import ENVIRONMENT, EPISODES, interval, make_evaluation
from matplotlib.figure import Figure
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch.nn.functional import one_hot
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, PrioritizedSampler, RandomSampler, TensorSpec
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.envs import GymEnv
from torchrl.modules import MLP, DistributionalQValueActor, EGreedyModule
from torchrl.objectives import DistributionalDQNLoss, SoftUpdate
from tqdm import tqdm

from multistep_triton import NStepReplayBuffer
from multistep_triton.checks import check_positive_int

FRAMES_PER_BATCH, UPDATES_PER_BATCH, BATCH_SIZE = 50, 20, 64
CAPACITY, LEARNING_RATE, TAU, GAMMA = 50_000, 1e-3, 0.05, 0.99
SUPPORT = (0.0, 1 / (1 - GAMMA), 51)
"""The returns of a distribution: the least, the greatest (of a pole that never falls), and how many there are."""
EVALUATIONS, FINAL = 20, 4
"""Evaluations of a run, and how many of the last make up the final return, as one alone is noisy."""
NAME = "rainbow_cartpole"
CPU = torch.device("cpu")
RUN = ["n_steps", "sampling", "seed"]
COLUMNS = [*RUN, "frames", "return"]


def make_sampler(prioritized: str) -> tuple[Sampler, str, str]:
    """The sampler, its name, and why it is that one."""
    if prioritized == "no":
        return RandomSampler(), "uniform", "as asked for"
    try:
        return PrioritizedSampler(CAPACITY, alpha=0.5, beta=0.5), "prioritized", "as torchrl's C++ extension loads"
    except RuntimeError as error:
        # The extension of torchrl 0.14.1 is built for torch 2.14, and loads with no other.
        return RandomSampler(), "uniform", f"as torchrl's PrioritizedSampler raises {type(error).__name__}: {error}"


def make_buffer(sampler: Sampler, n_steps: int, gamma: float = GAMMA) -> NStepReplayBuffer:
    """A buffer that takes 1-step transitions ``[T]`` of one environment and samples n-step ones ``[BATCH_SIZE]``.

    Their done flags are those of the window's end, where a target bootstraps or, if it has terminated, does not; and
    ``steps_to_next_obs`` has the reward's shape, as the loss broadcasts gamma to that power against its support.
    """
    n_step = {"n_steps": n_steps, "gamma": gamma, "match_reward_shape": True}
    return NStepReplayBuffer(**n_step, storage=LazyTensorStorage(CAPACITY), sampler=sampler, batch_size=BATCH_SIZE)


def make_loss(network: torch.nn.Module, support: torch.Tensor, spec: TensorSpec, gamma: float) -> DistributionalDQNLoss:
    """The loss; its ``value_network`` is the greedy policy. ``network`` makes ``[*B, atoms, actions]`` of observations.

    Its target is double DQN's: the target network's distribution of next, for the action that the online network
    prefers there, shrunk by ``gamma ** steps_to_next_obs`` and shifted by the reward. Cross-entropy is the priority.
    """
    actor = DistributionalQValueActor(network, support=support, spec=spec)
    return DistributionalDQNLoss(actor, gamma=gamma, delay_value=True)


def train(n_steps: tuple[int, int], seed: int, sampler: Sampler, *, frames: int) -> Iterator[tuple[int, float]]:
    """One run, n annealed between ``n_steps``; at every evaluation, yields the frames so far and the greedy return."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # torchrl's prioritized sampler draws from numpy's generator
    # Indices of actions: torchrl's one-hot actions have two ones where two values are equal.
    env = GymEnv(ENVIRONMENT, categorical_action_encoding=True)
    env.set_seed(seed)
    support = torch.linspace(*SUPPORT)
    network = MLP(in_features=4, out_features=(len(support), 2), num_cells=[128, 128])
    loss = make_loss(network, support, env.action_spec, GAMMA)
    target = SoftUpdate(loss, tau=TAU)
    optimizer = torch.optim.Adam(loss.parameters(), lr=LEARNING_RATE)
    buffer = make_buffer(sampler, n_steps[0])
    explore = EGreedyModule(env.action_spec, eps_init=1.0, eps_end=0.05, annealing_num_steps=max(frames // 5, 1))
    collector = Collector(
        env,
        TensorDictSequential(loss.value_network, explore),
        frames_per_batch=FRAMES_PER_BATCH,
        total_frames=frames,
        auto_register_policy_transforms=False,  # the policy needs none
    )
    # Its argument makes a number of each action, the greatest of which it takes.
    evaluate = make_evaluation(lambda x: one_hot(loss.value_network(TensorDict(observation=x))["action"]), seed, CPU)
    batches = frames // FRAMES_PER_BATCH
    for number, batch in enumerate(collector, 1):
        explore.step(batch.numel())
        # The loss computes distributions anew; stored, they would be most of a frame's bytes.
        buffer.extend(batch.exclude("action_value"))
        buffer.n_steps = round(n_steps[0] * (n_steps[1] / n_steps[0]) ** (number / batches))
        for _ in range(UPDATES_PER_BATCH if len(buffer) >= BATCH_SIZE else 0):
            transitions = buffer.sample()
            loss(transitions)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            target.step()
            buffer.update_tensordict_priority(transitions)  # does nothing with a uniform sampler
        if number * EVALUATIONS % batches < EVALUATIONS:  # the last batch is one of so many
            yield number * FRAMES_PER_BATCH, evaluate()
    collector.shutdown()


def steps_of(text: str) -> tuple[int, int]:
    """The first n and the last, of ``"10:3"`` or, if they are one, ``"3"``."""
    first, _, last = text.partition(":")
    return check_positive_int("n_steps", int(first)), check_positive_int("n_steps", int(last or first))


def read(path: Path) -> pd.DataFrame:
    """The rows of a file, or none where there is no file."""
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS)
    rows = pd.read_csv(path, comment="#", dtype={"n_steps": str})
    if list(rows) != COLUMNS or rows.empty or rows.pivot(index="frames", columns=RUN).isna().any(axis=None):
        raise ValueError(f"{path} must hold {', '.join(COLUMNS)} of whole runs, each once")
    return rows


def curves_of(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """By arm, the returns: a row per seed, a column per evaluation."""
    for (n, sampling), curve in rows.pivot(index=RUN, columns="frames", values="return").groupby(level=RUN[:2]):
        yield f"n = {n.replace(':', ' to ')}, {sampling} sampling, seeds: {len(curve)}", curve


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Learning curves: the mean over seeds, and its interval where there are several."""
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for label, curve in curves_of(rows):
        (line,) = axes.plot(curve.columns, curve.mean(), label=label, linewidth=1.6)
        axes.fill_between(curve.columns, *interval(curve.to_numpy()), color=line.get_color(), alpha=0.15, linewidth=0)
    updates = f"{UPDATES_PER_BATCH / FRAMES_PER_BATCH:.1f} updates of {BATCH_SIZE} transitions per frame"
    axes.set(xlabel=f"frames of one environment ({updates})", xlim=(0, rows["frames"].max()))
    axes.set(ylabel=f"return of the greedy policy, {EPISODES} episodes", ylim=(0, 510))
    axes.set_title(f"C51 on {ENVIRONMENT}: mean over seeds; band: its 95% bootstrap interval", fontsize=10, loc="left")
    axes.grid(color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options; with wrong ones, it exits with 2 and a line that says why."""
    parser = Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[*range(5)], metavar="SEED", help="of the runs of each n"
    )
    parser.add_argument("--frames", type=int, default=20_000, help=f"of each run, a multiple of {FRAMES_PER_BATCH}")
    parser.add_argument("--n-steps", nargs="+", default=["1", "3"], metavar="N", help="n, or FIRST:LAST to anneal it")
    parser.add_argument("--prioritized", choices=["auto", "no"], default="auto", help="auto: where torchrl can")
    parser.add_argument("--out", type=Path, default=Path(".benchmarks"), metavar="DIR", help="where the files go")
    options = parser.parse_args(arguments)
    try:
        if not all(0 <= seed < 1 << 32 for seed in options.seeds):
            raise ValueError(f"seeds must be ints in [0, 2**32), got {options.seeds}")
        if check_positive_int("frames", options.frames) % FRAMES_PER_BATCH:
            raise ValueError(f"frames must be a multiple of {FRAMES_PER_BATCH}, got {options.frames}")
        options.n_steps = {text: steps_of(text) for text in options.n_steps}
        options.known = read(options.out / f"{NAME}.csv")
        if not options.known.empty and options.known["frames"].max() != options.frames:
            raise ValueError(f"frames must be those of the runs that {options.out} holds, got {options.frames}")
        options.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> None:
    """Runs what the file lacks, one run after the other on one thread; draws and sums up what it holds then."""
    options = parse(arguments)
    torch.set_num_threads(1)
    logging.getLogger("torchrl").setLevel(logging.WARNING)  # it logs what each storage allocates
    _, sampling, why = make_sampler(options.prioritized)
    print(f"sampling: {sampling}, {why}")
    path, known = options.out / f"{NAME}.csv", set(options.known[RUN].itertuples(index=False, name=None))
    runs = [(n, sampling, seed) for seed in dict.fromkeys(options.seeds) for n in options.n_steps]
    for n, _, seed in tqdm([run for run in runs if run not in known], unit="run", disable=None):
        about, start = machine(CPU), time.process_time()
        found = train(options.n_steps[n], seed, make_sampler(options.prioritized)[0], frames=options.frames)
        rows = pd.DataFrame(found, columns=["frames", "return"]).assign(n_steps=n, sampling=sampling, seed=seed)
        about.append(f"n = {n}, seed {seed}: {time.process_time() - start:.0f} s of CPU time")
        text = "".join(f"# {line}\n" for line in about) + rows[COLUMNS].to_csv(index=False, header=not path.exists())
        with path.open("a") as file:
            file.write(text)
    draw(rows := read(path), path.with_suffix(".png"))
    for label, curve in curves_of(rows):
        final = curve.iloc[:, -FINAL:].mean(axis=1).to_numpy()
        print(f"{label}: final return {final.mean():.0f} {interval(final).round()}")


if __name__ == "__main__":
    main()
