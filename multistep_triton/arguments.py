"""What MultiStepTransform, MultiStep and NStepReplayBuffer are told: their arguments, checked when they are set.

Owns their rules. May import ``checks``, ``backends`` and ``roles``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar, overload

from tensordict import NestedKey

from multistep_triton.backends import check_backend
from multistep_triton.checks import check_bool, check_choice, check_gamma, check_positive_int
from multistep_triton.roles import DEFAULT_DONE_KEYS, DEFAULT_MASK_KEY, DEFAULT_REWARD_KEYS, check_key, key_list

Given = TypeVar("Given")
Stored = TypeVar("Stored")


class Argument(Generic[Given, Stored]):
    """Makes an argument of a method that checks: what it returns of the value that is set is kept as ``_<name>``."""

    def __init__(self, check: Callable[[Any, Given], Stored]) -> None:
        self._check, self._attribute, self.__doc__ = check, f"_{check.__name__}", check.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> Argument[Given, Stored]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Stored: ...
    def __get__(self, instance: object, owner: type) -> Any:
        """What is kept; of the class, the argument itself."""
        return self if instance is None else getattr(instance, self._attribute)

    def __set__(self, instance: object, value: Given) -> None:
        """Keeps what is right; where the check raises, the value stays."""
        setattr(instance, self._attribute, self._check(instance, value))


class Arguments:
    """The arguments, each of which can be set at any time."""

    DEFAULT_MASK_KEY: NestedKey = DEFAULT_MASK_KEY

    _n_steps: Any
    _gamma: float
    _reward_keys: Sequence[NestedKey]
    _done_key: NestedKey
    _done_keys: Sequence[NestedKey]
    _mask_key: NestedKey
    _backend: str
    _done_at: str
    _traj_key: NestedKey | None
    _match_reward_shape: bool

    def _set_arguments(self, given: Mapping[str, Any]) -> None:
        """Sets all of them, of a constructor's ``locals()``."""
        for name in ARGUMENTS:
            setattr(self, name, given[name])

    @Argument
    def n_steps(self, value: int) -> int:
        """Frames in a full window."""
        return check_positive_int("n_steps", value)

    @Argument
    def gamma(self, value: float) -> float:
        """Discount per step."""
        return check_gamma(value)

    @Argument
    def reward_keys(self, value: Sequence[NestedKey] | None) -> list[NestedKey]:
        """Reward keys under ``"next"``."""
        return key_list("reward_keys", value, DEFAULT_REWARD_KEYS)

    @Argument
    def done_key(self, value: NestedKey | None) -> NestedKey:
        """The done flag under ``"next"`` that ends trajectories."""
        return "done" if value is None else check_key("done_key", value)

    @Argument
    def done_keys(self, value: Sequence[NestedKey] | None) -> list[NestedKey]:
        """Done flags under ``"next"``: ``done_at`` says of which frame they are."""
        return key_list("done_keys", value, DEFAULT_DONE_KEYS)

    @Argument
    def mask_key(self, value: NestedKey | None) -> NestedKey:
        """Root entry that is False where a frame is padding."""
        return self.DEFAULT_MASK_KEY if value is None else check_key("mask_key", value)

    @Argument
    def backend(self, value: str) -> str:
        """The backend asked for."""
        return check_backend(value)

    @Argument
    def done_at(self, value: str) -> str:
        """The frame that done keys are of: the window's ``"start"`` or its ``"end"``."""
        return check_choice("done_at", value, ("start", "end"))

    @Argument
    def traj_key(self, value: NestedKey | None) -> NestedKey | None:
        """Root entry of trajectory ids, a change of which is a boundary; None if none is looked at."""
        return None if value is None else check_key("traj_key", value)

    @Argument
    def match_reward_shape(self, value: bool) -> bool:
        """Whether ``steps_to_next_obs``, ``gamma`` and ``nonterminal`` have the shape of the first reward."""
        return check_bool("match_reward_shape", value)


ARGUMENTS = tuple(name for name, value in vars(Arguments).items() if isinstance(value, Argument))
