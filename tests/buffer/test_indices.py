"""Indices that a sampler draws: of any kind, and of no frame."""

import numpy as np
import pytest
import torch
from paths import EITHER, kernels
from rings import Drawn, Ring, assert_sampled, make_buffer, make_stream

from multistep_triton import eager, engine, spec
from multistep_triton.debug.differences import different_bits
from multistep_triton.kernels.windows import INTERPRETED
from multistep_triton.samples import Samples, blanked, find_there
from multistep_triton.task import Keys, Task


def filled(batch=(), cuts=(8, 3), **arguments):
    ring, buffer = Ring(make_stream(batch, 40), 8), make_buffer(8, batch, **arguments)
    for cut in cuts:
        buffer.extend(ring.take(cut))
    return buffer, ring


def every_other(index):
    """The same, with other things between."""
    return torch.stack((index, torch.full_like(index, 5)), -1)[..., 0]


KINDS = {
    "as it is": lambda index: index,
    "every other": every_other,
    "a column": lambda index: index.view(-1, 1).expand(-1, 3)[:, 1],
    "of two dimensions": lambda index: every_other(index.view(2, -1)),
}


@EITHER
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_what_is_sampled_lies_where_the_index_says(batch, kind, dtype, where):
    slots, envs = torch.tensor([3, 0, 7, 0], dtype=dtype), torch.tensor([1, 0, 0, 1], dtype=dtype)
    drawn = KINDS[kind](slots) if not batch else (KINDS[kind](slots), KINDS[kind](envs))
    buffer, ring = filled(batch, sampler=Drawn(drawn))
    stored = buffer.storage[(slots.long(), envs.long()) if batch else slots.long()]["number"]
    for n_steps in (3, (1, 4)):
        buffer.n_steps = n_steps
        sample = buffer.sample(4)
        assert torch.equal(sample["number"].flatten(), stored)
        index = sample["index"].reshape(4, -1)
        assert index[:, 0].tolist() == slots.tolist() and (not batch or index[:, 1].tolist() == envs.tolist())
        assert_sampled(sample.flatten(), ring, n_steps)


@EITHER
def test_indices_of_numpy(where):
    slots = np.array([3, 0, 7, 0], dtype=np.int32)
    buffer, ring = filled(sampler=Drawn(slots))
    sample = buffer.sample(4)
    assert torch.equal(sample["number"], buffer.storage[torch.as_tensor(slots).long()]["number"])
    assert_sampled(sample, ring)


@EITHER
@pytest.mark.parametrize("index", [torch.tensor([0, 3]), torch.tensor([-1]), np.array([2, 9])], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_on_a_cpu_an_index_of_no_frame_is_an_error(index, backend, where):
    if where is kernels and not INTERPRETED:
        pytest.skip("the kernels run on a GPU, where such an index is seen in what comes out")
    buffer, _ = filled(cuts=[3], sampler=Drawn(index), backend=backend)
    with pytest.raises(IndexError, match=r"a sampler must draw indices within 0 \.\. 2, got"):
        buffer.sample(2)


# Where the host does not wait for the device


BLANKS = {
    "n": (3, None),
    "n of its own": (4, torch.tensor([1, 4, 2, 3, 2, 4, 1, 2, 3])),
    "a loop": (12, None),
    "one step": (1, None),
}


def drawn(batch):
    """Indices of which those of frames are the second, the fourth and the seventh; two are of no environment."""
    slots = torch.tensor([-1, 2, 8, 5, 1 << 40, -(1 << 33), 7, 1, 6])
    envs = torch.tensor([0, 1, 1, 0, 1, 0, 1, -1, 2])
    if len(batch) < 2:
        return [slots, envs] if batch else [slots[:7]]
    # The storage has the batch dimensions in reverse.
    return [slots, torch.tensor([0, 1, 2, 0, 1, 0, 2, -1, 3]), torch.tensor([0, 1, 1, 0, 1, 0, 1, 1, 1])]


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("case", BLANKS)
@kernels()
def test_an_index_of_no_frame_comes_out_blank(case, batch, marks, monkeypatch):
    """As on an accelerator, by both backends: 0 steps, a return of NaN, and zeros."""
    (high, own), stream = BLANKS[case], make_stream(batch, 40, traj=marks, mask=marks)
    stream["next", "cost"] = torch.randint(9, (*batch, 40, 2))
    stream["next", "half"] = torch.randn(*batch, 40).bfloat16()
    buffer = make_buffer(16 if high > 8 else 8, batch, reward_keys=["reward", "cost", "half"], n_steps=min(high, 8))
    buffer.extend(stream[..., :16]), buffer.extend(stream[..., 16:27])
    stored = buffer.storage[:]
    data = {key if isinstance(key, tuple) else (key,): stored[key] for key in stored.keys(True, True) if key != "index"}
    rewards = [("next", key) for key in ("reward", "cost", "half")]
    keys = Keys.of(
        data,
        1 + len(batch),
        tuple(("next", key) for key in ("done", "terminated", "truncated")),
        rewards=tuple(rewards),
        outputs=tuple((key, key, key[0] == "next" and key not in rewards) for key in data),
        mask=("mask",) if marks else None,
        traj=("collector", "traj_ids") if marks else None,
    )
    task = Task(keys, high, 0.9, 0, False)
    slots = stored.shape[0]
    indices = drawn(batch)
    own = None if own is None else own[: len(indices[0])].to(indices[0].device)
    samples = Samples(indices, 2, slots if slots == 8 else 11, own)
    inside, isolated = [1, 3, 6], [0, 2, 4, 5] if slots == 8 else [0, 4, 5]
    if slots > 8:
        inside = [1, 2, 3, 6]
    isolated += [7, 8] if batch else []
    picked = samples._replace(
        indices=[index[inside] for index in samples.indices], n_steps=None if own is None else own[inside]
    )
    expected = spec.n_step_sample(task, picked, data)
    monkeypatch.setattr(engine, "_check_indices", lambda *arguments: None)
    there, guarded = find_there(samples, next(iter(data.values())).shape)
    assert there.nonzero().flatten().tolist() == inside
    outs = [blanked(each.n_step_sample(task, guarded, data), there) for each in (eager, spec)]
    outs.append(engine.n_step_sample(task, samples, data, "triton"))
    for leaves, returns, steps, discount, nonterminal, *_ in outs:
        assert steps[isolated].tolist() == [0] * len(isolated)
        assert discount[isolated].tolist() == [1.0] * len(isolated)
        assert not nonterminal[isolated].any()
        assert all(value[isolated].isnan().all() for value in returns.values())
        assert all(not leaf[isolated].any() for leaf in leaves.values())
        assert torch.equal(steps[inside], expected.steps) and torch.equal(nonterminal[inside], expected.nonterminal)
        for key, leaf in expected.leaves.items():
            assert not different_bits(leaves[key][inside], leaf).any(), key
        for key, value in expected.returns.items():
            torch.testing.assert_close(returns[key][inside], value)
