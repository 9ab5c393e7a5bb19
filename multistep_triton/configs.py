"""Nodes for torchrl's Hydra configs (``torchrl.trainers.algorithms.configs``). Needs hydra-core.

Importing this module stores them in Hydra's ``ConfigStore``:

==================  =====================  =================================
group               name                   node
==================  =====================  =================================
``transform``       ``multi_step_triton``  :class:`MultiStepTransformConfig`
``postproc``        ``multi_step_triton``  :class:`MultiStepConfig`
``replay_buffer``   ``n_step_triton``      :class:`NStepReplayBufferConfig`
==================  =====================  =================================

If your configs name torchrl's own node, ``transform=multi_step``, store this package's node under that name, too::

    ConfigStore.instance().store(group="transform", name="multi_step", node=MultiStepTransformConfig)

Owns which arguments a YAML file can set; the classes check them. May import the package, hydra and torchrl.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch

from multistep_triton.postproc import MultiStep
from multistep_triton.replay_buffer import NStepReplayBuffer
from multistep_triton.transform import MultiStepTransform

try:
    from hydra.core.config_store import ConfigStore
except ImportError as error:
    raise ImportError('multistep_triton.configs needs hydra-core: pip install "multistep_triton[hydra]"') from error

from torchrl.trainers.algorithms.configs.common import ConfigBase
from torchrl.trainers.algorithms.configs.data import TensorDictReplayBufferConfig
from torchrl.trainers.algorithms.configs.transforms import TransformConfig

__all__ = ["MultiStepConfig", "MultiStepTransformConfig", "NStepReplayBufferConfig"]

Built = TypeVar("Built")


@dataclass
class _Arguments:
    """The arguments that all three classes take; ``n_steps`` and ``gamma`` have the defaults of torchrl's node.

    A nested key is a list of strings, as YAML has no tuples.
    """

    n_steps: int = 3
    gamma: float = 0.99
    reward_keys: Any = None
    done_key: Any = None
    done_keys: Any = None
    mask_key: Any = None
    backend: str = "auto"
    done_at: str = "start"
    traj_key: Any = "auto"
    match_reward_shape: bool = False


@dataclass
class MultiStepTransformConfig(_Arguments, TransformConfig):
    """Builds a :class:`multistep_triton.MultiStepTransform` from arguments, by default ``n_steps=3``, ``gamma=0.99``.

    Replaces torchrl's ``MultiStepTransformConfig``, which passes arguments that torchrl's class does not take. A nested
    key is a list of strings: ``reward_keys: [[agents, reward]]``, ``traj_key: [collector, traj_ids]``.

    Example:
        >>> from hydra import compose, initialize
        >>> from hydra.utils import instantiate
        >>> with initialize(version_base=None):
        ...     config = compose(
        ...         overrides=[
        ...             "+replay_buffer=base",
        ...             "+transform@replay_buffer.transform=multi_step_triton",
        ...             "replay_buffer.transform.n_steps=5",
        ...             "replay_buffer.transform.traj_key=[collector, traj_ids]",
        ...         ]
        ...     )
        >>> transform = instantiate(config.replay_buffer.transform)
        >>> transform.n_steps, transform.gamma, transform.traj_key
        (5, 0.99, ('collector', 'traj_ids'))
    """

    _target_: str = "multistep_triton.configs._make_multi_step_transform"


@dataclass
class MultiStepConfig(_Arguments, ConfigBase):
    """Builds a :class:`multistep_triton.MultiStep`, a collector's postproc, from its arguments, with the same defaults.

    Example:
        >>> from hydra import compose, initialize
        >>> from hydra.utils import instantiate
        >>> with initialize(version_base=None):
        ...     config = compose(overrides=["+postproc@collector.postproc=multi_step_triton"])
        >>> instantiate(config.collector.postproc).n_steps
        3
    """

    _target_: str = "multistep_triton.configs._make_multi_step"

    def __post_init__(self) -> None:
        """Does nothing; torchrl's abstract base class requires it."""


@dataclass
class NStepReplayBufferConfig(_Arguments, TensorDictReplayBufferConfig):
    """Builds a :class:`multistep_triton.NStepReplayBuffer` from its arguments and torchrl's (node ``tensordict``).

    ``n_steps`` is a number or a list ``[low, high]``; ``store_as`` maps keys to names of dtypes, such as ``bfloat16``.

    Example:
        >>> from hydra import compose, initialize
        >>> from hydra.utils import instantiate
        >>> with initialize(version_base=None):
        ...     config = compose(
        ...         overrides=[
        ...             "+replay_buffer=n_step_triton",
        ...             "+storage@replay_buffer.storage=lazy_tensor",
        ...             "replay_buffer.storage.max_size=100",
        ...             "replay_buffer.n_steps=[1, 5]",
        ...         ]
        ...     )
        >>> rb = instantiate(config.replay_buffer)
        >>> rb.n_steps, rb.done_at, rb.storage.max_size
        ((1, 5), 'end', 100)
    """

    n_steps: Any = 3
    done_at: str = "end"
    outputs: Any = None
    capturable: bool = False
    compact: Any = False
    end_slots: int | None = None
    store_as: Any = None
    _target_: str = "multistep_triton.configs._make_n_step_replay_buffer"


def _make_multi_step_transform(**arguments: Any) -> MultiStepTransform:
    return _make(MultiStepTransform, arguments)


def _make_multi_step(**arguments: Any) -> MultiStep:
    return _make(MultiStep, arguments)


def _make_n_step_replay_buffer(**arguments: Any) -> NStepReplayBuffer:
    return _make(NStepReplayBuffer, arguments)


def _make(build: type[Built], arguments: dict[str, Any]) -> Built:
    """Builds an object from arguments that YAML gives as lists where this package takes tuples."""
    for name in {"outputs", "compact", *(field.name for field in fields(_Arguments))} & arguments.keys():
        value = arguments[name]
        listed = (name in ("outputs", "compact") or name.endswith("_keys")) and _is_list(value)
        arguments[name] = [_as_tuple(each) for each in value] if listed else _as_tuple(value)
    if isinstance(named := arguments.get("store_as"), Mapping):
        # YAML gives names of dtypes; the buffer refuses a name that torch does not have.
        named = {key: getattr(torch, each, each) if isinstance(each, str) else each for key, each in named.items()}
        arguments["store_as"] = named
    return build(**arguments)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if _is_list(value) else value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


for _group, _name, _node in (
    ("transform", "multi_step_triton", MultiStepTransformConfig),
    ("postproc", "multi_step_triton", MultiStepConfig),
    ("replay_buffer", "n_step_triton", NStepReplayBufferConfig),
):
    ConfigStore.instance().store(group=_group, name=_name, node=_node)
