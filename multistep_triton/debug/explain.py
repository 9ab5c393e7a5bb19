"""Explain: shows the window of one frame of a saved rollout, frame by frame.

Owns how the file is read and the explanation's text; ``MultiStep`` computes the windows. May import ``postproc``,
``roles``, ``groups``, ``frames``, ``layouts`` and ``tables``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from multistep_triton.debug.tables import Row, number, shortened
from multistep_triton.frames import Frames
from multistep_triton.groups import find_groups
from multistep_triton.layouts import KeyPath
from multistep_triton.postproc import MultiStep
from multistep_triton.roles import WINDOW_PATHS

# The classes, besides tensors, that a tensordict saved with torch.save names; load_rollout allows no others.
_CLASSES = {
    "tensordict._lazy.LazyStackedTensorDict",
    "tensordict._reductions._make_td",
    "tensordict._td.TensorDict",
    "tensordict.tensorclass.NonTensorData",
    "tensordict.tensorclass.NonTensorStack",
    "tensordict.utils._LockedSchema",
}


class Windows:
    """The windows of one row of a rollout, cut at its last frame.

    Args:
        data: 1-step transitions, ``[*B, T]``.
        env: an index for each dimension of ``*B``.
        agent: the agent's index, counted over all agent dimensions, if each agent has a done flag; else None.
        multistep: the object that computes the windows and knows the keys.

    Raises:
        KeyError, TypeError, ValueError: the data is no rollout of 1-step transitions, or an index lies outside it.
    """

    def __init__(self, data: TensorDictBase, env: Sequence[int], agent: int | None, multistep: MultiStep) -> None:
        rollout = _row_of(data, env)
        frames = Frames.read(rollout)
        leaves, roles = frames.leaves, multistep._roles_in(frames.leaves)
        if written := [_name(path) for path in WINDOW_PATHS if path in leaves]:
            raise ValueError(f"the rollout must hold 1-step transitions, got n-step ones, with {', '.join(written)}")
        group = find_groups(frames, roles)[0]
        _check_agent(agent, group.agents, leaves[roles.done], len(rollout))
        out = multistep(rollout)

        def own(tensor: Tensor) -> Tensor:
            """Returns the agent's part of an entry ``[T, *A, ...]``, or the whole entry, as ``[T, F]``."""
            part = tensor if agent is None else tensor.flatten(1, len(group.agents))[:, agent]
            return part.reshape(len(rollout), -1)

        def columns(entries: Any, paths: Iterable[KeyPath]) -> dict[str, list[Any]]:
            """Returns a list of values per frame for each feature, named by entry and, if there are several, index."""
            features = {path: own(entries[path]).T.tolist() for path in paths}
            return {
                _name(path) + (f"[{i}]" if len(rows) > 1 else ""): values
                for path, rows in features.items()
                for i, values in enumerate(rows)
            }

        rewards = [path for path in roles.rewards if path in group.paths]
        paths = [path for path in group.paths if path in leaves]
        flags = [path for path in paths if path in roles.dones and path not in (roles.done, *rewards)]
        dones = [roles.done, *(path for path in flags if own(leaves[path]).shape[1] == 1)]
        mask, traj = (leaves.get(path) if path else None for path in (roles.mask, roles.traj))
        where = [f", env {', '.join(map(str, env))}"] * bool(env) + [f", agent {agent}"] * (agent is not None)
        self.where = "".join(where)
        self.n_steps, self.gamma = multistep.n_steps, multistep.gamma
        self.row = Row.read({path[-1]: own(leaves[path]) for path in group.flags}, mask, traj, _name(roles.done))
        self.steps: list[int]
        self.steps, self.discounts, self.nonterminal = columns(out, WINDOW_PATHS).values()
        self.rewards, self.returns = columns(leaves, rewards), columns(out, rewards)
        self.dones = columns(leaves, dones)
        """The values, by name, of each done key that has one feature; those of ``done_key`` come first."""
        self.gathered = [_name(path) for path in paths if roles.is_gathered(path)]
        """Names of the entries that a transition reads at the window's end."""

    def end(self, t: int) -> int:
        """Returns ``e(t)``, the last frame of the window that begins at ``t``."""
        return t + self.steps[t] - 1

    def why(self, t: int) -> str:
        """Says why the window that begins at ``t`` ends."""
        return self.row.why(t, self.end(t), self.n_steps)

    def explain(self, t: int) -> str:
        """Describes the window that begins at ``t`` as text."""
        _check_index("t", t, len(self.steps))
        end, steps = self.end(t), self.steps[t]
        terminal = "" if self.nonterminal[t] else f": t = {t} is {self.row.boundary(t) or 'the last known frame'}"
        return "\n".join(
            (
                f"window t = {t} .. {end}, {steps} of {self.n_steps} frames; ends: {self.why(t)}",
                "",
                self._table(t),
                "",
                *(self._sum(name, t) for name in self.rewards),
                f"steps_to_next_obs = {steps}",
                f"gamma = {number(self.gamma)} ** {steps} = {number(self.discounts[t], 7)}",
                f"nonterminal = {self.nonterminal[t]}{terminal}",
                f"next entries are those of t = {end}: {', '.join(self.gathered) or 'none'}",
                *(
                    f'{name} = {flags[t]} with done_at="start", {flags[end]} with done_at="end"'
                    for name, flags in self.dones.items()
                ),
            )
        )

    def _table(self, t: int) -> str:
        """Returns a table of the window's frames and the frame after the window."""
        end = self.end(t)
        columns: dict[str, Callable[[int], object]] = {name: of.__getitem__ for name, of in self.rewards.items()}
        columns["discount"] = lambda s: self.gamma ** (s - t) if s <= end else "-"
        columns |= {name: flags.__getitem__ for name, flags in [*self.dones.items()][1:]}
        notes = {t: ["this frame"]}
        notes.setdefault(end, []).append(f"the window ends: {self.why(t)}")
        if end + 1 < len(self.steps):
            notes[end + 1] = ["not in the window"]
        return self.row.table(t, max(notes), columns, notes)

    def _sum(self, name: str, t: int) -> str:
        """Writes out the return of a reward term by term."""
        terms = [(self.gamma**i, reward) for i, reward in enumerate(self.rewards[name][t : self.end(t) + 1])]
        (_, first), *others = terms
        summed = shortened([number(first), *(f"{number(discount)} * {number(reward)}" for discount, reward in others)])
        total, stored = sum(discount * reward for discount, reward in terms), self.returns[name][t]
        return f"{name} = {' + '.join(summed)} = {number(total, 7)} (stored as {number(stored, 7)})"


def load_rollout(path: Path) -> TensorDictBase:
    """Reads a tensordict that ``torch.save`` wrote, without running code that the file may hold.

    Raises:
        ValueError: the file cannot be read, or holds no tensordict.
    """
    rule = f"FILE must be a tensordict saved with torch.save, got {path}"
    found: list[str] = []
    try:
        found = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        names = [name.rpartition(".") for name in found if name in _CLASSES]
        with torch.serialization.safe_globals([getattr(importlib.import_module(at), name) for at, _, name in names]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on a file of another kind, the unpickler can raise anything
        if others := [name for name in found if name not in _CLASSES]:
            raise ValueError(
                f"{rule}, with {', '.join(others)} in it: save rollout.to_tensordict().clone(), plain tensors, instead"
            ) from error
        raise ValueError(f"{rule}: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    if not isinstance(data, TensorDictBase):
        raise ValueError(f"{rule}, a {type(data).__name__}")
    return data


def _check_index(name: str, index: int, size: int) -> None:
    if not 0 <= index < size:
        raise ValueError(f"{name} must be an int in 0 .. {size - 1}, got {index}")


def _row_of(data: TensorDictBase, env: Sequence[int]) -> TensorDictBase:
    *batch, count = data.batch_size or [0]
    if not count:
        raise ValueError(f"the rollout must hold frames, [*B, T], got batch size {list(data.batch_size)}")
    if len(env) != len(batch):
        raise ValueError(f"env must be one index for each dimension of *B = {batch}, got {[*env]}")
    for index, size in zip(env, batch, strict=True):
        _check_index("env", index, size)
    return data[tuple(env)] if env else data


def _check_agent(agent: int | None, agents: torch.Size, done: Tensor, count: int) -> None:
    if (agent is None) != (not agents):
        rule = "one of those that have a done flag each" if agents else "left out, as one done flag is for all"
        raise ValueError(f"agent must be {rule}, got {agent} (done {list(done.shape)}, batch size [{count}] = [T])")
    if agent is not None:
        _check_index("agent", agent, agents.numel())


def _name(path: KeyPath) -> str:
    return ".".join(path)
