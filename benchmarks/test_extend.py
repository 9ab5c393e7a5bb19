"""One call of the transform in steady state (n frames carried over), beside torchrl's and one clone of its input.

Run: ``pytest benchmarks --benchmark-only --benchmark-json=FILE``, then ``python benchmarks/table.py FILE``.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.transforms import MultiStepTransform as TorchRLMultiStepTransform
from torchrl.envs.transforms import Transform

from multistep_triton import MultiStepTransform

GAMMA = 0.99
WARMUP_CALLS = 5


class Case(NamedTuple):
    envs: int
    frames: int
    p_done: float
    n_steps: int = 3
    pixels: bool = False

    def __str__(self) -> str:
        kind = " pixels uint8[4, 84, 84]" if self.pixels else ""
        return f"{self.envs}x{self.frames}{kind} p(done)={self.p_done} n={self.n_steps}"


CASES = [
    Case(1024, 128, 0.0),
    Case(1024, 128, 0.01),
    Case(1024, 128, 0.1),
    Case(4096, 32, 0.01),
    Case(256, 64, 0.1),
    Case(1, 64, 0.0),
    Case(4096, 1, 0.01),
    Case(8, 64, 0.01, pixels=True),
]


def make_rollout(case: Case) -> TensorDict:
    """observation f32[17] (or pixels), action f32[6], next.observation, next.reward, done, terminated, truncated."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.envs, case.frames)

    def observation() -> torch.Tensor:
        if case.pixels:
            return torch.randint(256, (*shape, 4, 84, 84), dtype=torch.uint8, generator=generator)
        return torch.randn(*shape, 17, generator=generator)

    done = torch.rand(*shape, 1, generator=generator) < case.p_done
    return TensorDict(
        {
            "observation": observation(),
            "action": torch.randn(*shape, 6, generator=generator),
            "next": {
                "observation": observation(),
                "reward": torch.randn(*shape, 1, generator=generator),
                "done": done,
                "terminated": done.clone(),
                "truncated": torch.zeros_like(done),
            },
        },
        batch_size=shape,
    )


def check(case: Case, rollout: TensorDict) -> None:
    """The gate before any timing: what is about to be timed computes the same thing."""
    ours, theirs = MultiStepTransform(case.n_steps, GAMMA), TorchRLMultiStepTransform(case.n_steps, GAMMA)
    for _ in range(WARMUP_CALLS):
        out, expected = ours._inv_call(rollout), theirs._inv_call(rollout)
    for key in expected.keys(True, True):
        if key in ("gamma", ("next", "reward")):
            torch.testing.assert_close(out[key], expected[key])
        else:
            assert torch.equal(out[key], expected[key]), key


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request) -> Case:
    return request.param


@pytest.fixture(scope="module")
def rollout(case: Case) -> TensorDict:
    rollout = make_rollout(case)
    check(case, rollout)
    return rollout


def steady(transform: Transform, rollout: TensorDict) -> Transform:
    for _ in range(WARMUP_CALLS):
        transform._inv_call(rollout)
    return transform


@pytest.mark.parametrize("contender", ["clone of the input", "multistep_triton", "torchrl"])
@pytest.mark.benchmark(min_rounds=30, max_time=1.0, warmup=True, warmup_iterations=10)
def test_extend(benchmark, case, rollout, contender):
    benchmark.group = str(case)
    benchmark.extra_info.update(case._asdict(), contender=contender, input_bytes=rollout.bytes())
    if contender == "clone of the input":
        benchmark(rollout.clone)
    else:
        make = {"multistep_triton": MultiStepTransform, "torchrl": TorchRLMultiStepTransform}[contender]
        benchmark(steady(make(case.n_steps, GAMMA), rollout)._inv_call, rollout)
