"""What the kernels' path costs on the host: Python per extend, with launches that go nowhere.

Usage: ``python -m benchmarks.host``; needs Triton and no GPU. Kernels are compiled for sm_90 and handed to a driver
that does not launch them, so that everything is timed up to the call of the driver's launcher.
"""

from __future__ import annotations

import platform
import sys
import timeit
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import stub_driver
import torch
import triton

from benchmarks.cases import GAMMA, Case, make_rollout
from benchmarks.measure import set_up
from multistep_triton import MultiStepTransform

CASE = Case("state", 1, 64, 0.0)
WARM_UP_CALLS = 5
REPEATS, CALLS = 15, 1000


def microseconds(call) -> str:
    times = sorted(timeit.repeat(call, number=CALLS, repeat=REPEATS))
    median, least, most = (times[i] / CALLS * 1e6 for i in (REPEATS // 2, 0, -1))
    return f"{median:4.0f} us ({least:.0f} to {most:.0f})"


def main() -> None:
    set_up()
    driver = stub_driver.install("sm_90")
    from multistep_triton.kernels import launch

    rollout = make_rollout(CASE)
    rollout["step_count"] = torch.zeros(CASE.envs, CASE.frames, 1, dtype=torch.int64)
    leaves = len(list(rollout.keys(True, True)))
    print(
        f"[{CASE.envs}, {CASE.frames}], {leaves} leaves; torch {torch.__version__}, Triton {triton.__version__}, "
        f"Python {platform.python_version()}; median of {REPEATS} x {CALLS} calls (least to most)"
    )
    for n_steps in (3, 10):
        call = partial(MultiStepTransform(n_steps, GAMMA, backend="triton")._inv_call, rollout)
        for _ in range(WARM_UP_CALLS):
            call()
        before = driver.launches
        call()
        print(f"n={n_steps}, launches: {driver.launches - before}")
        print(f"    an extend, all but the launcher of the driver  {microseconds(call)}")
        run, launch._run = launch._run, lambda *arguments: None
        print(f"    an extend without Triton                       {microseconds(call)}")
        launch._run = run


if __name__ == "__main__":
    main()
