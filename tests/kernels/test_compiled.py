"""The kernels as they are compiled, in processes without the interpreter, for a GPU that need not be there."""

from collections import Counter
from functools import partial

import fresh
import pytest

PREAMBLE = """
import json
import stub_driver
driver = stub_driver.install("sm_90")
import torch
from memory import Calls
from rollouts import make_rollout
from torchrl.data import LazyTensorStorage
from multistep_triton import MultiStep, MultiStepTransform, NStepReplayBuffer, gather_future, n_step_return

def variants(call):
    "How many kernels a call compiled."
    before = len(stub_driver.compiled_kernels())
    call()
    return len(stub_driver.compiled_kernels()) - before

def extend(n_steps=3, rollout=None, gamma=0.9, batch=(2,), frames=(16,), **arguments):
    transform = MultiStepTransform(n_steps, gamma, backend="triton", **arguments)
    for count in frames:
        transform.inv(make_rollout(batch, count) if rollout is None else rollout)

def buffer(n_steps=3, envs=(2,), slots=8, frames=16, **arguments):
    storage = LazyTensorStorage(torch.Size(envs).numel() * slots, ndim=len(envs) + 1)
    buffer = NStepReplayBuffer(n_steps=n_steps, gamma=0.9, backend="triton", storage=storage, **arguments)
    buffer.extend(make_rollout(envs, frames))
    return buffer

"""


run = partial(fresh.found, PREAMBLE)


def test_what_recompiles_and_what_does_not():
    counts = run("""
def large_n(n):
    extend(n, frames=[n + 5, 1])

def slices():
    rollout = make_rollout((4,), 64)
    transform = MultiStepTransform(3, 0.9, backend="triton")
    for begin, end in ((0, 10), (10, 27), (27, 28), (28, 64)):
        transform.inv(rollout[:, begin:end])

def function(frames, gamma, n_steps=4):
    n_step_return(torch.zeros(2, frames), torch.zeros(2, frames, dtype=torch.bool), gamma=gamma, n_steps=n_steps,
                  backend="triton")

def double():
    rollout = make_rollout((2,), 16)
    rollout["next", "reward"] = rollout["next", "reward"].double()
    extend(rollout=rollout)

def wider():
    rollout = make_rollout((2,), 16)
    rollout["observation"] = torch.zeros(2, 16, 5)
    extend(rollout=rollout)

def marked(n_steps=3, dtype=torch.int64, mask=True, frames=16):
    rollout = make_rollout((2,), frames)
    rollout["traj"] = torch.zeros(2, frames, dtype=dtype)
    if mask:
        rollout["mask"] = torch.ones(2, frames, dtype=torch.bool)
    extend(n_steps, rollout, traj_key="traj")

def of_agents():
    rollout = make_rollout((2,), 16)
    for key in ("done", "reward"):
        rollout["next", key] = rollout["next", key].unsqueeze(-1).expand(2, 16, 4, 1)
    extend(rollout=rollout)

def time_major(frames=16):
    extend(rollout=make_rollout((frames,), 2).contiguous().transpose(0, 1))

print(json.dumps({
    "the first call": variants(extend),
    "frames": [variants(lambda: extend(frames=[each, 7])) for each in (1, 2, 15, 16, 17, 31, 32, 63, 64, 100, 1000)],
    "environments": [variants(lambda: extend(batch=(each,))) for each in (1, 3, 16, 17, 256)],
    "batch dimensions that make one": variants(lambda: extend(batch=(2, 8))),
    "slices": variants(slices),
    "gamma": [variants(lambda: extend(gamma=each)) for each in (0, 1, 1.0, 0.5, 0.99)],
    "a function": variants(lambda: function(16, 0.9)),
    "a function, frames and gamma": [variants(lambda: function(*each)) for each in ((1, 1), (32, 0.1))],
    "n": [variants(lambda: extend(each, frames=[20])) for each in (2, 4, 2)],
    "a larger n": variants(lambda: large_n(9)),
    "another n": [variants(lambda: large_n(each)) for each in (10, 16, 17, 32, 100, 1000, 2000)],
    "dtype of a reward": variants(double),
    "width of a leaf": variants(wider),
    "time-major": variants(time_major),
    "time-major, frames": [variants(lambda: time_major(each)) for each in (1, 7, 32)],
    "mask and trajectory ids": variants(marked),
    "their frames": [variants(lambda: marked(frames=each)) for each in (1, 17, 64)],
    "their dtype, no mask": [variants(lambda: marked(dtype=torch.int32)), variants(lambda: marked(mask=False))],
    "n with ids": [variants(lambda: marked(each)) for each in (5, 7, 8, 30)],
    "done per agent": variants(of_agents),
    "nothing held back": variants(lambda: MultiStep(0.9, 3, backend="triton")(make_rollout((2,), 16))),
}))
""")
    assert counts == {
        # Windows and rows.
        "the first call": 2,
        # Blocks of calls that emit one or two frames have half the lanes.
        "frames": [1] + [0] * 10,
        "environments": [0] * 5,
        "batch dimensions that make one": 0,
        # Rows at other addresses.
        "slices": 1,
        "gamma": [0] * 5,
        "a function": 1,
        "a function, frames and gamma": [1, 0],
        # Up to the next power of two, and that for windows of several pieces.
        "n": [1, 0, 0],
        "a larger n": 1,
        "another n": [0, 1, 1, 1, 2, 0, 0],
        "dtype of a reward": 2,
        "width of a leaf": 1,
        "time-major": 1,
        "time-major, frames": [0, 0, 0],
        "mask and trajectory ids": 2,
        "their frames": [1, 0, 0],
        "their dtype, no mask": [2, 2],
        # The largest n emits nothing yet.
        "n with ids": [1, 0, 0, 0],
        "done per agent": 4,
        "nothing held back": 1,
    }


@pytest.mark.parametrize("done_at", ["start", "end"])
@pytest.mark.parametrize("n_steps", [1, 8, 9, 100])
def test_launches_and_operators_of_an_extend(n_steps, done_at):
    """Two launches, and besides them the allocation of what is returned and of the lists of rows."""
    operators, launched, tensors = run(f"""
transform = MultiStepTransform({n_steps}, 0.9, backend="triton", done_at={done_at!r})
rollout = make_rollout((3,), 40)
for _ in range(4):
    transform._inv_call(rollout)
driver.launches = 0
with Calls() as operators:
    out = transform._inv_call(rollout)
distinct = {{id(leaf) for leaf in out.values(True, True)}}
print(json.dumps([operators.names, driver.launches, len(distinct)]))
""")
    assert launched == 2
    # What is held back is written into one ring or, if n is less than the 40 frames of a call, into two in turn.
    counts = Counter(operators)
    assert counts.keys() == {"aten.empty_like.default", "aten.empty.memory_format"}
    assert counts.total() == tensors + 1


def test_what_recompiles_when_frames_are_sampled():
    counts = run("""
rb = buffer()

def extended(frames):
    rb.extend(make_rollout((2,), frames))
    rb.sample(3)

def with_gamma(gamma):
    rb.gamma = gamma
    rb.sample(3)

print(json.dumps({
    "the first sample": variants(lambda: rb.sample(32)),
    "samples": [variants(lambda: rb.sample(each)) for each in (1, 2, 16, 17, 1000)],
    "the newest frame": [variants(lambda: extended(each)) for each in (1, 2, 7, 8)],
    "gamma": [variants(lambda: with_gamma(each)) for each in (0, 1, 1.0, 0.5)],
    "slots, frames": [variants(lambda: buffer(3, (2,), *each).sample(3)) for each in ((3, 1), (7, 3), (64, 5))],
    "environments": [variants(lambda: buffer(envs=(each,)).sample(3)) for each in (1, 3, 16, 100)],
    "n": [variants(lambda: rb.sample(3, n_steps=each)) for each in (1, 2, 3, 8)],
    "a larger n": [variants(lambda: rb.sample(3, n_steps=each)) for each in (9, 10, 100)],
    "n of its own": [variants(lambda: rb.sample(3, n_steps=each)) for each in ((1, 3), (2, 3), (1, 9), (3, 20))],
    "no environments": variants(lambda: buffer(envs=()).sample(3)),
}))
""")
    assert counts == {
        "the first sample": 2,
        "samples": [0] * 5,
        # What stores one frame, which lies in order, and what stores several.
        "the newest frame": [1, 1, 0, 0],
        "gamma": [0] * 4,
        # Of a single frame, windows are of one.
        "slots, frames": [1, 0, 0],
        "environments": [0] * 4,
        "n": [0, 1, 0, 1],
        "a larger n": [0, 0, 0],
        "n of its own": [1, 0, 1, 0],
        # An index less than with them.
        "no environments": 1,
    }


@pytest.mark.parametrize("n_steps", [1, 8, 9, (1, 8), (1, 9)])
def test_launches_and_operators_of_a_sample(n_steps):
    """Two launches, and besides them the draw, and the allocation of what is returned and of the lists of rows."""
    operators, launched, tensors = run(f"""
rb = buffer({n_steps}, slots=128)
rb.sample(4)
driver.launches = 0
with Calls() as operators:
    out = rb.sample(4)
distinct = {{id(leaf) for leaf in out.values(True, True)}}
print(json.dumps([operators.names, driver.launches, len(distinct)]))
""")
    assert launched == 2
    counts = Counter(operators)
    assert counts.pop("aten.randint.low_generator") == (2 if isinstance(n_steps, tuple) else 1)
    assert counts == {"aten.empty_like.default": tensors + 1}


@pytest.mark.parametrize("arguments", [{}, {"outputs": ["observation", ("next", "reward"), "gamma"]}], ids=str)
@pytest.mark.parametrize("n_steps", [1, 9])
def test_launches_and_operators_of_a_step_that_can_be_captured(n_steps, arguments):
    operators, launched, stored = run(f"""
rb = buffer({n_steps}, slots=128, capturable=True, **{arguments!r})
frame = make_rollout((2,), 1)
for _ in range(3):
    rb.extend(frame), rb.sample(4)
driver.launches = 0
with Calls() as operators:
    rb.extend(frame)
stored, launched = len(operators.names), driver.launches
with Calls() as operators:
    rb.sample(4)
print(json.dumps([operators.names, [launched, driver.launches - launched], stored]))
""")
    assert launched == [1, 2]
    # The index is allocated, and frames are counted; views are no launches.
    assert stored == 2
    counts = Counter(operators)
    assert counts.pop("aten.uniform_.default") == 1
    assert counts.keys() == {"aten.empty.memory_format", "aten.empty_like.default"}


@pytest.mark.parametrize("frames", [1, 5, 8])
def test_launches_and_operators_of_storing(frames):
    """One launch, across the wrap too, and the allocation of the indices that are returned."""
    operators, launched = run(f"""
rb, data = buffer(slots=8, frames=8), make_rollout((2,), {frames})
rb.extend(data)
driver.launches = 0
with Calls() as operators:
    for _ in range(8):
        rb.extend(data)
print(json.dumps([operators.names, driver.launches]))
""")
    assert launched == 8
    assert Counter(operators) == {"aten.empty.memory_format": 8}
