"""NStepReplayBuffer: single steps are stored, n-step transitions are sampled.

Owns where frames lie in a storage, and how a replay buffer samples. May import ``base``, ``frames`` and ``dispatch``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn.utils import _set_dispatch_td_nn_modules as set_dispatch_td_nn_modules
from torch import Tensor
from torchrl.data import (
    ReplayBuffer,
    TensorDictReplayBuffer,
    TensorDictRoundRobinWriter,
)
from torchrl.envs.transforms import NextStateReconstructor, Transform

from multistep_triton.agents import n_step_sample_agents
from multistep_triton.arguments import Arguments
from multistep_triton.base import MultiStepBase
from multistep_triton.checks import check_steps
from multistep_triton.dispatch import n_step_sample
from multistep_triton.frames import Frames, KeyPath
from multistep_triton.ordered import OrderedReplayBuffer
from multistep_triton.ring import Samples
from multistep_triton.roles import WINDOW_PATHS, agent_paths, check_entries, with_saved
from multistep_triton.transform import N_STEP, find_transforms

Steps = int | tuple[int, int]

# What a call of ``sample`` asks for, in its own thread alone: batches that are prefetched have the buffer's.
_steps_of_call: ContextVar[Steps | None] = ContextVar("n_steps of a call", default=None)

_INDEX = ("index",)
_ARGUMENTS = frozenset(name for name, value in vars(Arguments).items() if isinstance(value, property))


class NStepReplayBuffer(MultiStepBase, TensorDictReplayBuffer, OrderedReplayBuffer):
    """A replay buffer that stores single steps and computes n-step transitions of the frames that are sampled.

    With ``n = n_steps`` and ``e(t)`` the smallest of ``t + n - 1``, the first boundary at or after ``t``, and the
    newest frame that is stored:

    .. math::
        steps(t) = e(t) - t + 1, \\quad reward'(t) = \\sum_{i=0}^{steps(t)-1} \\gamma^i reward(t + i), \\quad
        next'(t) = next(e(t))

    A boundary is a frame that is done; with a mask in the data, one that is invalid or followed by an invalid frame;
    with ``traj_key``, one that is followed by a frame of another trajectory. The storage is a ring: the newest frame
    is where windows end, as the oldest one follows it there, and nothing that was not written is read.

    ``extend`` takes 1-step transitions ``[*B, T]``, time last, any number of frames at a time (of more than there are
    slots, the newest stay), and stores them as they are; nothing is held back, and where a call fails, windows end
    where they did. A storage of ``ndim`` dimensions holds frames of ``ndim - 1`` batch dimensions. What is sampled,
    ``[N]``, has the keys, dtypes and rules of :class:`MultiStepTransform`: ``steps_to_next_obs`` (int64), ``gamma``
    (float32, ``gamma ** steps``) and ``nonterminal`` (bool) at the root; under ``"next"`` every reward key holds the
    n-step return, ``<reward_key>_orig`` the reward as it came and, with exactly one reward key, ``original_reward``
    the same; done keys are those of frame ``e(t)`` and ``<done_key>_orig`` as they came, or with ``done_at="start"``
    as they came; every other entry is the one of frame ``e(t)``, bit for bit. The other root entries are those of
    frame ``t``, and ``"index"`` says where it lies. The result is new memory on the storage's device, on which
    everything is computed; the host does not wait for it.

    Keyword Args:
        n_steps: frames in a full window, an int >= 1, or a pair ``(low, high)``: every sampled frame then draws its
            own from ``low .. high``, uniformly, with the buffer's ``generator``. Can be set at any time; nothing is
            stored anew.
        gamma: discount per step, a finite number in [0, 1]; can be set at any time.
        reward_keys: rewards under ``"next"``, ``[*B, T, *F]``, floating point, integer or bool. Defaults to
            ``["reward"]``.
        done_key: the done flag under ``"next"`` that ends trajectories, bool ``[*B, T]``, ``[*B, T, 1]`` or, per
            agent, of a reward's shape. Defaults to ``"done"``.
        done_keys: done flags under ``"next"``, of which ``done_at`` speaks. Defaults to ``["done", "truncated",
            "terminated"]``; ``done_key`` is one of them in any case; those that are not in the data are ignored.
        traj_key: root entry of trajectory ids, integers ``[*B, T]`` or ``[*B, T, 1]``, such as ``("collector",
            "traj_ids")``; a change is a boundary. Defaults to None.
        mask_key: root entry, bool ``[*B, T]`` or ``[*B, T, 1]``, False where a frame is padding; ignored if it is
            not in the data. An invalid frame's window is itself. Defaults to ``"mask"``.
        done_at: ``"end"``: done keys are those of frame ``e(t)``, which is what a bootstrapped target needs;
            ``"start"``: those of frame ``t``. Defaults to ``"end"``.
        match_reward_shape: whether ``steps_to_next_obs``, ``gamma`` and ``nonterminal`` have the shape of the first
            reward. Defaults to False.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"verify"``, which runs both and compares every sample.
        **kwargs: those of :class:`torchrl.data.TensorDictReplayBuffer`. The storage is a ``LazyTensorStorage``,
            ``LazyMemmapStorage`` or another ``TensorStorage`` of a tensordict, the writer a ``RoundRobinWriter`` (the
            default one is) or, for a storage that is filled before, an ``ImmutableDatasetWriter``.

    Raises:
        TypeError: storage, writer or sampler is of another kind.
        ValueError: an argument breaks its rule; from ``extend``: data is of another dtype, shape or number of rows than
            what is stored.
        KeyError: from ``extend``: data lacks a reward, a done flag, trajectory ids, or a mask that is stored.
        RuntimeError: the backend asked for cannot run; :class:`EquivalenceError`, one of these, if ``"verify"`` finds a
            difference.

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
    """

    def __init__(
        self,
        *,
        n_steps: Steps,
        gamma: float,
        reward_keys: Sequence[NestedKey] | None = None,
        done_key: NestedKey | None = None,
        done_keys: Sequence[NestedKey] | None = None,
        traj_key: NestedKey | None = None,
        mask_key: NestedKey | None = None,
        done_at: str = "end",
        match_reward_shape: bool = False,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        self._changes = 0
        self._set_arguments(
            n_steps,
            gamma,
            reward_keys,
            done_key,
            done_keys,
            mask_key,
            backend,
            done_at,
            traj_key,
            match_reward_shape,
        )
        super().__init__(**kwargs)

    def _init(self) -> None:
        super()._init()
        _check_transform(self._transform)

    def append_transform(self, transform: Transform, *, invert: bool = False) -> ReplayBuffer:
        """Appends a transform, as in torchrl; one that writes what windows do is a ValueError.

        Example:
            >>> from torchrl.data import LazyTensorStorage
            >>> from torchrl.envs.transforms import DoubleToFloat
            >>> rb = NStepReplayBuffer(n_steps=2, gamma=1.0, storage=LazyTensorStorage(4))
            >>> len(rb.append_transform(DoubleToFloat()).transform)
            1
        """
        _check_transform(transform)
        return super().append_transform(transform, invert=invert)

    def insert_transform(self, index: int, transform: Transform, *, invert: bool = False) -> ReplayBuffer:
        """Inserts a transform, as in torchrl; one that writes what windows do is a ValueError.

        Example:
            >>> from torchrl.data import LazyTensorStorage
            >>> from torchrl.envs.transforms import DoubleToFloat
            >>> rb = NStepReplayBuffer(n_steps=2, gamma=1.0, storage=LazyTensorStorage(4))
            >>> len(rb.insert_transform(0, DoubleToFloat()).transform)
            1
        """
        _check_transform(transform)
        return super().insert_transform(index, transform, invert=invert)

    @property  # type: ignore[override]
    def n_steps(self) -> Steps:
        """Frames in a full window, or between which numbers of them each sampled frame draws its own.

        Example:
            >>> import torch
            >>> from tensordict import TensorDict
            >>> from torchrl.data import LazyTensorStorage
            >>> frames = TensorDict({"next": {"reward": torch.ones(8), "done": torch.zeros(8, dtype=torch.bool)}}, [8])
            >>> rb = NStepReplayBuffer(n_steps=2, gamma=1.0, storage=LazyTensorStorage(8))
            >>> indices = rb.extend(frames)
            >>> rb.n_steps = 3, 5
            >>> steps = rb.sample(1000)["steps_to_next_obs"]
            >>> steps.unique()  # 1 and 2 where the newest frame is nearer
            tensor([1, 2, 3, 4, 5])
        """
        steps: Steps = self._n_steps
        return steps

    @n_steps.setter
    def n_steps(self, value: Steps) -> None:
        self._n_steps = check_steps("n_steps", value)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute and, if it is one of the arguments, counts that."""
        super().__setattr__(name, value)
        if name in _ARGUMENTS:
            # Batches that were prefetched before are of the arguments before.
            self._changes += 1

    def sample(
        self,
        batch_size: int | None = None,
        return_info: bool = False,
        include_info: bool | None = None,
        *,
        n_steps: Steps | None = None,
    ) -> TensorDictBase:
        """Samples frames and computes their n-step transitions.

        Args:
            batch_size, return_info, include_info: as in torchrl.

        Keyword Args:
            n_steps: instead of the buffer's, for this call.

        Returns:
            TensorDict ``[batch_size]``; a tuple of this and the sampler's info if ``return_info``.

        Example:
            >>> import torch
            >>> from tensordict import TensorDict
            >>> from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement
            >>> sampler = SamplerWithoutReplacement(shuffle=False)
            >>> rb = NStepReplayBuffer(n_steps=2, gamma=1.0, storage=LazyTensorStorage(4), sampler=sampler)
            >>> done = torch.zeros(3, dtype=torch.bool)
            >>> indices = rb.extend(TensorDict({"next": {"reward": torch.ones(3), "done": done}}, [3]))
            >>> rb.sample(3)["next", "reward"]
            tensor([2., 2., 1.])
            >>> rb.sample(3, n_steps=3)["next", "reward"]
            tensor([3., 2., 1.])
        """
        token = _steps_of_call.set(None if n_steps is None else check_steps("n_steps", n_steps))
        try:
            with self._up_to_date():
                return super().sample(batch_size, return_info, include_info)
        finally:
            _steps_of_call.reset(token)

    @contextlib.contextmanager
    def _up_to_date(self) -> Iterator[None]:
        """Within, the next batch in the queue is one that was computed with today's arguments, or those of this call.

        It is of the slots that were drawn for it, no sampler draws anew, and of the frames that lie there now.
        """
        if not self._prefetch:
            yield
            return
        with self._futures_lock:
            queue, changes = self._prefetch_queue, self._changes
            # What was loaded may be of any arguments.
            of_before = [future for future in queue if getattr(future, "changes", None) != changes]
            while queue and (_steps_of_call.get() is not None or queue[0] in of_before):
                if queue[0].exception() is not None:
                    queue.popleft()
                    continue
                info = dict(queue[0].result()[1])
                with self._replay_lock, self._write_lock:
                    data = self._read(info)
                computed: Future[Any] = Future()
                computed.set_result(self._finished(data, info))
                queue[0] = computed
                break
            yield
            for future in queue:
                if future not in of_before:
                    future.changes = changes

    def empty(self, empty_write_count: bool = True) -> None:
        """Empties the buffer, and drops what was prefetched from it.

        Example:
            >>> import torch
            >>> from tensordict import TensorDict
            >>> from torchrl.data import LazyTensorStorage
            >>> rb = NStepReplayBuffer(n_steps=2, gamma=1.0, storage=LazyTensorStorage(4))
            >>> done = torch.zeros(3, dtype=torch.bool)
            >>> indices = rb.extend(TensorDict({"next": {"reward": torch.ones(3), "done": done}}, [3]))
            >>> len(rb)
            3
            >>> rb.empty()
            >>> len(rb)
            0
        """
        with self._futures_lock:
            self._clear_prefetch_queue_locked()
            super().empty(empty_write_count)

    def _set_index_in_td(self, tensordict: TensorDictBase, index: Tensor | int | None) -> None:
        # torchrl's takes the indices, which are those of frames with time first, for some with time last.
        ndim, dim = self._storage.ndim, self.dim_extend
        if ndim == 1 or not isinstance(index, Tensor):
            super()._set_index_in_td(tensordict, index)
            return
        shape = tensordict.batch_size[:ndim]
        if len(shape) < ndim or index.shape[0] != shape.numel():
            # One frame, which has no time.
            shape, dim = shape[: ndim - 1], 0
        lead = list(shape)
        lead[0], lead[dim] = lead[dim], lead[0]
        tensordict.set("index", index.view(*lead, ndim).transpose(0, dim))

    def _sample(self, batch_size: int) -> tuple[TensorDictBase, dict[str, Any]]:
        # Another process may have laid the storage out, which the sampler does not see.
        self._stored()
        with self._replay_lock, self._write_lock:
            index, info = self._sampler.sample(self._storage, batch_size)
            if self._sample_unit is not None:
                index, info = self._sample_unit.expand(index, info, self._storage)
            if taken := [key for key in info if key[0] == "next"]:
                raise TypeError(
                    f"sampler must leave the entries under 'next' to the windows, as a SliceSampler with "
                    f"truncated_key=None does, got {type(self._sampler).__name__}, which writes {taken}"
                )
            info["index"] = index
            data = self._read(info)
        return self._finished(data, info)

    def _read(self, info: dict[str, Any]) -> TensorDict:
        """The n-step transitions of the frames that lie where ``info`` says, which is told how old they are."""
        if self._writer.tracks_generations:
            info["index_generation"] = self._writer.generations_of(info["index"])
        return self._n_step_at(info["index"])

    def _finished(self, data: TensorDictBase, info: dict[str, Any]) -> tuple[TensorDictBase, dict[str, Any]]:
        """What was read from the storage, as a sample of torchrl's buffer leaves it."""
        data = self._collate_fn(data)
        if self._transform is not None and len(self._transform):
            with data.unlock_(), set_dispatch_td_nn_modules(True):
                data = self._transform(data)
        if self._pin_memory and data.device == torch.device("cpu"):
            data = data.pin_memory()
        return data, info

    def _n_step_at(self, index: Tensor | tuple[Tensor, ...]) -> TensorDict:
        """The n-step transitions of the frames that lie at an index of the storage."""
        data, ndim, roles = self._stored(), self._storage.ndim, self._checked_roles()
        if data is None:
            raise RuntimeError("storage must hold frames to be sampled, got an empty one")
        # The writer's own entry says where a frame lies, which needs no reading.
        indexed = isinstance(self._writer, TensorDictRoundRobinWriter) and data.batch_dims == ndim
        without = {*roles.written, _INDEX} if indexed else roles.written
        frames, objects = Frames.read_storage(data, ndim, without)
        agents = check_entries(frames, roles)
        leaves = with_saved(frames.leaves, roles.saved_in(frames.leaves))
        arguments = self._arguments(roles, leaves)
        indices = [
            torch.as_tensor(dim, dtype=torch.int64, device=leaves[roles.done].device)
            for dim in (index if isinstance(index, tuple) else (index,))
        ]
        shape = indices[0].shape
        samples, high = self._samples([dim.reshape(-1) for dim in indices], data.shape[:ndim])
        if agents:
            keys = agent_paths(leaves, roles, frames.batch_size, agents)
            extension = n_step_sample_agents(
                samples, leaves, agent_dims=len(agents), agent_keys=keys, n_steps=high, **arguments
            )
        else:
            extension = n_step_sample(samples, leaves, n_steps=high, **arguments)
        entries: dict[KeyPath, Any] = self._output_leaves(extension, roles, agents)
        if indexed:
            entries[_INDEX] = samples.indices[0]
        if objects:
            lengths = extension.steps.flatten(1).amin(1) if agents else extension.steps
            here, (time, *others) = tuple(samples.indices), samples.indices
            end = (time + lengths - 1) % samples.live, *others
            entries.update({path: value[end if roles.is_gathered(path) else here] for path, value in objects.items()})
        if tail := frames.nodes[()].tail:
            for path in WINDOW_PATHS:
                entries[path] = entries[path].view(-1, *entries[path].shape[1:] or [1] * len(tail))
        built = frames.build(entries, torch.Size([shape.numel()]))
        return built if len(shape) == 1 else built.reshape(*shape, *built.shape[1:])

    def _samples(self, indices: Sequence[Tensor], sizes: torch.Size) -> tuple[Samples, int]:
        """Frames at indices of a storage of these sizes, and the largest n of all."""
        live = -(-len(self._storage) // max(sizes[1:].numel(), 1))
        newest = (getattr(self._writer, "_cursor", 0) - 1) % live
        low, high = steps if isinstance(steps := _steps_of_call.get() or self._n_steps, tuple) else (steps, steps)
        drawn = None
        if low < high:
            generator, device = self._storage._rng, indices[0].device
            drawn = torch.randint(
                low,
                high + 1,
                indices[0].shape,
                generator=generator,
                device=device if generator is None else generator.device,
            ).to(device)
        return Samples(indices, newest, live, drawn), high

    def _needed(self) -> tuple[Collection[KeyPath], Collection[KeyPath]]:
        roles = self._roles
        return roles.needed, {roles.mask, *roles.kept, *roles.saved}


def _check_transform(transform: Any) -> None:
    if found := find_transforms(transform, (*N_STEP, NextStateReconstructor)):
        raise ValueError(
            f"transform must leave rewards and the entries under 'next' to the windows, which are computed when frames "
            f"are sampled, got {found[0]}"
        )
