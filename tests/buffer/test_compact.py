"""Observations kept once: what is sampled is what a buffer that keeps them twice samples, or one frame less."""

import pytest
import torch
from paths import EITHER
from rings import TRAJ_KEY, Drawn, Ring, assert_same_bytes, make_buffer, make_stream

KEPT_ONCE = ["observation"]


def kept_once(stream, keys=("observation",), *, done_keys=("done",), traj_key=None):
    """A stream in which what comes after a frame is what the next one holds, but at ends."""
    ring = Ring(stream, 1, done_keys=done_keys, traj_key=traj_key)
    ring.written = ring.length
    ended = torch.tensor([ring.is_boundary(number) for number in range(stream.numel())]).view(stream.batch_size)
    for key in keys:
        root, after = stream[key], stream["next"][key]
        there = ended.view(*ended.shape, *[1] * (root.ndim - ended.ndim))
        stream["next"][key] = torch.where(there, after, root.roll(-1, stream.ndim - 1))
    return stream


def window(ring, number, n_steps, end_slots):
    """The window of a frame, or of the one that stands for it, where ends have lost what comes after them."""
    env, length = number // ring.length, ring.length
    there = [each for each in ring.numbers() if each // length == env]
    ends = [each for each in there if ring.is_boundary(each) and not ring.is_newest(each)]
    gone = set(ends[: max(len(ends) - end_slots, 0)])
    if number in gone:
        before = number - 1
        number = there[-1] if before not in there or before in ends else before
    frames = ring.window(number, n_steps)
    return frames[:-1] if frames[-1] in gone and len(frames) > 1 else frames


def assert_kept_once(buffer, full, ring, end_slots):
    """Every frame that is there is sampled, of its window or that of the frame that stands for it."""
    index = torch.arange(len(buffer), device=torch.get_default_device())
    sizes = buffer._order.entries().shape[: buffer._storage.ndim]
    index = torch.unravel_index(index, sizes) if len(sizes) > 1 else (index,)
    index = index if len(sizes) > 1 else index[0]
    buffer.set_sampler(Drawn(index)), full.set_sampler(Drawn(index))
    sample, expected = buffer.sample(len(buffer)), full.sample(len(buffer))
    assert set(sample.keys(True, True)) == set(expected.keys(True, True))
    stream, n_steps = ring.stream.reshape(-1), buffer.n_steps
    windows = [window(ring, number, n_steps, end_slots) for number in expected["number"].tolist()]
    own, ends = (torch.tensor([each[at] for each in windows]) for at in (0, -1))
    for key, leaf in stream.items(True, True):
        if key[0] != "next":
            assert_same_bytes(sample[key], leaf[own], key)
        elif key[-1] != "reward":
            assert_same_bytes(sample[key], leaf[ends], key)
    assert sample["steps_to_next_obs"].tolist() == [len(each) for each in windows]
    whole = [ring.window(number, n_steps) for number in expected["number"].tolist()]
    same = torch.tensor([one == other for one, other in zip(windows, whole, strict=True)])
    for key, leaf in expected.items(True, True):
        torch.testing.assert_close(sample[key][same], leaf[same], rtol=0, atol=0, equal_nan=True)
    rewards = stream["next", "reward"].flatten().double().tolist()
    sums = [sum(buffer.gamma**i * rewards[frame] for i, frame in enumerate(each)) for each in windows]
    torch.testing.assert_close(sample["next", "reward"].flatten(), torch.tensor(sums).float())
    return same


@EITHER
@pytest.mark.parametrize(
    ("batch", "end_slots", "marks"),
    [
        ((), 12, {}),
        ((), 1, {"mask": True, "traj": True}),
        ((3,), 12, {"mask": True}),
        ((3,), 2, {}),
        ((2, 3), 3, {"traj": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("cuts", [[1] * 30, [5, 7, 12, 3, 1, 1], [11, 11, 3], [20, 1, 1, 13], [1, 3]], ids=str)
def test_what_is_sampled_is_what_another_buffer_samples(where, batch, cuts, end_slots, marks):
    with where():
        traj = TRAJ_KEY if "traj" in marks else None
        stream = kept_once(make_stream(batch, 40, p_done=0.3, **marks), traj_key=traj)
        ring = Ring(stream, 12, traj_key=traj)
        buffer = make_buffer(12, batch, compact=KEPT_ONCE, end_slots=end_slots)
        full = make_buffer(12, batch)
        for frames in cuts:
            part = ring.take(frames)
            assert torch.equal(buffer.extend(part), full.extend(part))
            same = assert_kept_once(buffer, full, ring, end_slots)
            lost = buffer.ends_lost()
            assert (lost == 0) == bool(same.all())
        assert ("next", "observation") not in buffer.storage[:].keys(True, True)
