"""torchrl's Ray backend on a Ray of our own: collectors in processes that write into a buffer in another one."""

import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import ray
import torch
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.modules import RandomPolicy
from workers import GAMMA, Countdown, expected_rows, frames_of, rows_of, streams

from multistep_triton import MultiStepTransform, NStepReplayBuffer

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torchrl's own, on import
    import ray_collectors
    from ray_collectors import REMOTE, TRAJ_KEY, DistinctTrajectories, make_pipeline
    from torchrl.collectors.distributed import RayCollector

ROOT = Path(__file__).parents[2]
N = 3
BATCH = 14
JOIN = {"address": "auto"}

# The policy is random and has no weights; Ray leaves files open, and its dead actors to the collector of garbage.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The policy is not an nn.Module:UserWarning"),
    pytest.mark.filterwarnings("ignore:RayCollector iteration started before weight:UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    # Its processes import what these tests do.
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "examples", "tests/support"))
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    yield
    ray.shutdown()


def make(where, workers, batches=1):
    return make_pipeline(
        [partial(Countdown, worker) for worker in workers],
        RandomPolicy(Countdown(0).action_spec),
        where=where,
        n_steps=N,
        gamma=GAMMA,
        capacity=10_000,
        frames_per_batch=BATCH,
        total_frames=BATCH * batches,
        ray_init_config=JOIN,
    )


def check(data, where):
    """Every stored frame; returns how many there are of each collector."""
    frames = frames_of(data)
    found = streams(frames)
    for times in found.values():
        # In order, without a gap and none twice.
        assert times == list(range(len(times)))
    if where == "buffer":
        worker, t = frames[-1]
        held = [(worker, t + i) for i in range(1, N + 1)]
        assert rows_of(data) == expected_rows(frames + held, N, "end")[:-N]
    else:
        # What others stored in between is nothing to it.
        rows = dict(zip(frames, rows_of(data), strict=True))
        for worker, times in found.items():
            known = [(worker, t) for t in range(len(times) + N)]
            assert [rows[frame] for frame in known[:-N]] == expected_rows(known, N, "end")[:-N]
    return {worker: len(times) for worker, times in found.items()}


@pytest.mark.parametrize("where", [pytest.param("collectors", marks=pytest.mark.slow), "buffer"])
def test_every_transition_is_right_and_a_killed_collector_loses_its_own_frames_only(where):
    collector, buffer = make(where, [0, 1])
    try:
        survivor, killed = collector.remote_collectors
        # As the collector's iterator asks them, which ends all of them when one dies.
        pending = {each.next.remote(): each for each in (survivor, killed)}
        for _ in range(20):
            done = ray.wait(list(pending))[0][0]
            each = pending.pop(done)
            ray.get(done)
            pending[each.next.remote()] = each
        ray.kill(killed)
        for batch, each in pending.items():
            if each is survivor:
                ray.get(batch)
            else:
                with pytest.raises(ray.exceptions.RayActorError):
                    ray.get(batch)
        before = check(buffer[:], where)
        assert set(before) == {0, 1} and sum(before.values()) >= 20 * BATCH - 2 * N
        for _ in range(5):
            ray.get(survivor.next.remote())
        data = buffer[:]
        after = check(data, where)
        assert after[0] >= before[0] + 4 * BATCH
        # All that was sent is stored, but for what the collector itself held back.
        assert after[1] % BATCH == (BATCH - N if where == "collectors" else 0)
        assert len(buffer.sample()) == 256
        # Each counts its trajectories from 0, which is why the example makes them distinct.
        ids = [data[TRAJ_KEY][data["observation"][:, 0] == worker] for worker in (0, 1)]
        assert bool(torch.isin(*ids).any()) == (where == "collectors")
    finally:
        collector.shutdown()
        buffer.shutdown()


@pytest.mark.slow
def test_the_buffers_state_is_saved_with_the_frames_held_back(tmp_path):
    collector, buffer = make("buffer", [0], batches=4)
    for _ in collector:
        pass
    collector.shutdown()
    buffer.dumps(tmp_path)
    stored = buffer[:]
    buffer.shutdown()

    transform = MultiStepTransform(N, GAMMA, done_at="end")
    local = ReplayBuffer(storage=LazyTensorStorage(10_000), transform=transform)
    local.loads(tmp_path)
    assert (local[:] == stored).all()
    assert frames_of(stored) + frames_of(transform.flush()) == [(0, t) for t in range(len(stored) + N)]


@pytest.mark.slow
def test_a_remote_buffer_that_is_sampled():
    buffer = NStepReplayBuffer(
        n_steps=N,
        gamma=GAMMA,
        storage=partial(LazyTensorStorage, 10_000),
        batch_size=64,
        service_backend="ray",
        service_backend_options={"remote_config": REMOTE, "ray_init_config": JOIN},
    )
    environments = [partial(Countdown, worker) for worker in range(2)]
    collector = RayCollector(
        environments,
        RandomPolicy(Countdown(0).action_spec),
        frames_per_batch=BATCH,
        total_frames=6 * BATCH,
        replay_buffer=buffer,
        collector_kwargs={"postproc": DistinctTrajectories()},
        remote_configs=REMOTE,
        ray_init_config=JOIN,
    )
    try:
        for _ in collector:
            pass
        frames = frames_of(buffer[:])
        for n_steps in (None, 1, 7):
            batch = buffer.sample() if n_steps is None else buffer.sample(n_steps=n_steps)
            expected = expected_rows(frames, n_steps or N, "end")
            assert rows_of(batch) == [expected[row] for row in batch["index"].reshape(-1).tolist()]
    finally:
        collector.shutdown()
        buffer.shutdown()


@pytest.mark.slow
def test_the_example():
    script = [sys.executable, ROOT / "examples/ray_collectors.py", "--frames", "400", "--address", "auto"]
    run = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert "next observations that many steps ahead: True" in run.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--collectors 0", "collectors must be an int >= 1, got 0"),
        ("--gamma 2", "gamma must be a finite number in [0, 1], got 2.0"),
        ("--n-steps 0", "n_steps must be an int >= 1, got 0"),
        ("--frames-per-batch 3", "frames_per_batch must be more than n_steps, 3, and at most frames, 10000, got 3"),
        ("--frames 100", "frames_per_batch must be more than n_steps, 3, and at most frames, 100, got 200"),
        ("--where moon", "argument --where: invalid choice: 'moon'"),
        ("--address moon", "argument --address: "),
    ],
)
def test_the_example_refuses_wrong_options_in_one_line(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ray_collectors.py", *options.split()])
    with pytest.raises(SystemExit) as stopped:
        ray_collectors.main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert f"error: {message}" in err and err.count("\n") == 1
