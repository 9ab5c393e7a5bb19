"""A done flag for every agent: each agent is a row of its own.

Leaves ``[*B, T, *A, ...]`` of the agents are read as ``[*B, *A, T, ...]``, views in another order, so that what
computes windows knows rows and no agents. May import ``dispatch``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from multistep_triton.dispatch import Extension, n_step_extend, n_step_sample
from multistep_triton.ring import Ring, Samples


def n_step_extend_agents(
    carry: Ring | None,
    data: Mapping[Any, Tensor],
    *,
    time_dim: int,
    agent_dims: int,
    agent_keys: Collection[Hashable],
    reward_keys: Collection[Hashable],
    gathered_keys: Collection[Hashable],
    done_key: Hashable,
    mask_key: Hashable | None,
    traj_key: Hashable | None,
    **arguments: Any,
) -> Extension:
    """:func:`multistep_triton.dispatch.n_step_extend` with a done flag ``[*B, T, *A]`` or ``[*B, T, *A, 1]``.

    Args:
        carry, data: as there.

    Keyword Args:
        agent_dims: the number of dimensions ``A``.
        agent_keys: leaves ``[*B, T, *A, ...]`` whose windows are those of their agent, ``done_key`` among them. The
            windows of the others end where that of any agent ends.

    Returns:
        Extension: steps, discount and nonterminal are ``[*B, E, *A]``. Leaves of the agents are views in another order
        of dimensions.
    """
    after = time_dim + agent_dims
    marks = [key for key in (mask_key, traj_key) if key is not None]
    # Both computations write into the ring, or none.
    free = carry is not None and carry.may_write(data.values())

    def of_agents(leaves: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
        rows = {key: leaves[key].movedim(time_dim, after) for key in agent_keys}
        lead = rows[done_key].shape[: after + 1]
        for key in marks:
            mark = leaves[key].flatten(time_dim)
            rows[key] = mark[(..., *[None] * agent_dims, slice(None))].expand(lead)
        return rows

    def of_frames(leaves: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
        rest = {key: leaf for key, leaf in leaves.items() if key not in agent_keys}
        return {**rest, done_key: leaves[done_key].flatten(time_dim + 1).any(-1)}

    def extend(view: Callable[[Mapping[Any, Tensor]], dict[Any, Tensor]], dim: int) -> Extension:
        leaves, before = view(data), None
        if carry is not None:
            olds = {key: carry.arrange(leaf, dim) for key, leaf in view(carry.leaves).items()}
            before = carry.with_leaves(olds, free)
        return n_step_extend(
            before,
            leaves,
            time_dim=dim,
            reward_keys=[key for key in reward_keys if key in leaves],
            gathered_keys=[key for key in gathered_keys if key in leaves],
            done_key=done_key,
            mask_key=mask_key,
            traj_key=traj_key,
            **arguments,
        )

    def back(leaves: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
        return {key: leaf.movedim(after, time_dim) for key, leaf in leaves.items() if key not in marks}

    frames = extend(of_frames, time_dim)
    agents = extend(of_agents, after)
    held = None
    if frames.carry is not None and agents.carry is not None:
        held = agents.carry.with_leaves({**frames.carry.leaves, **back(agents.carry.leaves)})
    return Extension(
        {**frames.leaves, **back(agents.leaves)},
        {**frames.returns, **back(agents.returns)},
        agents.steps.movedim(after, time_dim),
        agents.discount.movedim(after, time_dim),
        agents.nonterminal.movedim(after, time_dim),
        held,
    )


def n_step_sample_agents(
    samples: Samples,
    data: Mapping[Any, Tensor],
    *,
    agent_dims: int,
    agent_keys: Collection[Hashable],
    reward_keys: Collection[Hashable],
    gathered_keys: Collection[Hashable],
    done_key: Hashable,
    mask_key: Hashable | None,
    traj_key: Hashable | None,
    **arguments: Any,
) -> Extension:
    """:func:`multistep_triton.dispatch.n_step_sample` with a done flag ``[C, *R, *A]`` or ``[C, *R, *A, 1]``.

    Keyword Args:
        agent_dims: the number of dimensions ``A``.
        agent_keys: leaves ``[C, *R, *A, ...]`` whose windows are those of their agent, ``done_key`` among them. The
            windows of the others end where that of any agent ends.

    Returns:
        Extension: steps, discount and nonterminal are ``[N, *A]``.
    """
    dims, device = len(samples.indices), data[done_key].device
    sizes = data[done_key].shape[dims : dims + agent_dims]
    marks = [key for key in (mask_key, traj_key) if key is not None]
    of_agents = {key: data[key] for key in agent_keys}
    for key in marks:
        mark = data[key].flatten(dims - 1) if data[key].ndim > dims else data[key]
        of_agents[key] = mark[(..., *[None] * agent_dims)].expand(*mark.shape, *sizes)
    every = torch.meshgrid(
        torch.arange(samples.indices[0].shape[0], device=device),
        *(torch.arange(size, device=device) for size in sizes),
        indexing="ij",
    )
    frame, *agent = (each.flatten() for each in every)
    each_agent = samples._replace(
        indices=[*(dim[frame] for dim in samples.indices), *agent],
        n_steps=None if samples.n_steps is None else samples.n_steps[frame],
    )

    def sample(
        picked: Samples, leaves: Mapping[Any, Tensor], mask_key: Hashable | None, traj_key: Hashable | None
    ) -> Extension:
        return n_step_sample(
            picked,
            leaves,
            reward_keys=[key for key in reward_keys if key in leaves],
            gathered_keys=[key for key in gathered_keys if key in leaves],
            done_key=done_key,
            mask_key=mask_key,
            traj_key=traj_key,
            **arguments,
        )

    def back(value: Tensor) -> Tensor:
        return value.view(every[0].shape + value.shape[1:])

    agents = sample(each_agent, of_agents, mask_key, traj_key)
    # The shortest window of an agent is that of the frame, whatever ended it.
    steps = back(agents.steps)
    shortest = steps.flatten(1).amin(1)
    rest = {key: leaf for key, leaf in data.items() if key not in agent_keys}
    rest[done_key] = torch.zeros((), dtype=torch.bool, device=device).expand(data[done_key].shape[:dims])
    frames = sample(samples._replace(n_steps=shortest), rest, None, None)
    leaves = {key: back(leaf) for key, leaf in agents.leaves.items() if key not in marks}
    returns = {key: back(value) for key, value in agents.returns.items()}
    return Extension(
        {**frames.leaves, **leaves},
        {**frames.returns, **returns},
        steps,
        back(agents.discount),
        back(agents.nonterminal),
        None,
    )
