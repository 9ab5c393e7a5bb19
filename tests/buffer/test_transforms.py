"""torchrl's transforms on what the n-step buffer samples."""

import pytest
import torch
from rings import Ring, assert_same_bytes, assert_sampled, assert_windows, everything, make_buffer, make_stream, wrapped
from torchrl.data import SamplerWithoutReplacement
from torchrl.envs.transforms import Compose, DoubleToFloat, RewardScaling, Transform

REWARD, NEXT = ("next", "reward"), ("next", "observation")


class Change(Transform):
    """Adds 1 to observations on extend, and doubles next observations on sample."""

    def __init__(self):
        super().__init__()
        self.extended, self.sampled = [], []

    def _inv_call(self, tensordict):
        self.extended.append(tensordict.numel())
        return tensordict.set("observation", tensordict["observation"] + 1)

    def forward(self, tensordict):
        self.sampled.append(tensordict.numel())
        # it is given what is sampled: the n-step transition
        assert {"steps_to_next_obs", "gamma", "nonterminal"} <= set(tensordict.keys())
        return tensordict.set(NEXT, tensordict[NEXT] * 2)


@pytest.mark.parametrize("how", ["argument", "append", "insert", "compose"])
@pytest.mark.parametrize("prefetch", [None, 2])
def test_transforms_are_applied_once(how, prefetch):
    change = Change()
    given = {"argument": change, "compose": Compose(change)}.get(how)
    # prefetched samples are as many as there are batches in an epoch
    sampler = SamplerWithoutReplacement(drop_last=True)
    stream = make_stream((2,), 30)
    buffer = make_buffer(8, (2,), transform=given, sampler=sampler, batch_size=8, prefetch=prefetch)
    if how == "append":
        buffer.append_transform(change)
    elif how == "insert":
        buffer.insert_transform(0, change)
    ring = Ring(stream, 8)
    buffer.extend(ring.take(8)), buffer.extend(ring.take(3))
    assert change.extended == [16, 6]
    ring.stream = stream.clone()
    ring.stream["observation"] += 1
    ring.stream[NEXT] *= 2
    for n_steps in (3, 5):
        buffer.n_steps = n_steps
        assert_sampled(buffer.sample(), ring, n_steps)
    if prefetch is None:
        assert change.sampled == [8, 8]


def test_rewards_are_scaled_as_they_were_summed():
    scaling = RewardScaling(loc=0.0, scale=10.0, in_keys=[REWARD])
    buffer, ring = wrapped(transform=scaling)
    sample = everything(buffer)
    calm = wrapped()[0]
    expected = everything(calm)
    torch.testing.assert_close(sample[REWARD], expected[REWARD] * 10)
    assert_same_bytes(sample["next", "reward_orig"], expected["next", "reward_orig"])
    assert_windows(sample, ring, 3, 0.9)


def test_a_transform_that_casts_on_extend():
    stream = make_stream((2,), 30)
    ring, buffer = Ring(stream.clone(), 8), make_buffer(8, (2,), transform=DoubleToFloat(in_keys_inv=["observation"]))
    for start, stop in ((0, 8), (8, 13)):
        part = stream[:, start:stop].clone()
        part["observation"] = part["observation"].double()
        buffer.extend(part)
    ring.take(13)
    sample = everything(buffer)
    assert sample["observation"].dtype == torch.float32
    assert_sampled(sample, ring)
