"""n-step transitions at sampling time, against plain loops over the frames that are in the ring."""

import math

import pytest
import torch
from baselines import Peers, without_both
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import Calls
from paths import kernels
from rings import (
    TRAJ_KEY,
    Ring,
    assert_every_frame,
    assert_same_bytes,
    assert_sampled,
    assert_windows,
    everything,
    in_order,
    make_buffer,
    make_stream,
)
from rollouts import frames
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer

from multistep_triton import MultiStepTransform

F, T = False, True


# Numbers worked out by hand


def ring_of_eight(cuts, done=(), **arguments):
    """Frames 0 .. 11 in a ring of 8, rewards and observations counting from 0, next observations from 1."""
    buffer = make_buffer(8, **{"gamma": 1.0, **arguments})
    written = 0
    data = frames([float(t) for t in range(12)], [t in done for t in range(12)])
    for cut in cuts:
        buffer.extend(data[written : written + cut])
        written += cut
    return buffer


def by_frame(sample, *keys):
    """Each frame's values, by the frame."""
    columns = [sample[key].flatten().tolist() for key in keys]
    return dict(zip(sample["observation"].tolist(), zip(*columns, strict=True), strict=True))


REWARD, NEXT, DONE = ("next", "reward"), ("next", "observation"), ("next", "done")


@pytest.mark.parametrize("cuts", [[12], [8, 4], [5, 7], [3, 3, 3, 3], [11, 1]], ids=str)
def test_the_newest_frames_end_at_the_seam(cuts, size):
    sample = everything(ring_of_eight(cuts), size)
    assert by_frame(sample, REWARD, NEXT, "steps_to_next_obs", "nonterminal") == {
        4: (4 + 5 + 6, 7, 3, T),
        5: (5 + 6 + 7, 8, 3, T),
        6: (6 + 7 + 8, 9, 3, T),
        7: (7 + 8 + 9, 10, 3, T),
        8: (8 + 9 + 10, 11, 3, T),
        9: (9 + 10 + 11, 12, 3, T),
        10: (10 + 11, 12, 2, T),
        11: (11, 12, 1, F),
    }


def test_the_seam_moves_with_every_frame(size):
    buffer = ring_of_eight([8, 4], gamma=0.5)
    assert by_frame(everything(buffer, size), REWARD, "gamma")[11] == (11, 0.5)
    assert by_frame(everything(buffer, size), REWARD, "gamma")[10] == (10 + 11 / 2, 0.25)
    buffer.extend(frames([12.0], [False]).apply(lambda leaf: leaf if leaf.ndim > 1 else leaf + 12))
    sample = by_frame(everything(buffer, size), REWARD, NEXT, "steps_to_next_obs")
    assert set(sample) == set(range(5, 13))
    assert sample[10] == (10 + 11 / 2 + 12 / 4, 13, 3)
    assert sample[11] == (11 + 12 / 2, 13, 2)
    assert sample[12] == (12, 13, 1)
    assert sample[5] == (5 + 6 / 2 + 7 / 4, 8, 3)


def test_windows_end_at_done(size):
    sample = everything(ring_of_eight([7, 5], done=[5, 9]), size)
    assert by_frame(sample, REWARD, NEXT, DONE, ("next", "done_orig"), "nonterminal") == {
        4: (4 + 5, 6, T, F, T),
        5: (5, 6, T, T, F),
        6: (6 + 7 + 8, 9, F, F, T),
        7: (7 + 8 + 9, 10, T, F, T),
        8: (8 + 9, 10, T, F, T),
        9: (9, 10, T, T, F),
        10: (10 + 11, 12, F, F, T),
        11: (11, 12, F, F, F),
    }


def test_a_ring_that_is_not_full(size):
    buffer = ring_of_eight([2, 3])
    sample = everything(buffer, size)
    assert by_frame(sample, REWARD, NEXT) == {0: (3, 3), 1: (6, 4), 2: (9, 5), 3: (7, 5), 4: (4, 5)}
    sample = everything(buffer, size, n_steps=10**12)
    assert by_frame(sample, REWARD) == {0: (10,), 1: (10,), 2: (9,), 3: (7,), 4: (4,)}
    assert by_frame(everything(buffer, size, n_steps=1), REWARD) == {t: (t,) for t in range(5)}


def test_a_window_as_long_as_the_ring(size):
    buffer = ring_of_eight([12], n_steps=8)
    assert by_frame(everything(buffer, size), REWARD, NEXT) == {t: (sum(range(t, 12)), 12) for t in range(4, 12)}


def test_n_steps_of_one_is_what_was_stored():
    buffer = ring_of_eight([12], n_steps=1, gamma=0.25, done=[9])
    sample = by_frame(everything(buffer), REWARD, NEXT, DONE, "gamma", "nonterminal")
    assert sample == {t: (t, t + 1, t == 9, 0.25, t not in (9, 11)) for t in range(4, 12)}


def test_done_at_start():
    sample = everything(ring_of_eight([12], done=[9], done_at="start"))
    assert by_frame(sample, DONE) == {t: (t == 9,) for t in range(4, 12)}
    assert ("next", "done_orig") not in sample.keys(True)


def test_a_change_of_trajectory_is_a_boundary(size):
    buffer = make_buffer(8, gamma=1.0, traj_key="traj")
    traj = torch.tensor([0, 0, 0, 0, 0, 3, 3, 3, 1, 1, 1, 1])
    buffer.extend(frames([float(t) for t in range(12)], [False] * 12, traj=traj))
    assert by_frame(everything(buffer, size), REWARD, NEXT, "nonterminal") == {
        4: (4, 5, F),
        5: (5 + 6 + 7, 8, T),
        6: (6 + 7, 8, T),
        7: (7, 8, F),
        8: (8 + 9 + 10, 11, T),
        9: (9 + 10 + 11, 12, T),
        10: (10 + 11, 12, T),
        11: (11, 12, F),
    }


def test_padding_is_read_by_no_window(size):
    buffer = make_buffer(8, gamma=1.0)
    mask = torch.tensor([t not in (6, 7, 11) for t in range(12)])
    buffer.extend(frames([float(t) for t in range(12)], [False] * 12, mask=mask))
    assert by_frame(everything(buffer, size), REWARD, NEXT, "nonterminal") == {
        4: (4 + 5, 6, T),
        5: (5, 6, F),
        6: (6, 7, F),
        7: (7, 8, F),
        8: (8 + 9 + 10, 11, T),
        9: (9 + 10, 11, T),
        10: (10, 11, F),
        11: (11, 12, F),
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_behind_a_boundary_and_the_seam(value, size):
    buffer = make_buffer(8, gamma=1.0)
    # 4 and 5 are the oldest frames, in the slots after the newest; 8 follows a done
    rewards = [value if t in (4, 5, 8) else float(t) for t in range(12)]
    data = frames(rewards, [t == 7 for t in range(12)])
    data["next", "value"] = data["next", "reward"].squeeze(-1).clone()
    buffer.extend(data[:8]), buffer.extend(data[8:])
    sample = everything(buffer, size)
    returns = by_frame(sample, REWARD)
    assert {t: returns[t] for t in (6, 7, 9, 10, 11)} == {6: (13,), 7: (7,), 9: (30,), 10: (21,), 11: (11,)}
    assert not any(math.isfinite(*returns[t]) for t in (4, 5, 8))
    # the value at the end of the window, and no other
    values = by_frame(sample, ("next", "value"))
    assert {t: values[t] for t in (4, 5, 6, 7, 8, 9, 10, 11)} == {
        **{4: (6,), 5: (7,), 6: (7,), 7: (7,)},
        **{8: (10,), 9: (11,), 10: (11,), 11: (11,)},
    }


def test_an_unwritten_slot_is_never_read():
    buffer = make_buffer(8, gamma=1.0)
    buffer.extend(frames([math.nan] * 8, [False] * 8))
    buffer.empty()
    buffer.extend(frames([0.0, 1.0, 2.0], [False] * 3))
    assert by_frame(everything(buffer), REWARD, NEXT) == {0: (3, 3), 1: (3, 3), 2: (2, 3)}


# Any stream, ring and window, against the loops


@st.composite
def runs(draw, most_slots=14):
    """A ring, a stream of frames, how it is cut into calls, and the arguments of the buffer."""
    capacity = draw(st.integers(1, most_slots))
    cuts = draw(st.lists(st.integers(1, 2 * most_slots), min_size=1, max_size=4))
    traj, mask = draw(st.booleans()), draw(st.booleans())
    stream = make_stream(
        draw(st.sampled_from([(), (1,), (3,), (2, 2)])),
        sum(cuts),
        p_done=draw(st.sampled_from([0.0, 0.1, 0.4, 2.0])),
        traj=traj,
        mask=mask,
        seed=draw(st.integers(0, 2**16)),
    )
    low = draw(st.integers(1, capacity))
    arguments = {
        "n_steps": draw(st.one_of(st.just(low), st.tuples(st.just(low), st.integers(low, capacity)))),
        "gamma": draw(st.sampled_from([0.0, 0.5, 0.99, 1.0])),
        "done_at": draw(st.sampled_from(["start", "end"])),
        "traj_key": TRAJ_KEY if traj and draw(st.booleans()) else None,
    }
    return capacity, stream, cuts, arguments, draw(st.one_of(st.none(), st.integers(1, 6)))


def check_run(capacity, stream, cuts, arguments, size=None, *, every=True):
    """Checks every frame after every call, or after the last one alone."""
    ring = Ring(stream, capacity, traj_key=arguments["traj_key"])
    buffer = make_buffer(capacity, stream.batch_size[:-1], **arguments)
    for i, cut in enumerate(cuts, 1):
        buffer.extend(ring.take(cut))
        if every or i == len(cuts):
            assert_every_frame(buffer, ring, size=size, done_at=arguments["done_at"])


@given(runs())
def test_every_frame_is_the_loop_after_every_call(run):
    check_run(*run)


@settings(max_examples=settings().max_examples // 40)
@given(runs(most_slots=5))
def test_every_frame_is_the_loop_with_the_kernels(run):
    capacity, stream, *others = run
    with kernels():
        check_run(capacity, stream.to(torch.get_default_device()), *others[:2], every=False)


CASES = {
    "not full": ((), 9, [3, 4], 3),
    "wrapped": ((2,), 5, [3, 3, 3], 3),
    "calls longer than the ring": ((2,), 4, [11, 9], 2),
    "windows as long as the ring": ((2,), 4, [3, 3], 4),
    "one slot": ((3,), 1, [2, 1], 1),
    "three dimensions": ((2, 2), 4, [3, 3], (1, 4)),
    "a loop of steps": ((), 24, [20, 15], 12),
    "a pair": ((2,), 12, [10, 9], (2, 11)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("marks", [{}, {"traj": True, "mask": True}], ids=["done", "marks"])
def test_kinds_of_rings(case, marks, size):
    batch, capacity, cuts, n_steps = CASES[case]
    stream = make_stream(batch, sum(cuts), p_done=0.1, **marks)
    traj_key = TRAJ_KEY if marks else None
    arguments = {"n_steps": n_steps, "gamma": 0.99, "done_at": "end", "traj_key": traj_key}
    check_run(capacity, stream, cuts, arguments, size, every=False)


def test_both_at_once_agree():
    with kernels():
        ring = Ring(make_stream((2,), 13, traj=True), 8, traj_key=TRAJ_KEY)
        buffer = make_buffer(8, (2,), backend="verify", traj_key=TRAJ_KEY)
        buffer.extend(ring.take(6)), buffer.extend(ring.take(7))
        assert_every_frame(buffer, ring)


@settings(max_examples=settings().max_examples // 4)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 5))
def test_the_cuts_make_no_difference(cuts, n_steps):
    stream = make_stream((2,), sum(cuts))
    samples = []
    for schedule in (cuts, [1] * sum(cuts)):
        ring, buffer = Ring(stream, 7), make_buffer(7, (2,), n_steps=n_steps)
        for cut in schedule:
            buffer.extend(ring.take(cut))
        samples.append(in_order(everything(buffer)).exclude("index"))
    one, other = samples
    for key in one.keys(True, True):
        assert_same_bytes(one[key], other[key], key)


# Beside others


def pass_through(rollout, cut, n_steps, capacity):
    """The frames that both buffers hold after calls of ``cut`` frames: windows made on sampling, and on extend."""
    size = rollout.batch_size[:-1].numel() * capacity
    ours = make_buffer(capacity, rollout.batch_size[:-1], n_steps=n_steps, traj_key=TRAJ_KEY)
    theirs = TensorDictReplayBuffer(
        storage=LazyTensorStorage(size, ndim=rollout.ndim, device=torch.get_default_device()),
        sampler=SamplerWithoutReplacement(shuffle=False),
        transform=MultiStepTransform(n_steps, 0.9, done_at="end", traj_key=TRAJ_KEY),
    )
    for part in rollout.split(cut, -1):
        ours.extend(part)
    for part in rollout.split(10, -1):
        theirs.extend(part)
    one, other = in_order(everything(ours)), in_order(everything(theirs))
    mine, their = set(one["number"].tolist()), set(other["number"].tolist())
    one, other = (sample[[number in mine & their for number in sample["number"].tolist()]] for sample in (one, other))
    return one, other


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("n_steps", [1, 3, 7])
@pytest.mark.parametrize("cut", [1, 4, 10])
def test_equal_to_what_the_transform_stores(batch, n_steps, cut):
    rollout = make_stream(batch, 40, traj=True, mask=True, seed=n_steps)
    one, other = pass_through(rollout, cut, n_steps, 16)
    # the transform's has n more old frames in place of the n newest
    assert len(one) == torch.Size(batch).numel() * (16 - n_steps)
    assert set(one.keys(True, True)) == set(other.keys(True, True))
    for key in set(one.keys(True, True)) - {"index", REWARD}:
        assert_same_bytes(one[key], other[key], key)
    # sums of the same terms, perhaps in another order
    magnitude = n_steps * rollout["next", "reward"].abs().max()
    error = (one[REWARD] - other[REWARD]).abs().max()
    assert error <= 3 * n_steps * torch.finfo(torch.float32).eps * magnitude


@pytest.mark.parametrize("n_steps", [1, 3, 7])
def test_stable_baselines3_agrees_wherever_the_seam_is(n_steps):
    capacity, envs, gamma = 16, 3, 0.9
    stream = without_both(make_stream((envs,), 60, seed=n_steps))
    ring, buffer = Ring(stream, capacity), make_buffer(capacity, (envs,), n_steps=n_steps, gamma=gamma)
    peers = Peers(envs, buffer_size=capacity, n_steps=n_steps, gamma=gamma)
    # not full, full, and wrapped around to different slots
    for cut in (5, 8, 3, 1, 2, 7, 5, 1, 14, 10):
        part = ring.take(cut)
        buffer.extend(part.clone()), peers.add(part)
        sample = everything(buffer)
        assert sorted(sample["number"].tolist()) == ring.numbers()
        for env in range(envs):
            ours = sample[sample["number"] // ring.length == env]
            places = (ours["number"] % ring.length % capacity).numpy()
            peers.assert_agrees(env, places, ours, stream["next", "reward"].abs().max())


# Chance


def assert_uniform(counts):
    """A chi-square test at 0.1 %, by the cube root of Wilson and Hilferty; seeds are fixed."""
    expected = counts.sum() / counts.numel()
    assert expected >= 20
    statistic = ((counts - expected) ** 2 / expected).sum()
    free = counts.numel() - 1
    assert statistic <= free * (1 - 2 / (9 * free) + 3.09 * math.sqrt(2 / (9 * free))) ** 3, counts.tolist()


def sample_at_random(capacity, batch, cuts, count, **arguments):
    stream = make_stream(batch, sum(cuts), p_done=0.0)
    ring = Ring(stream, capacity)
    generator = torch.Generator().manual_seed(1)
    buffer = make_buffer(capacity, batch, sampler=None, generator=generator, **arguments)
    for cut in cuts:
        buffer.extend(ring.take(cut))
    return buffer.sample(count), ring


@pytest.mark.parametrize("cuts", [[5], [8, 3], [8, 8, 5]], ids=["not full", "wrapped", "wrapped again"])
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
@pytest.mark.parametrize("n_steps", [3, (2, 5)], ids=str)
def test_frames_are_sampled_uniformly(cuts, batch, n_steps):
    sample, ring = sample_at_random(8, batch, cuts, 3000, n_steps=n_steps)
    there = torch.tensor(ring.numbers())
    counts = torch.bincount(sample["number"], minlength=ring.stream.numel())
    assert counts[there].sum() == 3000
    assert_uniform(counts[there].double())
    assert_windows(sample, ring, n_steps, 0.9)


@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_n_steps_are_drawn_uniformly(batch):
    low, high = 3, 6
    sample, ring = sample_at_random(32, batch, [32, 9], 4000, n_steps=(low, high))
    steps, t = sample["steps_to_next_obs"], sample["number"] % ring.length
    whole = t + high <= ring.written
    assert_uniform(torch.bincount(steps[whole] - low, minlength=high - low + 1).double())
    # of the same frame too
    one = t == 20
    assert_uniform(torch.bincount(steps[one] - low, minlength=high - low + 1).double())
    # and one draw says nothing about the next
    drawn = steps[whole] - low
    drawn = drawn[: len(drawn) // 2 * 2].view(-1, 2)
    assert_uniform(torch.bincount(drawn[:, 0] * (high - low + 1) + drawn[:, 1], minlength=16).double())
    # nearer to the seam, longer ones are cut
    steps_left = ring.written - t[~whole]
    assert (steps[~whole] <= steps_left).all()
    assert (steps[~whole] >= steps_left.clamp(max=low)).all()


def test_the_reward_as_it_came_is_one_tensor_of_two_names():
    sample, _ = sample_at_random(16, (2,), [16, 7], 20)
    assert sample.get(("next", "original_reward")) is sample.get(("next", "reward_orig"))


def test_a_pair_of_equals_is_the_number():
    sample, ring = sample_at_random(16, (2,), [16, 7], 200, n_steps=(4, 4))
    assert_sampled(sample, ring, 4)


@pytest.mark.parametrize("count", [3, 8], ids=["a few", "all"])
def test_a_window_of_one_frame_knows_whether_its_trajectory_goes_on(count):
    """Which the frame after it tells, be it of another trajectory or invalid."""
    data = frames([0.0] * 8, [False] * 8)
    data[TRAJ_KEY] = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    data["mask"] = torch.tensor([True] * 5 + [False, True, True])
    sampler = SamplerWithoutReplacement(shuffle=False)
    buffer = make_buffer(8, n_steps=1, sampler=sampler, traj_key=TRAJ_KEY)
    buffer.extend(data)
    nonterminal = [True, True, False, True, False, False, True, False]
    assert buffer.sample(count)["nonterminal"].tolist() == nonterminal[:count]


def test_what_is_sampled_is_the_same_to_the_bit_however_much_is():
    """And holds no memory but its own; the index is the sampler's."""
    data = frames([-0.0] * 8, [True] * 8)
    for count in (1, 8):
        buffer = make_buffer(8, n_steps=3)
        buffer.extend(data)
        sample = buffer.sample(count)
        assert torch.signbit(sample["next", "reward"]).all()
        for key in {*sample.keys(True, True)} - {"index"}:
            assert sample[key].untyped_storage().nbytes() == sample[key].nbytes, key


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("sampled", [1, 64], ids=["few", "many"])
def test_no_operator_waits_for_threads_that_other_processes_keep_busy(sampled, compact):
    stream, buffer = make_stream((), 12), make_buffer(8, backend="reference", compact=compact)
    buffer.extend(stream)
    with Calls() as calls:
        buffer.sample(sampled)
    # torch shares these out among threads, however small they are.
    assert not [name for name in calls.names if name.startswith(("aten.max.dim", "aten.min.dim"))]
