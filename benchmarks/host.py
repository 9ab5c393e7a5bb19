"""What a call costs on the host, with tiny tensors: Python, and on a GPU the launches, for which nobody waits.

Usage: ``python -m benchmarks.host [--device DEVICE] [--fasttd3 FILE]``; needs Triton. On ``cpu``, the default, kernels
are compiled for sm_90 and handed to a driver that does not launch them, so that everything is timed up to the call of
the driver's launcher; operators of torch run, on the CPU, whoever calls them. FILE is the ``fast_td3_utils.py`` of
https://github.com/younggyoseo/FastTD3, whose ``SimpleReplayBuffer`` is then timed, too.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import timeit
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import pandas as pd
import stub_driver
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer

from benchmarks.cases import GAMMA, Case, make_rollout
from benchmarks.machine import about, sentence
from benchmarks.measure import set_up
from multistep_triton import MultiStepTransform, NStepReplayBuffer

CASE = Case("state", 1, 64, 0.0)
ENVS, SLOTS, BATCH, N_STEPS = 4, 64, 8, 3
"""Of the replay step: one frame of every environment stored, one batch sampled."""
ASKED = ["observation", "action", "gamma", *(("next", key) for key in ("observation", "reward", "terminated"))]
WARM_UP_CALLS = 2 * SLOTS
ROUNDS, CALLS = 15, 300

Call = Callable[[], Any]


def microseconds(calls: dict[str, Call]) -> dict[str, list[float]]:
    """Of each call, sorted, in turns, so that what drifts on a machine hits all alike."""
    for call in calls.values():
        for _ in range(WARM_UP_CALLS):
            call()
    wait()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(timeit.timeit(call, number=CALLS) / CALLS * 1e6)
            wait()
    return {name: sorted(each) for name, each in times.items()}


def wait() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def transform_calls(device: str) -> dict[str, Call]:
    """Calls of the transform: of one T, and of one that changes every time."""
    rollout = make_rollout(CASE, device)
    rollout["step_count"] = torch.zeros(CASE.envs, CASE.frames, 1, dtype=torch.int64, device=device)
    calls: dict[str, Call] = {}
    for n_steps in (3, 10):
        inv = MultiStepTransform(n_steps, GAMMA, backend="triton")._inv_call
        calls[f"T=64, n={n_steps}"] = partial(inv, rollout)
    inv = MultiStepTransform(3, GAMMA, backend="triton")._inv_call
    cut = cycle([rollout[:, :frames].clone() for frames in range(32, 64)])
    calls["T=32 to 63 in turn, n=3"] = lambda: inv(next(cut))
    return calls


def frame(device: str) -> TensorDict:
    """One frame of every environment, of the keys of the state cases."""
    return make_rollout(Case("state", ENVS, 1, 0.01), device)


def buffers(device: str, fasttd3: Path | None) -> dict[str, tuple[Call, Call]]:
    """What stores a frame of every environment, and what samples a batch, of each buffer."""
    data, size = frame(device), ENVS * SLOTS
    ours: dict[str, dict[str, Any]] = {
        "NStepReplayBuffer, kernels": {"backend": "triton"},
        "the same, outputs=": {"backend": "triton", "outputs": ASKED},
        "the same, capturable=True": {"backend": "triton", "capturable": True},
        "the same, compact=True": {"backend": "triton", "compact": True},
    }
    if device == "cpu":
        ours["NStepReplayBuffer, CPU"] = {"backend": "reference"}
        ours["CPU, compact=True"] = {"backend": "reference", "compact": True}
    found: dict[str, Any] = {
        # Its TensorDictReplayBuffer cannot be extended by one frame of every environment.
        "torchrl, single steps": ReplayBuffer(storage=LazyTensorStorage(size, ndim=2, device=device), batch_size=BATCH)
    }
    for name, arguments in ours.items():
        storage = LazyTensorStorage(size, ndim=2, device=device)
        found[name] = NStepReplayBuffer(n_steps=N_STEPS, gamma=GAMMA, storage=storage, batch_size=BATCH, **arguments)
    steps: dict[str, tuple[Call, Call]]
    steps = {name: (partial(each.extend, data), each.sample) for name, each in found.items()}
    if device != "cpu":
        # All of the step is in the first call.
        steps["the same, in a CUDA graph"] = captured(found["the same, capturable=True"], data), lambda: None
    if fasttd3 is not None:
        steps["FastTD3, its own class"] = fasttd3_calls(fasttd3, data)
    return steps


def captured(buffer: NStepReplayBuffer, data: TensorDict) -> Call:
    """A step captured in a CUDA graph: what replays it."""
    for _ in range(3):
        buffer.extend(data), buffer.sample()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        buffer.extend(data), buffer.sample()
    replay: Call = graph.replay
    return replay


def fasttd3_calls(file: Path, data: TensorDict) -> tuple[Call, Call]:
    spec = importlib.util.spec_from_file_location("fast_td3_utils", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    observation, action = data["observation"][:, 0], data["action"][:, 0]
    sizes = ENVS, SLOTS, observation.shape[-1], action.shape[-1], 0
    buffer = module.SimpleReplayBuffer(*sizes, n_steps=N_STEPS, gamma=GAMMA, device=observation.device)
    rewards, dones = data["next", "reward"][:, 0, 0], torch.zeros(ENVS, dtype=torch.int64, device=observation.device)
    after = {"rewards": rewards, "dones": dones, "truncations": dones, "observations": observation}
    transition = TensorDict({"observations": observation, "actions": action, "next": after}, batch_size=[ENVS])
    return partial(buffer.extend, transition), partial(buffer.sample, BATCH // ENVS)


def launches(driver: stub_driver.StubDriver | None, *calls: Call) -> dict[str, str]:
    """A column of how many of our kernels each call launches; none where the driver is not ours to count with."""
    if driver is None:
        return {}
    counts = []
    for call in calls:
        before = driver.launches
        call()
        counts.append(str(driver.launches - before))
    return {"launches": " + ".join(counts)}


def table(rows: dict[str, dict[str, Any]]) -> str:
    return pd.DataFrame.from_dict(rows, orient="index").to_string(float_format="{:.2f}".format)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Host time per call.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda launches the kernels")
    parser.add_argument("--fasttd3", type=Path, metavar="FILE", help="the fast_td3_utils.py of FastTD3")
    options = parser.parse_args(arguments)
    set_up()
    machine = about(torch.device(options.device))
    driver = stub_driver.install("sm_90") if options.device == "cpu" else None
    transforms, steps = transform_calls(options.device), buffers(options.device, options.fasttd3)
    calls = {f"transform {name}": call for name, call in transforms.items()}
    for name, pair in steps.items():
        calls.update({f"{kind} {name}": call for kind, call in zip(("extend", "sample"), pair, strict=True)})
    found = microseconds(calls)
    median = {name: statistics.median(times) for name, times in found.items()}
    plain = [median[f"{kind} torchrl, single steps"] for kind in ("extend", "sample")]
    print(
        f"{sentence(machine)} Medians of {ROUNDS} x {CALLS} calls in turns, us.\n\n"
        f"MultiStepTransform, kernels, {[CASE.envs, CASE.frames]}, 8 leaves:"
    )
    print(
        table(
            {
                name: {
                    "call": median[f"transform {name}"],
                    "least": found[f"transform {name}"][0],
                    "most": found[f"transform {name}"][-1],
                    "over extend of torchrl's plain buffer": median[f"transform {name}"] / plain[0],
                    **launches(driver, call),
                }
                for name, call in transforms.items()
            }
        )
    )
    print(f"\nA replay step, {ENVS} environments, {SLOTS} slots, {BATCH} sampled, n={N_STEPS}:")
    rows: dict[str, dict[str, Any]] = {}
    for name, (extend, sample) in steps.items():
        both = [median[f"{kind} {name}"] for kind in ("extend", "sample")]
        rows[name] = {
            **dict(zip(("extend", "sample"), both, strict=True)),
            "both": sum(both),
            "both, least": sum(found[f"{kind} {name}"][0] for kind in ("extend", "sample")),
            "over torchrl's": sum(both) / sum(plain),
            **launches(driver, extend, sample),
        }
    print(table(rows))
    if driver is not None:
        print("\nLaunches are those of our kernels; the draw of a sample is one of torch's, and so is the number of")
        print("frames written, which capturable=True keeps on the device.")


if __name__ == "__main__":
    main()
