"""Several threads on one buffer: no window is torn, no frame lost or stored twice."""

import sys
import threading
import time
import warnings

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, LazyTensorStorage, ReplayBuffer, Unbounded
from torchrl.envs import EnvBase

from multistep_triton import MultiStepTransform

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torchrl's own, on import
    from torchrl.collectors import Collector

N_STEPS, GAMMA = 3, 0.5
WORKERS, FRAMES = 2, 600


@pytest.fixture(autouse=True)
def switch_threads_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def run(*targets):
    """Runs functions in threads of their own; the first error of any of them is raised."""
    errors = []

    def guarded(target):
        try:
            target()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def stream_of(worker):
    """``FRAMES`` frames that say whose they are and which; rewards are the frames' numbers."""
    number = torch.arange(FRAMES)
    of = torch.full((FRAMES,), worker)
    return TensorDict(
        {
            "number": number,
            "worker": of,
            "next": {
                "number": number + 1,
                "worker": of,
                "reward": number.double(),
                "done": (number % 11 == 10),
            },
        },
        [FRAMES],
    )


def assert_consecutive(data):
    """Every window is one of consecutive frames of one worker, and its sum is theirs."""
    number, steps, reward = data["number"], data["steps_to_next_obs"], data["next", "reward"]
    assert torch.equal(data["next", "worker"], data["worker"])
    assert torch.equal(data["next", "number"], number + steps)
    expected = sum(torch.where(i < steps, GAMMA**i * (number + i), 0.0) for i in range(N_STEPS))
    assert torch.equal(reward.view_as(number), expected.to(reward.dtype))


def assert_whole(data):
    """Windows are of consecutive frames, and of one episode of 11."""
    assert_consecutive(data)
    number, steps = data["number"], data["steps_to_next_obs"]
    assert (number // 11 == (number + steps - 1) // 11).all()
    assert torch.equal(data["gamma"], GAMMA ** steps.float())


def test_two_threads_extend_one_buffer():
    transform = MultiStepTransform(N_STEPS, GAMMA, traj_key="worker")
    buffer = ReplayBuffer(storage=LazyTensorStorage(10_000), transform=transform)

    def extend(worker):
        for part in stream_of(worker).split([1, 2, 5, 12] * (FRAMES // 20)):
            buffer.extend(part)

    run(*(lambda worker=worker: extend(worker) for worker in range(WORKERS)))
    assert len(buffer) == WORKERS * FRAMES - N_STEPS
    transform.flush_into(buffer)
    stored = buffer[:]
    assert_whole(stored)
    assert sorted((stored["worker"] * FRAMES + stored["number"]).tolist()) == list(range(WORKERS * FRAMES))


def test_threads_that_extend_flush_save_and_change_n_steps():
    transform = MultiStepTransform(N_STEPS, GAMMA, traj_key="worker")
    buffer = ReplayBuffer(storage=LazyTensorStorage(10_000), transform=transform)
    working = threading.Event()
    working.set()

    def extend(worker):
        for part in stream_of(worker).split(6):
            buffer.extend(part)

    def disturb():
        while working.is_set():
            transform.n_steps = 1
            transform.flush_into(buffer)
            transform.n_steps = N_STEPS
            MultiStepTransform(N_STEPS, GAMMA).load_state_dict(transform.state_dict())
            transform.to("cpu")

    def work():
        try:
            run(*(lambda worker=worker: extend(worker) for worker in range(WORKERS)))
        finally:
            working.clear()

    run(work, disturb)
    transform.flush_into(buffer)
    stored = buffer[:]
    assert_whole(stored)
    assert sorted((stored["worker"] * FRAMES + stored["number"]).tolist()) == list(range(WORKERS * FRAMES))


class Counting(EnvBase):
    """Four environments whose episodes are of 5 to 8 frames; rewards are the frames' numbers."""

    def __init__(self):
        super().__init__(batch_size=[4])
        number = Unbounded((4,), dtype=torch.int64)
        self.observation_spec = Composite(number=number, worker=number.clone(), shape=(4,))
        self.action_spec = Bounded(-1, 1, (4, 1))
        self.reward_spec = Unbounded((4, 1))
        self.episode = torch.zeros(4, dtype=torch.int64)

    def _reset(self, tensordict):
        which = tensordict["_reset"].squeeze(-1) if tensordict is not None else torch.ones(4, dtype=torch.bool)
        self.episode += which
        self.number = torch.where(which, 0, getattr(self, "number", 0))
        # each episode is a worker of its own, as far as windows go
        return TensorDict({"number": self.number.clone(), "worker": 4 * self.episode + torch.arange(4)}, [4])

    def _step(self, tensordict):
        reward, self.number = self.number.float().unsqueeze(-1), self.number + 1
        done = (self.number == 5 + torch.arange(4)).unsqueeze(-1)
        return TensorDict(
            {
                "number": self.number.clone(),
                "worker": tensordict["worker"],
                "reward": reward,
                "done": done,
                "terminated": done.clone(),
            },
            [4],
        )

    def _set_seed(self, seed):
        pass


def test_a_collector_writes_while_a_learner_samples():
    transform = MultiStepTransform(N_STEPS, GAMMA, done_at="end")
    # a ring of few frames is overwritten often
    buffer = ReplayBuffer(storage=LazyTensorStorage(40 * 4, ndim=2), transform=transform, batch_size=32)
    collector = Collector(
        Counting(), policy=None, frames_per_batch=5 * 4, total_frames=-1, replay_buffer=buffer, trust_policy=True
    )
    collector.start()
    try:
        deadline = time.monotonic() + 60
        while buffer.write_count < 100 and time.monotonic() < deadline:
            time.sleep(0.01)
        seen = 0
        while buffer.write_count < 3000 and time.monotonic() < deadline:
            data = buffer.sample()
            assert_consecutive(data)
            ends = data["next", "number"] == 5 + data["worker"] % 4
            assert torch.equal(data["next", "terminated"].squeeze(-1), ends)
            assert (ends | (data["steps_to_next_obs"] == N_STEPS)).all()
            seen += 1
    finally:
        collector.async_shutdown(timeout=30)
    assert buffer.write_count >= 3000
    assert seen > 10
