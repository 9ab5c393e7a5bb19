"""Roles: which entry of the data is what, which ones are written, and the checks of those that are read.

Owns the keys; no maths. May import ``frames`` and ``checks``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from tensordict import NestedKey, unravel_key
from torch import Tensor

from multistep_triton.checks import check_flag, check_ids, check_reward, is_per_frame
from multistep_triton.frames import Frames, KeyPath

DEFAULT_REWARD_KEYS = ("reward",)
DEFAULT_DONE_KEYS = ("done", "truncated", "terminated")
WINDOW_PATHS = (("steps_to_next_obs",), ("gamma",), ("nonterminal",))
ORIGINAL_REWARD_PATH = ("next", "original_reward")


class Roles(NamedTuple):
    """Paths of the entries that play a role."""

    done: KeyPath
    mask: KeyPath
    traj: KeyPath | None
    rewards: tuple[KeyPath, ...]
    needed: tuple[KeyPath, ...]
    """Entries that must be there."""
    saved: dict[KeyPath, KeyPath]
    """Where done keys are gathered: the entry that keeps the flag as it came, by the done key."""
    kept: frozenset[KeyPath]
    """Entries under "next" that are not gathered."""
    written: frozenset[KeyPath]
    """Entries that are written, and not read where they are there already."""

    def in_group(self, path: KeyPath) -> bool:
        """Whether an entry lies beside the done flag or below."""
        return path[: len(self.done) - 1] == self.done[:-1]

    def saved_in(self, leaves: Mapping[KeyPath, Tensor]) -> dict[KeyPath, KeyPath]:
        """Of the done keys that are gathered and in ``leaves``: the done key, by the entry that keeps it as it came."""
        return {kept: path for path, kept in self.saved.items() if path in leaves}

    def is_gathered(self, path: KeyPath) -> bool:
        """Whether an entry is read at the end of the window; a done key may name a whole group that is not."""
        if path[0] != "next" or path in self.kept:
            return False
        return len(path) == 2 or not any(path[:names] in self.kept for names in range(2, len(path)))


@functools.lru_cache(maxsize=256)
def find_roles(
    done_key: NestedKey,
    mask_key: NestedKey,
    traj_key: NestedKey | None,
    reward_keys: tuple[NestedKey, ...],
    done_keys: tuple[NestedKey, ...],
    done_at: str,
) -> Roles:
    """The roles that these keys give.

    Raises:
        ValueError: a key names an entry that is written besides.
    """
    done, mask = _path("next", done_key), _path(mask_key)
    traj = None if traj_key is None else _path(traj_key)
    rewards = tuple(dict.fromkeys(_path("next", key) for key in reward_keys))
    dones = dict.fromkeys((done, *(_path("next", key) for key in done_keys)))
    saved = {path: original(path) for path in dones if path not in rewards} if done_at == "end" else {}
    written = {*WINDOW_PATHS, *map(original, rewards), *saved.values()}
    if len(rewards) == 1:
        written.add(ORIGINAL_REWARD_PATH)
    if taken := sorted(written & {mask, traj, *rewards, *dones} - {None}):
        raise ValueError(f"no key may name an entry that is written besides, got {', '.join(map(str, taken))}")
    kept = frozenset((*rewards, *(saved.values() if done_at == "end" else dones)))
    needed = (done, *rewards) if traj is None else (done, *rewards, traj)
    return Roles(done, mask, traj, rewards, needed, saved, kept, frozenset(written))


def with_saved(leaves: Mapping[KeyPath, Tensor], saved: Mapping[KeyPath, KeyPath]) -> dict[KeyPath, Tensor]:
    """Leaves, and those that are in them under another path once more."""
    return {**leaves, **{kept: leaves[path] for kept, path in saved.items()}}


def original(path: KeyPath) -> KeyPath:
    """The entry that keeps what came at ``path``."""
    return (*path[:-1], f"{path[-1]}_orig")


def check_entries(data: Frames, roles: Roles) -> torch.Size:
    """Checks the entries that play a role.

    Returns:
        The agents' dimensions, ``A``, of a done flag per agent, ``[*B, T, *A]`` or ``[*B, T, *A, 1]``; else none.

    Raises:
        KeyError: one that is needed is not there.
        TypeError: one is of the wrong kind.
        ValueError: one has the wrong shape.
    """
    lead, leaves = data.batch_size, data.leaves
    for path in roles.needed:
        if path not in leaves or path in data.objects:
            raise KeyError(f"data must hold a tensor at {path}, got the entries {list(leaves)}")
    if objects := [path for path in data.objects if path == roles.mask or path in roles.saved]:
        named = "mask_key" if objects[0] == roles.mask else "done_keys"
        raise TypeError(f"{objects[0]}, named by {named}, must be a tensor, got a non-tensor")
    for path in roles.rewards:
        check_reward(f"reward {path}", leaves[path], lead)
    if roles.mask in leaves:
        check_flag(f"mask {roles.mask}, named by mask_key,", leaves[roles.mask], lead)
    if roles.traj is not None:
        check_ids(f"trajectory ids {roles.traj}, named by traj_key,", leaves[roles.traj], lead)
    done = leaves[roles.done]
    if not is_per_frame(done, lead) and done.shape in [
        leaves[path].shape for path in filter(roles.in_group, roles.rewards)
    ]:
        check_flag(f"done {roles.done}", done, done.shape)
        agents = done.shape[len(lead) :]
        return agents[:-1] if len(agents) > 1 and agents[-1] == 1 else agents
    check_flag(f"done {roles.done}", done, lead, " or, per agent, that of a reward beside it")
    return torch.Size()


def agent_paths(leaves: Mapping[KeyPath, Tensor], roles: Roles, lead: torch.Size, agents: torch.Size) -> list[KeyPath]:
    """The entries whose windows are those of their agent.

    They have the agents' dimensions, ``[*B, T, *A, ...]``, and lie under "next" beside the done flag or below.
    """
    dims = (*lead, *agents)
    return [path for path, leaf in leaves.items() if roles.in_group(path) and leaf.shape[: len(dims)] == dims]


def _path(*keys: NestedKey) -> KeyPath:
    """The key as a flat tuple of names."""
    key = unravel_key(keys)
    return (key,) if isinstance(key, str) else key


def check_key(name: str, value: NestedKey) -> NestedKey:
    names = value if isinstance(value, tuple) else (value,)
    if not names or not all(isinstance(each, str) for each in names):
        raise TypeError(f"{name} must be a key, a string or a tuple of strings, got {value!r}")
    return value


def key_list(name: str, value: Iterable[NestedKey] | None, default: Sequence[NestedKey]) -> list[NestedKey]:
    if value is None:
        return list(default)
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence of keys, got {value!r}")
    return [check_key(name, key) for key in value]
