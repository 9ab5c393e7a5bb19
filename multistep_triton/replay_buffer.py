"""NStepReplayBuffer: single steps are stored, n-step transitions are sampled.

Owns what is sampled of frames, and which data may be stored. May import ``base`` and what it may,
``samples``, ``neighbours``, ``stored``, ``sampled`` and ``torchrl_internals``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import ImmutableDatasetWriter, TensorDictRoundRobinWriter
from torchrl.envs.transforms import Transform
from typing_extensions import Unpack

from multistep_triton.arguments import ARGUMENTS, Argument, DoneAt, TorchRLArguments
from multistep_triton.backends import Backend
from multistep_triton.base import MultiStepBase
from multistep_triton.buffer.capturable import CapturableReplayBuffer
from multistep_triton.buffer.outputs import Selection, StoredLayout
from multistep_triton.buffer.repeated import INDEX
from multistep_triton.buffer.stored import Leaves, Position, check_index, check_slots
from multistep_triton.checks import check_bool, check_not_captured, check_steps
from multistep_triton.frames import Frames
from multistep_triton.neighbours import check_mixing, check_transforms
from multistep_triton.roles import as_key, check_entries, check_single_steps
from multistep_triton.samples import Samples
from multistep_triton.torchrl_internals import calls, refuse_other_ways

Steps = int | tuple[int, int]

# What a call of ``sample`` asks for, in its own thread alone: batches that are prefetched have the buffer's.
_steps_of_call: ContextVar[Steps | None] = ContextVar("n_steps of a call", default=None)

_COUNTED = {*ARGUMENTS, "_storage"}


class NStepReplayBuffer(MultiStepBase, CapturableReplayBuffer):
    """A replay buffer that stores single steps and computes n-step transitions of the frames that are sampled.

    With ``n = n_steps`` and ``e(t)`` the smallest of ``t + n - 1``, the first boundary at or after ``t``, and the
    newest frame that is stored:

    .. math::
        steps(t) = e(t) - t + 1, \\quad reward'(t) = \\sum_{i=0}^{steps(t)-1} \\gamma^i reward(t + i), \\quad
        next'(t) = next(e(t))

    A boundary is a frame at which a done flag is set, ``done_key`` or any other of ``done_keys`` beside it that has its
    shape; with a mask in the data, one that is invalid or followed by an invalid frame; with trajectory ids, one that
    is followed by a frame of another trajectory. The storage is a ring: the newest frame is where windows end, as
    the oldest one follows it there, and nothing that was not written is read. Which one it is the storage knows,
    whoever wrote it.

    ``extend`` takes 1-step transitions ``[*B, T]``, time last, any number of frames at a time (of more than there are
    slots, the newest stay), and stores them as they are; nothing is held back, and where a call fails, windows end
    where they did. A storage of ``ndim`` dimensions holds frames of ``ndim - 1`` batch dimensions, and at least
    ``n_steps`` slots for each of them. What is sampled, ``[N]``, has the keys, dtypes and rules of
    :class:`MultiStepTransform`: ``steps_to_next_obs`` (int64), ``gamma`` (float32, ``gamma ** steps``) and
    ``nonterminal`` (bool) at the root; under ``"next"`` every reward key holds the n-step return, ``<reward_key>_orig``
    the reward as it came and, with exactly one reward key, ``original_reward`` the same; done keys are those of frame
    ``e(t)`` and ``<done_key>_orig`` as they came, or with ``done_at="start"`` as they came; every other entry is the
    one of frame ``e(t)``, bit for bit. The other root entries are those of frame ``t``, and ``"index"`` says where it
    lies. The result is new memory on the storage's device, on which everything is computed; the host does not wait for
    it. What is sliced, as in ``rb[:]``, are single steps as they are stored. An index outside of what is stored is an
    error on a CPU; on an accelerator such a row has 0 steps, a discount of 1, rewards of NaN and zeros.

    Keyword Args:
        n_steps: frames in a full window, an int >= 1, or a pair ``(low, high)``: every sampled frame then draws its
            own from ``low .. high``, uniformly, with the buffer's ``generator``. Can be set at any time; nothing is
            stored anew.
        gamma: discount per step, a finite number in [0, 1]; can be set at any time.
        reward_keys, done_key, done_keys, traj_key, mask_key, match_reward_shape: as for :class:`MultiStepTransform`,
            with the same defaults.
        done_at: ``"end"``: done keys are those of frame ``e(t)``, which is what a bootstrapped target needs;
            ``"start"``: those of frame ``t``. Defaults to ``"end"``.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"verify"``, which holds every sample to the
            specification.
        outputs: the entries that a sample has, and groups all of whose entries it has; what is left out is not
            copied. None, the default, stands for all.
        capturable: whether calls can be captured into a CUDA graph, as the device knows how far the buffer has come
            (``docs/buffer.md``). Defaults to False.
        compact: whether an entry under ``"next"`` that is at the root, too, of the same dtype and shape, is stored
            once, as the next frame's at the root (``docs/buffer.md``); or the keys of those that are.
        end_slots: rows for what comes after ends, of an environment; of more ends, windows end a frame earlier.
            Defaults to one for every 16 slots.
        store_as: narrower floating dtypes of entries in the storage, at the root and under ``"next"``; no rewards.
        **kwargs: those of :class:`torchrl.data.TensorDictReplayBuffer`. The storage is a ``LazyTensorStorage``,
            ``LazyMemmapStorage`` or another ``TensorStorage`` of a tensordict, the writer a ``RoundRobinWriter`` (the
            default one is) or, for a storage that is filled before, an ``ImmutableDatasetWriter``.

    Raises:
        TypeError: storage, writer or sampler is of another kind.
        ValueError: an argument breaks its rule, there are fewer slots than ``n_steps``, or a transform would be wrong
            on n-step transitions (``docs/neighbours.md``); from ``extend``: data is of n steps already, of another
            dtype, shape or number of rows than what is stored, or holds a flag that it lacks.
        KeyError: from ``extend``: data lacks a reward, a done flag, trajectory ids, or an entry that is stored; from
            ``sample``: ``outputs`` names an entry that there is not.
        RuntimeError: nobody can tell which frame is the newest, or some were overwritten in part; a CUDA graph captures
            what it cannot; the backend asked for cannot run; :class:`EquivalenceError`, if ``"verify"`` finds one.

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

    _layout_before: StoredLayout | None = None
    _selection: Selection | None = None

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
        self._changes, self._checked = 0, -1  # as of which change of the arguments data was checked
        self._selection = None if outputs is None else Selection(outputs)
        self._set_compact(compact, end_slots)
        self._set_store_as(store_as)
        self._capturable = check_bool("capturable", capturable)
        self._set_arguments(locals())
        super().__init__(**kwargs)

    def __repr__(self) -> str:
        """The arguments, and what torchrl says of its own."""
        others = "outputs", "capturable", "compact", "end_slots", "store_as"
        more = (f"{name}={value!r}" for name in others if (value := getattr(self, name)))
        said = "".join([f"{each}, " for each in (*self._said(), *more)])
        return CapturableReplayBuffer.__repr__(self).replace("(", f"(\n    {said}", 1)

    @property
    def outputs(self) -> list[NestedKey] | None:
        """The entries that a sample has, and groups all of whose entries it has; None if all."""
        return None if self._selection is None else [as_key(path) for path in self._selection.by]

    @Argument
    def n_steps(self, value: Steps) -> Steps:  # type: ignore[override]
        """Frames in a full window, or between which numbers of them each sampled frame draws its own."""
        value = check_steps("n_steps", value)
        self._check_room(n_steps=value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute and, if it is one of the arguments or the storage, counts that."""
        super().__setattr__(name, value)
        if name in _COUNTED:
            self._changes += 1  # batches that were prefetched, and what was checked, are of the arguments before
            self.__dict__["_repeated"] = None

    def sample(self, *args: Any, n_steps: Steps | None = None, **kwargs: Any) -> Any:
        """Samples frames and computes their n-step transitions.

        Args:
            args, kwargs: those of torchrl's buffer: ``batch_size``, ``return_info``, and what its version takes.

        Keyword Args:
            n_steps: instead of the buffer's, for this call; of more than there are slots, as many as there are.

        Returns:
            TensorDict ``[batch_size]``; a tuple of this and the sampler's info if ``return_info``.
        """
        if calling := calls():
            check_mixing(calling, (roles := self._roles_in(())).rewards, roles.dones, self._done_at)
        if not self._capturable:
            check_not_captured("sample")
        if n_steps is None and not self._prefetch:
            sampled = super().sample(*args, **kwargs)
        else:
            token = _steps_of_call.set(None if n_steps is None else check_steps("n_steps", n_steps))
            try:
                with self._up_to_date(self._changes, n_steps is not None):
                    sampled = super().sample(*args, **kwargs)
            finally:
                _steps_of_call.reset(token)
        if self._selection is not None and not self._selection[INDEX]:
            # torchrl sets it in the sample.
            (sampled[0] if isinstance(sampled, tuple) else sampled).pop(INDEX, None)
        return sampled

    def _check_call(self) -> None:
        refuse_other_ways(calls())
        if not self._capturable:
            check_not_captured("extend")

    def _check_data(
        self, data: TensorDictBase, time_dim: int | None, new: Leaves, stored: Leaves, is_filled: bool
    ) -> None:
        self._check_call()
        self._check_neighbours()
        check_single_steps([(key,) for key in data.keys()])  # noqa: SIM118  # iterating it goes over its frames
        roles = self._roles_in({**stored, **new})
        check_entries(roles, new, stored, is_filled)
        if self._checked != self._changes or not is_filled:
            frames = Frames.read(data.unsqueeze(-1) if time_dim is None else data, roles.written)
            self._groups_in(frames, roles)
            self._checked = self._changes
        self._check_room(data.numel() // (1 if time_dim is None else data.shape[time_dim]))

    def _check_room(self, rows: int | None = None, n_steps: Steps | None = None) -> None:
        slots, n_steps = self._slots(rows), n_steps or self._n_steps
        if slots is not None and not isinstance(self._writer, ImmutableDatasetWriter):
            size, high = self._storage.max_size, max(n_steps) if isinstance(n_steps, tuple) else n_steps
            check_slots(high, slots, size, rows or size // slots)

    def _n_step_at(self, index: Tensor | tuple[Tensor, ...], position: Position) -> TensorDict:
        """The n-step transitions of the frames that lie at an index of the storage."""
        layout = self._layout()
        indices = check_index(index, self._storage.ndim, layout.frames.leaves[layout.roles.done].device)
        shape = indices[0].shape
        samples, high = self._samples([dim.reshape(-1) for dim in indices], position)
        built, _ = layout.sample(samples, high, self, self._selection, False)
        return built if len(shape) == 1 else built.reshape(*shape, *built.shape[1:])

    def _n_step_drawn(self, rows: Tensor, position: Position, with_index: bool) -> tuple[TensorDict, Any]:
        layout = self._layout()
        samples, high = self._samples([rows], position, layout.frames.batch_size)
        return layout.sample(samples, high, self, self._selection, with_index)

    def _layout(self) -> StoredLayout:
        """What is known of the storage's entries, which are read anew where they may be others."""
        order, before = self._order, self._layout_before
        indexed = isinstance(self._writer, TensorDictRoundRobinWriter)
        of = order.entries(), order.changes(), self._changes, indexed, self._ends(), order.wide_dtypes
        if before is not None and of[0] is before.of[0] and of[1:] == before.of[1:]:
            return before
        self._layout_before = StoredLayout.read(of, self._storage.ndim, indexed, self, self._selection, *of[-2:])
        return self._layout_before

    def _samples(self, indices: Sequence[Tensor], position: Position, sizes: Any = None) -> tuple[Samples, int]:
        """Frames at indices or, of a storage of ``sizes``, at rows, and the largest n of all."""
        low, high = steps if isinstance(steps := _steps_of_call.get() or self._n_steps, tuple) else (steps, steps)
        drawn = None
        if low < high:
            generator, device = self._generator, indices[0].device
            drawn_on = device if generator is None else generator.device
            drawn = torch.randint(low, high + 1, indices[0].shape, generator=generator, device=drawn_on).to(device)
        newest, live, slots, written = position
        known = (newest, live) if written is None else (slots - 1, slots)
        return Samples(indices, *known, drawn, sizes, written=written), high

    def _check_transforms(self, transforms: list[Transform]) -> None:
        roles = self._roles_in(())
        check_transforms(transforms, roles.rewards, roles.dones, self._done_at)


# That of torchrl's metaclass, which an editor, ``help`` and a site would show, says nothing of the arguments.
_signature = inspect.signature(NStepReplayBuffer.__init__)
NStepReplayBuffer.__signature__ = _signature.replace(parameters=[*_signature.parameters.values()][1:])
