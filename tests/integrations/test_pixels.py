"""Pong through torchrl's environments and buffers, frame by frame against a second emulator without torchrl.

``python -m pytest -m slow tests/integrations/test_pixels.py``
"""

from dataclasses import dataclass, field
from functools import partial

import ale_py
import gymnasium
import pytest
import torch
from torchrl.data import LazyMemmapStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.envs import (
    CatFrames,
    Compose,
    GymEnv,
    RewardSum,
    SerialEnv,
    SignTransform,
    StepCounter,
    ToTensorImage,
    TransformedEnv,
    UnaryTransform,
)

from multistep_triton import MultiStepTransform, NStepReplayBuffer

pytestmark = pytest.mark.slow

GAME, SEEDS, ACTIONS = "ALE/Pong-v5", (3, 8), 6
SKIPPED, STACKED, SIZE = 4, 4, 84
FRAMES, MAX_STEPS = 901, 800
CUTS = (1, 2, 301, 4, 97, 1, 3, 255, 237)
GAMMA = 0.99


def shrink(screens):
    """uint8 ``[..., 3, 210, 160]`` to ``[..., 1, 84, 84]``, as torchvision's that torchrl's transforms need."""
    gray = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1).mul(screens).sum(-3, keepdim=True)
    small = torch.nn.functional.adaptive_avg_pool2d(gray.flatten(0, -4), SIZE)
    return small.round().byte().view(*gray.shape[:-2], SIZE, SIZE)


def actions():
    """``[2, FRAMES]``: the first player does nothing, and loses before the second one's time is up."""
    played = torch.zeros(len(SEEDS), FRAMES, dtype=torch.int64)
    played[1] = torch.randint(ACTIONS, (FRAMES,), generator=torch.Generator().manual_seed(0))
    return played


def seeded(env, seed):
    env.set_seed(seed)
    return env


@pytest.fixture(scope="module")
def rollout():
    """What torchrl's pipeline makes of the game, ``[2, FRAMES]``, one step after the other."""
    gymnasium.register_envs(ale_py)
    make = partial(
        GymEnv, GAME, frame_skip=SKIPPED, from_pixels=True, pixels_only=True, categorical_action_encoding=True
    )
    transforms = Compose(
        SignTransform(in_keys=["reward"]),
        ToTensorImage(from_int=False, dtype=torch.uint8),
        UnaryTransform(in_keys=["pixels"], out_keys=["pixels"], fn=shrink),
        CatFrames(STACKED, dim=-3, in_keys=["pixels"]),
        RewardSum(),
        StepCounter(MAX_STEPS),
    )
    env = TransformedEnv(SerialEnv(len(SEEDS), [lambda seed=seed: seeded(make(), seed) for seed in SEEDS]), transforms)
    frames, after = [], env.reset()
    for action in actions().unbind(1):
        frame, after = env.step_and_maybe_reset(after.set("action", action))
        frames.append(frame)
    env.close()
    return torch.stack(frames, 1)


@dataclass
class Game:
    """What the emulator alone says of one environment, in order of time."""

    observations: list = field(default_factory=list)
    next_observations: list = field(default_factory=list)
    rewards: list = field(default_factory=list)
    reward_sums: list = field(default_factory=list)
    step_counts: list = field(default_factory=list)
    terminated: list = field(default_factory=list)
    truncated: list = field(default_factory=list)

    def end(self, t, n_steps):
        """The last frame of the window of frame ``t``."""
        for end in range(t, min(t + n_steps, FRAMES)):
            if self.terminated[end] or self.truncated[end]:
                break
        return end


def play(seed, played):
    """The same seed and actions in gymnasium's emulator."""
    game, env = Game(), gymnasium.make(GAME, frameskip=SKIPPED)
    env.reset(seed=seed)

    def screen(raw):
        return shrink(torch.from_numpy(raw).permute(2, 0, 1)[None])[0]

    over = True
    for action in played.tolist():
        if over:
            stack, count, total = [screen(env.reset()[0])] * STACKED, 0, 0.0
        game.observations.append(torch.cat(stack))
        raw, reward, terminated, _, _ = env.step(action)
        stack, count, total = [*stack[1:], screen(raw)], count + 1, total + reward
        over = terminated or count == MAX_STEPS
        game.next_observations.append(torch.cat(stack))
        game.rewards.append(reward)
        game.reward_sums.append(total)
        game.step_counts.append(count)
        game.terminated.append(terminated)
        game.truncated.append(count == MAX_STEPS)
    env.close()
    return game


@pytest.fixture(scope="module")
def games():
    gymnasium.register_envs(ale_py)
    played = [play(seed, own) for seed, own in zip(SEEDS, actions(), strict=True)]
    # Without these the comparison would say little.
    assert any(any(game.terminated) for game in played)
    assert any(any(game.truncated) for game in played)
    for game in played:
        moves = [not torch.equal(*pair) for pair in zip(game.observations, game.next_observations, strict=True)]
        assert sum(moves) > 0.9 * FRAMES
        assert any(game.rewards)
    return played


def assert_frames(stored, games, n_steps, done_at):
    """Compares n-step transitions ``[2, FRAMES]``: the returns within their roundings, all else exactly."""
    assert stored.shape == (len(games), FRAMES)
    assert stored["pixels"].dtype == stored["next", "pixels"].dtype == torch.uint8
    for game, row in zip(games, stored, strict=True):
        ends = [game.end(t, n_steps) for t in range(FRAMES)]
        flags_at = range(FRAMES) if done_at == "start" else ends
        done = [one or other for one, other in zip(game.terminated, game.truncated, strict=True)]
        exact = {
            "pixels": game.observations,
            ("next", "pixels"): [game.next_observations[end] for end in ends],
            ("next", "reward_orig"): game.rewards,
            ("next", "episode_reward"): [game.reward_sums[end] for end in ends],
            ("next", "step_count"): [game.step_counts[end] for end in ends],
            "step_count": [count - 1 for count in game.step_counts],
            "steps_to_next_obs": [end - t + 1 for t, end in enumerate(ends)],
            "nonterminal": [not ended for ended in done[:-1]] + [False],
            ("next", "done"): [done[at] for at in flags_at],
            ("next", "terminated"): [game.terminated[at] for at in flags_at],
            ("next", "truncated"): [game.truncated[at] for at in flags_at],
        }
        if done_at == "end":
            exact["next", "done_orig"] = done
            exact["next", "terminated_orig"] = game.terminated
            exact["next", "truncated_orig"] = game.truncated
        for key, expected in exact.items():
            values = row[key]
            wrong = [
                t for t in range(FRAMES) if not torch.equal(values[t].squeeze(), torch.as_tensor(expected[t]).squeeze())
            ]
            assert not wrong, f"{key} differs in {len(wrong)} frames, first at t = {wrong[0]}"
        for t, end in enumerate(ends):
            terms = [GAMMA**i * reward for i, reward in enumerate(game.rewards[t : end + 1])]
            bound = 1.5 * n_steps * torch.finfo(torch.float32).eps * sum(map(abs, terms))
            assert abs(row["next", "reward"][t].item() - sum(terms)) <= bound, t
            assert row["gamma"][t].item() == torch.tensor(GAMMA ** (end - t + 1)).item(), t


CASES = pytest.mark.parametrize(("n_steps", "done_at"), [(3, "start"), (3, "end"), (5, "start"), (5, "end")])


def memmap(folder):
    return LazyMemmapStorage(len(SEEDS) * FRAMES, scratch_dir=folder, ndim=2)


@CASES
def test_what_a_memmap_stores_is_what_the_emulator_shows(rollout, games, tmp_path, n_steps, done_at):
    def make_buffer(folder):
        transform = MultiStepTransform(n_steps, GAMMA, done_at=done_at)
        return transform, ReplayBuffer(storage=memmap(tmp_path / folder), transform=transform)

    transform, rb = make_buffer("frames")
    for part in rollout.split(CUTS, 1):
        rb.extend(part)
    assert len(rb) == len(SEEDS) * (FRAMES - n_steps)
    rb.dumps(tmp_path / "saved")
    loaded_transform, loaded = make_buffer("loaded")
    loaded.loads(tmp_path / "saved")
    transform.flush_into(rb)
    assert_frames(rb[:], games, n_steps, done_at)
    loaded_transform.flush_into(loaded)
    assert_frames(loaded[:], games, n_steps, done_at)


@CASES
def test_what_is_sampled_from_a_memmap_is_what_the_emulator_shows(rollout, games, tmp_path, n_steps, done_at):
    def make_buffer(folder):
        sampler = SamplerWithoutReplacement()
        arguments = {"n_steps": n_steps, "gamma": GAMMA, "done_at": done_at, "batch_size": 17}
        return NStepReplayBuffer(storage=memmap(tmp_path / folder), sampler=sampler, **arguments)

    def sampled(rb):
        """Every stored frame, where it lies."""
        batches = [rb.sample() for _ in range(len(SEEDS) * FRAMES // 17)]
        frames = torch.cat(batches)
        time, row = frames["index"].unbind(-1)
        order = (row * FRAMES + time).argsort()
        return frames[order].view(len(SEEDS), FRAMES)

    rb = make_buffer("frames")
    for part in rollout.split(CUTS, 1):
        rb.extend(part)
    rb.dumps(tmp_path / "saved")
    assert_frames(sampled(rb), games, n_steps, done_at)
    loaded = make_buffer("loaded")
    loaded.loads(tmp_path / "saved")
    assert_frames(sampled(loaded), games, n_steps, done_at)
