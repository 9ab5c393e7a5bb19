"""Who owns which memory, and how much of it there is."""

import pytest
import torch
from memory import Calls, addresses, storages
from rollouts import make_rollout
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage

from benchmarks.measure import PeakMemory
from multistep_triton import MultiStepTransform, NStepReplayBuffer, gather_future, n_step_return


def test_peak_memory_counts_what_it_should():
    with PeakMemory() as memory:
        first = torch.ones(1000, dtype=torch.uint8)
        second = first + first
        view = second[:10]
        del first
        third = view.clone()
    assert (memory.alive, memory.peak) == (1010, 2000)
    del second, view, third
    assert memory.alive == 0


@pytest.mark.parametrize("cuts", [[20, 20], [2, 1, 30], [1] * 12, [20, 0, 20]], ids=str)
def test_outputs_inputs_and_carry_share_no_memory(cuts):
    rollout = make_rollout((2,), sum(cuts))
    transform = MultiStepTransform(3, 0.9)
    outs = []
    for part in rollout.split(cuts, -1):
        part = part.clone()
        before = part.clone()
        out = transform.inv(part)
        carry = transform._carry.leaves
        carried = addresses(carry.values())
        assert not carried & storages(part)
        assert not carried & storages(*outs)
        if out is not None:
            assert not storages(out) & (storages(part) | carried)
            outs.append(out)
        assert (part == before).all()


def test_the_carry_is_compact():
    transform = MultiStepTransform(3, 0.9)
    for part in make_rollout((4,), 2000).split(500, -1):
        transform.inv(part)
        for leaf in transform._carry.leaves.values():
            assert leaf.shape[1] == 3
            assert leaf.untyped_storage().nbytes() == leaf.nbytes
    assert transform._buffer.batch_size == (4, 3)
    assert not storages(transform._buffer) & addresses(transform._carry.leaves.values())


@pytest.mark.parametrize("n_steps", [1, 3])
def test_outputs_are_compact(n_steps):
    transform = MultiStepTransform(n_steps, 0.9)
    for part in make_rollout((4,), 60).split(20, -1):
        for key, leaf in transform.inv(part).items(True, True):
            assert leaf.is_contiguous(), key
            assert leaf.untyped_storage().nbytes() == leaf.nbytes, key


def test_writing_to_an_output_or_an_input_does_not_reach_the_carry():
    rollout = make_rollout((2,), 40)
    calm, disturbed = MultiStepTransform(3, 0.9), MultiStepTransform(3, 0.9)
    calm.inv(rollout[:, :20])
    part = rollout[:, :20].clone()
    disturbed.inv(part).zero_()
    part.zero_()
    expected, out = calm.inv(rollout[:, 20:]), disturbed.inv(rollout[:, 20:])
    for key in expected.keys(True, True):
        assert torch.equal(out[key], expected[key]), key


def test_functions_return_new_memory():
    reward, done = torch.ones(2, 5), torch.zeros(2, 5, dtype=torch.bool)
    for n_steps in (1, 3):
        out = n_step_return(reward, done, gamma=0.9, n_steps=n_steps)
        assert len({x.untyped_storage().data_ptr() for x in (reward, done, *out)}) == 5
    assert not done.any()
    gathered = gather_future(reward, torch.ones(2, 5, dtype=torch.int64))
    assert gathered.data_ptr() != reward.data_ptr()


def state_and_pixels(pixels, p_done):
    rollout = make_rollout((8,) if pixels else (256,), 64, p_done=p_done)
    for data in (rollout, rollout["next"]):
        data["observation"] = torch.zeros(8, 64, 4, 84, 84, dtype=torch.uint8) if pixels else torch.zeros(256, 64, 17)
    return rollout


@pytest.mark.parametrize("pixels", [False, True], ids=["state", "pixels"])
@pytest.mark.parametrize("p_done", [0.0, 0.1, 1.0])
def test_peak_memory_beyond_the_output_is_at_most_half_the_input(pixels, p_done):
    rollout = state_and_pixels(pixels, p_done)
    transform = MultiStepTransform(3, 0.9)
    transform.inv(rollout)
    with PeakMemory() as memory:
        out = transform.inv(rollout)
    owned = {leaf.untyped_storage().data_ptr(): leaf.nbytes for leaf in out.values(True, True)}
    assert memory.peak - sum(owned.values()) <= 0.5 * rollout.bytes()


@pytest.mark.parametrize("n_steps", [10, 50])
def test_a_sample_of_a_whole_ring_takes_no_copy_for_every_step(n_steps):
    """Of its flags and rewards it holds a few, and not one for each of n steps."""
    envs, slots = 16, 64
    rollout = make_rollout((envs,), slots)
    buffer = NStepReplayBuffer(
        n_steps=n_steps, gamma=0.9, storage=LazyTensorStorage(envs * slots, ndim=2), batch_size=envs * slots
    )
    buffer.extend(rollout)
    with PeakMemory() as memory:
        out = buffer.sample()
    owned = {leaf.untyped_storage().data_ptr(): leaf.nbytes for leaf in out.values(True, True)}
    read = rollout["next"].select("reward", "done", "terminated", "truncated").bytes()
    assert memory.peak - sum(owned.values()) <= 8 * read


def test_memory_and_calls_do_not_depend_on_the_number_of_episodes():
    seen = []
    for p_done in (0.0, 0.1, 1.0):
        rollout = state_and_pixels(False, p_done)
        transform = MultiStepTransform(3, 0.9)
        transform.inv(rollout)
        with PeakMemory() as memory, Calls() as calls:
            transform.inv(rollout)
        seen.append((memory.peak, calls.names))
        assert not calls.waits()
    assert seen[0] == seen[1] == seen[2]


def test_a_thousand_extends_hold_no_more_than_n_frames():
    rollout = TensorDict(
        {
            "observation": torch.zeros(4, 200, 8),
            "next": {
                "observation": torch.zeros(4, 200, 8),
                "reward": torch.zeros(4, 200, 1),
                "done": torch.zeros(4, 200, 1, dtype=torch.bool),
            },
        },
        [4, 200],
    )
    transform = MultiStepTransform(5, 0.9)
    with PeakMemory() as memory:
        for _ in range(1000):
            transform.inv(rollout)
    assert memory.alive == sum(leaf.nbytes for leaf in transform._carry.leaves.values()) == rollout.bytes() * 5 // 200
