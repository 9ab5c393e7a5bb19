"""Roles: which entries are rewards, done flags, mask and trajectory ids, and which ones a call writes.

Owns the keys, and no maths. May import ``layouts``.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, unravel_key
from torch import Tensor

from multistep_triton.layouts import KeyPath

DEFAULT_REWARD_KEYS = ("reward",)
DEFAULT_DONE_KEYS = ("done", "truncated", "terminated")
STEPS_KEY = "steps_to_next_obs"
WINDOW_PATHS = ((STEPS_KEY,), ("gamma",), ("nonterminal",))
ORIGINAL_REWARD_PATH = ("next", "original_reward")
INDEX = ("index",)
"""The entry in which a ``TensorDictRoundRobinWriter`` stores every frame's slot."""
COUNT_PATH = ("n_step_ends",)
"""The path of the count of ends among the entries of a storage that keeps observations once."""
AUTO = "auto"
DEFAULT_MASK_KEY = "mask"
TRAJ_PATH = ("collector", "traj_ids")
"""The path at which torchrl's collectors write trajectory ids, and its samplers look for them."""
MASK_PATH = ("collector", "mask")
"""The path at which torchrl's collectors write the mask with ``split_trajs=True``."""


@dataclass(frozen=True, eq=False)
class Roles:
    """Paths of the entries that play a role; equal keys mostly give the same object."""

    done: KeyPath
    done_at: str
    """The frame whose done flags a transition holds, ``"start"`` or ``"end"``."""
    mask: KeyPath
    traj: KeyPath | None
    rewards: tuple[KeyPath, ...]
    needed: tuple[KeyPath, ...]
    """Entries that the data must hold."""
    dones: tuple[KeyPath, ...]
    """The done keys, ``done`` first."""
    flags: tuple[str, ...]
    """The names of done flags, that of ``done`` first: a bool entry of such a name anywhere under "next" is a flag."""
    originals: dict[KeyPath, KeyPath]
    """For each reward, and each done key that is gathered, the path at which a call writes its original value."""
    at_start: frozenset[KeyPath]
    """Entries under "next" that are not read at the window's end: rewards and, with ``done_at="start"``, done keys."""
    written: frozenset[KeyPath]
    """Entries that a call writes; it does not read them where the data holds them already."""

    def is_flag(self, path: KeyPath, leaf: Any) -> bool:
        """Returns whether an entry is a done flag: ``done`` itself, or a bool tensor under "next" named like a flag."""
        named = path[0] == "next" and path[-1] in self.flags and path not in self.rewards
        return path == self.done or (named and isinstance(leaf, Tensor) and leaf.dtype == torch.bool)

    def is_role(self, path: KeyPath, leaf: Any) -> bool:
        """Returns whether an entry plays a role in data that holds it."""
        role = path in self.needed or path == self.mask or path in self.originals or self.is_flag(path, leaf)
        return role or path in self.at_start

    def is_gathered(self, path: KeyPath) -> bool:
        """Returns whether an entry is read at the window's end; one in a group that ``at_start`` names is not."""
        if path[0] != "next" or path in self.at_start:
            return False
        return len(path) == 2 or not any(path[:names] in self.at_start for names in range(2, len(path)))


@functools.lru_cache(maxsize=256)
def find_roles(
    done_key: NestedKey,
    mask_key: NestedKey,
    traj_key: NestedKey | None,
    reward_keys: tuple[NestedKey, ...],
    done_keys: tuple[NestedKey, ...],
    done_at: str,
) -> Roles:
    """Finds the roles that these keys assign.

    Raises:
        ValueError: a key names an entry that a call writes.
    """
    done, mask = as_path("next", done_key), as_path(mask_key)
    traj = None if traj_key is None else as_path(traj_key)
    rewards = tuple(dict.fromkeys(as_path("next", key) for key in reward_keys))
    dones = dict.fromkeys((done, *(as_path("next", key) for key in done_keys)))
    gathered_dones = dones if done_at == "end" else ()
    originals = {path: (*path[:-1], f"{path[-1]}_orig") for path in (*rewards, *gathered_dones)}
    written = {*WINDOW_PATHS, *originals.values()}
    if len(rewards) == 1:
        written.add(ORIGINAL_REWARD_PATH)
    if taken := sorted(written & {mask, traj, *rewards, *dones} - {None}):
        raise ValueError(f"no key may name an entry that is written besides, got {', '.join(map(str, taken))}")
    at_start = frozenset(rewards if done_at == "end" else (*rewards, *dones))
    needed = (done, *rewards) if traj is None else (done, *rewards, traj)
    flags = tuple(dict.fromkeys(path[-1] for path in dones))
    return Roles(
        done, done_at, mask, traj, rewards, needed, tuple(dones), flags, originals, at_start, frozenset(written)
    )


def check_entries(roles: Roles, new: Mapping[KeyPath, Any], stored: Mapping[KeyPath, Any], is_filled: bool) -> None:
    """Checks that ``new`` has all needed and stored entries and, if ``is_filled``, no further one that plays a role."""
    if missing := sorted(({*roles.needed} | stored.keys() - roles.written - {INDEX}) - new.keys()):
        message = f"data must hold {', '.join(map(str, missing))}, got the entries {list(new)}"
        if not {*missing}.isdisjoint(stored):
            message += "; the storage has the others, too: for data of other entries give it a new one (set_storage)"
        raise KeyError(message)
    if is_filled and (late := sorted(key for key in new.keys() - stored.keys() if roles.is_role(key, new[key]))):
        raise ValueError(
            f"data must not hold {', '.join(map(str, late))}, which windows read and the frames stored before "
            f"lack: extend with it from the first call on, or empty the buffer before"
        )


def find_pairs(roles: Roles, leaves: Mapping[KeyPath, Any]) -> list[KeyPath]:
    """Finds the tensors under "next" that the root has, too, in any dtype and shape, but for rewards and flags."""

    def is_pair(path: KeyPath, leaf: Any) -> bool:
        twin = leaves.get(path[1:]) if path[0] == "next" and len(path) > 1 else None
        if not isinstance(leaf, Tensor) or not isinstance(twin, Tensor) or roles.is_role(path, leaf):
            return False
        return path[1:] != INDEX and not any(path[: len(done)] == done for done in roles.dones)

    return [path for path, leaf in leaves.items() if is_pair(path, leaf)]


def find_twins(roles: Roles, leaves: Mapping[KeyPath, Any]) -> list[KeyPath]:
    """Finds the pairs of one dtype and shape, which can be kept once, as the next frame holds their values."""
    kinds = {path: (leaf.dtype, leaf.shape) for path, leaf in leaves.items() if isinstance(leaf, Tensor)}
    return [path for path in find_pairs(roles, leaves) if kinds[path] == kinds[path[1:]]]


def marks_of(roles: Roles, leaves: Mapping[KeyPath, Any]) -> tuple[tuple[KeyPath, ...], KeyPath | None, KeyPath | None]:
    """Finds the paths that define ends: the done flags of all groups; mask and trajectory ids, each None if absent."""
    mask, traj = (path if path in leaves else None for path in (roles.mask, roles.traj))
    return tuple([path for path, leaf in leaves.items() if roles.is_flag(path, leaf)]), mask, traj


def check_single_steps(entries: Container[KeyPath]) -> None:
    """Checks that the data holds single steps, and no n-step transitions yet."""
    if (STEPS_KEY,) in entries:
        raise ValueError(
            f"data must hold single steps, got n-step transitions, which hold {STEPS_KEY!r}: an n-step transform or "
            f"postproc made them before. Leave one of the two out, or delete the entry if it is something else"
        )


def as_path(*keys: NestedKey) -> KeyPath:
    """Joins keys to one flat tuple of names."""
    key = unravel_key(keys)
    return (key,) if isinstance(key, str) else key


def as_key(path: KeyPath) -> NestedKey:
    """Returns the path as a user writes it: as a string if it has one name."""
    return path[0] if len(path) == 1 else path


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
