"""Observations kept once: what is sampled is what a buffer that keeps them twice samples, or one frame less."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import EITHER, kernels, no_collection, specification
from rings import TRAJ_KEY, TWINS, Ring, assert_same_bytes, assert_sampled, kept_once, make_buffer, make_stream
from saving import EVERY_WAY, WAYS, loading_is_told
from segment_trees import plant
from tensordict import NonTensorStack, TensorDict, lazy_stack
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    RandomSampler,
    SamplerWithoutReplacement,
    SliceSampler,
    TensorDictReplayBuffer,
)
from torchrl.data.replay_buffers.samplers import PrioritizedSampler
from torchrl.envs.transforms import RewardScaling

from multistep_triton import EquivalenceError, NStepReplayBuffer
from multistep_triton.ends import Ends
from multistep_triton.kernels import run as running

KEPT = {("next", key) for key in TWINS}
SLOTS, NEXT = 8, ("next", "observation")


class Every(RandomSampler):
    """Draws every frame that is there."""

    def sample(self, storage, batch_size):
        index = torch.arange(len(storage), device=torch.get_default_device())
        sizes = storage._storage.shape[: storage.ndim]
        return (torch.unravel_index(index, sizes) if len(sizes) > 1 else index), {}


class Losing(Ring):
    """A ring with so many rows, per environment, for what comes after ends."""

    def __init__(self, stream, capacity, end_slots, **arguments):
        super().__init__(stream, capacity, **arguments)
        self.end_slots = end_slots

    def is_end(self, number):
        return self.is_boundary(number) and not self.is_newest(number)

    def lost(self):
        """The ends that have lost what comes after them."""
        there, numbers = self.numbers(), []
        for env in range(self.envs):
            ends = [each for each in there if each // self.length == env and self.is_end(each)]
            numbers += ends[: max(len(ends) - self.end_slots, 0)]
        return set(numbers)

    def window(self, number, n_steps):
        frames = super().window(number, n_steps)
        return frames[:-1] if len(frames) > 1 and frames[-1] in self.lost() else frames

    def stands_for(self, number):
        """The frame that is sampled in the place of one."""
        if number not in self.lost():
            return number
        before = number - 1
        goes_on = number % self.length and before in self.numbers() and not self.is_end(before)
        return before if goes_on else number // self.length * self.length + self.written - 1


def stream_of(batch=(), frames=60, traj_key=None, **arguments):
    return kept_once(make_stream(batch, frames, **{"p_done": 0.3, **arguments}), traj_key=traj_key)


def make_pair(slots=SLOTS, batch=(), *, compact=True, end_slots=0, **arguments):
    """A buffer that keeps observations once, by default with rows for all ends, and one that keeps them twice."""
    own = {"compact": compact, "end_slots": slots if end_slots == 0 else end_slots}
    return [make_buffer(slots, batch, **{"sampler": Every(), **arguments, **more}) for more in (own, {})]


def extend(buffers, data):
    """Extends both, whose index is the same."""
    one, other = (buffer.extend(data.clone()) for buffer in buffers)
    assert torch.equal(one, other)


def assert_equal(sample, expected):
    assert set(sample.keys(True, True)) == set(expected.keys(True, True))
    for key, leaf in expected.items(True, True):
        assert_same_bytes(sample[key], leaf, key)


def assert_alike(buffers, **arguments):
    """The same is sampled of all frames, bit for bit."""
    sample, expected = (buffer.sample(len(buffer), **arguments) for buffer in buffers)
    assert_equal(sample, expected)
    return sample


def assert_kept_once(buffers, ring):
    """Every frame that is there is sampled, or the one that stands for it; bit for bit where no end is lost."""
    buffer, full = buffers
    sample, expected = (each.sample(len(each)) for each in buffers)
    numbers = expected["number"].tolist()
    assert sorted(numbers) == ring.numbers()
    assert sample["number"].tolist() == [ring.stands_for(number) for number in numbers]
    assert_same_bytes(sample["index"], expected["index"])
    assert_sampled(sample, ring, full.n_steps, full.gamma)
    same = (sample["number"] == expected["number"]) & (sample["steps_to_next_obs"] == expected["steps_to_next_obs"])
    assert_equal(sample[same], expected[same])
    assert buffer.ends_lost() == len(ring.lost())
    assert KEPT.isdisjoint(buffer.storage[:].keys(True, True))


@st.composite
def cases(draw):
    slots = draw(st.integers(1, 8))
    sizes = st.sampled_from([0, 1, 1, 2, 3]) | st.integers(0, 2 * slots + 2)
    cuts = draw(st.lists(sizes, min_size=1, max_size=9).filter(any))
    marks = {"traj": draw(st.booleans()), "mask": draw(st.booleans()), "seed": draw(st.integers(0, 99))}
    batch, p_done = (draw(st.sampled_from(of)) for of in ([(), (1,), (3,), (2, 2)], [0.0, 0.1, 0.3, 0.6, 2.0]))
    return slots, batch, cuts, draw(st.integers(1, slots)), draw(st.integers(1, slots)), {"p_done": p_done, **marks}


def check(slots, batch, cuts, n_steps, end_slots, marks):
    traj = TRAJ_KEY if marks.get("traj") else None
    ring = Losing(stream_of(batch, sum(cuts), traj, **marks), slots, end_slots, traj_key=traj)
    buffers = make_pair(slots, batch, n_steps=n_steps, end_slots=end_slots)
    for frames in cuts:
        extend(buffers, ring.take(frames))
        if ring.written:
            assert_kept_once(buffers, ring)


@settings(max_examples=200)
@given(cases())
def test_any_stream(case):
    check(*case)


@pytest.mark.parametrize(
    "case",
    [
        (6, (), [2, 3, 1, 4, 9, 2], 3, 6, {}),
        (6, (3,), [1, 1, 4, 5], 4, 1, {"mask": True}),
        (5, (2, 2), [3, 2, 4], 3, 2, {"traj": True}),
        (1, (2,), [1, 1, 3], 1, 1, {}),
        # Windows of several pieces; an end that is lost is the first frame of a later one.
        (80, (), [76, 3, 40], 70, 1, {"p_done": 0.04, "seed": 2}),
        (8, (), [5, 1, 7], 2, 3, {"p_done": 2.0}),
    ],
    ids=str,
)
def test_streams_by_the_kernels(case):
    with kernels():
        check(*case)


@pytest.mark.parametrize("begin", range(SLOTS))
def test_the_ring_begins_anew_anywhere(begin):
    ring, buffers = Losing(stream_of((2,)), SLOTS, 1), make_pair(batch=(2,), end_slots=None)
    for frames in (SLOTS, begin, 0, SLOTS):
        extend(buffers, ring.take(frames))
        assert_kept_once(buffers, ring)


@pytest.mark.parametrize(("slots", "rows"), [(1, 1), (16, 1), (17, 2), (40, 3)])
def test_rows_unless_told(slots, rows):
    ring, buffers = Losing(stream_of(), slots, rows), make_pair(slots, end_slots=None, n_steps=1)
    extend(buffers, ring.take(slots)), extend(buffers, ring.take(5))
    assert_kept_once(buffers, ring)


# What is asked for


@EITHER
def test_n_of_samples(where):
    """A pair, of which every sample draws its own; of one call; and n and gamma that change."""
    with where():
        buffers, ring = make_pair(batch=(2,), n_steps=(1, 4)), Ring(stream_of((2,)), SLOTS)
        for buffer in buffers:
            buffer.set_rng(torch.Generator(torch.get_default_device()).manual_seed(0))
        extend(buffers, ring.take(7)), extend(buffers, ring.take(4))
        assert_sampled(assert_alike(buffers), ring, (1, 4))
        assert_sampled(assert_alike(buffers, n_steps=5), ring, 5)
        for n_steps, gamma in ((2, 0.5), ((2, 3), 1.0)):
            for buffer in buffers:
                buffer.n_steps, buffer.gamma = n_steps, gamma
            assert_sampled(assert_alike(buffers), ring, n_steps, gamma)


OUTPUTS = [[NEXT], ["observation", ("next", "reward")], ["next"], ["gamma", "index"], ["number", ("next", "done")]]


@pytest.mark.parametrize(
    "arguments", [{"done_at": "start"}, {"match_reward_shape": True}, *({"outputs": each} for each in OUTPUTS)], ids=str
)
def test_what_comes_out(arguments):
    stream, buffers = stream_of((2,), mask=True), make_pair(batch=(2,), **arguments)
    for part in stream[:, :23].split([7, 5, 1, 10], -1):
        extend(buffers, part)
        assert_alike(buffers)


@pytest.mark.parametrize("outputs", [["observation"], [("next", "reward"), "index"], [NEXT], None], ids=str)
def test_samples_write_nothing_beyond_their_memory(outputs, monkeypatch):
    """Whether or not an entry that is kept once comes out, of each group."""
    with kernels():
        stream = stream_of()
        add_group(stream, "mice")
        buffer, _ = make_pair(compact=["observation"], outputs=outputs, reward_keys=["reward", ("mice", "reward")])
        buffer.extend(stream[:7])
        usual, beyond = torch.empty_like, []

        def roomy(like, *args, **kwargs):
            made = usual(like, *args, **kwargs)
            if made.dtype != torch.int32 or made.ndim != 1:
                return made
            room = torch.full((4 * len(made) + 64,), -7, dtype=torch.int32)
            beyond.append(room[len(made) :])
            return room[: len(made)]

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", roomy)
            buffer.sample(7)
        assert beyond and all((each == -7).all() for each in beyond)


# Entries


@EITHER
def test_dtypes_and_shapes(where):
    with where():
        stream, keys = stream_of((2,), 16), []
        for dtype in (torch.bool, torch.uint8, torch.bfloat16, torch.float64, torch.complex64, torch.complex128):
            for features in ((), (1,), (2, 3)):
                # Of what comes after ends the numbers are negative.
                table = torch.randint(2 if dtype == torch.bool else 250, (64, *features)).to(dtype)
                keys.append(f"{dtype} {features}")
                for data in (stream, stream["next"]):
                    data[keys[-1]] = table[data["number"]]
        buffers = make_pair(6, (2,))
        for part in stream.split([4, 1, 5, 6], -1):
            extend(buffers, part)
        assert_alike(buffers)
        assert {("next", key) for key in keys}.isdisjoint(buffers[0].storage[:].keys(True, True))


def add_group(stream, name, agents=()):
    """A group whose episodes end by flags of their own, or with all others, and what its agents share."""
    lead, dim = stream.shape, stream.ndim - 1
    done = torch.rand(*lead, *agents) < 0.3
    ended = done | stream["next", "done"].view(*lead, *[1] * len(agents))
    shared = ended.view(*lead, -1).any(-1)
    root = {"alone": torch.randn(*lead), "wide": torch.randn(*lead, 2), "long": torch.randn(*lead, 2)}
    after = {"wide": torch.randn(*lead, 2).double(), "long": torch.randn(*lead, 3)}
    for key, ends in (("observation", ended), ("critic_observation", ended), ("state", shared)):
        root[key] = torch.randn(*ends.shape, 2)
        after[key] = torch.where(ends.unsqueeze(-1), torch.randn_like(root[key]), root[key].roll(-1, dim))
    after.update(done=done.unsqueeze(-1), reward=torch.randn(*lead, *agents, 1))
    stream[name], stream["next", name] = TensorDict(root, lead), TensorDict(after, lead)


def stream_of_groups(batch=(2,), agents=(3,)):
    torch.manual_seed(0)
    stream = stream_of(batch, p_done=0.1)
    add_group(stream, "agents", agents), add_group(stream, "mice")
    return stream


OF_AGENTS, OF_MICE = ("agents", "reward"), ("mice", "reward")
GROUPS = {
    "of all": {"reward_keys": ["reward", OF_AGENTS, OF_MICE]},
    "of agents": {"reward_keys": [OF_AGENTS, "reward"], "done_key": ("agents", "done"), "done_at": "start"},
    "of mice": {"reward_keys": [OF_MICE, OF_AGENTS], "done_key": ("mice", "done"), "match_reward_shape": True},
}


@pytest.mark.parametrize(("batch", "agents"), [((), (3,)), ((2,), (2, 2)), ((2, 2), (3,))], ids=str)
@pytest.mark.parametrize("arguments", GROUPS.values(), ids=GROUPS)
def test_groups_with_flags_of_their_own(arguments, batch, agents):
    stream, buffers = stream_of_groups(batch, agents), make_pair(6, batch, **arguments)
    for part in stream[..., :23].split([2, 3, 1, 13, 4], -1):
        extend(buffers, part)
        assert_alike(buffers)
    once, twice = (set(buffer.storage[:].keys(True, True)) for buffer in buffers)
    kept = {("next", of, key) for of in ("agents", "mice") for key in ("observation", "critic_observation", "state")}
    assert twice - once == kept | KEPT


def test_groups_by_the_kernels():
    with kernels():
        stream = stream_of_groups((), (5,))
        buffers = make_pair(5, **GROUPS["of agents"])
        for part in stream[:12].split([2, 1, 1, 2, 1, 1, 4]):
            extend(buffers, part)
            if len(part) > 1:
                assert_alike(buffers)


def test_long_windows_by_the_kernels_that_have_lost_ends():
    """Of two pieces of 64 frames, the first of which ends just before an end that is lost, among others."""
    with kernels():
        stream = stream_of((), 150, p_done=0.0)
        for t in (70, 140, 145):
            stream["next", "done"][t] = True
        ring = Losing(kept_once(stream), 150, 1)
        buffers = make_pair(150, end_slots=1, n_steps=100)
        extend(buffers, ring.take(150))
        assert_kept_once(buffers, ring)


def test_rows_of_what_comes_after_ends_are_counted_in_31_bits(monkeypatch):
    """There is one more than slots, for the newest frame."""
    with kernels():
        stream = stream_of((2,), 12)
        buffers = make_pair(batch=(2,))
        extend(buffers, stream[:, :2]), extend(buffers, stream[:, 2:4])
        monkeypatch.setattr(running, "MOST_ROWS", 2 * SLOTS)
        for use in (lambda: buffers[0].extend(stream[:, 4:6]), lambda: buffers[0].sample(7)):
            with pytest.raises(RuntimeError, match=f"at most {2 * SLOTS} frames in a call, got {2 * SLOTS + 2}"):
                use()
        buffers[1].extend(stream[:, 4:6]), buffers[1].sample(7)


def test_more_frames_than_a_program_counts_at_once():
    with kernels():
        stream = stream_of((), 160)
        buffers = make_pair(140)
        for part in stream.split([2, 135, 10, 13]):
            extend(buffers, part)
        assert_alike(buffers)


@pytest.mark.parametrize("arguments", GROUPS.values(), ids=GROUPS)
def test_groups_that_have_lost_ends(arguments):
    """As the specification has it."""
    buffer, _ = make_pair(7, (2,), end_slots=2, n_steps=4, **arguments)
    for part in stream_of_groups()[:, :30].split([5, 5, 1, 4, 15], -1):
        buffer.extend(part)
        sample = buffer.sample(len(buffer))
        with specification():
            expected = buffer.sample(len(buffer))
        assert set(sample.keys(True, True)) == set(expected.keys(True, True))
        for key, leaf in expected.items(True, True):
            torch.testing.assert_close(sample[key], leaf, **({} if "reward" in key else {"rtol": 0, "atol": 0}))
    assert buffer.ends_lost()


@EITHER
@pytest.mark.parametrize(
    ("end_slots", "agent", "steps", "after"),
    [
        (8, 0, [2, 2, 2, 2, 2, 2, 1], [1000, 30, 3000, 50, 5000, 70, 70]),
        (8, 1, [2, 1, 2, 1, 2, 1, 1], [1000, 1000, 3000, 3000, 5000, 5000, 70]),
        (1, 0, [1, 1, 1, 1, 2, 2, 1], [10, 10, 30, 30, 5000, 70, 70]),
        (1, 1, [1, 1, 1, 1, 2, 1, 1], [10, 10, 30, 30, 5000, 5000, 70]),
    ],
)
def test_windows_end_before_what_any_agent_has_lost(where, end_slots, agent, steps, after):
    """By hand: n cuts windows of agent 0 at ends of agent 1; frame t holds 10 t, and what comes after ends 1000 t."""
    with where():
        ends, now = torch.tensor([1, 3, 5]), torch.arange(7.0).mul(10).view(7, 1, 1).repeat(1, 2, 1)
        then, done = now + 10, torch.zeros(7, 2, 1, dtype=torch.bool)
        then[ends], done[ends, 1] = 1000.0 * ends.view(3, 1, 1), True
        moved = {"obs": then, "done": done, "reward": torch.ones(7, 2, 1)}
        key = ("agents", "done")
        arguments = {"reward_keys": [("agents", "reward")], "done_key": key, "done_keys": [key]}
        buffer, _ = make_pair(n_steps=2, end_slots=end_slots, **arguments)
        buffer.extend(TensorDict({"agents": {"obs": now}, "next": {"agents": moved}}, [7]))
        sample = buffer.sample(7)
        assert sample["steps_to_next_obs"][:, agent].flatten().tolist() == steps
        assert sample["next", "agents", "obs"][:, agent].flatten().tolist() == after
        assert buffer.ends_lost() == (2 if end_slots == 1 else 0)


def test_objects_and_an_entry_that_a_writer_writes():
    stream, buffers = stream_of(), make_pair()
    stream["index"], stream["next", "index"] = torch.arange(60) + 7, torch.arange(60) + 8
    for data in (stream, stream["next"]):
        data["name"] = NonTensorStack(*(f"frame {number}" for number in data["number"].tolist()))
    for part in stream[:13].split([6, 7]):
        extend(buffers, part)
    samples = [buffer.sample(SLOTS) for buffer in buffers]
    for key in ("name", ("next", "name")):
        assert list(samples[0][key]) == list(samples[1][key])
    assert_equal(*(sample.exclude("name", ("next", "name")) for sample in samples))


@pytest.mark.parametrize(("batch", "dim"), [((), 0), ((2,), 0), ((2,), 1)], ids=str)
def test_lazy_stacks(batch, dim):
    stream, buffers = stream_of(batch), make_pair(batch=batch)
    for part in stream[..., :19].split([5, 3, 11], -1):
        extend(buffers, lazy_stack(list(part.unbind(dim)), dim))
        assert_alike(buffers)
    if batch:
        for buffer in buffers:
            buffer.add(lazy_stack(list(stream[:, 19].unbind(0))))
        assert_alike(buffers)


def test_which_entries_are_kept_once():
    stream = stream_of()
    for compact, kept in (["observation", {NEXT}], [["number", NEXT], KEPT]):
        buffers = make_pair(compact=compact)
        extend(buffers, stream[:7])
        assert_alike(buffers)
        assert set(buffers[1].storage[:].keys(True, True)) - set(buffers[0].storage[:].keys(True, True)) == kept
    stream["next", "action"], stream["action"] = torch.zeros(60, 2), torch.zeros(60, 3)
    for keys in (["action"], ["number", ("next", "reward")], ["done"], ["nothing"]):
        buffer, _ = make_pair(compact=keys)
        with pytest.raises(KeyError, match=r"compact must name entries that are under 'next', too, .* got \["):
            buffer.extend(stream[:7])
        assert not len(buffer)
    with pytest.raises(KeyError, match="data must hold an entry under 'next' that is at the root, too"):
        make_pair()[0].extend(stream.exclude(*TWINS, "action"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({"compact": True, "end_slots": each}, "end_slots must be an int") for each in (0, True, 2.0)),
        ({"compact": True, "end_slots": 9}, "end_slots must be at most the slots of an environment, 8, got 9"),
        ({"end_slots": 2}, "end_slots must be None without compact, got 2"),
        *(({"compact": each}, "compact must be True, False or keys of observations") for each in ([], NEXT, "next")),
        ({"compact": 1}, "compact must be a sequence of keys"),
        ({"compact": [3]}, "compact must be a key"),
    ],
    ids=str,
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_buffer(SLOTS, **arguments).extend(stream_of()[:3])


# Other parts


@EITHER
@pytest.mark.parametrize("end_slots", [SLOTS, 1])
def test_capturable(where, end_slots):
    """As one that is not, of the same frames."""
    with where():
        stream, arguments = stream_of((2,), p_done=0.6), {"compact": True, "end_slots": end_slots}
        buffer = make_buffer(SLOTS, (2,), capturable=True, sampler=RandomSampler(), **arguments)
        usual, draws = make_buffer(SLOTS, (2,), sampler=RandomSampler(), backend="reference", **arguments), []
        usual.sampler.sample = lambda storage, count: (draws[-1], {})
        for part in stream[:, :20].split([3, 1, 1, 6, 9], -1):
            extend((buffer, usual), part)
            assert buffer.ends_lost() == usual.ends_lost()
            sample = buffer.sample(24)
            draws.append(sample["index"].unbind(-1))
            for key, leaf in usual.sample(24).items(True, True):
                torch.testing.assert_close(sample[key], leaf, **({} if "reward" in key else {"rtol": 0, "atol": 0}))


SLICES = {"num_slices": 2, "truncated_key": None, "end_key": ("next", "done"), "strict_length": False}
SAMPLERS = {
    "prioritized": (lambda: PrioritizedSampler(2 * SLOTS, 0.7, 0.5), {"priority_key": "td"}),
    "at random": (RandomSampler, {}),
    "without replacement": (SamplerWithoutReplacement, {}),
    "slices": (lambda: SliceSampler(**SLICES), {}),
    "scaled": (RandomSampler, {"transform": lambda: RewardScaling(0.5, 2.0, in_keys=["observation", NEXT])}),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning", "ignore:To copy construct")
@pytest.mark.parametrize(("sampler", "arguments"), SAMPLERS.values(), ids=SAMPLERS)
def test_samplers_and_transforms(sampler, arguments, monkeypatch):
    plant(monkeypatch)
    stream, samples = stream_of((2,)), ([], [])
    for drawn, more in zip(samples, ({"compact": True, "end_slots": SLOTS}, {}), strict=True):
        torch.manual_seed(0), np.random.seed(0)
        made = {key: value() if callable(value) else value for key, value in arguments.items()}
        buffer = make_buffer(SLOTS, (2,), sampler=sampler(), batch_size=4, n_steps=(1, 4), **made, **more)
        for part in stream[:, :29].split([5, 2, 4, 18], -1):
            buffer.extend(part[:, :-1]), buffer.add(part[:, -1])
            for _ in range(3):
                drawn.append(buffer.sample())
                td = {"index": drawn[-1]["index"], "td": torch.rand(len(drawn[-1])) + 0.1}
                buffer.update_tensordict_priority(TensorDict(td, drawn[-1].shape))
    for pair in zip(*samples, strict=True):
        assert_equal(*pair)


def test_samples_that_are_prefetched():
    ring, arguments = Ring(stream_of((2,)), SLOTS), {"sampler": RandomSampler(), "batch_size": 9, "prefetch": 2}
    buffer, _ = make_pair(batch=(2,), **arguments)
    buffer.extend(ring.take(11))
    for n_steps in (3, 1, (2, 4)):
        buffer.n_steps = n_steps
        for _ in range(4):
            assert_sampled(buffer.sample(), ring, n_steps)
    buffer.empty(), ring.empty(), buffer.extend(ring.take(5))
    assert_sampled(buffer.sample(), ring, (2, 4))


# Saving


@pytest.fixture
def not_collected():
    with no_collection():
        yield


@loading_is_told
@pytest.mark.filterwarnings("ignore:.*ends of trajectories have lost:UserWarning")
@pytest.mark.usefixtures("not_collected")
@pytest.mark.parametrize(("way", "storage"), EVERY_WAY)
@pytest.mark.parametrize(("end_slots", "before"), [(SLOTS, [5]), (2, [5]), (1, [8, 5])], ids=str)
def test_one_that_is_saved_goes_on(way, storage, end_slots, before):
    def make():
        return make_pair(batch=(2,), storage=storage, end_slots=end_slots)[0]

    ring, (_, full), whole = Losing(stream_of((2,), p_done=0.6), SLOTS, end_slots), make_pair(batch=(2,)), make()
    for frames in before:
        extend((whole, full), ring.take(frames))
    resumed = WAYS[way](whole, make)
    for frames in (0, 3, 1, 13):
        part = ring.take(frames)
        for each in (whole, full, resumed):
            each.extend(part)
        assert_kept_once((resumed, full), ring), assert_kept_once((whole, full), ring)


@loading_is_told
def test_what_another_kind_of_buffer_saved_is_not_loaded(tmp_path, monkeypatch):
    ring, buffers = Losing(stream_of(), SLOTS, SLOTS), make_pair()
    extend(buffers, ring.take(11))
    states = [copy.deepcopy(buffer.state_dict()) for buffer in buffers]
    folders = [tmp_path / name for name in ("once", "twice")]
    for buffer, folder in zip(buffers, folders, strict=True):
        buffer.dumps(folder)
    for buffer, state, folder in zip(buffers, states[::-1], folders[::-1], strict=True):
        for load, saved in ((buffer.load_state_dict, state), (buffer.loads, folder)):
            with pytest.raises(ValueError, match=r"compact must be .* to load what a buffer with"):
                load(saved)
            assert_kept_once(buffers, ring)
    # What was saved on a GPU is loaded where there is none.
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        buffers[0].dumps(tmp_path / "GPU")
    buffers[0], _ = make_pair()
    buffers[0].loads(tmp_path / "GPU")
    assert_kept_once(buffers, ring)


def test_who_saves_is_told_of_ends_that_are_lost(tmp_path):
    stream, (buffer, _) = stream_of(p_done=2.0), make_pair(end_slots=3)
    buffer.extend(stream[:4])
    buffer.state_dict(), buffer.dumps(tmp_path)
    assert buffer.ends_lost() == 0
    buffer.extend(stream[4:6])
    assert buffer.ends_lost() == 2
    for save in (buffer.state_dict, lambda: buffer.dumps(tmp_path)):
        with pytest.warns(UserWarning, match="2 ends of trajectories have lost what comes after them"):
            save()


# One storage


@pytest.mark.parametrize("late", ["nothing", ("next", "truncated"), "mask", TRAJ_KEY], ids=str)
def test_emptied(late):
    """What comes then begins anew, with a flag, a mask or ids that did not tell ends before, and other arguments."""
    stream = make_stream((), 60, traj=True, mask=True, p_done=0.3)
    stream["next", "done"] = stream["next", "terminated"].clone()
    kept_once(stream, done_keys=("done", "truncated"), traj_key=TRAJ_KEY)
    buffers = make_pair(storage=LazyMemmapStorage if late == "nothing" else LazyTensorStorage)
    extend(buffers, stream[:5].exclude(late))
    for arguments in ({}, {"done_keys": ["done", "truncated"], "traj_key": TRAJ_KEY}):
        for buffer in buffers:
            buffer.empty()
            for name, value in arguments.items():
                setattr(buffer, name, value)
        for part in stream[5:40].split(5):
            extend(buffers, part)
            assert_alike(buffers)


@pytest.mark.parametrize(
    ("name", "value"), [("done_keys", ["done"]), ("traj_key", None), ("mask_key", "valid"), ("traj_key", "number")]
)
def test_what_tells_ends_stays_as_it_is(name, value):
    stream, buffers = stream_of((2,)), make_pair(batch=(2,))
    extend(buffers, stream[:, :9])
    before = getattr(buffers[0], name)
    setattr(buffers[0], name, value)
    for use in (lambda: buffers[0].sample(4), lambda: buffers[0].extend(stream[:, 9:10])):
        with pytest.raises(ValueError, match="done_key, done_keys, traj_key, mask_key and reward_keys must stay"):
            use()
    setattr(buffers[0], name, before)
    assert_alike(buffers)
    extend(buffers, stream[:, 9:12])
    assert_alike(buffers)


def test_exchanged_storages():
    stream, buffers = stream_of(), make_pair()
    extend(buffers, stream[:11])
    before = [buffer.set_storage(LazyTensorStorage(SLOTS + 3)) for buffer in buffers]
    for part in stream[11:30].split([5, 14]):
        extend(buffers, part)
        assert_alike(buffers)
    for buffer, other in zip(buffers, before[::-1], strict=True):
        of_other = pytest.raises(ValueError, match=r"storage must be empty, or filled by|compact must be True for a")
        with of_other:
            buffer.set_storage(other)
        with of_other:
            NStepReplayBuffer(n_steps=3, gamma=0.9, storage=other, compact=buffer.compact)
        assert_alike(buffers)
    for buffer, storage in zip(buffers, before, strict=True):
        buffer.set_storage(storage)
    assert_alike(buffers)
    extend(buffers, stream[11:14])
    assert_alike(buffers)


def test_two_on_one_storage():
    stream, firsts = stream_of((2,)), make_pair(batch=(2,))
    arguments = {"n_steps": 2, "gamma": 0.5, "sampler": Every()}
    seconds = [NStepReplayBuffer(storage=each.storage, compact=each.compact, **arguments) for each in firsts]
    for turn, part in enumerate(stream[:, :56].split([3, 4, 1, 2, 9, 9, 3, 4, 1, 2, 9, 9], -1)):
        extend((firsts, seconds)[turn % 2], part)
        assert_alike(firsts), assert_alike(seconds)
        if turn == 5:
            for buffer in seconds:
                buffer.empty()


def test_another_writer():
    """Of its frames nobody kept what comes after them."""
    stream, buffers = stream_of(), make_pair()
    other = TensorDictReplayBuffer(storage=buffers[0].storage)
    extend(buffers, stream[:5])
    other.writer._cursor = 5
    other.extend(stream[5:7].exclude(*KEPT))
    for use in (lambda: buffers[0].sample(4), lambda: buffers[0].extend(stream[7:8])):
        with pytest.raises(RuntimeError, match="storage must be written by buffers with compact alone"):
            use()
    for buffer in buffers:
        buffer.empty()
    extend(buffers, stream[5:11])
    assert_alike(buffers)


# What fails


@pytest.mark.parametrize("end_slots", [SLOTS, 2])
@pytest.mark.parametrize("fails", ["storage", "sampler", "what comes after ends"])
def test_what_fails_leaves_what_was(fails, end_slots, monkeypatch):
    ring = Losing(stream_of((2,), p_done=0.6), SLOTS, end_slots)
    buffers, find = make_pair(batch=(2,), end_slots=end_slots), Ends.find_writes
    for frames in (3, 2):
        extend(buffers, ring.take(frames))

    def fail(*arguments, **more):
        raise OSError("no space left")

    # What is like a call before is stored before the sampler hears of it.
    buffers[0].done_at = "end"
    with monkeypatch.context() as patch:
        if fails == "storage":
            patch.setattr(buffers[0].storage, "set", fail)
        elif fails == "sampler":
            patch.setattr(buffers[0].sampler, "extend", fail)
        else:
            patch.setattr(Ends, "find_writes", lambda *of: (lambda write: lambda: (write(), fail()))(find(*of)))
        with pytest.raises(OSError, match="no space left"):
            buffers[0].extend(ring.stream[:, 20:22].clone())
    if fails == "what comes after ends":
        with pytest.raises(RuntimeError, match=r"a write that failed.*: empty the buffer"):
            buffers[0].sample(4)
        for buffer in buffers:
            buffer.empty()
        ring.empty()
    else:
        assert_kept_once(buffers, ring)
    for frames in (2, 5):
        extend(buffers, ring.take(frames))
        assert_kept_once(buffers, ring)


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("kind", ["lacks", "root lacks", torch.float64, torch.int32, "shape"], ids=str)
def test_what_is_wrong_is_not_stored(kind, calls):
    ring, buffers = Losing(stream_of(), SLOTS, SLOTS), make_pair()
    for frames in (3, 2)[:calls]:
        extend(buffers, ring.take(frames))
    data = ring.stream[5:7].clone()
    if isinstance(kind, torch.dtype) or kind == "shape":
        data[NEXT] = data[NEXT][:, :1] if kind == "shape" else data[NEXT].to(kind)
    else:
        data = data.exclude(NEXT if kind == "lacks" else "observation")
    for buffer in buffers[::-1]:
        with pytest.raises((KeyError, ValueError), match=r"observation'"):
            buffer.extend(data)
        assert len(buffer) == len(ring.numbers())
    assert_kept_once(buffers, ring)
    extend(buffers, ring.take(7))
    assert_kept_once(buffers, ring)


# Verified


@pytest.mark.parametrize("end_slots", [5, 1])
def test_right_streams_are_verified(end_slots):
    ring = Losing(stream_of((2,)), 5, end_slots)
    buffers = make_pair(5, (2,), end_slots=end_slots, backend="verify")
    for turn, frames in enumerate((3, 1, 12, 2)):
        if turn == 3:
            buffers[0].empty(), buffers[1].empty(), ring.empty()
        extend(buffers, ring.take(frames))
        assert_kept_once(buffers, ring)


@pytest.mark.parametrize("at", [0, 1, 5, 10])
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_a_frame_that_was_altered_is_found(batch, at):
    """An observation that is another than what came after the frame before, which no flag ends; nothing is stored."""
    stream, buffers = stream_of(batch, p_done=0.0), make_pair(batch=batch)
    extend(buffers, stream[..., :5])
    data, frame = stream[..., 5:16].clone(), (*(1 for _ in batch), at)
    data["observation"][frame][1] += 1
    buffers[0].backend = "verify"
    with pytest.raises(EquivalenceError, match="which is kept once") as raised:
        buffers[0].extend(data)
    assert raised.value.key == ("observation",) and f"frame {frame}" in str(raised.value)
    buffers[0].backend = "reference"
    assert buffers[0].write_count == buffers[1].write_count
    assert_alike(buffers)
    extend(buffers, stream[..., 5:16])
    assert_alike(buffers)
