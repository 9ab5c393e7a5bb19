"""What a CUDA graph of a replay step would hold, without a GPU: its operators and launches, recorded and repeated.

For a process in which Triton is not interpreted. A graph holds launches with their arguments, and memory that it keeps;
so a step is recorded once, and then only its launches, and its operators that write, are repeated, without Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ptx_driver
import torch
from rings import Drawn
from tensordict import TensorDict
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.data import LazyTensorStorage

from multistep_triton import NStepReplayBuffer

ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided"}
WRITES = {"aten::uniform_", "aten::add_"}
ENVS, SLOTS, BATCH, N_STEPS, GAMMA = 3, 8, 16, 3, 0.9
SIZE = ENVS * SLOTS


class Step(TorchDispatchMode):
    """Records what happens within: launches of the driver, and operators, of which no other than these may be."""

    def __init__(self, driver: Any) -> None:
        super().__init__()
        self.driver, self.execute = driver, driver.execute
        self.did: list[tuple[Any, ...]] = []
        self.memory: list[torch.Tensor] = []

    def __enter__(self) -> Step:
        self.driver.execute = self._launch
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.driver.execute = self.execute
        super().__exit__(*error)

    def _launch(self, src: Any, grid: tuple[int, ...], arguments: list[float]) -> None:
        self.did.append((self.execute, (src, grid, arguments), {}))
        self.execute(src, grid, arguments)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, out = func._schema.name, func(*args, **(kwargs or {}))
        if name in ALLOCATIONS:
            self.memory.append(out)
        elif name in WRITES:
            self.did.append((func, args, kwargs or {}))
        else:
            assert func.is_view, f"{func} in a captured step"
        return out

    def repeat(self) -> None:
        """Does it again."""
        for function, args, kwargs in self.did:
            function(*args, **kwargs)

    def launches(self) -> int:
        return sum(function == self.execute for function, *_ in self.did)

    def same(self) -> list[Any]:
        """What must be the same in every step: memory of its own is named in the order in which it was asked for."""
        return [self._named(args if function == self.execute else (function, *args)) for function, args, _ in self.did]

    def _named(self, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return [self._named(each) for each in value]
        address = value.data_ptr() if isinstance(value, torch.Tensor) else value
        for k, memory in enumerate(self.memory):
            if isinstance(address, int) and 0 <= address - memory.data_ptr() < max(memory.nbytes, 1):
                return "memory", k, address - memory.data_ptr()
        return address if isinstance(address, int | float) else str(type(address))


def frames() -> TensorDict:
    """What environments write their frames into."""
    reward = torch.zeros(ENVS, 1, 1)
    group = {
        "observation": torch.zeros(ENVS, 1, 3),
        "reward": reward,
        "done": reward.bool(),
        "terminated": reward.bool(),
    }
    return TensorDict({"observation": torch.zeros(ENVS, 1, 3), "next": group}, batch_size=[ENVS, 1])


def stream(data: TensorDict, seed: int = 0) -> Iterator[int]:
    """Writes frame after frame of a stream into the data."""
    generator, number = torch.Generator().manual_seed(seed), 0
    while True:
        value = number + torch.arange(ENVS).view(ENVS, 1, 1) / 4
        data["observation"].copy_(value.expand(ENVS, 1, 3))
        data["next", "observation"].copy_((value + 1).expand(ENVS, 1, 3))
        data["next", "reward"].copy_(value)
        terminated = torch.rand(ENVS, 1, 1, generator=generator) < 0.15
        data["next", "terminated"].copy_(terminated)
        data["next", "done"].copy_(terminated | (torch.rand(ENVS, 1, 1, generator=generator) < 0.1))
        # What comes after an end no other frame holds.
        data["next", "observation"].sub_(1e4 * data["next", "done"])
        yield number
        number += 1


def make(capturable: bool, **arguments: Any) -> NStepReplayBuffer:
    storage = LazyTensorStorage(SIZE, ndim=2)
    arguments = {"n_steps": N_STEPS, "gamma": GAMMA, "storage": storage, "batch_size": BATCH, **arguments}
    return NStepReplayBuffer(**arguments, capturable=capturable)


def assert_same(sample: TensorDict, usual: NStepReplayBuffer, captured: NStepReplayBuffer) -> None:
    """The storages hold the same, and of the same draws the same is sampled, bit for bit but for sums of rewards."""
    assert len(usual) == len(captured)
    # What lies in slots that were never written nobody knows.
    stored = usual[:]
    for key, leaf in captured[:].items(True, True):
        assert torch.equal(leaf, stored[key]), key
    usual._sampler = Drawn(sample["index"].unbind(-1))
    expected = usual.sample(BATCH)
    assert set(sample.keys(True, True)) == set(expected.keys(True, True))
    for key, leaf in expected.items(True, True):
        torch.testing.assert_close(sample[key], leaf, rtol=1e-6 if key == ("next", "reward") else 0, atol=0)


def steps_are_the_same(driver: Any, steps: int = 3 * SLOTS, **arguments: Any) -> None:
    """Every step makes the same launches with the same arguments, whether slots are free, or the ring begins anew."""
    data, buffer = frames(), make(True, backend="triton", **arguments)
    number, did = stream(data), []
    # The first calls find out what later ones know.
    for _ in range(2):
        next(number)
        buffer.extend(data)
        buffer.sample()
    for _ in range(steps):
        next(number)
        step = Step(driver)
        with step:
            buffer.extend(data)
            buffer.sample()
        did.append(step.same())
        assert step.launches() == 3
    assert all(each == did[0] for each in did)
    # One of a sample that draws its own n, and that leaves out what nobody asks for.
    assert len(buffer) == SIZE


def repeated(driver: Any, steps: int, every: int, compact: bool = False, **arguments: Any) -> None:
    """A step that was recorded once is repeated: what lies in the storage, and what is sampled, is what should."""
    kept_once = {"compact": True, "end_slots": SLOTS} if compact else {}
    data, captured = frames(), make(True, backend="triton", **arguments, **kept_once)
    usual = make(False, backend="reference", **arguments)
    number = stream(data)

    def store(extend: Callable[[], Any]) -> None:
        next(number)
        usual.extend(data.clone())
        extend()

    for _ in range(2):
        store(lambda: captured.extend(data))
    sample = captured.sample()
    step = Step(driver)

    def record() -> None:
        nonlocal sample
        with step:
            captured.extend(data)
            sample = captured.sample()

    store(record)
    assert_same(sample, usual, captured)
    for k in range(steps):
        store(step.repeat)
        if k % every == 0 or k < 2 * SLOTS:
            assert_same(sample, usual, captured)
    assert_same(sample, usual, captured)


def main(how: str, steps: int, every: int) -> None:
    driver = ptx_driver.install_as(how)
    driver.counted = driver.checked = False
    steps_are_the_same(driver), steps_are_the_same(driver, compact=True)
    repeated(driver, steps, every)
    repeated(driver, 5 * SLOTS, 1, compact=True)
    repeated(driver, 2 * SLOTS, 1, outputs=["observation", ("next", "observation"), ("next", "reward"), "index"])
