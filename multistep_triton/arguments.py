"""The arguments of MultiStepTransform, MultiStep and NStepReplayBuffer, checked whenever they are set.

Owns the arguments' rules and their ``repr``. May import ``checks``, ``backends``, ``roles``, torchrl's types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any, Generic, Literal, TypeVar, get_args, overload

import torch
from tensordict import NestedKey
from torchrl.data import SampleUnit, Storage, StorageCheckpointerBase, Writer
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.envs.transforms import Transform
from typing_extensions import Required, TypedDict

from multistep_triton.backends import Backend, check_backend
from multistep_triton.checks import check_bool, check_choice, check_gamma, check_positive_int
from multistep_triton.roles import DEFAULT_DONE_KEYS, DEFAULT_MASK_KEY, DEFAULT_REWARD_KEYS, check_key, key_list

DoneAt = Literal["start", "end"]
DONE_AT: tuple[DoneAt, ...] = get_args(DoneAt)
Given = TypeVar("Given")
Stored = TypeVar("Stored")


class Argument(Generic[Given, Stored]):
    """Turns a method that checks a value into an attribute: setting it stores the method's result as ``_<name>``."""

    def __init__(self, check: Callable[[Any, Given], Stored]) -> None:
        self.check, self._attribute, self.__doc__ = check, f"_{check.__name__}", check.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> Argument[Given, Stored]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Stored: ...
    def __get__(self, instance: object, owner: type) -> Any:
        """Returns the stored value; on the class, the descriptor itself."""
        return self if instance is None else getattr(instance, self._attribute)

    def __set__(self, instance: object, value: Given) -> None:
        """Stores the result of the check; if the check raises, the old value stays."""
        setattr(instance, self._attribute, self.check(instance, value))


class Arguments:
    """The arguments of the n-step classes; each can be set at any time."""

    DEFAULT_MASK_KEY: NestedKey = DEFAULT_MASK_KEY

    _n_steps: Any
    _gamma: float
    _reward_keys: Sequence[NestedKey]
    _done_key: NestedKey
    _done_keys: Sequence[NestedKey]
    _mask_key: NestedKey
    _backend: Backend
    _done_at: DoneAt
    _traj_key: NestedKey | None
    _match_reward_shape: bool

    def _set_arguments(self, given: Mapping[str, Any]) -> None:
        """Sets all arguments from a constructor's ``locals()``."""
        for name in ARGUMENTS:
            setattr(self, name, given[name])

    def __repr__(self) -> str:
        """Returns the class name with the arguments that :meth:`_said` lists."""
        return f"{type(self).__name__}({', '.join(self._said())})"

    def _said(self) -> list[str]:
        """Lists each argument that has no default or differs from it as ``name=value``; skips those not set yet."""
        parameters: dict[str, Parameter] = {}
        for each in reversed(type(self).__mro__):
            parameters.update(signature(each.__init__).parameters)  # type: ignore[misc]
        said, kept = [], vars(self)
        for name, argument in ARGUMENTS.items():
            default = parameters[name].default if name in parameters else Parameter.empty
            value = kept.get(f"_{name}", default)
            if value is not default and (default is Parameter.empty or value != argument.check(self, default)):
                said.append(f"{name}={value!r}")
        return said

    @Argument
    def n_steps(self, value: int) -> int:
        """The number of frames in a full window."""
        return check_positive_int("n_steps", value)

    @Argument
    def gamma(self, value: float) -> float:
        """The discount per step."""
        return check_gamma(value)

    @Argument
    def reward_keys(self, value: Sequence[NestedKey] | None) -> list[NestedKey]:
        """The reward keys under ``"next"``."""
        return key_list("reward_keys", value, DEFAULT_REWARD_KEYS)

    @Argument
    def done_key(self, value: NestedKey | None) -> NestedKey:
        """The done flag under ``"next"`` that ends trajectories."""
        return "done" if value is None else check_key("done_key", value)

    @Argument
    def done_keys(self, value: Sequence[NestedKey] | None) -> list[NestedKey]:
        """The done flags under ``"next"``; ``done_at`` says which frame's flags a transition holds."""
        return key_list("done_keys", value, DEFAULT_DONE_KEYS)

    @Argument
    def mask_key(self, value: NestedKey | None) -> NestedKey:
        """The root entry that is False where a frame is padding."""
        return self.DEFAULT_MASK_KEY if value is None else check_key("mask_key", value)

    @Argument
    def backend(self, value: Backend) -> Backend:
        """The requested backend."""
        return check_backend(value)

    @Argument
    def done_at(self, value: DoneAt) -> DoneAt:
        """The frame whose done flags a transition holds: the window's ``"start"`` or its ``"end"``."""
        return check_choice("done_at", value, DONE_AT)

    @Argument
    def traj_key(self, value: NestedKey | None) -> NestedKey | None:
        """The root entry of trajectory ids, whose changes are boundaries; None ignores ids."""
        return None if value is None else check_key("traj_key", value)

    @Argument
    def match_reward_shape(self, value: bool) -> bool:
        """Whether ``steps_to_next_obs``, ``gamma`` and ``nonterminal`` have the shape of the first reward."""
        return check_bool("match_reward_shape", value)


ARGUMENTS = {name: value for name, value in vars(Arguments).items() if isinstance(value, Argument)}


class TorchRLArguments(TypedDict, total=False):
    """The keyword arguments that NStepReplayBuffer passes on to torchrl's buffer, which has their defaults."""

    storage: Required[Storage | Callable[[], Storage]]
    sampler: Sampler | Callable[[], Sampler] | None
    sample_unit: SampleUnit | None
    writer: Writer | Callable[[], Writer] | None
    collate_fn: Callable[..., Any] | None
    pin_memory: bool
    prefetch: int | None
    transform: Transform | Callable[..., Any] | None
    transform_factory: Callable[[], Transform | Callable[..., Any]] | None
    batch_size: int | None
    dim_extend: int | None
    checkpointer: StorageCheckpointerBase | Callable[[], StorageCheckpointerBase] | None
    generator: torch.Generator | None
    consume_after_n_samples: int | None
    shared: bool
    compilable: bool | None
    delayed_init: bool | None
    priority_key: str
    service_backend: Literal["direct", "ray"]
    service_backend_options: dict[str, Any] | None
    transport: Literal["auto", "direct", "ray", "distributed"]
    transport_options: dict[str, Any] | None
