"""MultiStepTransform: n-step transitions on ``ReplayBuffer.extend``.

Owns what a call emits and what is flushed. May import ``arguments``, ``backends``, ``frames``, ``ownership``,
``neighbours`` and ``torchrl_internals``.
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
from multistep_triton.frames import frames_of
from multistep_triton.neighbours import check_holds_n_steps
from multistep_triton.ownership import OwnedTransform
from multistep_triton.torchrl_internals import calls, lock_of, refuse_other_ways, store, transforms_in, update_priority


class MultiStepTransform(OwnedTransform):
    """Turns the 1-step transitions that extend a replay buffer into n-step ones.

    A drop-in replacement for ``torchrl.envs.transforms.MultiStepTransform``. With ``n = n_steps`` and ``e(t)`` the
    smallest of ``t + n - 1``, the first boundary at or after ``t``, and the last known frame:

    .. math::
        steps(t) = e(t) - t + 1, \\quad reward'(t) = \\sum_{i=0}^{steps(t)-1} \\gamma^i reward(t + i), \\quad
        next'(t) = next(e(t))

    A boundary is a frame at which a done flag is set, ``done_key`` or any other of ``done_keys`` beside it that has its
    shape; with a mask in the data, one that is invalid or followed by an invalid frame; with trajectory ids, one that
    is followed by a frame of another trajectory.

    The data of a call has batch shape ``[*B, T]``, time last; a frame with batch shape ``[]`` counts as ``T = 1``.
    A call emits the ``c + T - n`` oldest of the ``c`` frames carried over from the calls before and the ``T`` new
    ones, and holds back the last ``n``; with nothing to emit it returns None and the buffer stores nothing. What is
    emitted does not depend on how the stream is cut into calls. :meth:`flush` returns what is held back,
    :meth:`flush_into` stores it.

    Written at the root: ``steps_to_next_obs`` (int64), ``gamma`` (float32, ``gamma ** steps``) and ``nonterminal``
    (bool, False at a boundary), each ``[*B, E]``. Under ``"next"``: every reward key holds the n-step return,
    ``<reward_key>_orig`` the reward as it came and, with exactly one reward key, ``original_reward`` is the same
    tensor; done keys stay as they came, or with ``done_at="end"`` are those of frame ``e(t)``, beside
    ``<done_key>_orig``; every other entry is the one of frame ``e(t)``, bit for bit. The other root entries stay those
    of frame ``t``. The result lies on the data's device, in memory of its own, and the input is not modified.

    With one done flag per agent, ``[*B, T, *A]`` or ``[*B, T, *A, 1]``, and a reward of the same shape beside it or
    below, every agent has its own windows: those of all entries ``[*B, T, *A, ...]`` there. Windows of other entries
    there end where that of any agent ends. ``steps_to_next_obs``, ``gamma`` and ``nonterminal`` then have the done
    flag's shape. Any other group under ``"next"`` that has a done flag of its own is governed by it; if it has a
    reward, these three are written for it, too, as ``(*group, "steps_to_next_obs")`` and so on. What is in no such
    group is governed by the flags at the root, or else by ``done_key``.

    A transform belongs to the one replay buffer that it is given to.

    The frames held back, :attr:`frames_held` of every row, are a copy, follow ``.to(device)``, and are part of
    ``state_dict()``, with ``n_steps`` and ``gamma``, of pickles and of deep copies: a run that is resumed from one of
    these stores what an unbroken one would. Calls from several threads take turns; as a buffer calls its transforms
    outside the lock under which it stores, save it and flush into it while no other thread is extending it.

    Args:
        n_steps: frames in a full window, an int >= 1; can be set at any time, which loses and repeats no frame. After
            making it smaller, extend with a batch before ``ReplayBuffer.add``, which can store one frame only.
        gamma: discount per step, a finite number in [0, 1]; can be set at any time.

    Keyword Args:
        reward_keys: rewards under ``"next"``, ``[*B, T, *F]``, floating point, integer or bool. Defaults to
            ``["reward"]``.
        done_key: the done flag under ``"next"`` that must be there, bool ``[*B, T]``, ``[*B, T, 1]`` or, per agent, of
            a reward's shape. Defaults to ``"done"``.
        done_keys: done flags under ``"next"``, of which ``done_at`` speaks, and which end windows, bool. Defaults to
            ``["done", "truncated", "terminated"]``; ``done_key`` is one of them in any case; those that are not in the
            data are ignored. A bool entry of such a name in another group under ``"next"`` is a done flag of that
            group, named here or not.
        mask_key: root entry, bool ``[*B, T]`` or ``[*B, T, 1]``, False where a frame is padding; ignored if it is
            not in the data. An invalid frame's window is itself. Defaults to ``"mask"`` or, if that is not in the data,
            ``("collector", "mask")``.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"verify"``, which holds every call to the
            specification.
        done_at: ``"start"``, torchrl's rule, leaves the done keys those of frame ``t``: the last ``n - 1`` frames
            before a termination then bootstrap from where the episode ended. With ``"end"`` they are those of frame
            ``e(t)``, which is what a bootstrapped target needs. Defaults to ``"start"``.
        traj_key: root entry of trajectory ids, integers ``[*B, T]`` or ``[*B, T, 1]``; a change is a boundary.
            Defaults to ``"auto"``: ``("collector", "traj_ids")`` if it is in the data. None looks at none.
        match_reward_shape: whether ``steps_to_next_obs``, ``gamma`` and ``nonterminal`` have the shape of the first
            reward, repeated along its features, which torchrl's distributional DQN loss and its value estimators with
            rewards per agent need; those at the root are then of its windows. Defaults to False.

    Raises:
        KeyError: the done key, a reward key or the trajectory ids are missing from the data.
        TypeError: the data, a flag or a reward is of the wrong kind.
        ValueError: a number, a shape or a key breaks its rule, the data does not continue the carry or is of n steps
            already, or what shares the buffer would be wrong (``docs/neighbours.md``). After any error the carry is as
            it was.
        RuntimeError: a CUDA graph is being captured; the backend asked for cannot run; :class:`EquivalenceError`, which
            is one, if ``"verify"`` finds a difference.

    Notes:
        Differences from torchrl's class: done keys beside ``done_key`` and trajectory ids end windows; a NaN or Inf
        after a done does not reach the frames before it; integer
        rewards are promoted to ``torch.get_default_dtype()``; ``nonterminal`` is also right for ``n_steps=1``; a mask
        ends windows; rewards narrower than float32 are accumulated in float32; several reward keys keep their
        originals apart; a ``done_key`` outside ``done_keys`` is not gathered; the carry is a copy, without the
        autograd graph, and is saved and loaded.

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
        """The n-step transitions whose windows are known by now; ``[*B, T]`` frames in, which stay as they are.

        Returns:
            TensorDict: ``[*B, E]``, or None where all frames are held back.
        """
        # The frames are not modified, so they need not be copied before, as torchrl's does: a subclass that writes into
        # what its _inv_call gets is to copy it.
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
            # Without the search of torch.nn.Module for parameters of that name.
            self.__dict__["_carry"] = held
        if not count:
            return None
        return emitted.squeeze(-1) if single else emitted

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """What is sampled, as it is."""
        self._check_owner(tensordict, calls())
        out: TensorDictBase = super().forward(tensordict)
        return out

    def flush(self) -> TensorDict | None:
        """The n-step transitions of the frames held back, with windows cut at the last one; holds back none after.

        Returns:
            TensorDict: ``[*B, c]``, or None where nothing was held back. The last frame is not ``nonterminal``.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: as in a call; the frames are still held back.
        """
        with self._lock:
            if self._carry is None:
                return None
            emitted, self._carry = self._n_step(frames_of(self._carry), None, hold=False)
        return emitted

    def flush_into(self, replay_buffer: ReplayBuffer) -> Tensor:
        """Stores what :meth:`flush` returns in a replay buffer, without passing it through this transform again.

        Transforms of the buffer that come after this one when it is extended, which are those before it in their
        list, are applied; so are all of them if this one is not among them.

        Args:
            replay_buffer: the buffer to extend.

        Returns:
            Tensor: the indices, as of ``replay_buffer.extend``.

        Raises:
            TypeError: not a replay buffer.
            ValueError: the buffer has an n-step transform, and not this one.
            Exception: whatever the buffer raises when it stores; the frames are still held back then.
        """
        if not isinstance(replay_buffer, ReplayBuffer):
            raise TypeError(f"replay_buffer must be a torchrl ReplayBuffer, got {type(replay_buffer).__name__}")
        transforms = transforms_in(replay_buffer.transform)
        if self in transforms:
            transforms = transforms[: transforms.index(self)]
        elif others := [each for each in transforms if isinstance(each, N_STEP)]:
            raise ValueError(f"replay_buffer must hold this transform or none of its kind, got {others[0]}")
        check_holds_n_steps(replay_buffer)
        # The buffer's lock first, as in its load_state_dict.
        with lock_of(replay_buffer), self._lock:
            before = self._carry
            try:
                data = self.flush()
                for transform in reversed(transforms):
                    data = None if data is None else transform.inv(data)
                if data is None:
                    return torch.zeros((0, replay_buffer.storage.ndim), dtype=torch.long)
                indices = store(replay_buffer, data)
            except BaseException:
                self._carry = before
                raise
        update_priority(replay_buffer, indices, data)
        return indices


N_STEP: tuple[type[Transform], ...] = MultiStepTransform, _TorchRLMultiStepTransform
"""The n-step transforms, ours and torchrl's."""
