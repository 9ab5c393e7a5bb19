"""TD3 with a thousand environments, one frame of each per step, and n-step returns: training in the style of FastTD3.

Usage: ``python examples/td3_gpu_style.py --buffer both --out DIR``; with ``--graph``, on a GPU, what the buffer does in
a step is captured in a CUDA graph once, and repeated. Environments, networks and the replay buffer lie on
one device. After Y. Seo et al., FastTD3 (https://arxiv.org/abs/2505.22642): many environments, large batches, a noise
of its own for each environment; the critic is torchrl's, of scalars, not FastTD3's of distributions. Put your own
vectorized environment where ``PendulumEnv`` is made. Needs ``pip install "multistep_triton[examples]"``.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from console import Parser, machine
from pendulum import MAX_STEPS, MAX_TORQUE, PendulumEnv
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.modules import MLP, TanhModule, ValueOperator
from torchrl.objectives import SoftUpdate, TD3Loss
from tqdm import tqdm

from multistep_triton import MultiStepTransform, NStepReplayBuffer, n_step_return

BUFFERS = ("sample", "extend")
PARTS = ("extend", "sample", "environment", "act", "update")
RESULT = "td3_gpu_style.csv"
CAPACITY = 512
"""Frames of each environment that a buffer holds."""
NOISE = (0.001, 0.4)
"""Between which standard deviations every environment has its own, as a share of the largest torque."""
POLICY_DELAY, TAU, LEARNING_RATE, CELLS = 2, 0.05, 2e-3, [64, 64]
COLLECTED = 10
"""Steps before the first update, besides the n that the transform holds back."""
WARM_UP = 10
"""Steps with updates before anything is timed: memory is allocated then, and kernels are compiled."""
STORED = ("observation", "action", *(("next", k) for k in ("observation", "reward", "done", "terminated", "truncated")))


def make_buffer(when: str, options: argparse.Namespace) -> ReplayBuffer:
    """A buffer of n-step transitions, computed when they are sampled or when the buffer is extended.

    It takes 1-step transitions ``[envs, T]`` and samples n-step ones ``[batch_size]``. The done flags of a sample are
    those of the window's end, which is where its target bootstraps.
    """
    storage = LazyTensorStorage(CAPACITY * options.envs, ndim=2, device=options.device)
    n_step = {"n_steps": options.n_steps, "gamma": options.gamma, "done_at": "end", "backend": options.backend}
    if when == "sample":
        return NStepReplayBuffer(**n_step, storage=storage, batch_size=options.batch_size, capturable=options.graph)
    # Not TensorDictReplayBuffer: torchrl's cannot be extended by one frame of each environment.
    return ReplayBuffer(storage=storage, transform=MultiStepTransform(**n_step), batch_size=options.batch_size)


def make_loss(gamma: float, device: torch.device) -> tuple[TensorDictModule, TD3Loss]:
    """The policy and its loss, for observations of three numbers and a torque."""
    policy = TensorDictSequential(
        TensorDictModule(MLP(3, 1, num_cells=CELLS, device=device), in_keys=["observation"], out_keys=["raw"]),
        TanhModule(in_keys=["raw"], out_keys=["action"], low=-MAX_TORQUE, high=MAX_TORQUE).to(device),
    )
    critic = ValueOperator(MLP(4, 1, num_cells=CELLS, device=device), in_keys=["observation", "action"])
    loss = TD3Loss(
        policy, critic, bounds=(-MAX_TORQUE, MAX_TORQUE), policy_noise=0.2, noise_clip=0.5, loss_function="l2"
    )
    # Its estimator finds "steps_to_next_obs" in a sample and discounts each target by gamma ** steps.
    loss.make_value_estimator(gamma=gamma)
    return policy, loss


class Captured:
    """A frame of every environment stored, and batches sampled: calls of a buffer, captured in a CUDA graph."""

    def __init__(self, buffer: NStepReplayBuffer, frame: TensorDict, batches: int) -> None:
        """``frame`` is like those that the buffer has stored before."""
        self.frame, self.graph = frame.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            buffer.extend(self.frame)
            self.batches = [buffer.sample() for _ in range(batches)]

    def extend(self, frame: TensorDict) -> None:
        """Stores a frame, and samples; the batches lie where those of the call before did."""
        self.frame.copy_(frame)
        self.graph.replay()


class Clock:
    """Seconds in each part of a loop; it waits for the device before and after each, so that none pays for another.

    Those until a part has launched what it does are the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start()

    def start(self) -> None:
        """Forgets what was measured."""
        self.seconds: Counter[str] = Counter()
        self.host: Counter[str] = Counter()
        self.began = self.now()

    def now(self) -> float:
        """Seconds, when the device has nothing left to do."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Adds the time within to that of the part."""
        began = self.now()
        yield
        self.host[part] += time.perf_counter() - began
        self.seconds[part] += self.now() - began

    def measured(self, envs: int, steps: int) -> dict[str, float]:
        """Environment steps per second since the start, and of each part its share and the host's time per step.

        Evaluation is left out of all.
        """
        spent = self.seconds
        total = self.now() - self.began - spent["evaluation"]
        parts = {part: spent[part] / total for part in PARTS}
        return {
            "env_steps_per_s": envs * steps / total,
            "buffer_share": parts["extend"] + parts["sample"],
            **{f"{part}_share": share for part, share in parts.items()},
            "other_share": 1 - sum(parts.values()),
            **{f"{part}_host_us": self.host[part] / steps * 1e6 for part in PARTS},
        }


@torch.no_grad()
def evaluate(policy: TensorDictModule, envs: int, seed: int, device: torch.device) -> float:
    """Mean return of one episode of each of so many environments, without noise."""
    env = PendulumEnv(envs, seed=seed, device=device)
    return env.rollout(MAX_STEPS, policy)["next", "reward"].sum(1).mean().item()


def train(when: str, options: argparse.Namespace) -> dict[str, str | float]:
    """Trains with one of the buffers; returns what it measured."""
    torch.manual_seed(options.seed)
    envs, device = options.envs, options.device
    env = PendulumEnv(envs, staggered=True, seed=options.seed, device=device)
    policy, loss = make_loss(options.gamma, device)
    policy_optimizer = torch.optim.Adam(loss.actor_network_params.values(True, True), lr=LEARNING_RATE)
    critic_optimizer = torch.optim.Adam(loss.qvalue_network_params.values(True, True), lr=LEARNING_RATE)
    target = SoftUpdate(loss, tau=TAU)
    buffer = make_buffer(when, options)
    collected = options.n_steps + COLLECTED
    clock, updates, every = Clock(device), 0, max(options.steps // 10, 1)
    returns = [evaluate(policy, envs, options.seed + 1, device)]
    # disable=None: only where stderr is a terminal.
    progress = tqdm(range(1, options.steps + 1), desc=when, unit=" env steps", unit_scale=envs, disable=None)

    captured: Captured | None = None
    state = env.reset()
    done, noise = torch.ones(envs, 1, dtype=torch.bool, device=device), torch.zeros(envs, 1, device=device)
    for step in progress:
        with clock("act"), torch.no_grad():
            # Every episode has a noise of its own.
            noise = torch.where(done, MAX_TORQUE * torch.empty_like(noise).uniform_(*NOISE), noise)
            policy(state)
            action = state["action"] + noise * torch.randn_like(noise)
            state["action"] = action.clamp(-MAX_TORQUE, MAX_TORQUE)
        with clock("environment"):
            frame, state = env.step_and_maybe_reset(state)
            done = frame["next", "done"]
        with clock("extend"):
            # One frame of each environment: [envs, 1].
            (captured or buffer).extend(frame.select(*STORED).unsqueeze(-1))
        for update in range(options.updates if step > collected else 0):
            with clock("sample"):
                batch = captured.batches[update] if captured else buffer.sample()
            with clock("update"):
                updates += 1
                critic_loss, _ = loss.value_loss(batch)
                critic_loss.backward()
                critic_optimizer.step()
                critic_optimizer.zero_grad()
                if updates % POLICY_DELAY == 0:
                    policy_loss, _ = loss.actor_loss(batch)
                    policy_loss.backward()
                    policy_optimizer.step()
                    policy_optimizer.zero_grad()
                target.step()
        if step == collected + WARM_UP:
            if when == "sample" and options.graph:
                captured = Captured(buffer, frame.select(*STORED).unsqueeze(-1), options.updates)
            clock.start()
        if step % every == 0 or step == options.steps:
            with clock("evaluation"):
                returns.append(evaluate(policy, envs, options.seed + 1, device))
            progress.set_postfix({"return": f"{returns[-1]:.0f}"})
    measured = clock.measured(envs, options.steps - collected - WARM_UP)
    return {"buffer": when, **measured, "first_return": returns[0], "final_return": returns[-1]}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options; with wrong ones, it exits with 2 and a line that says why."""
    parser = Parser(
        description="TD3 with many environments and n-step returns.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--buffer", choices=[*BUFFERS, "both"], default="sample", help="when n-step is computed")
    whole = {
        "envs": (1024, 1, "environments"),
        "steps": (600, 1, "of every environment"),
        "n_steps": (3, 1, "frames in a full window"),
        "batch_size": (2048, 1, "transitions in an update"),
        "updates": (4, 1, "per step"),
        "seed": (0, 0, "of networks, environments and noise"),
    }
    for name, (default, _, text) in whole.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, metavar="N", help=text)
    parser.add_argument("--gamma", type=float, default=0.97, metavar="G", help="discount per step")
    parser.add_argument("--backend", default="auto", metavar="NAME", help="auto, reference, triton or verify")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of everything")
    parser.add_argument("--graph", action="store_true", help="capture the buffer that samples in a CUDA graph")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"where to write {RESULT}")
    options = parser.parse_args(arguments)
    for name, (_, low, _) in whole.items():
        if not low <= getattr(options, name) < 1 << 31:
            parser.error(f"{name} must be an int in [{low}, 2**31), got {getattr(options, name)}")
    if options.steps <= (excluded := options.n_steps + COLLECTED + WARM_UP):
        parser.error(f"steps must be more than {excluded}, which are not timed, got {options.steps}")
    try:
        options.device = torch.device(options.device)
        frame = torch.zeros(1, 1, device=options.device)
        # Says what is wrong with the device, gamma or the backend before anything is made.
        out = n_step_return(frame, frame.bool(), gamma=options.gamma, n_steps=options.n_steps, backend=options.backend)
        out.reward.cpu()
        if options.graph and options.device.type != "cuda":
            raise ValueError(f"graph needs a CUDA device, got {options.device}")
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
        parser.error(str(error))
    return options


def about(options: argparse.Namespace) -> list[str]:
    """The machine and versions, the options, and what is timed; call it before, for the load that others make."""
    asked = ", ".join(f"{name} {value}" for name, value in vars(options).items() if name != "out")
    return [
        *machine(options.device),
        f"{asked}, capacity {CAPACITY} frames of each environment, {torch.get_num_threads()} threads",
        f"excluded from times: {options.n_steps + COLLECTED} steps before the first update, {WARM_UP} to warm up, and "
        f"evaluation",
    ]


def main(arguments: list[str] | None = None) -> None:
    """Trains, prints a column per buffer, and writes them as rows."""
    options = parse(arguments)
    logging.getLogger("torchrl").setLevel(logging.WARNING)  # it logs what each storage allocates
    header = about(options)
    rows = pd.DataFrame([train(name, options) for name in (BUFFERS if options.buffer == "both" else [options.buffer])])
    print(*header, rows.set_index("buffer").T.to_string(float_format="{:.4g}".format), sep="\n")
    if options.out:
        lines = "".join(f"# {line}\n" for line in header)
        (options.out / RESULT).write_text(lines + rows.to_csv(index=False, float_format="%.4g"))


if __name__ == "__main__":
    main()
