"""MultiStepTransform: n-step transitions on ``ReplayBuffer.extend``.

Owns the carry, and how a replay buffer calls. May import ``base`` and ``frames``.
"""

from __future__ import annotations

from collections.abc import Sequence

from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.envs.transforms import Transform
from torchrl.envs.transforms.rb_transforms import MultiStepTransform as _TorchRLMultiStepTransform

from multistep_triton.base import MultiStepBase
from multistep_triton.frames import Frames


class MultiStepTransform(MultiStepBase, Transform):
    """Turns the 1-step transitions that extend a replay buffer into n-step ones.

    A drop-in replacement for ``torchrl.envs.transforms.MultiStepTransform``. With ``n = n_steps`` and ``e(t)`` the
    smallest of ``t + n - 1``, the first boundary at or after ``t``, and the last known frame:

    .. math::
        steps(t) = e(t) - t + 1, \\quad reward'(t) = \\sum_{i=0}^{steps(t)-1} \\gamma^i reward(t + i), \\quad
        next'(t) = next(e(t))

    A boundary is a frame that is done, or, with a mask in the data, invalid or followed by an invalid frame.

    The data of a call has batch shape ``[*B, T]``, time last; a frame with batch shape ``[]`` counts as ``T = 1``.
    A call emits the ``c + T - n`` oldest of the ``c`` frames carried over from the calls before and the ``T`` new
    ones, and holds back the last ``n``; with nothing to emit it returns None and the buffer stores nothing. What is
    emitted does not depend on how the stream is cut into calls.

    Written at the root: ``steps_to_next_obs`` (int64), ``gamma`` (float32, ``gamma ** steps``) and ``nonterminal``
    (bool, False at a boundary), each ``[*B, E]``. Under ``"next"``: every reward key holds the n-step return,
    ``<reward_key>_orig`` the reward as it came and, with exactly one reward key, ``original_reward`` is the same
    tensor; done keys stay as they came; every other entry is the one of frame ``e(t)``, bit for bit. The other root
    entries stay those of frame ``t``. The result lies on the data's device, in memory of its own, and the input is
    not modified.

    Args:
        n_steps: frames in a full window, an int >= 1; can be set at any time, which loses and repeats no frame.
        gamma: discount per step, a finite number in [0, 1]; can be set at any time.

    Keyword Args:
        reward_keys: rewards under ``"next"``, ``[*B, T, *F]``, floating point, integer or bool. Defaults to
            ``["reward"]``.
        done_key: the done flag under ``"next"`` that ends trajectories, bool ``[*B, T]`` or ``[*B, T, 1]``. Defaults
            to ``"done"``.
        done_keys: entries under ``"next"`` that stay as they came. Defaults to ``["done", "truncated",
            "terminated"]``; ``done_key`` is one of them in any case.
        mask_key: root entry, bool ``[*B, T]`` or ``[*B, T, 1]``, False where a frame is padding; ignored if it is
            not in the data. An invalid frame's window is itself. Defaults to ``"mask"``.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``.

    Raises:
        KeyError: the done key or a reward key is missing from the data.
        TypeError: the data, a flag or a reward is of the wrong kind.
        ValueError: a number, a shape or a key breaks its rule, or the data does not continue the carry. After any
            error the carry is as it was.
        RuntimeError: the backend asked for cannot run.

    Notes:
        Differences from torchrl's class: a NaN or Inf after a done does not reach the frames before it; integer
        rewards are promoted to ``torch.get_default_dtype()``; ``nonterminal`` is also right for ``n_steps=1``; a mask
        ends windows; rewards narrower than float32 are accumulated in float32; several reward keys keep their
        originals apart; a ``done_key`` outside ``done_keys`` is not gathered; the carry is a copy, without the
        autograd graph.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> transform = MultiStepTransform(n_steps=2, gamma=0.5)
        >>> frames = TensorDict({
        ...     "observation": torch.arange(4),
        ...     "next": {
        ...         "observation": torch.arange(1, 5),
        ...         "reward": torch.ones(4, 1),
        ...         "done": torch.tensor([False, True, False, False]).unsqueeze(-1),
        ...     },
        ... }, batch_size=[4])
        >>> out = transform.inv(frames)
        >>> out["next", "reward"].squeeze(-1), out["next", "observation"], out["steps_to_next_obs"]
        (tensor([1.5000, 1.0000]), tensor([2, 2]), tensor([2, 1]))
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
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self._set_arguments(n_steps, gamma, reward_keys, done_key, done_keys, mask_key, backend)
        self._carry: Frames | None = None

    def clear(self) -> None:
        """Drops the frames held back."""
        self._carry = None

    @property
    def _buffer(self) -> TensorDict | None:
        """A copy of the frames held back, under the name of torchrl's attribute."""
        return None if self._carry is None else self._carry.build(self._carry.leaves, self._carry.batch_size).clone()

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDict | None:
        if self.parent is not None:
            raise ValueError(self.ENV_ERR)
        if not isinstance(tensordict, TensorDictBase):
            raise TypeError(f"data must be a TensorDict of batch size [*B, T], got {type(tensordict).__name__}")
        if not tensordict.ndim:
            self._check_emits_one_frame()
            frame = self._inv_call(tensordict.unsqueeze(-1))
            return None if frame is None else frame.squeeze(-1)
        emitted, self._carry = self._n_step(tensordict, self._carry, hold=True)
        return emitted if emitted.batch_size[-1] else None

    def _check_emits_one_frame(self) -> None:
        held = 0 if self._carry is None else self._carry.batch_size[-1]
        if held > self._n_steps:
            raise ValueError(
                f"a single frame must find at most n_steps = {self._n_steps} frames held back, got {held}: after "
                f"n_steps was made smaller, extend with a batch of frames first, an empty one will do"
            )
