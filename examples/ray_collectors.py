"""Collectors on several machines that write n-step transitions into one replay buffer, by torchrl's Ray backend.

``python examples/ray_collectors.py`` starts a Ray of its own; ``--address auto`` joins the cluster of this machine.
"""

from __future__ import annotations

import argparse
import logging
import secrets
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
from console import Parser
from tensordict import TensorDictBase
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import EnvBase, GymEnv, StepCounter, TransformedEnv
from torchrl.modules import MLP, QValueActor
from tqdm import tqdm

from multistep_triton import MultiStepTransform
from multistep_triton.checks import check_gamma, check_positive_int

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torchrl's own, on import
    from torchrl.collectors.distributed import RayCollector

TRAJ_KEY = ("collector", "traj_ids")
# What a collector or the buffer asks of the cluster; torchrl's default of 2 GiB of memory each is more than they need.
REMOTE = {"num_cpus": 1}


class DistinctTrajectories:
    """Makes trajectory ids distinct among all collectors: Ray's count from 0, every one of them.

    Without it, a window in the buffer could go on from a trajectory of one collector into one of another that happens
    to have the same number.
    """

    def __init__(self) -> None:
        self.first: int | None = None

    def __call__(self, data: TensorDictBase) -> TensorDictBase:
        """A collector's batch, with other ids."""
        if self.first is None:
            # Drawn by the collector that calls it, so that one which is started again has ids of its own, too.
            self.first = secrets.randbits(31) << 32
        return data.set(TRAJ_KEY, data.get(TRAJ_KEY) + self.first)


def n_step_in_the_collectors(n_steps: int, gamma: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every collector holds its own frames back. A batch must be longer than a window.

    Returns:
        Arguments of the collectors, and of the buffer.
    """
    return {"postproc": MultiStepTransform(n_steps, gamma, done_at="end").inv}, {}


def n_step_in_the_buffer(n_steps: int, gamma: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The buffer holds frames back. Windows end where the batch of one collector is followed by that of another.

    Returns:
        Arguments of the collectors, and of the buffer.
    """
    transform = partial(MultiStepTransform, n_steps, gamma, done_at="end")
    return {"postproc": DistinctTrajectories()}, {"transform_factory": transform}


WHERE = {"collectors": n_step_in_the_collectors, "buffer": n_step_in_the_buffer}


def make_pipeline(
    environments: list[Callable[[], EnvBase]],
    policy: Callable[[TensorDictBase], TensorDictBase],
    *,
    where: str,
    n_steps: int,
    gamma: float,
    capacity: int,
    frames_per_batch: int,
    total_frames: int,
    batch_size: int = 256,
    ray_init_config: dict[str, Any] | None = None,
) -> tuple[RayCollector, ReplayBuffer]:
    """A collector for each of the environments, on whatever machine of the cluster, and the buffer they write into."""
    of_collectors, of_buffer = WHERE[where](n_steps, gamma)
    buffer = ReplayBuffer(
        storage=partial(LazyTensorStorage, capacity),
        batch_size=batch_size,
        service_backend="ray",
        service_backend_options={"remote_config": REMOTE, "ray_init_config": ray_init_config},
        **of_buffer,
    )
    collector = RayCollector(
        environments,
        policy,
        frames_per_batch=frames_per_batch,
        total_frames=total_frames,
        replay_buffer=buffer,
        collector_kwargs=of_collectors,
        remote_configs=REMOTE,
        ray_init_config=ray_init_config,
    )
    return collector, buffer


def make_environment() -> EnvBase:
    """CartPole, with the number of every step."""
    return TransformedEnv(GymEnv("CartPole-v1"), StepCounter())


def main() -> int:
    """Collects, samples, and prints what came of it."""
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--address", help="of a Ray cluster; 'auto' finds that of this machine")
    parser.add_argument("--collectors", type=int, default=2, help="actors that collect, one CPU each")
    parser.add_argument("--frames", type=int, default=10_000, help="frames to collect")
    parser.add_argument("--frames-per-batch", type=int, default=200, help="frames that a collector sends at once")
    parser.add_argument("--n-steps", type=int, default=3)
    parser.add_argument("--gamma", type=float, default=0.99)
    parser.add_argument("--where", choices=WHERE, default="collectors", help="what computes the n-step transitions")
    options = parser.parse_args()
    try:
        for name in ("collectors", "frames", "frames_per_batch", "n_steps"):
            check_positive_int(name, getattr(options, name))
        check_gamma(options.gamma)
        if not options.n_steps < options.frames_per_batch <= options.frames:
            raise ValueError(
                f"frames_per_batch must be more than n_steps, {options.n_steps}, and at most frames, {options.frames}, "
                f"got {options.frames_per_batch}"
            )
    except ValueError as error:
        parser.error(str(error))

    # A Ray of our own gets a CPU for every actor, whether or not the machine has as many.
    cpus = {} if options.address else {"num_cpus": options.collectors + 1}
    try:
        ray.init(address=options.address, log_to_driver=False, include_dashboard=False, **cpus)
    except (ConnectionError, RuntimeError, ValueError) as error:
        parser.error(f"argument --address: {error}")
    needed, there = options.collectors + 1, int(ray.cluster_resources().get("CPU", 0))
    if there < needed:
        # Ray would wait for them.
        parser.error(f"--collectors and the buffer need a CPU each, {needed}, and the cluster has {there}")
    logging.getLogger("torchrl").setLevel(logging.WARNING)  # it logs which actors it ends
    policy = QValueActor(
        MLP(in_features=4, out_features=2), in_keys=["observation"], spec=make_environment().action_spec
    )
    collector, buffer = make_pipeline(
        [make_environment] * options.collectors,
        policy,
        where=options.where,
        n_steps=options.n_steps,
        gamma=options.gamma,
        capacity=options.frames,
        frames_per_batch=options.frames_per_batch,
        total_frames=options.frames,
        ray_init_config={"address": "auto"},
    )
    collector.update_policy_weights_()
    for _ in tqdm(collector, total=-(-options.frames // options.frames_per_batch), unit="batch", disable=None):
        # Here a learner would sample, update the policy, and send it to the collectors.
        pass
    batch = buffer.sample()
    steps = batch["steps_to_next_obs"]
    ahead = (batch["next", "step_count"] - batch["step_count"]).squeeze(-1)
    print(
        f"stored {len(buffer)} n-step transitions of {options.collectors} collectors, computed in the {options.where}"
    )
    print(f"of {len(batch)} that were sampled, {int((steps == options.n_steps).sum())} have {options.n_steps} steps")
    print(f"next observations that many steps ahead: {bool((ahead == steps).all())}")
    collector.shutdown()
    buffer.shutdown()
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
