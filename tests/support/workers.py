"""An environment of which every frame is known beforehand, and what an n-step buffer must hold of its frames."""

import torch
from tensordict import TensorDict
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

GAMMA = 0.5


def reward(worker, t):
    """A float32 whose sums of up to 8 with powers of GAMMA are exact."""
    return float((5 * t + 3 * worker) % 16)


def ends(worker, t):
    """Whether the episode that is at frame t ends there; episodes of one frame and of up to 11."""
    return (t * t + worker) % 11 < 2


class Countdown(EnvBase):
    """Observes which worker this is and how many steps it took since it was made, whatever the episode."""

    def __init__(self, worker):
        super().__init__()
        self.worker, self.t = worker, 0
        self.observation_spec = Composite(observation=Unbounded((2,), dtype=torch.int64))
        self.action_spec = Categorical(2)
        self.reward_spec = Unbounded((1,))
        self.done_spec = Composite(
            done=Binary(1, dtype=torch.bool),
            terminated=Binary(1, dtype=torch.bool),
            truncated=Binary(1, dtype=torch.bool),
        )

    def _reset(self, tensordict=None, **_):
        return TensorDict({"observation": torch.tensor([self.worker, self.t])})

    def _step(self, tensordict):
        t, self.t = self.t, self.t + 1
        end = torch.tensor([ends(self.worker, t)])
        return TensorDict(
            {
                "observation": torch.tensor([self.worker, self.t]),
                "reward": torch.tensor([reward(self.worker, t)]),
                "done": end,
                "terminated": end,
                "truncated": torch.zeros_like(end),
            }
        )

    def _set_seed(self, seed):
        pass


def frames_of(data):
    """``(worker, t)`` of every frame, in order."""
    return [tuple(each) for each in data["observation"].tolist()]


def rows_of(data):
    """What is stored of every frame: next observation, return, steps, whether it ends the episode."""
    return list(
        zip(
            map(tuple, data["next", "observation"].tolist()),
            data["next", "reward"].squeeze(-1).tolist(),
            data["steps_to_next_obs"].tolist(),
            data["next", "terminated"].squeeze(-1).tolist(),
            strict=True,
        )
    )


def expected_rows(frames, n_steps, done_at="start"):
    """The same of a stream of ``(worker, t)``: windows end where the next frame is not the worker's next one."""
    rows = []
    for first, (worker, t) in enumerate(frames):
        steps = 1
        while (
            steps < n_steps
            and not ends(worker, t + steps - 1)
            and frames[first + steps : first + steps + 1] == [(worker, t + steps)]
        ):
            steps += 1
        last = t + steps - 1
        rows.append(
            (
                (worker, last + 1),
                sum(GAMMA**i * reward(worker, t + i) for i in range(steps)),
                steps,
                ends(worker, last if done_at == "end" else t),
            )
        )
    return rows


def streams(frames):
    """The frames of each worker, in the order in which they lie."""
    each = {}
    for worker, t in frames:
        each.setdefault(worker, []).append(t)
    return each
