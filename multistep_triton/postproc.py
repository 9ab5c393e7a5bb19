"""MultiStep: turns rollouts into n-step transitions as a collector's postproc.

May import ``base`` and what it may, and ``backends``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import nn

from multistep_triton.arguments import DoneAt
from multistep_triton.backends import Backend
from multistep_triton.base import MultiStepBase
from multistep_triton.roles import MASK_PATH


class MultiStep(MultiStepBase, nn.Module):
    """Turns the 1-step transitions of a rollout into n-step transitions, and holds back no frames.

    A drop-in replacement for ``torchrl.data.postprocs.MultiStep``, for ``Collector(postproc=...)``. It makes the same
    windows and writes the same entries as :class:`MultiStepTransform`, but every call stands for itself: it emits all
    ``T`` frames and cuts windows at the last one, which is not ``nonterminal``. Prefer the transform in a replay buffer
    where you can use it: the last ``n - 1`` frames of every rollout have shorter windows here.

    Entries that do not change (root entries, rewards and done flags as they came) are the input's own tensors, not
    copies; the input is not modified.

    Args:
        gamma: discount per step, a finite number in [0, 1].
        n_steps: frames in a full window, an int >= 1.

    Keyword Args:
        mask_key: as for :class:`MultiStepTransform`. Defaults to ``("collector", "mask")``, which collectors write with
            ``split_trajs=True``.
        reward_keys: as for :class:`MultiStepTransform`, and so are the others, with the same defaults.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: as for :class:`MultiStepTransform`.

    Notes:
        Differences from torchrl's class: those of :class:`MultiStepTransform`; and the mask ends windows.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> frames = TensorDict({
        ...     "observation": torch.arange(4),
        ...     "next": {
        ...         "observation": torch.arange(1, 5),
        ...         "reward": torch.ones(4, 1),
        ...         "done": torch.tensor([False, True, False, False]).unsqueeze(-1),
        ...     },
        ... }, batch_size=[4])
        >>> out = MultiStep(gamma=0.5, n_steps=2)(frames)
        >>> out["next", "reward"].squeeze(-1), out["next", "observation"], out["nonterminal"]
        (tensor([1.5000, 1.0000, 1.5000, 1.0000]), tensor([2, 2, 4, 4]), tensor([ True, False,  True, False]))
    """

    DEFAULT_MASK_KEY = MASK_PATH

    def __init__(
        self,
        gamma: float,
        n_steps: int,
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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # torchrl's class saves the powers of its gamma, which replace those of the module that loads them.
        powers = torch.tensor([float(self._gamma) ** k for k in range(self._n_steps + 1)])
        saved = state_dict.pop(f"{prefix}gammas", powers).flatten()
        if saved.shape != powers.shape or not torch.allclose(saved, powers.to(saved)):
            raise ValueError(
                f"n_steps and gamma must be those of the module that was saved, whose powers of gamma are "
                f"{saved.tolist()}, got n_steps={self._n_steps} and gamma={self._gamma}"
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Computes the n-step transitions ``[*B, T]`` of the frames ``[*B, T]`` in ``tensordict``."""
        is_tensordict = isinstance(tensordict, TensorDictBase)
        if not is_tensordict or not tensordict.ndim:
            got = "batch size []" if is_tensordict else f"{tensordict!r:.100}"
            raise ValueError(f"data must be a TensorDict of batch size [*B, T], got {got}")
        return self._n_step(tensordict, None, hold=False)[0]
