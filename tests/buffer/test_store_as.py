"""Entries stored as narrower dtypes: what is sampled is what came, rounded once."""

import copy
import pickle

import pytest
import torch
from paths import EITHER
from rings import Drawn, assert_same_bytes, kept_once, make_buffer, make_stream
from tensordict import lazy_stack
from torchrl.data import LazyMemmapStorage

from multistep_triton import NStepReplayBuffer

PAIRS = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float32),
    (torch.float64, torch.bfloat16),
    (torch.float64, torch.float16),
]
# The first two lie beside the middle between two halves, of eight and of eleven bits, by less than a float32 tells.
SPECIAL = [
    1 + 2**-8 + 2**-40,
    1 + 2**-11 + 2**-40,
    0.0,
    -0.0,
    torch.inf,
    -torch.inf,
    torch.nan,
    1e-40,
    3.3e38,
    1 / 3,
    65520.0,
    -1e-7,
]


def make_wide_stream(batch, frames, wide, width=6, **arguments):
    stream = make_stream(batch, frames, **arguments)
    observation = torch.randn(*batch, frames, width).double()
    # In the first call and in the last one.
    for each in (slice(len(SPECIAL)), slice(-len(SPECIAL), None)):
        observation.view(-1)[each] = torch.tensor(SPECIAL, dtype=torch.float64)
    stream["observation"] = observation.to(wide)
    stream["next", "observation"] = torch.randn(*batch, frames, width).to(wide)
    stream["action"] = torch.randn(*batch, frames, dtype=wide)
    return kept_once(stream)


def rounded(stream, narrow):
    """What comes out where all that is to be narrow was."""
    stream = stream.clone()
    for key in ("observation", "action", ("next", "observation")):
        stream[key] = stream[key].to(narrow).to(stream[key].dtype)
    return stream


def everything(buffer):
    sizes = buffer._order.entries().shape[: buffer._storage.ndim]
    index = torch.unravel_index(torch.arange(len(buffer), device=torch.get_default_device()), sizes)
    buffer.set_sampler(Drawn(index if len(sizes) > 1 else index[0]))
    return buffer.sample(len(buffer))


@EITHER
@pytest.mark.parametrize(("wide", "narrow"), PAIRS, ids=str)
@pytest.mark.parametrize(
    ("compact", "batch", "width"),
    [({}, (3,), 7), ({"compact": ["observation"], "end_slots": 6}, (2, 3), 8)],
    ids=["full", "compact"],
)
def test_what_is_sampled_is_what_came_rounded_once(where, wide, narrow, compact, batch, width):
    with where():
        stream, cuts = make_wide_stream(batch, 15, wide, width, p_done=0.3), [3, 3, 1, 7, 1]
        store_as = {"observation": narrow, "action": narrow}
        buffer, usual = make_buffer(6, batch, store_as=store_as, **compact), make_buffer(6, batch)
        for part, after in zip(stream.split(cuts, -1), rounded(stream, narrow).split(cuts, -1), strict=True):
            buffer.extend(part), usual.extend(after)
            sample, expected = everything(buffer), everything(usual)
            for key, leaf in expected.items(True, True):
                assert sample[key].dtype == leaf.dtype
                torch.testing.assert_close(sample[key], leaf, rtol=0, atol=0, equal_nan=True)
        stored = buffer.storage[:]
        assert stored["observation"].dtype == stored["action"].dtype == narrow
        if not compact:
            assert stored["next", "observation"].dtype == narrow
        assert buffer.store_as == store_as


@EITHER
@pytest.mark.parametrize("capturable", [False, True])
def test_calls_alike_are_verified(where, capturable):
    with where():
        stream = make_wide_stream((3,), 15, torch.float32)
        buffer = make_buffer(
            6, (3,), store_as={"observation": torch.bfloat16}, backend="verify", capturable=capturable, sampler=None
        )
        for part in stream.split(1, -1):
            buffer.extend(part)
        assert buffer.write_count == 15 and buffer.sample(4)["observation"].dtype == torch.float32


@pytest.mark.parametrize("dim", [0, 1])
def test_lazy_stacks(dim):
    stream, store_as = make_wide_stream((3,), 6, torch.float32), {"observation": torch.bfloat16}
    buffer, usual = (make_buffer(6, (3,), store_as=store_as) for _ in range(2))
    buffer.extend(lazy_stack([*stream.unbind(dim)], dim)), usual.extend(stream)
    for key, leaf in everything(usual).items(True, True):
        assert_same_bytes(everything(buffer)[key], leaf, key)


@pytest.mark.parametrize("way", ["state", "dumps", "copy", "pickle", "memmap"])
def test_saved_and_loaded(way, tmp_path):
    def make():
        storage = {"storage": LazyMemmapStorage} if way == "memmap" else {}
        return make_buffer(8, (3,), store_as={"observation": torch.bfloat16}, **storage)

    stream, buffer = make_wide_stream((3,), 20, torch.float64), make()
    for part in stream[:, :12].split([5, 5, 2], -1):
        buffer.extend(part)
    other = make()
    if way == "state":
        other.load_state_dict(copy.deepcopy(buffer.state_dict()))
    elif way in ("dumps", "memmap"):
        buffer.dumps(tmp_path), other.loads(tmp_path)
    else:
        other = copy.deepcopy(buffer) if way == "copy" else pickle.loads(pickle.dumps(buffer))
    for part in stream[:, 12:].split([1, 1, 6], -1):
        buffer.extend(part), other.extend(part)
        one, two = everything(buffer), everything(other)
        assert one["observation"].dtype == torch.float64
        for key, leaf in one.items(True, True):
            assert torch.equal(leaf.nan_to_num(), two[key].nan_to_num()), key


def test_a_captured_step_and_what_is_asked_for():
    stream = make_wide_stream((3,), 20, torch.float32)
    store_as = {"observation": torch.float16}
    buffer = make_buffer(8, (3,), store_as=store_as, capturable=True, sampler=None, outputs=["observation", "index"])
    for part in stream.split([5, 5, 5, 5], -1):
        buffer.extend(part)
    sample = buffer.sample(32)
    at = sample["index"].unbind(-1)
    assert sample["observation"].dtype == torch.float32
    stored = buffer.storage[:]["observation"][at].float()
    torch.testing.assert_close(sample["observation"], stored, rtol=0, atol=0, equal_nan=True)


def test_single_frames_and_an_entry_under_next_alone():
    stream = make_wide_stream((3,), 6, torch.float32)
    buffer = make_buffer(8, (3,), store_as={("next", "observation"): torch.bfloat16})
    for frame in stream.unbind(-1):
        buffer.add(frame)
    stored = buffer.storage[:]
    assert stored["observation"].dtype == torch.float32 and stored["next", "observation"].dtype == torch.bfloat16
    assert everything(buffer)["next", "observation"].dtype == torch.float32


@pytest.mark.parametrize(
    ("store_as", "error", "message"),
    [
        ({"reward": torch.bfloat16}, ValueError, "that are no rewards, got .*reward"),
        ({("next", "done"): torch.bfloat16}, ValueError, "that are no rewards, got .*done"),
        ({"number": torch.bfloat16}, ValueError, "wider floating dtypes.*number.*int64"),
        ({"action": torch.float32}, ValueError, "wider floating dtypes.*action.*float32"),
        ({"nothing": torch.bfloat16}, KeyError, "must name entries of the data, got .*nothing"),
        ({"action": torch.int8}, ValueError, "must have dtypes of .*float16.*got .*int8"),
        (["action"], TypeError, "must be a dict"),
    ],
    ids=str,
)
def test_what_cannot_be_narrow_is_refused_before_anything_is_stored(store_as, error, message):
    with pytest.raises(error, match=message):
        buffer = make_buffer(8, (3,), store_as=store_as)
        try:
            buffer.extend(make_wide_stream((3,), 4, torch.float32))
        finally:
            assert not len(buffer)


def test_data_of_another_dtype_than_came_before():
    buffer = make_buffer(8, (3,), store_as={"observation": torch.bfloat16})
    buffer.extend(make_wide_stream((3,), 4, torch.float64))
    before = everything(buffer)
    with pytest.raises(ValueError, match="must be that of what is stored, whose entries came as"):
        buffer.extend(make_wide_stream((3,), 4, torch.float32))
    with pytest.raises(KeyError, match=r"data must hold \('next', 'observation'\), got the entries"):
        buffer.extend(make_wide_stream((3,), 4, torch.float64).exclude(("next", "observation")))
    assert torch.equal(everything(buffer)["number"], before["number"])
    other = NStepReplayBuffer(n_steps=1, gamma=1.0, storage=buffer.storage)
    assert other.sample(3)["observation"].dtype == torch.float64
