"""The specification against plain loops, and the fast path against the specification."""

import pytest
import torch
from hypothesis import given
from rollouts import assert_returns, boundaries, window_ends
from streams import frame_bytes, streams, take

from multistep_triton import eager, engine, spec
from multistep_triton.debug import verify
from multistep_triton.debug.streams import KINDS, run_verified
from multistep_triton.task import Keys, Task


@given(streams())
def test_the_specification_is_the_loop(stream):
    rollout, cuts, n_steps, gamma = stream
    future, dim = rollout["next"], rollout.ndim - 1
    data = {"reward": future["reward"], "done": future["done"], "value": future["value"], "own": rollout["value"]}
    data |= {key: rollout[key] for key in ("mask", "traj") if key in rollout.keys()}  # noqa: SIM118
    keys = Keys.of(
        data,
        rollout.ndim,
        ("done",),
        rewards=("reward",),
        outputs=tuple((key, key, key == "value") for key in data),
        mask="mask" if "mask" in data else None,
        traj="traj" if "traj" in data else None,
    )
    carry, outs, begin = None, [], 0
    for cut in cuts:
        part = {key: leaf.narrow(dim, begin, cut) for key, leaf in data.items()}
        outs.append(spec.n_step_extend(Task(keys, n_steps, gamma, dim), carry, part))
        carry, begin = outs[-1].carry, begin + cut
    held = {key: carry.frames(key, dim) for key in data}
    outs.append(spec.n_step_extend(Task(keys, n_steps, gamma, dim, hold=False), None, held))
    steps, nonterminal = (torch.cat([getattr(out, name) for out in outs], dim) for name in ("steps", "nonterminal"))
    flags = [data.get(key) for key in ("done", "mask", "traj")]
    flags = [None if flag is None else flag.reshape(rollout.batch_size) for flag in flags]
    ends, boundary = window_ends(flags[0], n_steps, *flags[1:]), boundaries(*flags)
    boundary[..., -1:] = True
    assert torch.equal(steps, ends - torch.arange(ends.shape[-1]) + 1)
    assert torch.equal(nonterminal, ~boundary)
    for key, leaf in data.items():
        out = torch.cat([each.leaves[key] for each in outs], dim)
        assert torch.equal(frame_bytes(out), frame_bytes(take(leaf, ends) if key == "value" else leaf)), key
    assert_returns(torch.cat([out.returns["reward"] for out in outs], dim), data["reward"], ends, gamma, n_steps)


@pytest.mark.parametrize("join_bytes", [eager.JOIN_BYTES, -1], ids=["joined", "where they lie"])
@pytest.mark.parametrize("seed", range(4 * len(KINDS)))
def test_the_fast_path_is_as_specified(seed, join_bytes, monkeypatch):
    """Random streams, extended and sampled, with ``backend="verify"`` where the kernels cannot run.

    Carry and data are joined where they are small, as all of these are, and else read where they lie.
    """
    monkeypatch.setattr(eager, "JOIN_BYTES", join_bytes)
    monkeypatch.setattr(verify, "find_obstacle", lambda *tensors: "there is one")
    monkeypatch.setattr(engine, "_import", {"verify": verify}.__getitem__)
    result = run_verified(seed, torch.device("cpu"))
    assert result.difference is None
    assert result.frames > 0
