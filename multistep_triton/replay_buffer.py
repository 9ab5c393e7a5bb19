"""NStepReplayBuffer: a buffer that stores single steps and samples n-step transitions.

Owns its arguments. May import ``arguments``, ``backends``, ``capturable`` and what it may, ``sampled``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import NestedKey
from torchrl.data import ReplayBuffer
from typing_extensions import Unpack

from multistep_triton.arguments import ARGUMENTS, Argument, DoneAt, TorchRLArguments
from multistep_triton.backends import Backend
from multistep_triton.buffer.capturable import CapturableReplayBuffer
from multistep_triton.buffer.ordered import Steps
from multistep_triton.buffer.outputs import Selection
from multistep_triton.buffer.sampled import steps_of_call
from multistep_triton.checks import check_bool, check_not_captured, check_steps
from multistep_triton.neighbours import check_mixing
from multistep_triton.roles import INDEX, as_key
from multistep_triton.torchrl_internals import calls

# n and gamma are read when frames are sampled.
_COUNTED = {*ARGUMENTS, "_storage", "_writer"} - {"n_steps", "gamma"}


class NStepReplayBuffer(CapturableReplayBuffer):
    """A replay buffer that stores single steps and computes n-step transitions of the frames that it samples.

    For a sampled frame ``t``, with ``n = n_steps``, let ``e(t)`` be the smallest of ``t + n - 1``, the first boundary
    at or after ``t``, and the newest stored frame:

    .. math::
        steps(t) = e(t) - t + 1, \\quad reward'(t) = \\sum_{i=0}^{steps(t)-1} \\gamma^i reward(t + i), \\quad
        next'(t) = next(e(t))

    Boundaries are those of :class:`MultiStepTransform`. The storage is a ring: windows end at the newest frame, as the
    oldest one follows it there, and no slot is read that was not written. The storage tells which frame is the newest,
    whichever buffer wrote it.

    ``extend`` takes 1-step transitions ``[*B, T]``, time last, of any number of frames (if there are more than slots,
    the newest stay), and stores them as they are. It holds nothing back; if it fails, windows end where they did. A
    storage of ``ndim`` dimensions holds frames of ``ndim - 1`` batch dimensions, and needs at least ``n_steps`` slots
    for every environment. Slices such as ``rb[:]`` return single steps as they are stored.

    A sample, ``[N]``, has the keys, dtypes and rules of :class:`MultiStepTransform`; ``"index"`` tells where a frame
    lies. It is new memory on the storage's device, where the buffer computes it; the host does not wait for kernels. An
    index of no frame is an error on a CPU; on an accelerator its row has 0 steps, discount 1, NaN rewards, else zeros.

    Keyword Args:
        n_steps: frames in a full window, an int >= 1, or a pair ``(low, high)``: every sampled frame then draws its
            own from ``low .. high``, uniformly, with the buffer's ``generator``.
        gamma: discount per step, a finite number in [0, 1]. Both can be set at any time; stored frames do not change.
        reward_keys, done_key, done_keys, traj_key, mask_key, match_reward_shape: as for :class:`MultiStepTransform`,
            with the same defaults.
        done_at: the frame whose flags the done keys hold: ``"end"``, frame ``e(t)``, as bootstrapped targets need
            them, or ``"start"``, frame ``t``. Defaults to ``"end"``.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"verify"``, which compares every sample with the
            specification.
        outputs: keys of the entries that a sample holds; the key of a group stands for all entries in it. Other
            entries are not copied. None, the default, stands for all.
        capturable: whether a CUDA graph can capture calls, for which the write count lies on the device
            (``docs/buffer.md``). Defaults to False.
        compact: whether an entry under ``"next"`` that the root also has, in the same dtype and shape, is stored
            once, as the next frame's root entry (``docs/buffer.md``); or the keys of the entries that are.
        end_slots: rows for final observations, per environment; with more ends, windows end a frame before the ends
            whose rows were overwritten. Defaults to one row for every 16 slots.
        store_as: by key, narrower floating dtypes for stored entries, at the root and under ``"next"``; no rewards.
        **kwargs: arguments of :class:`torchrl.data.TensorDictReplayBuffer`. The storage is a ``LazyTensorStorage``,
            ``LazyMemmapStorage`` or another ``TensorStorage`` of a tensordict, the writer a ``RoundRobinWriter`` (the
            default one is) or, for a storage that already holds its frames, an ``ImmutableDatasetWriter``.

    Raises:
        TypeError: storage, writer or sampler is of the wrong kind; from ``extend``: a reward, flag, mask or id is.
        ValueError: an argument breaks its rule, the storage has fewer slots than ``n_steps``, or a transform would be
            wrong on n-step transitions (``docs/neighbours.md``); from ``extend``: data holds n-step transitions,
            differs from the stored frames in dtype, shape or number of rows, or holds a flag that they lack.
        KeyError: from ``extend``: data lacks a reward, a done flag, trajectory ids, or an entry that is stored; from
            ``sample``: ``outputs`` names an entry that does not exist.
        RuntimeError: the order of frames is unknown, or slots are torn; a CUDA graph captures a call that it cannot;
            the backend asked for cannot run; ``"verify"`` finds a difference (:class:`EquivalenceError`).

    Source: R. S. Sutton, Learning to predict by the methods of temporal differences, Machine Learning 3, 1988.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement
        >>> rb = NStepReplayBuffer(
        ...     n_steps=2, gamma=0.5, storage=LazyTensorStorage(4), sampler=SamplerWithoutReplacement(shuffle=False)
        ... )
        >>> reward, done = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([False, False, True, False])
        >>> indices = rb.extend(TensorDict({"next": {"reward": reward, "done": done}}, batch_size=[4]))
        >>> rb.sample(4)["next", "reward"]
        tensor([2., 4., 4., 8.])
        >>> rb.sample(4, n_steps=1)["next", "reward"]
        tensor([1., 2., 4., 8.])
        >>> rb.n_steps = 3
        >>> rb.sample(4)["next", "reward"]
        tensor([3., 4., 4., 8.])
        >>> rb.n_steps = 2, 3  # every sampled frame draws its own
        >>> rb.sample(4)["steps_to_next_obs"][1:]
        tensor([2, 1, 1])
    """

    def __init__(
        self,
        *,
        n_steps: Steps,
        gamma: float,
        reward_keys: Sequence[NestedKey] | None = None,
        done_key: NestedKey | None = None,
        done_keys: Sequence[NestedKey] | None = None,
        traj_key: NestedKey | None = "auto",
        mask_key: NestedKey | None = None,
        done_at: DoneAt = "end",
        match_reward_shape: bool = False,
        backend: Backend = "auto",
        outputs: Sequence[NestedKey] | None = None,
        capturable: bool = False,
        compact: bool | Sequence[NestedKey] = False,
        end_slots: int | None = None,
        store_as: Mapping[NestedKey, torch.dtype] | None = None,
        **kwargs: Unpack[TorchRLArguments],
    ) -> None:
        if kwargs.get("storage") is None:
            raise TypeError("storage must be a TensorStorage, such as LazyTensorStorage(max_size), got None")
        self._selection = None if outputs is None else Selection(outputs)
        self._set_compact(compact, end_slots)
        self._set_store_as(store_as)
        self._capturable = check_bool("capturable", capturable)
        self._set_arguments(locals())
        super().__init__(**kwargs)

    def __repr__(self) -> str:
        """Returns torchrl's text, with the arguments of this class before torchrl's."""
        others = "outputs", "capturable", "compact", "end_slots", "store_as"
        more = (f"{name}={value!r}" for name in others if (value := getattr(self, name)))
        said = "".join([f"{each}, " for each in (*self._said(), *more)])
        self._pull()
        torchrls: str = ReplayBuffer.__repr__(self)
        return torchrls.replace("(", f"(\n    {said}", 1)

    @property
    def outputs(self) -> list[NestedKey] | None:
        """The keys of the entries and groups that a sample holds; None if it holds all entries."""
        return None if self._selection is None else [as_key(path) for path in self._selection.by]

    @Argument
    def n_steps(self, value: Steps) -> Steps:  # type: ignore[override]
        """Frames in a full window, or a pair ``(low, high)`` between which each sampled frame draws its own number."""
        value = check_steps("n_steps", value)
        self._check_room(n_steps=value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; counts the change if it is an argument, the storage or the writer."""
        super().__setattr__(name, value)
        if name in _COUNTED:
            self._changes += 1  # prefetched batches and past checks belong to the old value
            self.__dict__["_repeated"] = None

    def sample(self, *args: Any, n_steps: Steps | None = None, **kwargs: Any) -> Any:
        """Samples frames and computes their n-step transitions.

        Args:
            args, kwargs: the arguments of torchrl's ``sample``, such as ``batch_size`` and ``return_info``.

        Keyword Args:
            n_steps: replaces the buffer's for this call; windows have at most as many frames as there are slots.

        Returns:
            TensorDict ``[batch_size]``; with ``return_info``, a tuple of this and the sampler's info.
        """
        if calling := calls(self):
            check_mixing(calling, self._roles_in(()))
        if not self._capturable:
            check_not_captured("sample")
        if n_steps is None and not self._prefetch:
            sampled = super().sample(*args, **kwargs)
        else:
            token = steps_of_call.set(None if n_steps is None else check_steps("n_steps", n_steps))
            try:
                with self._up_to_date((self._changes, self._n_steps, self._gamma), n_steps is not None):
                    sampled = super().sample(*args, **kwargs)
            finally:
                steps_of_call.reset(token)
        if self._selection is not None and not self._selection[INDEX]:
            # torchrl's ``sample`` sets the index, selected or not.
            (sampled[0] if isinstance(sampled, tuple) else sampled).pop(INDEX, None)
        return sampled


# Editors, ``help`` and the site would otherwise show the signature of torchrl's metaclass, without arguments.
_signature = inspect.signature(NStepReplayBuffer.__init__)
NStepReplayBuffer.__signature__ = _signature.replace(parameters=[*_signature.parameters.values()][1:])
