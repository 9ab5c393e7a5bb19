"""The specification: n-step transitions in the plainest PyTorch, formula by formula, on any device.

The tests and ``backend="verify"`` compare the other backends with it. Flags are ``[*B, S]``, time last, leaves
``[*B, S, *F]``. ``x.roll(-1)`` gives each frame the next frame's ``x``; the last known frame gets the first one's, but
no result uses that, as this frame is a boundary. Boundaries select: a NaN beyond one reaches nothing before it.
May import ``task``, ``carry``, ``samples`` and ``spec_ring``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multistep_triton.carry import Carry
from multistep_triton.samples import Samples, sampled_where_frames_are
from multistep_triton.spec_ring import rows_of, with_next
from multistep_triton.task import Keys, Leaves, Results, Task, return_dtype, summed_dtype


def find_boundaries(last: Tensor, leaves: Leaves, keys: Keys) -> Tensor:
    """Returns the boundaries: frames that are ``last``, done or padding, or that padding or another id follows."""
    boundary = last
    for key in keys.done:
        boundary = boundary | leaves[key].reshape(last.shape)
    if keys.mask is not None:
        valid = leaves[keys.mask].reshape(last.shape)
        boundary = boundary | ~valid | ~valid.roll(-1, -1)
    if keys.traj is not None:
        ids = leaves[keys.traj].reshape(last.shape)
        boundary = boundary | (ids != ids.roll(-1, -1))
    return boundary


def count_steps(boundary: Tensor, n_steps: int) -> Tensor:
    """Returns ``steps(t)``: 1 at a boundary or if n is 1, else 1 more than the next frame's with n - 1."""
    steps = torch.ones_like(boundary, dtype=torch.int64)
    for _ in range(min(n_steps, boundary.shape[-1]) - 1):
        steps = torch.where(boundary, 1, 1 + steps.roll(-1, -1))
    return steps


def sum_rewards(reward: Tensor, boundary: Tensor, task: Task) -> Tensor:
    """Returns ``R(t)``: ``r(t)`` at a boundary or if n is 1, else ``r(t) + gamma R(t + 1)``, that with n - 1."""
    dim = boundary.ndim - 1
    boundary = boundary.view(*boundary.shape, *[1] * (reward.ndim - boundary.ndim))
    total = now = reward.to(summed_dtype(reward))
    for _ in range(min(task.n_steps, boundary.shape[dim]) - 1):
        total = torch.where(boundary, now, now + task.gamma * total.roll(-1, dim))
    return total.to(return_dtype(reward))


def gather_future(value: Tensor, steps: Tensor) -> Tensor:
    """Returns ``value(e(t))`` with ``e(t) = t + steps(t) - 1``."""
    frames = torch.arange(steps.numel(), device=steps.device).view(steps.shape)
    return value.flatten(0, steps.ndim - 1)[frames + steps - 1]


def n_step_extend(task: Task, carry: Carry | None, data: Leaves) -> Results:
    """Returns the windows of carried and new frames as far as they are known, and the frames held back."""
    dim, keys = task.time_dim, task.keys
    stream = {key: torch.cat((carry.frames(key, dim), leaf), dim) if carry else leaf for key, leaf in data.items()}
    shape = next(iter(stream.values())).shape[: dim + 1]
    known, emitted = shape[-1], max(shape[-1] - task.n_steps, 0) if task.hold else shape[-1]
    last = (torch.arange(known, device=stream[keys.done[0]].device) == known - 1).expand(shape)
    boundary = find_boundaries(last, stream, keys)
    steps = count_steps(boundary, task.n_steps)
    whole = {out: gather_future(stream[key], steps) if at_end else stream[key] for out, key, at_end in keys.outputs}
    leaves = {out: leaf.narrow(dim, 0, emitted).clone() for out, leaf in whole.items()}
    returns = {key: sum_rewards(stream[key], boundary, task).narrow(dim, 0, emitted).clone() for key in keys.rewards}
    held = {key: stream[key].narrow(dim, emitted, known - emitted) for key in keys.held}
    steps, nonterminal = steps[..., :emitted].clone(), ~boundary[..., :emitted]
    carry = Carry.of(held, known - emitted) if task.hold else None
    return Results(leaves, returns, steps, (task.gamma ** steps.double()).float(), nonterminal, carry)


@sampled_where_frames_are
def n_step_sample(task: Task, samples: Samples, data: Leaves) -> Results:
    """Returns the window of each sampled frame, the first one in the row of frames from it up to the newest."""
    samples, data, gone = with_next(samples, data, task.keys)
    keys, live, (time, *others) = task.keys, samples.live, samples.indices
    ahead = torch.arange(min(task.n_steps + 1, live), device=time.device)
    slots, after = rows_of(samples, len(ahead))
    row = {key: data[key][slots] for key in (*keys.flags, *keys.rewards)}
    boundary = find_boundaries(ahead >= after[:, None], row, keys)
    nonterminal = ~boundary[:, 0]
    boundary = boundary | gone[slots].roll(-1, -1)
    if samples.n_steps is not None:
        boundary = boundary | (ahead + 1 >= samples.n_steps[:, None])
    steps = count_steps(boundary, task.n_steps)[:, 0]
    end = (time + steps - 1) % live
    leaves = {out: data[key][(end if at else time, *others)] for out, key, at in keys.outputs}
    leaves = {out: leaves[out].to(keys.wide_dtypes.get(key, data[key].dtype)) for out, key, _ in keys.outputs}
    returns = {key: sum_rewards(row[key], boundary, task)[:, 0].clone() for key in keys.rewards}
    return Results(leaves, returns, steps.clone(), (task.gamma ** steps.double()).float(), nonterminal)
