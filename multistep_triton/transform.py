"""MultiStepTransform: n-step transitions on ``ReplayBuffer.extend``.

Owns the keys, the carry and the TensorDict plumbing; no maths. May import ``functional`` and ``frames``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torch import Tensor
from torchrl.envs.transforms import Transform
from torchrl.envs.transforms.rb_transforms import MultiStepTransform as _TorchRLMultiStepTransform

from multistep_triton.frames import Frames, KeyPath
from multistep_triton.functional import (
    Extension,
    check_backend,
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


class MultiStepTransform(Transform):
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
        self.n_steps = n_steps
        self.gamma = gamma
        self.reward_keys = reward_keys
        self.done_key = done_key
        self.done_keys = done_keys
        self.mask_key = mask_key
        self.backend = backend
        self._carry: Frames | None = None

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
        self._mask_key = "mask" if value is None else _check_key("mask_key", value)

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
        done, mask = _path("next", self._done_key), _path(self._mask_key)
        rewards = [_path("next", key) for key in self._reward_keys]
        as_they_came = {done, *rewards, *(_path("next", key) for key in self._done_keys)}
        written = {*ROOT_PATHS, *map(_original, rewards)} - {mask, *as_they_came}
        if len(rewards) == 1:
            written.add(ORIGINAL_REWARD_PATH)
        data, carry = Frames.read(tensordict, without=written), self._carry
        _check_entries(data, done, mask, rewards)
        if carry is not None:
            data.follow(carry)
        extension = n_step_extend(
            None if carry is None else carry.leaves,
            data.leaves,
            time_dim=tensordict.ndim - 1,
            reward_keys=rewards,
            gathered_keys={path for path in data.leaves if path[0] == "next" and path not in as_they_came},
            done_key=done,
            mask_key=mask if mask in data.leaves else None,
            n_steps=self._n_steps,
            gamma=float(self._gamma),
            backend=self._backend,
        )
        emitted, held = extension.steps.shape[-1], extension.carry[done].shape[tensordict.ndim - 1]
        batch = tensordict.batch_size[:-1]
        result = data.build(_output_leaves(extension), torch.Size((*batch, emitted))) if emitted else None
        self._carry = data.hold(extension.carry, torch.Size((*batch, held))) if held else None
        return result

    def _check_emits_one_frame(self) -> None:
        held = 0 if self._carry is None else self._carry.batch_size[-1]
        if held > self._n_steps:
            raise ValueError(
                f"a single frame must find at most n_steps = {self._n_steps} frames held back, got {held}: after "
                f"n_steps was made smaller, extend with a batch of frames first, an empty one will do"
            )


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


def _check_entries(data: Frames, done: KeyPath, mask: KeyPath, rewards: Sequence[KeyPath]) -> None:
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
