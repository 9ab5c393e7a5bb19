"""The kernels where tiles, strides, dtypes and lengths make a difference: interpreted on a CPU, compiled on a GPU."""

import itertools
import weakref

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import kernels, target_amd
from rollouts import assert_returns, boundaries, window_ends, window_sums
from streams import check_functions, check_transform, frame_bytes, streams, take
from tensordict import TensorDict

from multistep_triton import MultiStepTransform, eager, gather_future, n_step_return
from multistep_triton.carry import Carry
from multistep_triton.engine import n_step_extend, n_step_sample
from multistep_triton.kernels import launch, rows
from multistep_triton.kernels import run as running
from multistep_triton.kernels.windows import MOST_PIECE, TILE
from multistep_triton.samples import Ring, Samples
from multistep_triton.task import Keys, Task

GAMMA = 0.97
DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
    *(torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


@pytest.fixture(autouse=True, scope="module")
def on_the_kernels():
    with kernels():
        yield


def random_bytes(shape, dtype, seed=0):
    """Any bit pattern that the dtype has, NaNs with payloads among them."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(256, (size,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def flags(shape, p, seed=0):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.rand(shape, generator=generator) < p


def make_task(data, dims, n_steps, gamma=GAMMA, *, done=("done",), hold=True):
    """Of leaves whose names say what they are."""
    keys = Keys.of(
        data,
        dims,
        done,
        rewards=tuple(key for key in data if key.startswith("reward")),
        outputs=tuple((key, key, key.startswith("value")) for key in data),
        mask="mask" if "mask" in data else None,
        traj="traj" if "traj" in data else None,
    )
    return Task(keys, n_steps, gamma, dims - 1, hold)


def emitted_and_held(data, carry, n_steps, *, backend="triton", **arguments):
    """What ``n_step_extend`` makes of leaves named done, reward, value and copied, by the kernels."""
    time_dim = data["done"].ndim - 1
    before = None
    if carry is not None:
        # Not a copy, which would begin at an address of its own.
        count = carry["done"].shape[time_dim]
        before = Carry({key: leaf.contiguous() for key, leaf in carry.items()}, 0, count, count)
    return n_step_extend(make_task(data, time_dim + 1, n_steps, **arguments), before, data, backend)


def check(carry, data, n_steps, hold=True):
    """Compares every output with plain loops over the joined stream; gathers to the bit."""
    time_dim = data["done"].ndim - 1
    out = emitted_and_held(data, carry, n_steps, hold=hold)
    stream = {key: torch.cat((carry[key], leaf), time_dim) if carry else leaf for key, leaf in data.items()}
    done, mask, traj = stream["done"], stream.get("mask"), stream.get("traj")
    known = done.shape[-1]
    emitted = max(known - n_steps, 0) if hold else known
    ends = window_ends(done, n_steps, mask, traj)

    def head(leaf):
        return leaf.narrow(time_dim, 0, emitted)

    assert torch.equal(out.steps, head(ends - torch.arange(known) + 1))
    assert torch.equal(out.discount, (torch.tensor(GAMMA, dtype=torch.float64) ** out.steps).float())
    boundary = boundaries(done, mask, traj)
    boundary[..., known - 1 :] |= not hold
    assert torch.equal(out.nonterminal, ~head(boundary))
    for key, leaf in stream.items():
        expected = head(take(leaf, ends) if key.startswith("value") else leaf)
        assert out.leaves[key].dtype == leaf.dtype
        assert torch.equal(frame_bytes(out.leaves[key]), frame_bytes(expected)), key
        if hold:
            held = leaf.narrow(time_dim, emitted, known - emitted)
            assert torch.equal(frame_bytes(out.carry.frames(key, time_dim)), frame_bytes(held)), key
        if key.startswith("reward"):
            assert_returns(out.returns[key], leaf, ends, GAMMA, n_steps)
    return out


def rollout(batch, frames, *, p=0.2, seed=0, mask=False, traj=None):
    """Random leaves; ``traj`` is the dtype of trajectory ids of which one in five differs from the one before."""
    shape = (*batch, frames)
    data = {
        "done": flags(shape, p, seed),
        "reward": torch.randn(shape, generator=torch.Generator(torch.get_default_device()).manual_seed(seed)),
        "value": random_bytes((*shape, 3), torch.float32, seed),
        "copied": random_bytes((*shape, 2), torch.int16, seed),
    }
    if mask:
        data["mask"] = flags(shape, 0.8, seed + 1)
    if traj is not None:
        ids = flags(shape, 0.2, seed + 2).cumsum(-1)
        data["traj"] = torch.where(ids % 3 == 1, min(torch.iinfo(traj).max, 2**63 - 1) - ids, ids).to(traj)
    return data


@given(streams(), st.sampled_from(["start", "end"]))
@settings(max_examples=30)
def test_transform_is_the_loop_however_the_stream_is_cut(stream, done_at):
    check_transform(stream, done_at)


@given(streams())
@settings(max_examples=30)
def test_functions_are_the_loop(stream):
    check_functions(stream)


EDGES = [TILE // 4 * 3 - 1, TILE // 4 * 3, TILE // 4 * 3 + 1, TILE - 1, TILE]


@pytest.mark.parametrize(
    ("rows", "frames", "mask"),
    [*((2, frames, True) for frames in EDGES), *((rows, frames, False) for rows in (1, 7) for frames in (1, 1000))],
)
def test_around_the_edges_of_tiles(rows, frames, mask):
    check(rollout((rows,), 3, seed=1, mask=mask), rollout((rows,), frames, mask=mask), 3)


@pytest.mark.parametrize("frames", [1, 2, 7, 8, 67])
@pytest.mark.parametrize("rows", [1, 5, 31, 33, 100])
def test_time_major(rows, frames):
    def time_major(leaf):
        return leaf.transpose(0, 1).contiguous().transpose(0, 1)

    data = {key: time_major(leaf) for key, leaf in rollout((rows,), frames).items()}
    check(rollout((rows,), 2, seed=1), data, 2)


@pytest.mark.parametrize("n_steps", [1, 2, 3, 8, 9, 17, 23])
@pytest.mark.parametrize("frames", [1, 6, 17])
def test_carry_of_every_length_and_n_below_equal_to_and_above_it(frames, n_steps):
    for carried in {0, 1, n_steps - 1, n_steps, n_steps + 3}:
        carry = rollout((2,), carried, seed=1) if carried else None
        check(carry, rollout((2,), frames), n_steps)


PIECE = 1 << MOST_PIECE


MARKS = {"mask": True, "traj": torch.int32}


@pytest.mark.parametrize(
    ("n_steps", "marks"),
    [
        *((n_steps, {}) for n_steps in (PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 1, 3 * PIECE + 5)),
        *((n_steps, MARKS) for n_steps in (PIECE, PIECE + 1, 3 * PIECE + 5)),
    ],
    ids=str,
)
def test_windows_of_several_pieces(n_steps, marks):
    """In two environments, of which one has no done."""
    carry = rollout((2,), n_steps, p=0.01, seed=1, **marks)
    data = rollout((2,), 4 * PIECE, p=0.01, **marks)
    assert data["done"][1].any()
    for leaves in (carry, data):
        leaves["done"][0] = False
    for leaves in (carry, data) if marks else ():
        # Padding and other trajectories are rare, so that most windows are of several pieces.
        leaves["mask"] |= flags(leaves["mask"].shape, 0.98)
        leaves["traj"] = (torch.arange(leaves["traj"].shape[-1]) // 150).expand_as(leaves["traj"]).int()
    check(carry, data, n_steps)


@pytest.mark.parametrize("fewer", [2, 5])
def test_an_empty_call_emits_what_a_smaller_n_no_longer_holds_back(fewer):
    frames = rollout((2,), 9)
    data = TensorDict({"value": frames["value"], "next": {key: frames[key] for key in ("reward", "done")}}, [2, 9])
    transform, expected = (MultiStepTransform(6, GAMMA, backend=each) for each in ("triton", "reference"))
    for each in (transform, expected):
        each.inv(data), setattr(each, "n_steps", fewer)
    out, other = transform.inv(data[:, :0]), expected.inv(data[:, :0])
    assert out.shape == other.shape == (2, 6 - fewer)
    torch.testing.assert_close(out["next"], other["next"])
    assert torch.equal(frame_bytes(out["value"]), frame_bytes(other["value"]))


def test_units_of_a_ring_are_counted_in_32_bits(monkeypatch):
    """Of all its slots, as a place in it is counted from the first one on."""
    data = rollout((2,), 3)
    data["value"] = torch.zeros(2, 3, 7, dtype=torch.uint8)
    carry = emitted_and_held(data, None, 8).carry
    monkeypatch.setattr(running, "MOST_UNITS", 2 * carry.capacity * 7 - 1)
    with pytest.raises(RuntimeError, match=rf"at most {running.MOST_UNITS} units of a leaf in a call, got"):
        emitted_and_held(data, None, 8)


def test_rows_without_elements_of_what_lies_ahead():
    steps = torch.ones(2, 3, dtype=torch.int64)
    assert launch.gather_future(torch.zeros(2, 3, 0), steps).shape == (2, 3, 0)


def test_more_frames_held_back_than_windows():
    check(None, rollout((1,), 2 * TILE + 1, p=0.01), 4 * TILE)


def test_samples_with_an_n_of_their_own_of_several_pieces():
    done = torch.zeros(200, dtype=torch.bool)
    own = torch.tensor([1, PIECE - 1, PIECE, PIECE + 1, PIECE + 2, PIECE + 6])
    samples = Samples([torch.full((6,), 10)], 199, 200, own)
    data = {"done": done, "reward": torch.ones(200), "value": torch.arange(200)}
    out = n_step_sample(make_task(data, 1, PIECE + 6, 1.0), samples, data, "triton")
    assert torch.equal(out.steps, own)
    assert torch.equal(out.returns["reward"], own.float())
    assert torch.equal(out.leaves["value"], 10 + own - 1)


def test_storages_of_other_dimensions_in_turn():
    """The same entries: a kernel is compiled for as many indices as there are dimensions."""
    data = rollout((), 24)
    task = make_task(data, 1, 3, 0.5)
    for lead in ((), (1,), (2,), (2, 3), (), (2, 3)):
        slots = {key: leaf.view(-1, *lead, *leaf.shape[1:]) for key, leaf in data.items()}
        frames = slots["done"].shape[0]
        samples = Samples(torch.unravel_index(torch.arange(24), (frames, *lead)), frames - 1, frames)
        out, expected = (n_step_sample(task, samples, slots, each) for each in ("triton", "reference"))
        assert torch.equal(out.steps, expected.steps)
        torch.testing.assert_close(out.returns["reward"], expected.returns["reward"])
        assert torch.equal(frame_bytes(out.leaves["value"]), frame_bytes(expected.leaves["value"]))


@pytest.mark.parametrize("n_steps", [3, 10, PIECE + 3])
def test_a_return_is_the_same_to_the_bit_wherever_its_window_lies(n_steps):
    """In blocks, in calls, and where it is sampled."""
    data = rollout((2,), 3 * PIECE, p=0.02)
    whole = emitted_and_held(data, None, n_steps)
    for cut in (n_steps, n_steps + 1, PIECE, PIECE + 7, 2 * PIECE):
        parts = [{key: leaf[:, :cut] for key, leaf in data.items()}, {key: leaf[:, cut:] for key, leaf in data.items()}]
        first = emitted_and_held(parts[0], None, n_steps)
        second = n_step_extend(make_task(data, 2, n_steps), first.carry, parts[1], "triton")
        returns = torch.cat((first.returns["reward"], second.returns["reward"]), 1)
        assert torch.equal(returns, whole.returns["reward"])
    slots = {key: leaf.transpose(0, 1).contiguous() for key, leaf in data.items()}
    frames = whole.steps.shape[1]
    index = [torch.arange(frames).repeat(2), torch.arange(2).repeat_interleave(frames)]
    samples = Samples(index, 3 * PIECE - 1, 3 * PIECE)
    sampled = n_step_sample(make_task(slots, 2, n_steps)._replace(time_dim=0), samples, slots, "triton")
    assert torch.equal(sampled.returns["reward"].view(2, frames), whole.returns["reward"])
    assert torch.equal(frame_bytes(sampled.leaves["value"]), frame_bytes(whole.leaves["value"].flatten(0, 1)))


def test_a_return_depends_neither_on_n_nor_on_how_many_frames_are_known():
    reward, done = torch.randn(64, 90), torch.zeros(64, 90, dtype=torch.bool)
    done[:, 6] = True
    found = [
        n_step_return(reward[:, :frames], done[:, :frames], gamma=0.99, n_steps=n_steps, backend="triton").reward[:, 0]
        for frames, n_steps in ((7, 7), (8, 7), (8, 8), (12, 10), (12, 12), (40, 31), (90, 33), (90, 70))
    ]
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("n_steps", [1, 4, 1000])
@pytest.mark.parametrize("frames", [0, 1, 6, 7, 300])
def test_nothing_held_back(frames, n_steps):
    check(None, rollout((2,), frames, p=0.01), n_steps, hold=False)


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]


FLAGS = {
    "alike": lambda flag: flag,
    "one in another order": lambda flag: flag.t().contiguous().t(),
    "one with a feature": lambda flag: flag.unsqueeze(-1),
    "one that is every other": lambda flag: torch.stack((flag, ~flag), -1)[..., 0],
}


@pytest.mark.parametrize(
    ("n_steps", "marks"),
    [
        *((n_steps, {}) for n_steps in (1, 2, 4, 9, 30)),
        *((3, {"mask": True}), (3, {"traj": torch.int64})),
        *((n_steps, {"mask": True, "traj": torch.int64}) for n_steps in (1, 5, 8)),
    ],
    ids=str,
)
def test_any_of_several_flags(n_steps, marks):
    """They end what one flag would that is set where any of them is, however they lie."""
    data, carry = (rollout((3,), frames, seed=seed, **marks) for frames, seed in ((40, 1), (n_steps, 2)))
    for layout in FLAGS.values():
        parts, joined = [], []
        for each in (carry, data):
            first, *others = [flags(each["done"].shape, 0.1, seed) for seed in range(3)]
            joined.append({**each, "done": first | others[0] | others[1]})
            parts.append({**each, "done": first, "other": others[0], "third": layout(others[1])})
        expected, out = (
            emitted_and_held(new, old, n_steps, done=keys)
            for (old, new), keys in ((joined, ("done",)), (parts, ("done", "other", "third")))
        )
        for name in ("steps", "discount", "nonterminal"):
            assert torch.equal(getattr(out, name), getattr(expected, name))
        for key, leaf in expected.leaves.items():
            if key != "done":
                assert torch.equal(frame_bytes(out.leaves[key]), frame_bytes(leaf)), key
        for key, value in expected.returns.items():
            assert torch.equal(frame_bytes(out.returns[key]), frame_bytes(value)), key
        for key in ("done", "other", "third"):
            held = out.carry.frames(key, 1)
            assert torch.equal(held, parts[1][key][:, 40 - n_steps :])


@pytest.mark.parametrize(
    ("dtype", "mask", "n_steps"),
    [
        *((dtype, mask, 5) for dtype in INTEGERS for mask in (False, True)),
        *((torch.int64, mask, n_steps) for mask in (False, True) for n_steps in (1, 4, 9)),
    ],
    ids=str,
)
def test_trajectory_ids(dtype, mask, n_steps):
    data, carry = (rollout((2,), frames, p=0.05, mask=mask, traj=dtype) for frames in (40, 4))
    check(carry, data, n_steps)


def test_trajectory_ids_that_differ_in_one_bit():
    data = rollout((64,), 2, p=0)
    data["traj"] = torch.zeros(64, 2, dtype=torch.int64)
    data["traj"][:, 1] = 2 ** torch.arange(64)
    out = check(None, data, 2, hold=False)
    assert (out.steps == 1).all()


PATTERNS = {
    "none": [],
    "all": slice(None),
    "first": 0,
    "last": -1,
    "adjacent": slice(8, 10),
    "every other": slice(0, None, 2),
}


@pytest.mark.parametrize("n_steps", [3, 12])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_done_patterns(pattern, n_steps):
    data = rollout((2,), 20)
    data["done"] = torch.zeros(2, 20, dtype=torch.bool)
    data["done"][..., PATTERNS[pattern]] = True
    check(rollout((2,), n_steps, p=0, seed=1), data, n_steps)


FEATURES = [(), (1,), (3,), (16,), (5, 7), (0,)]
# An item of every number of bytes has rows of every width.
SIZES = [torch.uint8, torch.int16, torch.float32, torch.complex64, torch.complex128]


@pytest.mark.parametrize(
    ("dtype", "features"),
    [
        *((dtype, features) for dtype in SIZES for features in FEATURES),
        *((dtype, features) for dtype in DTYPES if dtype not in SIZES for features in ((), (3,))),
    ],
    ids=str,
)
def test_gathers_every_dtype_and_width_to_the_bit(dtype, features):
    shapes = (2, 3, *features), (2, 9, *features)
    carry, data = ({**rollout((2,), shape[1])} for shape in shapes)
    for leaves, shape in ((carry, shapes[0]), (data, shapes[1])):
        leaves["value"] = random_bytes(shape, dtype, shape[1])
        leaves["copied"] = random_bytes(shape, dtype, shape[1] + 1)
    check(carry, data, 3)


@pytest.mark.parametrize("width", [4 * TILE - 1, 16 * TILE, 16 * TILE + 16, 1 << 20])
def test_gathers_wide_rows(width):
    data = rollout((1,), 2, p=0)
    data["value"] = random_bytes((1, 2, width), torch.uint8)
    check({key: leaf[:, :1].contiguous() for key, leaf in data.items()}, data, 2)


@pytest.mark.parametrize("offsets", [(1, 0), (2, 0), (4, 0), (8, 0), (12, 0), (0, 1), (0, 8), (4, 2)], ids=str)
def test_gathers_rows_at_any_address(offsets):
    """Of the data and of the frames held back."""
    data, carry = rollout((2,), 7), rollout((2,), 2, seed=1)
    for leaves, frames, offset in zip((data, carry), (7, 2), offsets, strict=True):
        leaves["value"] = random_bytes((2 * frames * 32 + offset,), torch.uint8)[offset:].view(2, frames, 32)
    check(carry, data, 2)


def reverse(leaf):
    return leaf.permute(*reversed(range(leaf.ndim)))


@pytest.mark.parametrize("amd", [False, True])
def test_many_leaves(amd, monkeypatch):
    """As compiled for NVIDIA, where a program ends with its tile, and for AMD, where it looks at all leaves."""
    target_amd(monkeypatch, amd)
    data, carry = rollout((3,), 9), rollout((3,), 2, seed=1)
    for leaves, frames in ((data, 9), (carry, 2)):
        for i in range(12):
            name = ("value", "copied")[i % 2] + str(i)
            leaves[name] = random_bytes(
                (3, frames, 3 + i % 3), (torch.float32, torch.int32)[i % 4 // 2], seed=frames + i
            )
    check(carry, data, 2)


LAYOUTS = {
    "every other environment": lambda leaf: leaf.repeat_interleave(2, 0)[::2],
    "every other frame": lambda leaf: leaf.repeat_interleave(2, 2)[:, :, ::2],
    "a part of the features": lambda leaf: torch.cat((leaf, leaf), -1)[..., : leaf.shape[-1]],
    "batch dimensions exchanged": lambda leaf: leaf.transpose(0, 1).contiguous().transpose(0, 1),
    "time first": lambda leaf: leaf.movedim(2, 0).contiguous().movedim(0, 2),
    "time last": lambda leaf: leaf.movedim(2, -1).contiguous().movedim(-1, 2),
    "features first": lambda leaf: leaf.movedim(-1, 0).contiguous().movedim(0, -1),
    "features exchanged": lambda leaf: leaf.transpose(-1, -2).contiguous().transpose(-1, -2),
    "backwards": lambda leaf: reverse(reverse(leaf).contiguous()),
    "expanded in time": lambda leaf: leaf[:, :, :1].expand_as(leaf),
    "expanded in features": lambda leaf: leaf[..., :1].expand_as(leaf),
    "every second feature": lambda leaf: leaf.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.complex128], ids=str)
def test_any_strides(layout, dtype):
    lay_out = LAYOUTS[layout]
    data, carry = rollout((3, 2), 9), rollout((3, 2), 2, seed=1)
    for leaves, frames in ((data, 9), (carry, 2)):
        leaves["value"] = random_bytes((3, 2, frames, 4, 6), dtype, frames)
        leaves["reward"] = torch.arange(3.0 * 2 * frames * 4 * 6).view(3, 2, frames, 4, 6)
    data["value"], data["reward"] = lay_out(data["value"]), lay_out(data["reward"])
    carry["value"], carry["reward"] = lay_out(carry["value"]), lay_out(carry["reward"])
    if not layout.startswith(("expanded", "time last", "features", "a part", "every second", "backwards")):
        data["done"] = lay_out(data["done"].unsqueeze(-1)).squeeze(-1)
    check(carry, data, 2)


@pytest.mark.parametrize("batch", [(2, 1, 3), (1, 2, 3), (2, 3, 1), (1, 1), (2, 1, 1, 2)], ids=str)
@pytest.mark.parametrize("time", range(3))
def test_batch_dimensions_of_one(batch, time):
    # in memory, time lies before some of the batch dimensions
    data = {
        key: leaf.movedim(len(batch), time).contiguous().movedim(time, len(batch))
        for key, leaf in rollout(batch, 5).items()
    }
    check(rollout(batch, 2, seed=1), data, 2)


@pytest.mark.parametrize("trailing", [False, True])
@pytest.mark.parametrize("time_first", [False, True])
@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
def test_a_mask_that_environments_share_wherever_it_lies(order, time_first, trailing):
    """In memory, dimensions of the reward lie in this order, and those of the mask with time first or last."""
    reward, done = (
        leaf.permute(order).contiguous().permute([order.index(dim) for dim in range(3)])
        for leaf in (torch.arange(24.0).view(2, 3, 4), flags((2, 3, 4), 0.2, 0))
    )
    mask = torch.tensor([[True, True, False, True], [True, False, True, True]]).unsqueeze(1)
    if time_first:
        mask = mask.movedim(-1, 0).contiguous().movedim(0, -1)
    mask = mask.unsqueeze(-1).expand(2, 3, 4, 1) if trailing else mask.expand(2, 3, 4)
    got, expected = (
        n_step_return(reward, done, gamma=GAMMA, n_steps=3, mask=mask, backend=backend)
        for backend in ("triton", "reference")
    )
    assert torch.equal(got.steps, expected.steps)
    assert torch.allclose(got.reward, expected.reward)


def test_views_whose_bytes_are_not_their_values():
    data = rollout((2,), 6)
    complex_leaf = random_bytes((2, 6, 3), torch.int16).float().view(2, 6, 3)
    complex_leaf = torch.complex(complex_leaf, complex_leaf + 1)
    data["value"], data["copied"] = complex_leaf.conj(), complex_leaf.conj().imag
    assert data["value"].is_conj()
    assert data["copied"].is_neg()
    check(None, data, 2)


def test_what_is_read_lives_until_the_launch(monkeypatch):
    """A copy of what lies in another way, too."""
    arrange, run, copies = launch.lie_alike, launch.run, []

    def remember(data, *arguments):
        read, *layout = arrange(data, *arguments)
        copies.extend(weakref.ref(leaf) for key, leaf in read.items() if leaf is not data[key])
        return read, *layout

    def check_and_run(*arguments):
        assert copies
        assert all(copy() is not None for copy in copies)
        run(*arguments)

    monkeypatch.setattr(launch, "lie_alike", remember)
    monkeypatch.setattr(launch, "run", check_and_run)
    emitted_and_held({**rollout((2,), 6), "value": torch.ones(2, 6, dtype=torch.complex64).conj()}, None, 2)


@pytest.mark.parametrize(
    ("row", "address", "unit"),
    [
        *[(80, 0, 16), (80, 8, 8), (80, 4, 4), (80, 2, 2), (80, 1, 1), (80, 12, 4), (72, 0, 8), (68, 0, 4), (68, 8, 4)],
        *[(24, 0, 8), (16, 0, 16), (6, 0, 2), (3, 0, 1), (1, 0, 1), (28224, 0, 16)],
    ],
)
def test_rows_are_copied_in_the_widest_unit_that_divides_them_and_where_they_begin(row, address, unit):
    item, parts, width, out = rows.units_of(row, (address, 0), torch.uint8, torch.uint8)
    assert out == item
    assert item.primitive_bitwidth // 8 * parts == unit
    assert width * unit == row


REWARDS = [dtype for dtype in DTYPES if not dtype.is_complex and dtype.itemsize and "float8" not in str(dtype)]


@pytest.mark.parametrize("n_steps", [3, 11])
@pytest.mark.parametrize("dtype", REWARDS, ids=str)
def test_rewards_of_every_dtype(dtype, n_steps):
    data, carry = rollout((2,), 30), rollout((2,), 5, seed=1)
    for leaves in (data, carry):
        reward = leaves["reward"] * 5
        if not dtype.is_signed:
            reward = reward.abs()
        leaves["reward"] = reward > 0 if dtype == torch.bool else reward.to(dtype)
    check(carry, data, n_steps)


@pytest.mark.parametrize("features", [(), (1,), (3,), (2, 5), (2 * TILE + 1,), (0,)], ids=str)
def test_rewards_of_every_width_and_several_keys(features):
    data, carry = rollout((2,), 9), rollout((2,), 3, seed=1)
    for leaves, frames in ((data, 9), (carry, 3)):
        leaves["reward_wide"] = torch.randn(2, frames, *features)
        leaves["reward_double"] = torch.randn(2, frames, 2, dtype=torch.float64)
    check(carry, data, 3)


def test_promotion_follows_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        out = check(None, {**rollout((2,), 9), "reward": torch.arange(18).view(2, 9)}, 3)
        assert out.returns["reward"].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_gamma_is_not_rounded_to_float32():
    reward = torch.ones(1, 3, dtype=torch.float64)
    out = n_step_return(reward, torch.zeros(1, 3, dtype=torch.bool), gamma=0.1, n_steps=2)
    assert out.reward[0, 0].item() == 1 + 0.1


def test_sums_are_within_twice_the_error_of_a_loop():
    data = rollout((4,), 400, p=0.02)
    ends = window_ends(data["done"], 20)
    exact, _ = window_sums(data["reward"], ends, GAMMA)
    loop = torch.zeros_like(data["reward"])
    following = torch.arange(400) + 1
    for i in reversed(range(20)):
        place = (torch.arange(400) + i).clamp(max=399)
        here = data["reward"][:, place]
        on = (following + i <= ends).view(*ends.shape, *[1] * (here.ndim - 2))
        loop = torch.where(on, here + GAMMA * loop, here)
    error = {
        backend: (emitted_and_held(data, None, 20, hold=False, backend=backend).returns["reward"] - exact).abs().max()
        for backend in ("triton", "reference")
    }
    assert 0 < error["triton"] <= 2 * (loop - exact).abs().max()
    assert 0 < error["reference"] <= (loop - exact).abs().max()


def test_gather_future_keeps_windows_within_their_row_where_it_cannot_check_them():
    value = torch.arange(8).view(2, 4)
    gathered = launch.gather_future(value, torch.tensor([[-(2**40), 0, 1, 2], [1, 3, 99, 2**40]]))
    assert gathered.tolist() == [[0, 1, 2, 3], [4, 7, 7, 7]]


@pytest.mark.parametrize("steps", [torch.tensor([[2, 1, 2, 1], [4, 2, 1, 1]])])
def test_gather_future_takes_steps_of_any_strides(steps):
    value = random_bytes((2, 4, 3), torch.int16)
    spread = steps.to(torch.get_default_device()).t().contiguous().t()
    expected = gather_future(value, spread, backend="reference")
    assert torch.equal(gather_future(value, spread), expected)
    assert torch.equal(gather_future(value, torch._neg_view(-spread)), expected)


@numpy.errstate(all="ignore")  # the interpreter sums with numpy
def test_every_bfloat16():
    """Subnormals among them; NaN stays NaN."""
    reward = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    done = torch.ones(len(reward), dtype=torch.bool)
    out = n_step_return(reward, done, gamma=0.5, n_steps=1, backend="triton").reward
    nan = reward.isnan()
    assert out[nan].isnan().all()
    assert torch.equal(out[~nan].view(torch.int16), reward[~nan].view(torch.int16))
    done[::2] = False
    out = n_step_return(reward, done, gamma=0.5, n_steps=2, backend="triton").reward[::2]
    expected = (reward[::2].double() + 0.5 * reward[1::2].double()).to(torch.bfloat16)
    assert torch.equal(out.nan_to_num(7), expected.nan_to_num(7))


AT = {"an address that is no multiple of 16": 1, "one of 8": 2, "one of 16": 4, "in order": 0}


@pytest.mark.parametrize("at", AT)
@pytest.mark.parametrize(("lead", "time_dim"), [((), 0), ((3,), 1), ((3,), 0), ((2, 3), 2), ((2, 3), 1)], ids=str)
def test_frames_are_stored_as_by_the_fast_path(lead, time_dim, at):
    frames, slots = 5, 7

    def lay_out(leaf):
        return torch.cat((leaf.flatten()[: AT[at]], leaf.flatten()))[AT[at] :].view(leaf.shape)

    shape = (*lead[:time_dim], frames, *lead[time_dim:])
    data = {
        "observation": lay_out(torch.randn(*shape, 4)),
        "action": lay_out(torch.randn(*shape, 3)),
        "done": lay_out(torch.rand(shape) < 0.5),
        "count": lay_out(torch.randint(99, (*shape, 2))),
        "empty": torch.zeros(*shape, 0),
        "phase": torch.complex(*torch.randn(2, *shape)),
    }
    for slot in (0, 3, 5, 6):
        stored = []
        if slot == 5:
            data = {key: leaf.clone() for key, leaf in data.items()}
        for store in (launch.store_frames, eager.store_frames):
            sizes = (slots, *data["done"].transpose(0, time_dim).shape[1:])
            ring = {key: torch.zeros(*sizes, *leaf.shape[len(sizes) :], dtype=leaf.dtype) for key, leaf in data.items()}
            numbers = torch.full(sizes, -1)
            if slot % 2:
                # What a kernel may take for granted of one ring is no matter of another.
                ring = {key: lay_out(leaf) if leaf.numel() else leaf for key, leaf in ring.items()}
                numbers = lay_out(numbers)
            index = store(data, Ring(ring, numbers, len(sizes), time_dim), slot)
            stored.append([*ring.values(), numbers, index])
        assert all(map(torch.equal, *stored))
    written = torch.tensor(3 * slots + slot)
    ring = {key: torch.zeros_like(leaf) for key, leaf in ring.items()}
    assert torch.equal(launch.store_frames(data, Ring(ring, None, len(sizes), time_dim), written), index)
    assert all(map(torch.equal, ring.values(), stored[1]))
