"""The replay buffer of FastTD3 and holosoma, on top of ``NStepReplayBuffer``.

Usage: lay this file beside the training script, and import ``SimpleReplayBuffer`` from ``fasttd3_buffer`` instead of
from ``fast_td3_utils`` (FastTD3, https://github.com/younggyoseo/FastTD3) or ``fast_sac_utils`` (holosoma,
https://github.com/amazon-far/holosoma, whose critics have observations of their own: add ``asymmetric_obs=True``).
Constructor, ``extend`` and ``sample`` are the same, and so are entries, shapes and dtypes of a sample; what a script
makes of a sample stays as it is.

With ``n_steps=1`` the transitions are the same, too, as long as ``compact`` has rows for all ends (``end_slots``; while
episodes are short, one for every 16 slots may be few, and dones are then sampled more rarely). With more, windows are
exact here. Measured of FastTD3's buffer (commit 229ed59) and of holosoma's (fc600e7), which agree, with n_steps=3 and 8
slots per environment; numbers are those of frames, "sum" says whose rewards are summed, and "next of" whose next
observations are sampled:

+-----------------------+-----------------------------------------------+-------------------------------------------+
| stored                | sampled by the original                       | sampled here                              |
+=======================+===============================================+===========================================+
| 4 .. 11 (full),       | 10: sum 10, 11, 4; 3 steps; next of 11        | 10: sum 10, 11; 2 steps; next of 11       |
| no flag set           | 11: sum 11, 4, 5; 3 steps; next of 11         | 11: sum 11; 1 step; next of 11            |
|                       | 9, 10 and 11: truncated                       | 9, 10 and 11: not truncated               |
+-----------------------+-----------------------------------------------+-------------------------------------------+
| 5 .. 12 (full), the   | 10, 11 and 12: done, not truncated            | 10, 11 and 12: done and truncated         |
| last done, truncated  |                                               |                                           |
+-----------------------+-----------------------------------------------+-------------------------------------------+
| 0 .. 4 (not full)     | 0, 1 and 2 alone                              | all of them                               |
+-----------------------+-----------------------------------------------+-------------------------------------------+
| 0 and 1 (less than n) | 0 alone: sum 0, 1; 3 steps; next of zeros     | 0: sum 0, 1; 2 steps; next of 1           |
|                       |                                               | 1: sum 1; 1 step; next of 1               |
+-----------------------+-----------------------------------------------+-------------------------------------------+
| 4 .. 11, 8 truncated  | 7: sum 7, 8, 9; 3 steps; next of 8            | 7: sum 7, 8; 2 steps; next of 8           |
| but not done          | 8: sum 8, 9, 10; 3 steps; next of 8           | 8: sum 8; 1 step; next of 8               |
+-----------------------+-----------------------------------------------+-------------------------------------------+

- On a full ring the original sets ``truncations`` of the newest frame to "not done" while it samples. That ends next
  observations and flags there, but its rewards and number of steps end at ``dones`` alone: of the newest n - 1 frames
  they run on, over the write position, into the oldest frames, unless a ``dones`` comes before. A newest frame that
  reached a time limit, done and truncated, loses its truncation until the next frame comes, so that targets of windows
  that end there do not bootstrap.
- As long as the ring is not full, the newest n - 1 frames are not sampled, also where an episode ends among them; of
  fewer than n frames the first one alone is, with slots that were never written in its window.
- It draws ``batch_size`` frames of every environment, in the order of environments. Here frames of all environments are
  drawn alike, ``batch_size`` of each on average, and in no order.
- FastTD3's environments of Isaac Lab, and holosoma's, set ``dones`` wherever they truncate; the last row of the table
  does not happen with them.
- FastTD3's script evaluates in the environments that it trains in, but for MuJoCo Playground's, and resets them after
  that, where no flag is set. Windows run on over it, there and here; with ``compact`` the next observations of the
  frame before it are those of the reset, too. Let the script not evaluate, or set ``compact=False``.
"""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import LazyTensorStorage

from multistep_triton import NStepReplayBuffer

REWARD, DONE, TRUNCATED = ("next", "reward"), ("next", "done"), ("next", "truncated")
OBSERVATIONS, CRITIC, PRIVILEGED = "observations", "critic_observations", "privileged_observations"


class SimpleReplayBuffer:
    """A ring of ``buffer_size`` single steps of every environment, of which n-step transitions are sampled.

    Args:
        n_env: how many environments there are.
        buffer_size: slots of each, at least ``n_steps``.
        n_obs, n_act, n_critic_obs: sizes of an observation, an action and an observation of the critic.
        asymmetric_obs: whether the critic has observations of its own. Defaults to False.
        playground_mode: whether these begin with the ones of the actor, of which then only the privileged rest is
            stored; without ``asymmetric_obs`` it has no meaning. Defaults to False.
        n_steps: frames in a full window.
        gamma: discount per step.
        device: where everything lies; None is torch's default device.

    Keyword Args:
        compact: whether observations are stored once instead of twice. The next observations of a frame that is
            neither done nor truncated must then be the observations of the next one, as those of both scripts are but
            where FastTD3's evaluates. Defaults to True.
        end_slots: with ``compact``, rows for the next observations of frames that are done or truncated, per
            environment. Of more, windows end a frame earlier. Defaults to one for every 16 slots.
    """

    def __init__(
        self,
        n_env: int,
        buffer_size: int,
        n_obs: int,
        n_act: int,
        n_critic_obs: int,
        asymmetric_obs: bool = False,
        playground_mode: bool = False,
        n_steps: int = 1,
        gamma: float = 0.99,
        device: torch.device | str | None = None,
        *,
        compact: bool = True,
        end_slots: int | None = None,
    ) -> None:
        self.n_env, self.buffer_size, self.n_steps, self.gamma = n_env, buffer_size, n_steps, gamma
        self.n_obs, self.n_act, self.n_critic_obs = n_obs, n_act, n_critic_obs
        self.asymmetric_obs, self.playground_mode = asymmetric_obs, playground_mode and asymmetric_obs
        self.device = torch.get_default_device() if device is None else torch.device(device)
        observed = [OBSERVATIONS]
        if asymmetric_obs:
            observed.append(PRIVILEGED if self.playground_mode else CRITIC)
        self.buffer = NStepReplayBuffer(
            n_steps=n_steps,
            gamma=gamma,
            storage=LazyTensorStorage(n_env * buffer_size, ndim=2, device=self.device),
            outputs=[
                *observed,
                "actions",
                *(("next", key) for key in observed),
                REWARD,
                DONE,
                TRUNCATED,
                "steps_to_next_obs",
            ],
            compact=compact,
            end_slots=end_slots,
        )

    @torch.no_grad()
    def extend(self, tensor_dict: TensorDictBase) -> None:
        """Stores one frame of every environment.

        Args:
            tensor_dict: ``[n_env]``, of ``observations`` ``[n_env, n_obs]``, ``actions`` ``[n_env, n_act]`` and, under
                ``"next"``, ``observations``, ``rewards``, ``dones`` and ``truncations``, each ``[n_env]``; with
                ``asymmetric_obs`` also of ``critic_observations`` ``[n_env, n_critic_obs]``, and these under
                ``"next"``. Flags may be integers.

        Raises:
            ValueError: an entry has another shape.
        """
        entries = {
            "actions": self._read(tensor_dict, "actions", self.n_act),
            REWARD: self._read(tensor_dict, ("next", "rewards")),
            DONE: self._read(tensor_dict, ("next", "dones"), dtype=torch.bool),
            TRUNCATED: self._read(tensor_dict, ("next", "truncations"), dtype=torch.bool),
        }
        for at in ((), ("next",)):
            entries[(*at, OBSERVATIONS)] = self._read(tensor_dict, (*at, OBSERVATIONS), self.n_obs)
            if self.asymmetric_obs:
                critic = self._read(tensor_dict, (*at, CRITIC), self.n_critic_obs)
                if self.playground_mode:
                    entries[(*at, PRIVILEGED)] = critic[..., self.n_obs :]
                else:
                    entries[(*at, CRITIC)] = critic
        # One frame of each environment: [n_env, 1].
        self.buffer.extend(TensorDict(entries, batch_size=[self.n_env, 1], device=self.device))

    @torch.no_grad()
    def sample(self, batch_size: int) -> TensorDict:
        """Samples n-step transitions.

        Args:
            batch_size: how many, per environment.

        Returns:
            TensorDict ``[n_env * batch_size]`` of ``observations``, ``actions`` and, under ``"next"``, of the frame at
            the window's end ``observations``, ``dones`` and ``truncations`` (int64), and of the window ``rewards`` and
            ``effective_n_steps`` (float32, or int64 if ``n_steps`` is 1); with ``asymmetric_obs`` also of
            ``critic_observations``, which are under ``"next"``, too.
        """
        data = self.buffer.sample(self.n_env * batch_size)
        after, steps = data["next"], data["steps_to_next_obs"]
        out = TensorDict(
            {
                OBSERVATIONS: data[OBSERVATIONS],
                "actions": data["actions"],
                "next": {
                    "rewards": data[REWARD],
                    "dones": data[DONE].long(),
                    "truncations": data[TRUNCATED].long(),
                    OBSERVATIONS: after[OBSERVATIONS],
                    "effective_n_steps": steps if self.n_steps == 1 else steps.float(),
                },
            },
            batch_size=data.batch_size,
        )
        if self.asymmetric_obs:
            out[CRITIC], out["next", CRITIC] = self._critic(data), self._critic(after)
        return out

    def _read(self, frame: TensorDictBase, key: NestedKey, *sizes: int, dtype: torch.dtype = torch.float) -> Tensor:
        """An entry ``[n_env, *sizes]`` of a frame, as ``[n_env, 1, *sizes]``, as it is stored."""
        value: Tensor = frame[key]
        if value.shape != (self.n_env, *sizes):
            raise ValueError(f"{key} must be of shape {[self.n_env, *sizes]}, got {[*value.shape]}")
        return value.to(self.device, dtype).unsqueeze(1)

    def _critic(self, part: TensorDictBase) -> Tensor:
        """What the critic observes in a sample, or after it."""
        critic: Tensor = torch.cat([part[OBSERVATIONS], part[PRIVILEGED]], 1) if self.playground_mode else part[CRITIC]
        return critic
