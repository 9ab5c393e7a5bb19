"""The buffer with FastTD3's interface: every frame that it samples is what a loop over the stream makes of it."""

import pytest
import torch
from fasttd3_buffer import SimpleReplayBuffer
from tensordict import TensorDict

ENVS, SLOTS, FRAMES = 3, 8, 21
N_OBS, N_ACT, N_CRITIC = 3, 2, 5
GAMMA = 0.5  # with rewards that are small integers, sums are exact
MODES = {
    "symmetric": {},
    "symmetric playground": {"playground_mode": True},
    "asymmetric": {"asymmetric_obs": True},
    "playground": {"asymmetric_obs": True, "playground_mode": True},
}
PAIRED = ("observations", "critic_observations")


@pytest.fixture(params=[True, False], ids=["compact", "twice"])
def make(request):
    """A buffer of small sizes."""

    def make_buffer(mode="symmetric", **options):
        sizes = {"n_env": ENVS, "buffer_size": SLOTS, "n_obs": N_OBS, "n_act": N_ACT, "n_critic_obs": N_CRITIC}
        kept = {"compact": request.param, "end_slots": SLOTS if request.param else None}
        return SimpleReplayBuffer(**sizes | {"gamma": GAMMA} | MODES[mode] | options | kept)

    return make_buffer


def make_stream(seed=0, p=0.12):
    """A stream ``[FRAMES, ENVS]`` as a training script makes it: flags are integers, and all observations differ."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.rand(FRAMES, ENVS, generator=generator)
    terminated, limit, truncated = kind < p, (p <= kind) & (kind < 2 * p), (2 * p <= kind) & (kind < 3 * p)
    ends = terminated | limit | truncated
    numbers = torch.arange((FRAMES + 1) * ENVS * N_CRITIC, dtype=torch.float).view(FRAMES + 1, ENVS, N_CRITIC)
    # What follows the last step of an episode is not what the next one begins with.
    after = torch.where(ends.unsqueeze(-1), -numbers[1:], numbers[1:])
    return TensorDict(
        {
            "observations": numbers[:-1, :, :N_OBS],
            "critic_observations": numbers[:-1],
            "actions": torch.randn(FRAMES, ENVS, N_ACT, generator=generator),
            "next": {
                "observations": after[..., :N_OBS],
                "critic_observations": after,
                "rewards": torch.randint(-8, 8, (FRAMES, ENVS), generator=generator).float(),
                "dones": (terminated | limit).long(),
                "truncations": (limit | truncated).long(),
            },
        },
        [FRAMES, ENVS],
    )


def expected_of(stream, frame, env, newest, n_steps):
    """What is sampled of a frame, in a loop."""
    flags, then = stream["next"], frame
    total, steps = 0.0, 0
    while True:
        total += GAMMA**steps * flags["rewards"][then, env].item()
        steps += 1
        if flags["dones"][then, env] or flags["truncations"][then, env] or then == newest or steps == n_steps:
            break
        then += 1
    first, last = stream[frame, env], stream[then, env]["next"]
    scalars = {
        "rewards": torch.tensor(total),
        "effective_n_steps": torch.tensor(steps, dtype=torch.long if n_steps == 1 else torch.float),
    }
    return TensorDict({**first, "next": {**last, **scalars}}, [])


def every_frame(sampled, stream, newest):
    """The environment and the frame of each row of a sample, which must hold all that are stored, and no other."""
    place = sampled["observations"][:, 0].long() // N_CRITIC
    frames, envs = place // ENVS, place % ENVS
    seen = {*zip(frames.tolist(), envs.tolist(), strict=True)}
    assert seen == {(frame, env) for frame in range(max(newest + 1 - SLOTS, 0), newest + 1) for env in range(ENVS)}
    return frames.tolist(), envs.tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n_steps", [1, 3, 8])
def test_every_frame_is_what_a_loop_makes_of_it(make, n_steps, mode):
    torch.manual_seed(0)
    rb, stream = make(mode, n_steps=n_steps), make_stream(seed=n_steps)
    assert {(0, 0), (1, 0), (1, 1), (0, 1)} == {
        *zip(*(stream["next", key].flatten().tolist() for key in ("dones", "truncations")), strict=True)
    }
    if not MODES[mode].get("asymmetric_obs"):
        stream = stream.exclude("critic_observations", ("next", "critic_observations"))
    for newest in range(FRAMES):  # partly full, full and over again
        assert rb.extend(stream[newest]) is None
        live = min(newest + 1, SLOTS)
        sampled = rb.sample(20 * live)
        assert sampled.batch_size == (ENVS * 20 * live,)
        frames, envs = every_frame(sampled, stream, newest)
        once = {at: expected_of(stream, *at, newest, n_steps) for at in {*zip(frames, envs, strict=True)}}
        expected = torch.stack([once[at] for at in zip(frames, envs, strict=True)])
        assert {*sampled.keys(True, True)} == {*expected.keys(True, True)}
        for key, value in expected.items(True, True):
            torch.testing.assert_close(sampled[key], value, rtol=0, atol=0, msg=str(key))


def test_newest_frames_by_hand(make):
    # Frames 4 .. 11 lie in the ring; the rewards are powers of two, whose sum says which ones they are.
    rb = make(n_env=1, n_obs=1, n_act=1, n_steps=3, gamma=1.0)
    for t in range(12):
        frame = {"observations": torch.tensor([[float(t)]]), "actions": torch.zeros(1, 1)}
        flag = torch.zeros(1, dtype=torch.long)
        after = {"observations": torch.tensor([[t + 1.0]]), "rewards": torch.tensor([2.0**t])}
        rb.extend(TensorDict({**frame, "next": {**after, "dones": flag, "truncations": flag}}, [1]))
    sampled = rb.sample(200)
    for t, rewards, after, steps in [(4, 16 + 32 + 64, 7, 3), (10, 1024 + 2048, 12, 2), (11, 2048, 12, 1)]:
        row = sampled[sampled["observations"][:, 0] == t]["next"][0]
        assert (row["rewards"], row["observations"], row["effective_n_steps"]) == (rewards, after, steps)
        assert (row["dones"], row["truncations"]) == (0, 0)


@pytest.mark.parametrize("mode", MODES)
def test_of_observations_what_is_needed_is_stored(make, mode):
    rb, stream = make(mode), make_stream()
    rb.extend(stream[0])
    stored = {key: rb.buffer[:][key].shape[-1] for key in rb.buffer[:].keys() if "observations" in key}  # noqa: SIM118
    critics = {"asymmetric": {"critic_observations": N_CRITIC}, "playground": {"privileged_observations": 2}}
    assert stored == {"observations": N_OBS, **critics.get(mode, {})}


def test_other_dtypes_are_stored_as_the_originals(make):
    rb, stream = make(), make_stream()
    other = stream[0].to(torch.float64)
    other["next", "dones"], other["next", "truncations"] = stream[0]["next", "dones"].bool(), torch.ones(ENVS)
    rb.extend(other)
    sampled = rb.sample(4)
    dtypes = {value.dtype for key, value in sampled.items(True, True)}
    assert dtypes == {torch.float, torch.long}
    assert sampled["next", "truncations"].tolist() == [1] * 4 * ENVS


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("actions", r"actions must be of shape \[3, 2\], got \[3, 1\]"),
        (("next", "rewards"), r"\('next', 'rewards'\) must be of shape \[3\], got \[3, 1\]"),
        (("next", "critic_observations"), r"must be of shape \[3, 5\], got \[3, 1\]"),
    ],
)
def test_another_shape_is_an_error(make, key, message):
    with pytest.raises(ValueError, match=message):
        make("asymmetric").extend(make_stream()[0].set(key, torch.zeros(ENVS, 1)))
