"""Streams of any shape, done pattern, dtype and layout, and what must come of them: the loops of ``rollouts.py``."""

import torch
from hypothesis import assume
from hypothesis import strategies as st
from rollouts import assert_returns, boundaries, extend, window_ends
from tensordict import TensorDict
from torch import Tensor

from multistep_triton import MultiStepTransform, gather_future, n_step_return

REWARD_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.uint8, torch.bool]
VALUE_DTYPES = [torch.bool, torch.uint8, torch.int16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
LAYOUTS = ["contiguous", "time-major", "time inside", "strided"]


def lay_out(tensor: Tensor, layout: str, time_dim: int) -> Tensor:
    """The same values, laid out in memory in another way."""
    if layout == "time-major":
        return tensor.movedim(time_dim, 0).contiguous().movedim(0, time_dim)
    if layout == "time inside":
        return tensor.movedim(time_dim, time_dim // 2).contiguous().movedim(time_dim // 2, time_dim)
    if layout == "strided":
        return tensor.repeat_interleave(2, time_dim)[(slice(None),) * time_dim + (slice(None, None, 2),)]
    return tensor


@st.composite
def streams(draw):
    """A rollout with rewards of any dtype, how it is cut into calls, n and gamma."""
    batch = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    cuts = draw(st.lists(st.integers(0, 12), min_size=1, max_size=5))
    shape = (*batch, sum(cuts))
    count = torch.Size(shape).numel()
    flags = st.lists(st.booleans(), min_size=count, max_size=count)
    dtype = draw(st.sampled_from(REWARD_DTYPES))
    features = tuple(draw(st.lists(st.integers(1, 2), max_size=2)))
    generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**16)))
    reward = torch.randn(*shape, *features, generator=generator) * 3
    value = torch.randn(*shape, 2, generator=generator) * 3
    layout = draw(st.sampled_from(LAYOUTS))
    data = {
        "value": value.to(draw(st.sampled_from(VALUE_DTYPES))),
        "next": {
            "reward": (reward > 0 if dtype == torch.bool else reward.abs() if dtype == torch.uint8 else reward).to(
                dtype
            ),
            "done": torch.tensor(draw(flags), dtype=torch.bool).view(shape),
            "value": value.to(draw(st.sampled_from(VALUE_DTYPES))),
        },
    }
    if draw(st.booleans()):
        data["next"]["done"] = data["next"]["done"].unsqueeze(-1)
    if draw(st.booleans()):
        data["mask"] = torch.tensor(draw(flags), dtype=torch.bool).view(shape)
    if draw(st.booleans()):
        data["traj"] = torch.tensor(draw(flags), dtype=draw(st.sampled_from([torch.int64, torch.uint8]))).view(shape)
    rollout = TensorDict(data, shape).apply(lambda leaf: lay_out(leaf, layout, len(batch)))
    return rollout, cuts, draw(st.integers(1, 14)), draw(st.sampled_from([0.0, 0.5, 0.99, 1.0]))


def take(value: Tensor, ends: Tensor) -> Tensor:
    """``value`` at the ends of the windows, one frame after the other."""
    frames, features = ends.shape[-1], value.shape[ends.ndim :]
    rows = value.reshape(ends.shape[:-1].numel(), frames, *features)
    picked = [rows[b, end] for b, row in enumerate(ends.reshape(rows.shape[:2]).tolist()) for end in row]
    return torch.stack(picked).view(value.shape) if picked else value


def frame_bytes(value: Tensor) -> Tensor:
    return value.clone(memory_format=torch.contiguous_format).view(torch.uint8) if value.numel() else value


def check_transform(stream, done_at="start"):
    rollout, cuts, n_steps, gamma = stream
    before = rollout.clone()
    frames = rollout.shape[-1]
    traj = rollout.get("traj")
    transform = MultiStepTransform(n_steps, gamma, done_at=done_at, traj_key=None if traj is None else "traj")
    out = extend(transform, rollout, cuts)
    assert (rollout == before).all()
    emitted = frames - n_steps
    if emitted <= 0:
        assert out is None
        return

    lead = rollout.batch_size
    done = rollout["next", "done"].reshape(lead)
    mask = rollout.get("mask")
    ends = window_ends(done, n_steps, mask, traj)
    assert out.batch_size == (*lead[:-1], emitted)

    def head(leaf: Tensor) -> Tensor:
        return leaf.narrow(len(lead) - 1, 0, emitted)

    reward = rollout["next", "reward"]
    assert_returns(out["next", "reward"], reward, ends, gamma, n_steps)
    assert torch.equal(frame_bytes(out["next", "value"]), frame_bytes(head(take(rollout["next", "value"], ends))))
    assert torch.equal(frame_bytes(out["value"]), frame_bytes(head(rollout["value"])))
    assert torch.equal(out["next", "reward_orig"], head(reward))
    if done_at == "end":
        assert torch.equal(out["next", "done_orig"], head(rollout["next", "done"]))
        assert torch.equal(out["next", "done"], head(take(rollout["next", "done"], ends)))
    else:
        assert torch.equal(out["next", "done"], head(rollout["next", "done"]))
    steps = head(ends) - torch.arange(emitted) + 1
    assert torch.equal(out["steps_to_next_obs"], steps)
    assert torch.equal(out["gamma"], (torch.tensor(gamma, dtype=torch.float64) ** steps).float())
    assert torch.equal(out["nonterminal"], ~head(boundaries(done, mask, traj)))


def check_functions(stream):
    rollout, _, n_steps, gamma = stream
    reward, done, mask = rollout["next", "reward"], rollout["next", "done"], rollout.get("mask")
    lead, features = rollout.batch_size, reward.shape[rollout.ndim :]
    if done.ndim == len(lead):
        assume(features or lead[-1] != 1 or len(lead) == 1)  # [*B, 1], else read as [*B, T, 1]
    else:
        assume(len(features) < 2 or features[0] != 1)  # [*B, T, 1], else read as [*B, 1]
    out = n_step_return(reward, done, gamma=gamma, n_steps=n_steps, mask=mask)
    ends = window_ends(done.reshape(lead), n_steps, mask)
    assert_returns(out.reward, reward, ends, gamma, n_steps)
    assert torch.equal(out.steps, ends - torch.arange(lead[-1]) + 1)
    assert torch.equal(out.discount, (torch.tensor(gamma, dtype=torch.float64) ** out.steps).float())
    gathered = gather_future(rollout["next", "value"], out.steps)
    assert torch.equal(frame_bytes(gathered), frame_bytes(take(rollout["next", "value"], ends)))
