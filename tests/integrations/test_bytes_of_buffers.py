"""What buffers take of memory is what is counted by hand, and what it was meant to come to."""

import gc
import types

import numpy as np
import pytest
import torch
from stable_baselines3.common.buffers import ReplayBuffer as PlainBuffer
from torchrl.data import LazyTensorStorage

from benchmarks import memory
from benchmarks.memory import BFLOAT16, COMPACT, FASTTD3, FULL, SB3, SB3_ONCE, TORCHRL
from multistep_triton import NStepReplayBuffer

SLOTS = 256
ROWS = SLOTS + SLOTS // 16 + 1
"""Of an observation that is kept once: one per slot, those of ends, and what comes after the newest frame."""
FLAGS, REWARD, INDEX, COUNT = 3, 4, 8, 4
HUMANOID, ACTION = 4 * (98 + 286), 4 * 29
MOTRIXLAB, PICTURES, CHOICE = 4 * (2412 + 1645), 4 * 84 * 84, 8


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(memory, "SLOTS", SLOTS)
    monkeypatch.setattr(memory, "CASES", [case._replace(envs=2) for case in memory.CASES])


def once(observations):
    return observations * ROWS / SLOTS + COUNT + INDEX


def of_vectors(observations):
    return {
        FULL: 2 * observations + ACTION + REWARD + FLAGS + INDEX,
        COMPACT: once(observations) + ACTION + REWARD + FLAGS,
        BFLOAT16: once(observations / 2) + ACTION / 2 + REWARD + FLAGS,
        TORCHRL: 2 * observations + ACTION + REWARD + FLAGS,
        SB3: 2 * observations + ACTION + REWARD + 2 * 4,
        SB3_ONCE: observations + ACTION + REWARD + 2 * 4,
        FASTTD3: 2 * observations + ACTION + REWARD + 2 * 8,
    }


EXPECTED = {
    "FastTD3, humanoid": of_vectors(HUMANOID),
    "MotrixLab": of_vectors(MOTRIXLAB),
    "Atari": {
        FULL: 2 * PICTURES + CHOICE + REWARD + FLAGS + INDEX,
        COMPACT: once(PICTURES) + CHOICE + REWARD + FLAGS,
        TORCHRL: 2 * PICTURES + CHOICE + REWARD + FLAGS,
        SB3: 2 * PICTURES + CHOICE + REWARD + 2 * 4,
        SB3_ONCE: PICTURES + CHOICE + REWARD + 2 * 4,
    },
}


def test_bytes_are_those_counted_by_hand():
    rows = memory.measure()
    for case, group in rows.groupby("case"):
        assert dict(zip(group["buffer"], group["bytes per transition"], strict=True)) == EXPECTED[case]
    assert rows["case"].nunique() == len(EXPECTED)
    assert rows.loc[rows["case"].eq("MotrixLab") & rows["buffer"].eq(FASTTD3)].iloc[0, -1] == pytest.approx(137, abs=1)


def test_observations_take_half_of_it_and_a_quarter_as_bfloat16():
    rows = memory.measure().set_index(["case", "buffer"])["this / NStepReplayBuffer"].unstack("buffer")
    assert rows[FULL].eq(1).all()
    assert rows[COMPACT].le(0.56).all()
    assert rows[BFLOAT16].dropna().le(0.3).tolist() == [True, True]


def reached_from(held):
    """Tensors and arrays that an object refers to, directly or through others."""
    found, seen, left = [], set(), [held]
    while left:
        each = left.pop()
        if id(each) in seen or isinstance(each, type | types.ModuleType | types.FunctionType):
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor | np.ndarray):
            found.append(each)
        else:
            left += gc.get_referents(each)
    return found


@pytest.mark.parametrize("arguments", [{}, {"compact": True}, {"compact": True, "store_as": memory.STORE_AS}], ids=len)
def test_a_buffer_holds_nothing_besides(arguments):
    case = memory.CASES[0]
    storage = LazyTensorStorage(case.envs * SLOTS, ndim=2)
    buffer = NStepReplayBuffer(n_steps=3, gamma=0.9, storage=storage, **arguments)
    buffer.extend(memory.frames(case))
    # torchrl's storages keep the slots that the last call has written.
    held = [each for each in reached_from(buffer) if each is not storage._last_cursor]
    assert memory.bytes_of(held) == memory.bytes_of(memory.ours(case, **arguments))


def test_memory_that_is_shared_counts_once():
    block = torch.zeros(10)
    assert memory.bytes_of([block[:2], block[5:], np.zeros(3, np.uint8)]) == 43


def test_single_steps_and_n_steps_are_stored_alike_by_stable_baselines3():
    case = memory.CASES[0]
    plain = PlainBuffer(case.envs * SLOTS, *memory.spaces_of(case), n_envs=case.envs)
    assert memory.bytes_of(memory.arrays_of(plain)) == memory.bytes_of(memory.stable_baselines3(case))


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    memory.main(["--out", str(tmp_path)])
    text = (tmp_path / "memory.md").read_text()
    assert capsys.readouterr().out == text
    assert [path.name for path in tmp_path.iterdir()] == ["memory.md"]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(memory.measure())
    assert "doesn't support optimize_memory_usage=True" in text
    memory.main(["--out", str(tmp_path)])
    assert (tmp_path / "memory.md").read_text() == text
