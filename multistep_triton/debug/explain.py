"""Explain: the window of one frame of a saved rollout, frame by frame.

Owns the reading of the file and what is said; the windows are those of ``MultiStep``. May import ``postproc``,
``roles`` and ``tables``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from multistep_triton.debug.tables import Row, number, shortened
from multistep_triton.frames import Frames, KeyPath
from multistep_triton.groups import find_groups
from multistep_triton.postproc import MultiStep
from multistep_triton.roles import WINDOW_PATHS

# What torch.save writes of a tensordict besides tensors.
_CLASSES = {
    f"tensordict.{name}"
    for name in (
        "_lazy.LazyStackedTensorDict",
        "_reductions._make_td",
        "_td.TensorDict",
        "tensorclass.NonTensorData",
        "tensorclass.NonTensorStack",
        "utils._LockedSchema",
    )
}


@dataclass(frozen=True)
class Windows:
    """One row of frames of a rollout, and the windows that begin there."""

    where: str
    """Environment and agent, in words, after a comma."""
    n_steps: int
    gamma: float
    row: Row
    steps: list[int]
    discounts: list[float]
    nonterminal: list[bool]
    rewards: dict[str, list[float]]
    """Of every frame, by key and feature; ``returns`` likewise."""
    returns: dict[str, list[float]]
    done_keys: dict[str, list[bool]]
    """The one that ends windows comes first."""
    gathered: list[str]
    """Names of the entries that are read at the window's end."""

    def end(self, t: int) -> int:
        """``e(t)``."""
        return t + self.steps[t] - 1

    def why(self, t: int) -> str:
        """Why the window that begins at ``t`` ends."""
        return self.row.why(t, self.end(t), self.n_steps)

    def explain(self, t: int) -> str:
        """The window that begins at ``t`` in words."""
        end, steps = self.end(t), self.steps[t]
        columns: dict[str, Callable[[int], str]] = {}
        for name, rewards in self.rewards.items():
            columns[name] = partial(_cell, rewards)
        columns["discount"] = lambda s: number(self.gamma ** (s - t)) if s <= end else "-"
        for name, flags in [*self.done_keys.items()][1:]:
            columns[name] = partial(_cell, flags)
        notes = {t: ["this frame"]}
        notes.setdefault(end, []).append(f"the window ends: {self.why(t)}")
        last = min(end + 1, len(self.steps) - 1)
        if last > end:
            notes[last] = ["not in the window"]
        lines = [
            f"window t = {t} .. {end}, {steps} of {self.n_steps} frames; ends: {self.why(t)}",
            "",
            self.row.table(t, last, columns, notes),
            "",
        ]
        for name, rewards in self.rewards.items():
            terms = [
                number(reward) if i == 0 else f"{number(self.gamma**i)} * {number(reward)}"
                for i, reward in enumerate(rewards[t : end + 1])
            ]
            total = sum(self.gamma**i * reward for i, reward in enumerate(rewards[t : end + 1]))
            stored = number(self.returns[name][t], 7)
            lines.append(f"{name} = {' + '.join(shortened(terms))} = {number(total, 7)} (stored as {stored})")
        lines += [
            f"steps_to_next_obs = {steps}",
            f"gamma = {number(self.gamma)} ** {steps} = {number(self.discounts[t], 7)}",
            f"nonterminal = {self.nonterminal[t]}"
            + ("" if self.nonterminal[t] else f": t = {t} is {self.row.boundary(t) or 'the last known frame'}"),
            f"next entries are those of t = {end}: {', '.join(self.gathered) or 'none'}",
        ]
        for name, flags in self.done_keys.items():
            lines.append(f'{name} = {flags[t]} with done_at="start", {flags[end]} with done_at="end"')
        return "\n".join(lines)


def load_rollout(path: Path) -> TensorDictBase:
    """Reads a tensordict that ``torch.save`` wrote, running no code that the file may hold.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    rule = f"FILE must be a tensordict saved with torch.save, got {path}"
    found: list[str] = []
    try:
        found = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        names = [name.rpartition(".") for name in found if name in _CLASSES]
        with torch.serialization.safe_globals([getattr(importlib.import_module(at), name) for at, _, name in names]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler makes of a file that is something else
        if others := [name for name in found if name not in _CLASSES]:
            raise ValueError(
                f"{rule}, with {', '.join(others)} in it: save rollout.to_tensordict().clone(), plain tensors, instead"
            ) from error
        raise ValueError(f"{rule}: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    if not isinstance(data, TensorDictBase):
        raise ValueError(f"{rule}, a {type(data).__name__}")
    return data


def find_windows(data: TensorDictBase, env: Sequence[int], agent: int | None, multistep: MultiStep) -> Windows:
    """The windows of one row of a rollout, cut at its last frame.

    Args:
        data: 1-step transitions, ``[*B, T]``.
        env: an index for each dimension of ``*B``.
        agent: which one, where each has a done flag; else None.
        multistep: computes the windows, and knows the keys.

    Raises:
        KeyError, TypeError, ValueError: the data is no rollout, or an index is not one of it.
    """
    *batch, count = data.batch_size or [0]
    if not count:
        raise ValueError(f"the rollout must hold frames, [*B, T], got batch size {list(data.batch_size)}")
    if len(env) != len(batch):
        raise ValueError(f"env must be one index for each dimension of *B = {batch}, got {[*env]}")
    for index, size in zip(env, batch, strict=True):
        check_index("env", index, size)
    rollout = data[tuple(env)] if env else data
    frames = Frames.read(rollout)
    leaves, roles = frames.leaves, multistep._roles_in(frames.leaves)
    if written := [_name(path) for path in WINDOW_PATHS if path in leaves]:
        raise ValueError(f"the rollout must hold 1-step transitions, got n-step ones, with {', '.join(written)}")
    group = find_groups(frames, roles)[0]
    agents = group.agents
    if (agent is None) != (not agents):
        rule = "one of those that have a done flag each" if agents else "left out, as one done flag is for all"
        got = f"{agent} (done {list(leaves[roles.done].shape)}, batch size {list(frames.batch_size)} = [T])"
        raise ValueError(f"agent must be {rule}, got {got}")
    if agent is not None:
        check_index("agent", agent, agents.numel())
    out = multistep(rollout)

    def row(tensor: Tensor) -> Tensor:
        """Its frames ``[T, F]``, of the agent."""
        return (tensor.flatten(1, len(agents))[:, agent] if agents else tensor).reshape(count, -1)

    def features(path: KeyPath, tensor: Tensor) -> Iterator[tuple[str, list[float]]]:
        for i, values in enumerate(columns := row(tensor).T.tolist()):
            yield _name(path) + (f"[{i}]" if len(columns) > 1 else ""), values

    def window(path: KeyPath) -> list[Any]:
        return row(out[path])[:, 0].tolist()

    rewards = [path for path in roles.rewards if path in group.paths]
    dones = [roles.done]
    for path in filter(leaves.__contains__, group.paths):
        if path in roles.kept and path not in (roles.done, *rewards) and row(leaves[path]).shape[1] == 1:
            dones.append(path)
    mask, traj = (leaves.get(path) if path else None for path in (roles.mask, roles.traj))
    where = [f"env {', '.join(map(str, env))}"] * bool(env) + [f"agent {agent}"] * (agent is not None)
    return Windows(
        where="".join(f", {each}" for each in where),
        n_steps=multistep.n_steps,
        gamma=multistep.gamma,
        row=Row.read({path[-1]: row(leaves[path]) for path in group.flags}, mask, traj, _name(roles.done)),
        steps=window(WINDOW_PATHS[0]),
        discounts=window(WINDOW_PATHS[1]),
        nonterminal=window(WINDOW_PATHS[2]),
        rewards=dict(each for path in rewards for each in features(path, leaves[path])),
        returns=dict(each for path in rewards for each in features(path, out[path])),
        done_keys={_name(path): row(leaves[path])[:, 0].tolist() for path in dones},
        gathered=[_name(path) for path in group.paths if path in leaves and roles.is_gathered(path)],
    )


def check_index(name: str, index: int, size: int) -> None:
    if not 0 <= index < size:
        raise ValueError(f"{name} must be an int in 0 .. {size - 1}, got {index}")


def _cell(values: Sequence[float | bool], t: int) -> str:
    return number(values[t])


def _name(path: KeyPath) -> str:
    return ".".join(path)
