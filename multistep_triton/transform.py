"""MultiStepTransform: computes n-step transitions when ``ReplayBuffer.extend`` stores frames.

Owns which transitions a call emits and which a flush stores. May import ``arguments``, ``backends``, ``frames``,
``carrying``, ``neighbours`` and ``torchrl_internals``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer
from torchrl.envs.transforms import MultiStepTransform as _TorchRLMultiStepTransform
from torchrl.envs.transforms import Transform

from multistep_triton.arguments import DoneAt
from multistep_triton.backends import Backend
from multistep_triton.carrying import CarryingTransform
from multistep_triton.frames import frames_of
from multistep_triton.neighbours import check_holds_n_steps
from multistep_triton.torchrl_internals import calls, lock_of, refuse_other_ways, store, transforms_in, update_priority


class MultiStepTransform(CarryingTransform):
    """Turns the 1-step transitions that extend a replay buffer into n-step transitions.

    A drop-in for ``torchrl.envs.transforms.MultiStepTransform``. With ``n = n_steps``, the window of frame ``t`` ends
    at ``e(t)``, the smallest of ``t + n - 1``, the first boundary at or after ``t``, and the last known frame:

    .. math::
        steps(t) = e(t) - t + 1, \\quad reward'(t) = \\sum_{i=0}^{steps(t)-1} \\gamma^i reward(t + i), \\quad
        next'(t) = next(e(t))

    A frame is a boundary if one of its done flags is set: ``done_key``, or any other of ``done_keys`` beside it that
    has its shape; if the data holds a mask, and the frame or the next one is invalid; or if the data holds trajectory
    ids, and the next frame has another id.

    The data of a call has batch shape ``[*B, T]``, time last; a frame with batch shape ``[]`` counts as ``T = 1``.
    The transform appends the ``T`` new frames to the ``c`` frames that it carries over from earlier calls, emits the
    oldest ``c + T - n`` of them, and holds back the last ``n``. If it has nothing to emit, it returns None and the
    buffer stores nothing. The transitions do not depend on how the stream is cut into calls. :meth:`flush` returns the
    transitions of the frames held back, :meth:`flush_into` stores them.

    The transform writes at the root ``steps_to_next_obs`` (int64), ``gamma`` (float32, ``gamma ** steps``) and
    ``nonterminal`` (bool, False at a boundary), each ``[*B, E]``. Under ``"next"``, every reward key holds the n-step
    return and ``<reward_key>_orig`` the reward as it came; with exactly one reward key, ``original_reward`` is the same
    tensor. Done keys stay as they came; with ``done_at="end"`` they hold the flags of frame ``e(t)``, and
    ``<done_key>_orig`` those that came. Every other entry under ``"next"`` is that of frame ``e(t)``, bit for bit; the
    other root entries stay those of frame ``t``. The result is new memory on the data's device; the input stays as is.

    With one done flag per agent, ``[*B, T, *A]`` or ``[*B, T, *A, 1]``, and a reward of the same shape beside it or
    below, every agent has its own windows, and the three entries at the root have the flag's shape. Groups under
    ``"next"`` that have done flags of their own have windows of their own (``docs/agents.md``).

    A transform belongs to one replay buffer at a time, the one that takes it.

    The frames held back, :attr:`frames_held` of every row, are a copy, follow ``.to(device)``, and are part of
    ``state_dict()`` (with ``n_steps`` and ``gamma``), of pickles and of deep copies: a run that resumes from one of
    these stores what an uninterrupted run would. Calls from several threads take turns. A buffer calls its transforms
    outside the lock under which it stores: save it and flush into it while no other thread is extending it.

    Args:
        n_steps: frames in a full window, an int >= 1. It can be set at any time without losing or repeating a frame.
            After making it smaller, extend with a batch before ``ReplayBuffer.add``, which can store one frame only.
        gamma: discount per step, a finite number in [0, 1]; it can be set at any time.

    Keyword Args:
        reward_keys: rewards under ``"next"``, ``[*B, T, *F]``, floating point, integer or bool. Defaults to
            ``["reward"]``.
        done_key: the done flag under ``"next"`` that the data must hold, bool ``[*B, T]``, ``[*B, T, 1]`` or, per
            agent, of a reward's shape. Defaults to ``"done"``.
        done_keys: the done flags under ``"next"``, bool, that end windows and that ``done_at`` applies to. Defaults to
            ``["done", "truncated", "terminated"]``. ``done_key`` always counts as one of them; flags that the data
            lacks are ignored. A bool entry with the name of one of them in another group under ``"next"`` is a done
            flag of that group, whether its full key is listed here or not.
        mask_key: root entry, bool ``[*B, T]`` or ``[*B, T, 1]``, False where a frame is padding; ignored if the data
            lacks it. The window of an invalid frame is that frame alone. Defaults to ``"mask"`` or, if the data lacks
            that, ``("collector", "mask")``.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"verify"``, which compares every call with the
            specification.
        done_at: ``"start"``, torchrl's rule, leaves the done flags of frame ``t`` in the done keys: targets of the last
            ``n - 1`` frames before a termination then bootstrap from where the episode ended. ``"end"`` writes the
            flags of frame ``e(t)``, which bootstrapped targets need. Defaults to ``"start"``.
        traj_key: root entry of trajectory ids, integers ``[*B, T]`` or ``[*B, T, 1]``, whose changes are boundaries.
            Defaults to ``"auto"``: ``("collector", "traj_ids")`` if the data holds it. None ignores ids.
        match_reward_shape: whether ``steps_to_next_obs``, ``gamma`` and ``nonterminal`` have the shape of the first
            reward, repeated along its features; torchrl's distributional DQN loss and its value estimators with rewards
            per agent need this. The three at the root then describe the first reward's windows. Defaults to False.

    Raises:
        KeyError: the data lacks the done key, a reward key or the trajectory ids.
        TypeError: the data, a flag or a reward is of the wrong kind.
        ValueError: a number, a shape or a key breaks its rule, the data does not continue the carry or holds n-step
            transitions already, or a part of the buffer would misread n-step transitions (``docs/neighbours.md``).
            After any error the carry is as it was.
        RuntimeError: a CUDA graph is being captured; the requested backend cannot run; or ``"verify"`` finds a
            difference and raises :class:`EquivalenceError`, a subclass.

    Notes:
        Differences from torchrl's class: done keys beside ``done_key``, trajectory ids and a mask end windows; a NaN or
        Inf after a done does not reach the frames before it; integer rewards are promoted to
        ``torch.get_default_dtype()``, and rewards narrower than float32 accumulated in float32; ``nonterminal`` is also
        right for ``n_steps=1``; every reward key keeps its own original; a ``done_key`` outside ``done_keys`` is not
        gathered; the carry is a copy without the autograd graph, and ``state_dict()`` holds it.

        Source: R. S. Sutton, Learning to predict by the methods of temporal differences, Machine Learning 3, 1988.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
        >>> frames = TensorDict({
        ...     "observation": torch.arange(4),
        ...     "next": {
        ...         "observation": torch.arange(1, 5),
        ...         "reward": torch.ones(4, 1),
        ...         "done": torch.tensor([False, True, False, False]).unsqueeze(-1),
        ...     },
        ... }, batch_size=[4])
        >>> transform = MultiStepTransform(n_steps=2, gamma=0.5)
        >>> rb = ReplayBuffer(storage=LazyTensorStorage(8), transform=transform)
        >>> rb.extend(frames)  # the last 2 are held back
        tensor([0, 1])
        >>> transform.flush_into(rb)  # at the end of the stream
        tensor([2, 3])
        >>> rb[:]["next", "reward"].squeeze(-1), rb[:]["next", "observation"], rb[:]["steps_to_next_obs"]
        (tensor([1.5000, 1.0000, 1.5000, 1.0000]), tensor([2, 2, 4, 4]), tensor([2, 1, 2, 1]))
        >>> transform.n_steps = 3
        >>> transform.inv(frames)["next", "reward"].squeeze(-1)  # as the buffer calls it
        tensor([1.5000])
        >>> transform.flush()["next", "reward"].squeeze(-1)
        tensor([1.0000, 1.5000, 1.0000])
    """

    ENV_ERR = _TorchRLMultiStepTransform.ENV_ERR

    def __init__(
        self,
        n_steps: int,
        gamma: float,
        *,
        reward_keys: Sequence[NestedKey] | None = None,
        done_key: NestedKey | None = None,
        done_keys: Sequence[NestedKey] | None = None,
        mask_key: NestedKey | None = None,
        backend: Backend = "auto",
        done_at: DoneAt = "start",
        traj_key: NestedKey | None = "auto",
        match_reward_shape: bool = False,
    ) -> None:
        super().__init__()
        self._set_arguments(locals())

    def inv(self, tensordict: TensorDictBase) -> TensorDict | None:
        """Emits the n-step transitions of the frames held back and the new ones, ``[*B, T]``, but the last ``n_steps``.

        Returns:
            TensorDict: ``[*B, E]``, or None if all frames are held back. The new frames are not modified.
        """
        # torchrl's inv passes _inv_call a shallow copy, this one the frames themselves: an _inv_call of a subclass must
        # copy them before it writes into them.
        return self._inv_call(tensordict)

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDict | None:
        if self.parent is not None:
            raise ValueError(self.ENV_ERR)
        if not isinstance(tensordict, TensorDictBase):
            raise TypeError(f"data must be a TensorDict of batch size [*B, T], got {type(tensordict).__name__}")
        calling = calls()
        refuse_other_ways(calling)
        self._check_owner(tensordict, calling)
        single = not tensordict.ndim or "put" in calling
        data = tensordict.unsqueeze(-1) if single else tensordict
        with self._lock:
            emitted, held = self._n_step(data, self._carry, hold=True)
            count = emitted.batch_size[-1]
            if count > 1 and data.batch_size[-1] == 1 and (single or "add" in calling):
                raise ValueError(
                    f"a single frame must find at most n_steps = {self._n_steps} frames held back, got "
                    f"{self._n_steps + count - 1}: after n_steps was made smaller, extend with a batch of frames "
                    f"first, an empty one will do"
                )
            # Bypasses __setattr__ of torch.nn.Module, which would search its parameters for the name.
            self.__dict__["_carry"] = held
        if not count:
            return None
        return emitted.squeeze(-1) if single else emitted

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Returns the sampled batch unchanged, after checking what shares the buffer."""
        self._check_owner(tensordict, calls())
        out: TensorDictBase = super().forward(tensordict)
        return out

    def flush(self) -> TensorDict | None:
        """Computes the n-step transitions of the frames held back, cuts windows at the last one, and drops the frames.

        Returns:
            TensorDict: ``[*B, c]``, or None if no frames were held back. The last frame is not ``nonterminal``.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: as in a call; the frames then stay held back.
        """
        with self._lock:
            if self._carry is None:
                return None
            emitted, self._carry = self._n_step(frames_of(self._carry), None, hold=False)
        return emitted

    def flush_into(self, replay_buffer: ReplayBuffer) -> Tensor:
        """Stores the transitions that :meth:`flush` returns in a replay buffer, without calling this transform on them.

        Applies the buffer's transforms that run after this one on extend, which are those before it in the buffer's
        list; if this one is not in the list, applies all of them.

        Args:
            replay_buffer: the buffer to extend.

        Returns:
            Tensor: the indices, as ``replay_buffer.extend`` returns them.

        Raises:
            TypeError: ``replay_buffer`` is not a replay buffer.
            ValueError: the buffer has an n-step transform but not this one, or holds single steps.
            Exception: any error of the buffer while it stores; the frames then stay held back.
        """
        if not isinstance(replay_buffer, ReplayBuffer):
            raise TypeError(f"replay_buffer must be a torchrl ReplayBuffer, got {type(replay_buffer).__name__}")
        transforms = transforms_in(replay_buffer.transform)
        if self in transforms:
            transforms = transforms[: transforms.index(self)]
        elif others := [each for each in transforms if isinstance(each, N_STEP)]:
            raise ValueError(f"replay_buffer must hold this transform or none of its kind, got {others[0]}")
        check_holds_n_steps(replay_buffer)
        # Takes the buffer's lock first, in the order of its load_state_dict, so that the two cannot deadlock.
        with lock_of(replay_buffer), self._lock:
            before = self._carry
            try:
                data = self.flush()
                for transform in reversed(transforms):
                    data = None if data is None else transform.inv(data)
                if data is None:
                    return torch.zeros((0, replay_buffer.storage.ndim), dtype=torch.long, device="cpu")
                indices = store(replay_buffer, data)
            except BaseException:
                self._carry = before
                raise
        update_priority(replay_buffer, indices, data)
        return indices


N_STEP: tuple[type[Transform], ...] = MultiStepTransform, _TorchRLMultiStepTransform
"""The classes of n-step transforms, this package's and torchrl's."""
