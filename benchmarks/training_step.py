"""What the n-step transform is of one training iteration, and what would be gained if it cost nothing.

Usage: ``python -m benchmarks.training_step --out DIR``. An iteration is one of DQN without collecting: store a rollout
of observations f32[17], then K times sample a batch of 256 and update an MLP of two layers of 256 (Adam, a soft target
update). K is 1, and the rollout's frames / 256, a replay ratio of 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, OneHot, ReplayBuffer
from torchrl.envs.transforms import MultiStepTransform as TorchRLMultiStepTransform
from torchrl.envs.transforms import Transform
from torchrl.modules import MLP, QValueActor
from torchrl.objectives import DQNLoss, SoftUpdate
from tqdm import tqdm

from benchmarks.cases import GAMMA, Case, make_rollout
from benchmarks.machine import about, sentence
from benchmarks.measure import command, in_turns, set_up
from benchmarks.report import table
from multistep_triton import MultiStepTransform

ACTIONS, HIDDEN, BATCH = 6, 256, 256
ROUNDS = 5
CASES = [Case("state", 256, 64, 0.01), Case("state", 1024, 128, 0.01)]
NONE, TORCHRL, OURS = "no transform", "torchrl", "multistep_triton"
TRANSFORMS: dict[str, Callable[[int], Transform | None]] = {
    NONE: lambda n_steps: None,
    TORCHRL: lambda n_steps: TorchRLMultiStepTransform(n_steps, GAMMA),
    OURS: lambda n_steps: MultiStepTransform(n_steps, GAMMA),
}


class Learner:
    """A buffer and what learns from it."""

    def __init__(self, case: Case, transform: Transform | None, device: torch.device):
        storage = LazyTensorStorage(case.envs * case.capacity(True), ndim=2, device=device)
        self.buffer = ReplayBuffer(storage=storage, transform=transform, batch_size=BATCH)
        network = MLP(in_features=case.width, out_features=ACTIONS, num_cells=[HIDDEN, HIDDEN], device=device)
        actor = QValueActor(network, in_keys=["observation"], spec=OneHot(ACTIONS, device=device))
        self.loss = DQNLoss(actor, action_space="one-hot", delay_value=True)
        self.loss.make_value_estimator(gamma=GAMMA)
        self.target = SoftUpdate(self.loss, eps=0.995)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), lr=1e-4)

    def update(self) -> None:
        loss = self.loss(self.buffer.sample())["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.target.step()

    def iterate(self, rollout: TensorDict, updates: int) -> None:
        self.buffer.extend(rollout)
        for _ in range(updates):
            self.update()


def one_hot(rollout: TensorDict) -> TensorDict:
    """Actions as DQN takes them."""
    rollout["action"] = torch.nn.functional.one_hot(rollout["action"].argmax(-1), ACTIONS)
    return rollout


def measure(case: Case, device: torch.device, seconds: float) -> list[dict[str, object]]:
    """One row per transform and number of updates."""
    rollout = one_hot(make_rollout(case, device))
    learners = {name: Learner(case, make(case.n_steps), device) for name, make in TRANSFORMS.items()}
    for learner in learners.values():
        for _ in range(3):
            learner.iterate(rollout, 1)
    rows = []
    for updates in (1, rollout.numel() // BATCH):
        extends = {name: partial(learner.buffer.extend, rollout) for name, learner in learners.items()}
        iterations = {
            f"iteration, {name}": partial(learner.iterate, rollout, updates) for name, learner in learners.items()
        }
        times = in_turns(extends | iterations, seconds, ROUNDS)
        for name in learners:
            iteration, extend = times[f"iteration, {name}"], times[name].median
            rows.append(
                {
                    "case": str(case),
                    "updates": updates,
                    "transform": name,
                    "iteration_ms": iteration.median * 1e3,
                    "iqr_ms": iteration.iqr * 1e3,
                    "extend_ms": extend * 1e3,
                    "extend_share": extend / iteration.median,
                    "faster_than_torchrl": times[f"iteration, {TORCHRL}"].median / iteration.median,
                    "limit": iteration.median / (iteration.median - extend + times[NONE].median),
                }
            )
    return rows


def verdict(rows: pd.DataFrame) -> str:
    """Amdahl's limit, in words."""
    lines = []
    for (case, updates), group in rows.groupby(["case", "updates"], sort=False):
        torchrl, ours = (group[group["transform"] == name].iloc[0] for name in (TORCHRL, OURS))
        lines.append(
            f"- {case}, updates: {updates}. With torchrl's transform, extend is {torchrl['extend_share']:.0%} of an "
            f"iteration, which would be {torchrl['limit']:.2f} times as fast if the transform cost nothing. With ours, "
            f"extend takes {ours['extend_ms']:.1f} ms instead of {torchrl['extend_ms']:.1f}, "
            f"{ours['extend_share']:.0%} of an iteration; {ours['limit']:.2f} times is left to gain."
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    options = command(__doc__, seconds=3.0).parse_args(arguments)
    set_up()
    device = torch.device(options.device)
    machine = about(device)
    measured = [row for case in tqdm(CASES) for row in measure(case, device, options.seconds)]
    rows = pd.DataFrame(measured).assign(**machine)
    options.out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(options.out / f"{device.type}-training-step.csv", index=False, float_format="%.6g")
    text = "\n\n".join(
        [
            sentence(rows.iloc[0].to_dict()),
            table(pd.DataFrame(measured)),
            "`limit`: how many times as fast the iteration would be if the transform cost nothing, that is, if extend "
            "took as long as without one (Amdahl's law).",
            verdict(rows),
        ]
    )
    (options.out / f"{device.type}-training-step.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
