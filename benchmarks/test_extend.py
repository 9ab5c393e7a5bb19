"""The comparison's contenders, operations and gate on a few cases, for histories that pytest-benchmark keeps.

Run: ``pytest benchmarks --benchmark-only --benchmark-autosave``; then ``pytest-benchmark compare``.
"""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from benchmarks.cases import PIXELS, Case, make_rollout
from benchmarks.contenders import COMPILED, CONTENDERS, Contender, applies
from benchmarks.gate import check
from benchmarks.measure import memory_of

CASES = [
    Case("state", 1, 64, 0.0),
    Case("state", 256, 64, 0.1),
    Case("state", 1024, 128, 0.01),
    Case("state", 256, 64, 0.01, 1),
    Case("streaming", 4096, 1, 0.01),
    Case("pixels", 8, 64, 0.01, width=torch.Size(PIXELS).numel()),
    Case("sampling", 256, 16, 0.01, 3, 64, 2048),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request) -> Case:
    return request.param


@pytest.fixture(scope="module")
def rollout(case: Case) -> TensorDict:
    return make_rollout(case, "cuda" if torch.cuda.is_available() else "cpu")


# Compiling takes longer than all the rest; benchmarks.compare does it.
PARTIES = [(operation, c) for c in CONTENDERS if c.name != COMPILED for operation in c.operations]


@pytest.mark.parametrize(("operation", "contender"), PARTIES, ids=lambda party: getattr(party, "name", party))
@pytest.mark.benchmark(min_rounds=10, max_time=0.5, warmup=True, warmup_iterations=3)
def test_extend(benchmark, case: Case, rollout: TensorDict, operation: str, contender: Contender):
    if not applies(contender, operation, case):
        pytest.skip(f"not compared for {case.kind}")
    if reason := contender.obstacle(case, rollout.device):
        pytest.skip(reason)
    subject = contender.make(case, operation, rollout.device)
    errors = check(case, rollout, subject)
    assert errors.keys() <= set(contender.known_errors(case)), errors

    def call() -> None:
        subject.call(rollout)
        if rollout.is_cuda:
            torch.cuda.synchronize()

    benchmark.group = f"{operation}, {case}"
    benchmark.extra_info.update(case._asdict(), contender=contender.name, input_bytes=memory_of(rollout))
    benchmark(call)
