"""The example in the style of FastTD3: its pendulum is Gymnasium's, its targets are right, and its buffers agree."""

import argparse
import math
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pandas as pd
import pytest
import td3_gpu_style
import torch
from pendulum import MAX_STEPS, MAX_TORQUE, PendulumEnv
from tensordict import TensorDict
from torchrl.data import SamplerWithoutReplacement
from torchrl.envs import check_env_specs
from torchrl.objectives import SoftUpdate

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMITTED = EXAMPLES / "results" / td3_gpu_style.RESULT
COLUMNS = [
    "buffer",
    "env_steps_per_s",
    "buffer_share",
    "extend_share",
    "sample_share",
    "environment_share",
    "act_share",
    "update_share",
    "other_share",
    *(f"{part}_host_us" for part in td3_gpu_style.PARTS),
    "first_return",
    "final_return",
]
SHARES = [name for name in COLUMNS if name.endswith("_share") and name != "buffer_share"]


def step(env, action):
    return env.step(TensorDict({"action": action}, env.batch_size))["next"]


def test_trajectories_are_gymnasiums():
    env = PendulumEnv(8, seed=0, dtype=torch.float64)
    env.reset()
    # Some begin at the largest speed, or beyond half a turn.
    env.speed[:2] = torch.tensor([8.0, -8.0])
    env.angle[2:4] = torch.tensor([9.0, -9.0])
    theirs = [gymnasium.make("Pendulum-v1") for _ in range(8)]
    for one, state in zip(theirs, torch.stack([env.angle, env.speed], -1), strict=True):
        one.reset(seed=0)
        one.unwrapped.state = state.numpy().copy()
    generator = torch.Generator().manual_seed(0)
    for _ in range(MAX_STEPS):
        # Some torques are beyond the bounds.
        action = 1.5 * MAX_TORQUE * (2 * torch.rand(8, 1, dtype=torch.float64, generator=generator) - 1)
        ours = step(env, action)
        for i, one in enumerate(theirs):
            observation, reward, terminated, truncated, _ = one.step(action[i].numpy())
            np.testing.assert_allclose(ours["observation"][i].numpy(), observation, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(ours["reward"][i].item(), reward, rtol=1e-9, atol=1e-9)
            assert (ours["terminated"][i].item(), ours["truncated"][i].item()) == (terminated, truncated)
    assert truncated


def test_a_step_by_hand():
    env = PendulumEnv(1)
    env.angle, env.speed = torch.tensor([math.pi / 2]), torch.tensor([1.0])
    after = step(env, torch.tensor([[2.0]]))
    # 1 + (15 sin(pi / 2) + 3 * 2) * 0.05 = 2.05
    torch.testing.assert_close(env.speed, torch.tensor([2.05]))
    torch.testing.assert_close(env.angle, torch.tensor([math.pi / 2 + 2.05 * 0.05]))
    torch.testing.assert_close(after["reward"].item(), -(math.pi**2 / 4 + 0.1 + 0.004), rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [{}, {"staggered": True, "max_steps": 3}, {"dtype": torch.float64}], ids=str)
def test_specs(options):
    check_env_specs(PendulumEnv(5, seed=0, **options))


def test_a_reset_of_some_leaves_the_others():
    env = PendulumEnv(4, seed=0)
    state = step(env, env.reset()["observation"][:, :1])
    before = env.angle, env.speed, env.steps
    chosen = torch.tensor([[True], [False], [True], [False]])
    after = env.reset(state.clone().set("_reset", chosen))
    chosen = chosen.squeeze(-1)
    for old, new in zip(before, (env.angle, env.speed, env.steps), strict=True):
        assert (new == old).tolist() == (~chosen).tolist()
    assert env.steps.tolist() == [0, 1, 0, 1]
    assert (after["observation"] == state["observation"]).all(-1).tolist() == (~chosen).tolist()


def test_resets_are_within_gymnasiums_bounds_and_seeded():
    env = PendulumEnv(10_000, seed=3)
    first = env.reset()["observation"]
    assert 3.1 < env.angle.abs().max() <= math.pi
    assert 0.99 < env.speed.abs().max() <= 1
    assert not torch.equal(env.reset()["observation"], first)
    assert torch.equal(PendulumEnv(10_000, seed=3).reset()["observation"], first)


def rollout(env, frames):
    state, out = env.reset(), []
    for _ in range(frames):
        frame, state = env.step_and_maybe_reset(state.set("action", env.action_spec.rand()))
        out.append(frame)
    return torch.stack(out, -1)


def test_the_time_limit_truncates():
    data = rollout(PendulumEnv(3, max_steps=4, seed=0), 9)
    ends = [False, False, False, True] * 2 + [False]
    for key, expected in {"done": ends, "truncated": ends, "terminated": [False] * 9}.items():
        assert data["next", key].squeeze(-1).tolist() == [expected] * 3
    goes_on = (data["observation"][:, 1:] == data["next", "observation"][:, :-1]).all(-1)
    assert goes_on.tolist() == [[not end for end in ends[:-1]]] * 3


def test_staggered_environments_reach_their_limits_apart():
    ends = rollout(PendulumEnv(100, max_steps=10, staggered=True, seed=0), 20)["next", "done"].squeeze(-1)
    assert torch.equal(ends[:, :10], ends[:, 10:])
    assert (ends[:, :10].sum(1) == 1).all()
    assert (ends[:, :10].sum(0) > 0).all()


def options(envs, batch_size, **others):
    defaults = {"n_steps": 3, "gamma": 0.9, "backend": "reference", "device": torch.device("cpu"), "graph": False}
    return argparse.Namespace(envs=envs, batch_size=batch_size, **defaults | others)


def sampled(when, stream):
    """All that a buffer holds, after it was extended frame by frame; by environment and frame."""
    envs, frames = stream.batch_size
    buffer = td3_gpu_style.make_buffer(when, options(envs, envs))
    for t in range(frames):
        buffer.extend(stream[:, t : t + 1])
    buffer.set_sampler(SamplerWithoutReplacement(shuffle=False))
    count = len(buffer)
    out = torch.cat([buffer.sample() for _ in range(count // envs)])
    assert len(out) == count
    return out[out["number"].argsort()].reshape(envs, -1)


@pytest.fixture
def stream():
    torch.manual_seed(0)
    data = rollout(PendulumEnv(6, max_steps=5, staggered=True, seed=0), 23)
    # Which flag an episode ends with matters to a target; a pendulum has only one of them.
    failed = data["next", "done"] & (torch.rand(6, 23, 1) < 0.5)
    data["next", "terminated"] = failed
    data["next", "truncated"] &= ~failed
    assert failed.any() and data["next", "truncated"].any()
    return data.select(*td3_gpu_style.STORED).set("number", torch.arange(6 * 23).view(6, 23))


def test_both_buffers_hold_the_same_transitions(stream):
    late, early = (sampled(when, stream) for when in td3_gpu_style.BUFFERS)
    # The transform holds back the last three frames; their windows end at the newest frame when they are sampled.
    assert (late.shape, early.shape) == ((6, 23), (6, 20))
    late = late[:, :20]
    keys = set(early.keys(True, True))
    assert {("next", "reward"), ("next", "observation"), ("next", "terminated"), "steps_to_next_obs", "gamma"} < keys
    assert keys - {"index"} == set(late.keys(True, True)) - {"index"}
    for key in keys - {"index"}:
        assert torch.equal(late[key], early[key]), key


@pytest.mark.parametrize("when", td3_gpu_style.BUFFERS)
@pytest.mark.parametrize(
    ("ends_with", "around_the_end"), [("truncated", [75.61, 82.9, 91.0]), ("terminated", [2.71, 1.9, 1.0])]
)
def test_targets_by_hand(when, ends_with, around_the_end):
    # Rewards of 1, gamma 0.9, n = 3, a critic that says 100; the episode ends at t = 4. A whole window's target is
    # 1 + .9 + .81 + .729 * 100; one that is cut bootstraps after fewer steps, or not at all.
    frames = 12
    end = (torch.arange(frames) == 4).view(1, frames, 1)
    no = torch.zeros_like(end)
    flags = {"done": end, "terminated": no, "truncated": no} | {ends_with: end}
    data = TensorDict(
        {
            "observation": torch.randn(1, frames, 3),
            "action": torch.randn(1, frames, 1),
            "number": torch.arange(frames).view(1, frames),
            "next": {"observation": torch.randn(1, frames, 3), "reward": torch.ones(1, frames, 1), **flags},
        },
        [1, frames],
    )
    _, loss = td3_gpu_style.make_loss(0.9, torch.device("cpu"))
    SoftUpdate(loss, tau=0.5)  # without one, the loss warns
    for name, parameter in loss.target_qvalue_network_params.items(True, True):
        last = parameter.shape[-1:] == (1,) and name[-1] == "bias"
        parameter.data.fill_(100.0 if last else 0.0)
    batch = sampled(when, data)[0, :9]
    _, out = loss.value_loss(batch)
    assert (out["next_state_value"] == 100).all()
    expected = [75.61, 75.61, *around_the_end, *[75.61] * 4]
    torch.testing.assert_close(out["target_value"], torch.tensor(expected))


def read(path):
    rows = pd.read_csv(path, comment="#")
    assert list(rows.columns) == COLUMNS
    np.testing.assert_allclose(rows[SHARES].sum(axis=1), 1, atol=1e-3)
    np.testing.assert_allclose(rows["extend_share"] + rows["sample_share"], rows["buffer_share"], rtol=2e-3)
    assert (rows[[*SHARES, "env_steps_per_s"]] > 0).all(axis=None)
    return rows.set_index("buffer")


def test_the_script_writes_a_row_per_buffer(tmp_path):
    command = ["--buffer", "both", "--envs", "8", "--steps", "40", "--batch-size", "16", "--updates", "1"]
    command += ["--out", str(tmp_path / "new")]
    script = EXAMPLES / "td3_gpu_style.py"
    # Threads that share a core with those of other tests spend their time waiting for one another.
    result = subprocess.run(
        [sys.executable, script, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    path = tmp_path / "new" / td3_gpu_style.RESULT
    assert list(read(path).index) == ["sample", "extend"]
    machine, versions, asked, excluded = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert f"torch {torch.__version__}" in versions
    assert "envs 8, steps 40" in asked
    assert "13 steps before the first update, 10 to warm up, and evaluation" in excluded
    for text in (machine, versions, asked, excluded):
        assert text.removeprefix("# ") in result.stdout


def test_the_committed_run_learned():
    rows = read(COMMITTED)
    assert list(rows.index) == ["sample", "extend"]
    assert (rows["first_return"] < -1000).all()
    assert (rows["final_return"] > -400).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--envs", "0"], "envs must be an int in [1, 2**31), got 0"),
        (["--seed", "-1"], "seed must be an int in [0, 2**31), got -1"),
        (["--steps", "23"], "steps must be more than 23, which are not timed, got 23"),
        (["--gamma", "2"], "gamma must be a finite number in [0, 1], got 2.0"),
        (["--backend", "cuda"], "backend must be one of 'auto', 'reference', 'triton', 'verify', got 'cuda'"),
        (["--device", "abacus"], "device string: abacus"),
        (["--device", "meta"], "meta tensor"),
        (["--device", "cpu", "--graph"], "graph needs a CUDA device, got cpu"),
        (["--out", "/dev/null/x"], "/dev/null"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        td3_gpu_style.main(arguments)
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
