"""What MultiStepTransform, MultiStep and NStepReplayBuffer are told: their arguments, checked when they are set.

Owns their defaults and their rules. May import ``checks``, ``backends`` and ``roles``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict import NestedKey

from multistep_triton.backends import check_backend
from multistep_triton.checks import check_bool, check_choice, check_gamma, check_positive_int
from multistep_triton.roles import DEFAULT_DONE_KEYS, DEFAULT_MASK_KEY, DEFAULT_REWARD_KEYS, check_key, key_list

DONE_AT = ("start", "end")


class Arguments:
    """The arguments, each of which can be set at any time."""

    DEFAULT_MASK_KEY: NestedKey = DEFAULT_MASK_KEY

    _n_steps: Any

    def _set_arguments(
        self,
        n_steps: int | tuple[int, int],
        gamma: float,
        reward_keys: Sequence[NestedKey] | None,
        done_key: NestedKey | None,
        done_keys: Sequence[NestedKey] | None,
        mask_key: NestedKey | None,
        backend: str,
        done_at: str,
        traj_key: NestedKey | None,
        match_reward_shape: bool,
    ) -> None:
        self.n_steps = n_steps  # type: ignore[assignment]
        self.gamma = gamma
        self.reward_keys = reward_keys
        self.done_key = done_key
        self.done_keys = done_keys
        self.mask_key = mask_key
        self.backend = backend
        self.done_at = done_at
        self.traj_key = traj_key
        self.match_reward_shape = match_reward_shape

    @property
    def n_steps(self) -> int:
        """Frames in a full window.

        Example:
            >>> import torch
            >>> from tensordict import TensorDict
            >>> frames = TensorDict({"next": {"reward": torch.ones(4), "done": torch.zeros(4, dtype=torch.bool)}}, [4])
            >>> transform = MultiStepTransform(n_steps=3, gamma=1.0)
            >>> transform.inv(frames)["next", "reward"]  # the last 3 are held back
            tensor([3.])
            >>> transform.n_steps = 2
            >>> transform.inv(frames)["next", "reward"]  # 3 held back and 4 new ones, of which 2 are held back
            tensor([2., 2., 2., 2., 2.])
        """
        steps: int = self._n_steps
        return steps

    @n_steps.setter
    def n_steps(self, value: int) -> None:
        self._n_steps = check_positive_int("n_steps", value)

    @property
    def gamma(self) -> float:
        """Discount per step.

        Example:
            >>> import torch
            >>> from tensordict import TensorDict
            >>> frames = TensorDict({"next": {"reward": torch.ones(3), "done": torch.zeros(3, dtype=torch.bool)}}, [3])
            >>> multi_step = MultiStep(gamma=1.0, n_steps=2)
            >>> multi_step(frames)["next", "reward"]
            tensor([2., 2., 1.])
            >>> multi_step.gamma = 0.5
            >>> multi_step(frames)["next", "reward"]
            tensor([1.5000, 1.5000, 1.0000])
        """
        return self._gamma

    @gamma.setter
    def gamma(self, value: float) -> None:
        self._gamma = check_gamma(value)

    @property
    def backend(self) -> str:
        """The backend asked for.

        Example:
            >>> transform = MultiStepTransform(n_steps=3, gamma=0.99)
            >>> transform.backend
            'auto'
            >>> transform.backend = "reference"
            >>> transform.backend
            'reference'
        """
        return self._backend

    @backend.setter
    def backend(self, value: str) -> None:
        self._backend = check_backend(value)

    @property
    def reward_keys(self) -> Sequence[NestedKey]:
        """Reward keys under ``"next"``.

        Example:
            >>> import torch
            >>> from tensordict import TensorDict
            >>> score, cost, done = torch.ones(3), torch.full((3,), 10.0), torch.zeros(3, dtype=torch.bool)
            >>> frames = TensorDict({"next": {"score": score, "cost": cost, "done": done}}, [3])
            >>> multi_step = MultiStep(gamma=1.0, n_steps=2)
            >>> multi_step.reward_keys = ["score", "cost"]
            >>> out = multi_step(frames)["next"]
            >>> out["score"], out["cost"], out["cost_orig"]
            (tensor([2., 2., 1.]), tensor([20., 20., 10.]), tensor([10., 10., 10.]))
        """
        return self._reward_keys

    @reward_keys.setter
    def reward_keys(self, value: Sequence[NestedKey] | None) -> None:
        self._reward_keys = key_list("reward_keys", value, DEFAULT_REWARD_KEYS)

    @property
    def done_key(self) -> NestedKey:
        """The done flag under ``"next"`` that ends trajectories.

        Example:
            >>> import torch
            >>> from tensordict import TensorDict
            >>> flag = torch.tensor([False, True, False])
            >>> frames = TensorDict({"next": {"reward": torch.ones(3), "life_lost": flag}}, [3])
            >>> multi_step = MultiStep(gamma=1.0, n_steps=3)
            >>> multi_step.done_key = "life_lost"
            >>> multi_step(frames)["next", "reward"]
            tensor([2., 1., 1.])
        """
        return self._done_key

    @done_key.setter
    def done_key(self, value: NestedKey | None) -> None:
        self._done_key = "done" if value is None else check_key("done_key", value)

    @property
    def done_keys(self) -> Sequence[NestedKey]:
        """Done flags under ``"next"``: ``done_at`` says of which frame they are.

        Example:
            >>> import torch
            >>> from tensordict import TensorDict
            >>> flag = torch.tensor([False, False, True])
            >>> frames = TensorDict({"next": {"reward": torch.ones(3), "done": flag, "life_lost": flag}}, [3])
            >>> multi_step = MultiStep(gamma=1.0, n_steps=2)
            >>> multi_step(frames)["next", "life_lost"]  # an entry like any other, of the window's end
            tensor([False,  True,  True])
            >>> multi_step.done_keys = ["done", "life_lost"]
            >>> multi_step(frames)["next", "life_lost"]  # as done_at="start" has it
            tensor([False, False,  True])
        """
        return self._done_keys

    @done_keys.setter
    def done_keys(self, value: Sequence[NestedKey] | None) -> None:
        self._done_keys = key_list("done_keys", value, DEFAULT_DONE_KEYS)

    @property
    def mask_key(self) -> NestedKey:
        """Root entry that is False where a frame is padding.

        Example:
            >>> import torch
            >>> from tensordict import TensorDict
            >>> next_ = {"reward": torch.ones(3), "done": torch.zeros(3, dtype=torch.bool)}
            >>> frames = TensorDict({"valid": torch.tensor([True, True, False]), "next": next_}, [3])
            >>> multi_step = MultiStep(gamma=1.0, n_steps=3)
            >>> multi_step.mask_key = "valid"
            >>> multi_step(frames)["next", "reward"]
            tensor([2., 1., 1.])
        """
        return self._mask_key

    @mask_key.setter
    def mask_key(self, value: NestedKey | None) -> None:
        self._mask_key = self.DEFAULT_MASK_KEY if value is None else check_key("mask_key", value)

    @property
    def traj_key(self) -> NestedKey | None:
        """Entry of trajectory ids, a change of which is a boundary; None if none is looked at.

        ``"auto"`` is ``("collector", "traj_ids")``, where torchrl's collectors write ids and its samplers look for
        them, if it is in the data.

        Example:
            >>> import torch
            >>> from tensordict import TensorDict
            >>> next_ = {"reward": torch.ones(4), "done": torch.zeros(4, dtype=torch.bool)}
            >>> frames = TensorDict({"traj_ids": torch.tensor([7, 7, 8, 8]), "next": next_}, [4])
            >>> multi_step = MultiStep(gamma=1.0, n_steps=3)
            >>> multi_step.traj_key = "traj_ids"
            >>> multi_step(frames)["next", "reward"]
            tensor([2., 1., 2., 1.])
        """
        return self._traj_key

    @traj_key.setter
    def traj_key(self, value: NestedKey | None) -> None:
        self._traj_key = None if value is None else check_key("traj_key", value)

    @property
    def done_at(self) -> str:
        """The frame that done keys are of: the window's ``"start"`` or its ``"end"``.

        Example:
            >>> import torch
            >>> from tensordict import TensorDict
            >>> done = torch.tensor([False, False, True])
            >>> frames = TensorDict({"next": {"reward": torch.ones(3), "done": done}}, [3])
            >>> multi_step = MultiStep(gamma=1.0, n_steps=2)
            >>> multi_step(frames)["next", "done"]  # of the frame itself
            tensor([False, False,  True])
            >>> multi_step.done_at = "end"
            >>> multi_step(frames)["next", "done"]
            tensor([False,  True,  True])
        """
        return self._done_at

    @done_at.setter
    def done_at(self, value: str) -> None:
        self._done_at = check_choice("done_at", value, DONE_AT)

    @property
    def match_reward_shape(self) -> bool:
        """Whether ``steps_to_next_obs``, ``gamma`` and ``nonterminal`` have the shape of the first reward.

        Example:
            >>> import torch
            >>> from tensordict import TensorDict
            >>> done = torch.zeros(3, 1, dtype=torch.bool)
            >>> frames = TensorDict({"next": {"reward": torch.ones(3, 1), "done": done}}, [3])
            >>> multi_step = MultiStep(gamma=1.0, n_steps=2)
            >>> multi_step(frames)["steps_to_next_obs"].shape
            torch.Size([3])
            >>> multi_step.match_reward_shape = True
            >>> multi_step(frames)["steps_to_next_obs"].shape
            torch.Size([3, 1])
        """
        return self._match_reward_shape

    @match_reward_shape.setter
    def match_reward_shape(self, value: bool) -> None:
        self._match_reward_shape = check_bool("match_reward_shape", value)
