"""What MultiStepTransform and MultiStep share: their arguments, and one call from tensordict to tensordict.

Owns the keys, which entry plays which role and what is written where; no maths. May import ``functional`` and
``frames``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torch import Tensor

from multistep_triton.backends import check_backend
from multistep_triton.frames import Frames, KeyPath
from multistep_triton.functional import (
    Extension,
    check_flag,
    check_gamma,
    check_positive_int,
    check_reward,
    n_step_extend,
)

DEFAULT_REWARD_KEYS = ("reward",)
DEFAULT_DONE_KEYS = ("done", "truncated", "terminated")
ROOT_PATHS = (("steps_to_next_obs",), ("gamma",), ("nonterminal",))
ORIGINAL_REWARD_PATH = ("next", "original_reward")


class MultiStepBase:
    """The arguments, each of which can be set at any time, and the call."""

    DEFAULT_MASK_KEY: NestedKey = "mask"

    def _set_arguments(
        self,
        n_steps: int,
        gamma: float,
        reward_keys: Sequence[NestedKey] | None,
        done_key: NestedKey | None,
        done_keys: Sequence[NestedKey] | None,
        mask_key: NestedKey | None,
        backend: str,
    ) -> None:
        self.n_steps = n_steps
        self.gamma = gamma
        self.reward_keys = reward_keys
        self.done_key = done_key
        self.done_keys = done_keys
        self.mask_key = mask_key
        self.backend = backend

    @property
    def n_steps(self) -> int:
        """Frames in a full window."""
        return self._n_steps

    @n_steps.setter
    def n_steps(self, value: int) -> None:
        self._n_steps = check_positive_int("n_steps", value)

    @property
    def gamma(self) -> float:
        """Discount per step."""
        return self._gamma

    @gamma.setter
    def gamma(self, value: float) -> None:
        self._gamma = check_gamma(value)

    @property
    def backend(self) -> str:
        """The backend asked for."""
        return self._backend

    @backend.setter
    def backend(self, value: str) -> None:
        self._backend = check_backend(value)

    @property
    def reward_keys(self) -> Sequence[NestedKey]:
        """Reward keys under ``"next"``."""
        return self._reward_keys

    @reward_keys.setter
    def reward_keys(self, value: Sequence[NestedKey] | None) -> None:
        self._reward_keys = _key_list("reward_keys", value, DEFAULT_REWARD_KEYS)

    @property
    def done_key(self) -> NestedKey:
        """The done flag under ``"next"`` that ends trajectories."""
        return self._done_key

    @done_key.setter
    def done_key(self, value: NestedKey | None) -> None:
        self._done_key = "done" if value is None else _check_key("done_key", value)

    @property
    def done_keys(self) -> Sequence[NestedKey]:
        """Entries under ``"next"`` that stay as they came."""
        return self._done_keys

    @done_keys.setter
    def done_keys(self, value: Sequence[NestedKey] | None) -> None:
        self._done_keys = _key_list("done_keys", value, DEFAULT_DONE_KEYS)

    @property
    def mask_key(self) -> NestedKey:
        """Root entry that is False where a frame is padding."""
        return self._mask_key

    @mask_key.setter
    def mask_key(self, value: NestedKey | None) -> None:
        self._mask_key = self.DEFAULT_MASK_KEY if value is None else _check_key("mask_key", value)

    def _n_step(
        self, tensordict: TensorDictBase, carry: Frames | None, *, hold: bool
    ) -> tuple[TensorDict, Frames | None]:
        """The frames of ``carry`` and ``tensordict`` whose windows are known, and those that are held back.

        Without ``hold`` windows are cut at the last frame, all frames come out, and with no carry either an entry
        that does not change is the input's own.
        """
        roles = _roles(self._done_key, self._mask_key, tuple(self._reward_keys), tuple(self._done_keys))
        data = Frames.read(tensordict, without=roles.written)
        _check_entries(data, roles)
        if carry is not None:
            data.follow(carry)
        time_dim, leaves = tensordict.ndim - 1, data.leaves
        extension = n_step_extend(
            None if carry is None else carry.leaves,
            leaves,
            time_dim=time_dim,
            reward_keys=roles.rewards,
            gathered_keys=frozenset([path for path in leaves if path[0] == "next" and path not in roles.kept]),
            done_key=roles.done,
            mask_key=roles.mask if roles.mask in leaves else None,
            n_steps=self._n_steps,
            gamma=float(self._gamma),
            hold=hold,
            backend=self._backend,
        )
        batch = tensordict.batch_size[:-1]
        emitted = data.build(_output_leaves(extension), torch.Size((*batch, extension.steps.shape[-1])))
        held = extension.carry[roles.done].shape[time_dim] if hold else 0
        return emitted, data.hold(extension.carry, torch.Size((*batch, held))) if held else None


class _Roles(NamedTuple):
    done: KeyPath
    mask: KeyPath
    rewards: tuple[KeyPath, ...]
    kept: frozenset[KeyPath]
    """Entries under "next" that are not gathered."""
    written: frozenset[KeyPath]
    """Entries that are written, and not read where they are there already."""


@functools.lru_cache(maxsize=256)
def _roles(
    done_key: NestedKey, mask_key: NestedKey, reward_keys: tuple[NestedKey, ...], done_keys: tuple[NestedKey, ...]
) -> _Roles:
    done, mask = _path("next", done_key), _path(mask_key)
    rewards = tuple(dict.fromkeys(_path("next", key) for key in reward_keys))
    kept = frozenset((done, *rewards, *(_path("next", key) for key in done_keys)))
    written = {*ROOT_PATHS, *map(_original, rewards), *([ORIGINAL_REWARD_PATH] if len(rewards) == 1 else [])}
    if taken := sorted(written & {mask, *kept}):
        raise ValueError(f"no key may name an entry that is written besides, got {', '.join(map(str, taken))}")
    return _Roles(done, mask, rewards, kept, frozenset(written))


def _output_leaves(extension: Extension) -> dict[KeyPath, Tensor]:
    leaves = extension.leaves
    for path, returns in extension.returns.items():
        original = leaves[path]
        leaves[_original(path)] = original
        leaves[path] = returns
    if len(extension.returns) == 1:
        leaves[ORIGINAL_REWARD_PATH] = original
    leaves.update(zip(ROOT_PATHS, (extension.steps, extension.discount, extension.nonterminal), strict=True))
    return leaves


def _original(reward: KeyPath) -> KeyPath:
    return (*reward[:-1], f"{reward[-1]}_orig")


def _check_entries(data: Frames, roles: _Roles) -> None:
    done, mask, rewards = roles.done, roles.mask, roles.rewards
    for path in (done, *rewards):
        if path not in data.leaves or path in data.objects:
            raise KeyError(f"data must hold a tensor at {path}, got the entries {list(data.leaves)}")
    check_flag(f"done {done}", data.leaves[done], data.batch_size)
    if mask in data.objects:
        raise TypeError(f"mask {mask}, named by mask_key, must be bool, got a non-tensor")
    if mask in data.leaves:
        check_flag(f"mask {mask}, named by mask_key,", data.leaves[mask], data.batch_size)
    for path in rewards:
        check_reward(f"reward {path}", data.leaves[path], data.batch_size)


def _path(*keys: NestedKey) -> KeyPath:
    """The key as a flat tuple of names."""
    key = unravel_key(keys)
    return (key,) if isinstance(key, str) else key


def _check_key(name: str, value: NestedKey) -> NestedKey:
    names = value if isinstance(value, tuple) else (value,)
    if not names or not all(isinstance(each, str) for each in names):
        raise TypeError(f"{name} must be a key, a string or a tuple of strings, got {value!r}")
    return value


def _key_list(name: str, value: Iterable[NestedKey] | None, default: Sequence[NestedKey]) -> list[NestedKey]:
    if value is None:
        return list(default)
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence of keys, got {value!r}")
    return [_check_key(name, key) for key in value]
