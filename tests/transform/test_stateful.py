"""Good calls, bad ones, changes, saves and loads, flushes, in any order, against a model in plain lists.

Some 500 steps, and more than 10,000 with ``HYPOTHESIS_PROFILE=nightly``.
"""

from typing import NamedTuple

import pytest
import torch
from bad import BAD_DATA, BAD_STATES
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from memory import addresses, storages
from paths import no_collection
from saving import TRANSFORMS
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer

from multistep_triton import MultiStepTransform

ENVS, GAMMA = 2, 0.5


class Frame(NamedTuple):
    number: int
    reward: int
    done: bool
    valid: bool
    traj: int


frame_lists = st.lists(
    st.tuples(*[st.tuples(st.integers(-8, 8), st.booleans(), st.booleans(), st.integers(0, 1)) for _ in range(ENVS)]),
    max_size=7,
)


BAD_ARGUMENTS = {
    "n_steps": [0, -1, True, 2.0, "3"],
    "gamma": [-3, 1.5, float("nan"), "0.9", True],
    "backend": ["cuda"],
    "done_at": ["middle"],
    "traj_key": [7],
}
TROUBLES = [
    *(("data", kind) for kind in sorted(BAD_DATA)),
    *(("state", kind) for kind in sorted(BAD_STATES)),
    *((name, value) for name, values in BAD_ARGUMENTS.items() for value in values),
    ("flush", "a done that is not there"),
    ("buffer", "no buffer"),
]


class Model:
    """What the transform should do, one frame after the other; all sums are exact."""

    def __init__(self):
        self.n_steps, self.held, self.use_traj, self.done_at = 3, [[] for _ in range(ENVS)], False, "start"

    def extend(self, rows):
        rows = [held + row for held, row in zip(self.held, rows, strict=True)]
        count = max(len(rows[0]) - self.n_steps, 0)
        self.held = [row[count:] for row in rows]
        return [[self.transition(row, t) for t in range(count)] for row in rows]

    def flush(self):
        rows, self.held = self.held, [[] for _ in range(ENVS)]
        return [[self.transition(row, t) for t in range(len(row))] for row in rows]

    def is_boundary(self, row, t):
        if row[t].done or not row[t].valid or t + 1 == len(row):
            return True
        return not row[t + 1].valid or (self.use_traj and row[t + 1].traj != row[t].traj)

    def transition(self, row, t):
        end = t
        while end < t + self.n_steps - 1 and not self.is_boundary(row, end):
            end += 1
        reward = sum(GAMMA ** (i - t) * row[i].reward for i in range(t, end + 1))
        done = row[end if self.done_at == "end" else t].done
        steps = end - t + 1
        return (row[t].number, row[end].number + 1, reward, steps, GAMMA**steps, not self.is_boundary(row, t), done)


def to_tensordict(rows):
    def column(read, dtype):
        return torch.tensor([[read(frame) for frame in row] for row in rows], dtype=dtype).view(ENVS, len(rows[0]))

    numbers = column(lambda frame: frame.number, torch.int64)
    return TensorDict(
        {
            "observation": numbers.unsqueeze(-1).expand(*numbers.shape, 3).float(),
            "action": numbers * 2,
            "mask": column(lambda frame: frame.valid, torch.bool),
            "traj": column(lambda frame: frame.traj, torch.int32),
            "next": {
                "observation": (numbers + 1).unsqueeze(-1).expand(*numbers.shape, 3).float(),
                "reward": column(lambda frame: frame.reward, torch.float32).unsqueeze(-1),
                "done": column(lambda frame: frame.done, torch.bool).unsqueeze(-1),
            },
        },
        numbers.shape,
    )


def to_transitions(out):
    columns = (
        out["observation"][..., 0],
        out["next", "observation"][..., 0],
        out["next", "reward"].squeeze(-1),
        out["steps_to_next_obs"],
        out["gamma"],
        out["nonterminal"],
        out["next", "done"].squeeze(-1),
    )
    return [list(zip(*(column[env].tolist() for column in columns), strict=True)) for env in range(ENVS)]


class Stream(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.guard = no_collection()
        self.guard.__enter__()
        self.transform, self.model, self.count = MultiStepTransform(3, GAMMA), Model(), 0
        self.buffer = ReplayBuffer(storage=LazyTensorStorage(1000, ndim=2))
        self.seen = []

    def teardown(self):
        self.guard.__exit__(None, None, None)

    def frames(self, drawn):
        rows = [[Frame(self.count + t, *frame[env]) for t, frame in enumerate(drawn)] for env in range(ENVS)]
        self.count += len(drawn)
        return rows

    def compare(self, out, expected):
        if not expected[0]:
            assert out is None
        else:
            assert to_transitions(out) == expected
            self.seen.append(out)

    def extend(self, drawn):
        rows = self.frames(drawn)
        data = to_tensordict(rows)
        before = data.clone()
        self.compare(self.transform.inv(data), self.model.extend(rows))
        assert (data == before).all()
        self.seen.append(data)

    # Every rule but one ends in a call, as which rules there are is drawn anew for every run.

    @rule(drawn=frame_lists)
    def call(self, drawn):
        self.extend(drawn)

    @rule(trouble=st.sampled_from(TROUBLES), drawn=frame_lists)
    def call_after_trouble(self, trouble, drawn):
        kind, which = trouble
        if kind == "data" and self.model.held[0]:
            spoil, error, _ = BAD_DATA[which]
            with pytest.raises(error):
                self.transform._inv_call(spoil(to_tensordict([[Frame(0, 0, False, True, 0)] * 10] * ENVS)))
        elif kind == "state":
            state, message = BAD_STATES[which]
            with pytest.raises(ValueError, match=message):
                self.transform.load_state_dict({"_extra_state": state})
        elif kind in BAD_ARGUMENTS:
            with pytest.raises((ValueError, TypeError), match=f"{kind} must be"):
                setattr(self.transform, kind, which)
        elif kind == "flush" and self.model.held[0]:
            self.transform.done_key = "finished"
            for flush in (self.transform.flush, lambda: self.transform.flush_into(self.buffer)):
                with pytest.raises(KeyError):
                    flush()
            self.transform.done_key = "done"
        elif kind == "buffer":
            with pytest.raises(TypeError):
                self.transform.flush_into(self.buffer.storage)
        self.extend(drawn)

    @rule(
        n_steps=st.integers(1, 9), done_at=st.sampled_from(["start", "end"]), use_traj=st.booleans(), drawn=frame_lists
    )
    def call_after_a_change(self, n_steps, done_at, use_traj, drawn):
        self.transform.n_steps = self.model.n_steps = n_steps
        self.transform.done_at, self.transform.traj_key = done_at, "traj" if use_traj else None
        self.model.done_at, self.model.use_traj = done_at, use_traj
        self.extend(drawn)

    @rule(way=st.sampled_from(sorted(TRANSFORMS)), drawn=frame_lists)
    def call_when_resumed(self, way, drawn):
        self.transform = TRANSFORMS[way](self.transform).to("cpu").double()
        self.transform.done_at, self.transform.traj_key = self.model.done_at, "traj" if self.model.use_traj else None
        self.extend(drawn)

    @rule(how=st.sampled_from(["flush", "flush_into", "clear"]))
    def let_go(self, how):
        if how == "clear":
            self.transform.clear()
            self.model.held = [[] for _ in range(ENVS)]
        elif how == "flush":
            self.compare(self.transform.flush(), self.model.flush())
        else:
            expected, stored = self.model.flush(), len(self.buffer)
            indices = self.transform.flush_into(self.buffer)
            assert len(indices) == len(self.buffer) - stored == ENVS * len(expected[0])
            if expected[0]:
                assert to_transitions(self.buffer[:][:, stored // ENVS :]) == expected

    @invariant()
    def holds_what_the_model_holds_in_memory_of_its_own(self):
        held = self.transform._buffer
        if not self.model.held[0]:
            assert held is None
            return
        assert held["observation"][..., 0].tolist() == [[frame.number for frame in row] for row in self.model.held]
        carry = self.transform._carry.leaves.values()
        assert all(leaf.untyped_storage().nbytes() == leaf.nbytes for leaf in carry)
        state = self.transform.state_dict()["_extra_state"]["carry"]["leaves"].values()
        own = [addresses(carry), addresses(state), *map(storages, (held, *self.seen[-6:]))]
        assert len(set.union(*own)) == sum(map(len, own))


NIGHTLY = settings().max_examples > 1000
TestStream = Stream.TestCase
TestStream.settings = settings(max_examples=120 if NIGHTLY else 10, stateful_step_count=100 if NIGHTLY else 50)
