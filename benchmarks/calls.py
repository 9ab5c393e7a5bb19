"""Where the time of a small call goes: the operators that it dispatches, and what is left without them.

Usage: ``python benchmarks/calls.py``. At [1, 64] a call moves 10 kB; what it costs is how many operators it runs.
"""

from __future__ import annotations

import timeit
from collections import Counter

import torch
from test_extend import GAMMA, Case, make_rollout, steady
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.envs.transforms import MultiStepTransform as TorchRLMultiStepTransform

from multistep_triton import MultiStepTransform, reference

CASE = Case(1, 64, 0.0)
REPEATS, CALLS = 15, 1000


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[str(function)] += 1
        return function(*args, **(kwargs or {}))


def microseconds(call) -> float:
    times = sorted(timeit.repeat(call, number=CALLS, repeat=REPEATS))
    return times[REPEATS // 2] / CALLS * 1e6


def main() -> None:
    torch.set_num_threads(2)
    rollout = make_rollout(CASE)
    print(f"{CASE}, torch {torch.__version__}, median of {REPEATS} x {CALLS} calls")
    for name, make in (("torchrl", TorchRLMultiStepTransform), ("multistep_triton", MultiStepTransform)):
        transform = steady(make(CASE.n_steps, GAMMA), rollout)
        with Operators() as operators:
            transform._inv_call(rollout)
        time = microseconds(lambda transform=transform: transform._inv_call(rollout))
        print(f"{name}: {time:.0f} us, {operators.names.total()} operators")
        for operator, calls in operators.names.most_common():
            print(f"    {calls:3d} {operator}")

    # With the reference's result at hand, what is left is reading and building tensordicts. The last transform is ours.
    compute, recorded = reference.n_step_extend_reference, []

    def record(*args, **kwargs):
        leaves, returns, *rest = compute(*args, **kwargs)
        recorded[:] = leaves.copy(), returns.copy(), *rest
        return leaves, returns, *rest

    def replay(*args, **kwargs):
        leaves, returns, *rest = recorded
        return leaves.copy(), returns.copy(), *rest

    reference.n_step_extend_reference = record
    transform._inv_call(rollout)
    reference.n_step_extend_reference = replay
    print(f"multistep_triton without the reference: {microseconds(lambda: transform._inv_call(rollout)):.0f} us")


if __name__ == "__main__":
    main()
