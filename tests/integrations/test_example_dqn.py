"""The DQN example: its targets by hand, its files, its verdict, and what is committed."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Categorical
from torchrl.modules import QValueActor
from torchrl.objectives import SoftUpdate

with warnings.catch_warnings():  # what torchrl deprecates in itself
    warnings.simplefilter("ignore", DeprecationWarning)
    import dqn_cartpole as example

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "examples" / "results" / "dqn_cartpole.csv"
CPU = torch.device("cpu")
ARMS = {"n=1", "n=3, done_at=start", "n=3, done_at=end"}


def stream():
    """Twelve frames: t = 4 terminates, t = 7 truncates, the rest goes on."""
    rewards = torch.tensor([1.0, 2, 3, 4, 5, 1, 2, 3, 1, 1, 1, 1]).unsqueeze(-1)
    terminated, truncated = (torch.arange(12).unsqueeze(-1) == t for t in (4, 7))
    ends = {"terminated": terminated, "truncated": truncated, "done": terminated | truncated}
    following = {"observation": torch.zeros(12, 4), "reward": rewards, **ends}
    actions = torch.zeros(12, dtype=torch.int64)
    return TensorDict({"observation": torch.zeros(12, 4), "action": actions, "next": following}, [12])


def loss_of_constant_values(online, target, gamma):
    network = torch.nn.Linear(4, 2)
    torch.nn.init.zeros_(network.weight)
    actor = QValueActor(network, in_keys=["observation"], spec=Categorical(2))
    loss = example.make_loss(actor, gamma)
    SoftUpdate(loss, tau=0.5)
    network.bias.data = torch.tensor(online)
    loss.target_value_network_params["module", "0", "module", "bias"].data.copy_(torch.tensor(target))
    return loss


@pytest.mark.parametrize(
    ("done_at", "before_termination"),
    # 3 + .9 * 4 + .81 * 5 and 4 + .9 * 5; with "start", + .729 * 100 and + .81 * 100 of where the episode ended
    [("end", [10.65, 8.5]), ("start", [83.55, 89.5])],
)
def test_targets_by_hand(done_at, before_termination):
    data = stream()
    buffer = example.make_buffer(3, done_at, 0.9, "reference", CPU)
    for batch in data.split([3, 4, 5]):
        buffer.extend(batch)
    # The online network prefers action 1, which the target network values at 100; it values action 0 at 0.
    loss = loss_of_constant_values(online=[0.0, 1.0], target=[300.0, 100.0], gamma=0.9)
    sampled = buffer[:]
    loss(sampled)
    # 1 + 1.8 + 2.43 + 72.9, 2 + 2.7 + 3.24 + 72.9; t = 4 ends there; truncated ones bootstrap, after 3, 2 and 1 frames
    targets = [78.13, 80.84, *before_termination, 5.0, 78.13, 85.7, 93.0, 75.61]
    # The value of the action taken is 0.
    torch.testing.assert_close(sampled["td_error"].flatten().sqrt(), torch.tensor(targets))
    assert sampled["steps_to_next_obs"].tolist() == [3, 3, 3, 2, 1, 3, 2, 1, 3]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_script_writes_what_a_run_of_the_same_seed_finds(tmp_path, one_thread):
    options = ["--frames", "100", "--seeds", "1", "--jobs", "1", "--backend", "reference", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, example.__file__, *options], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    rows = example.read(tmp_path / "dqn_cartpole.csv")
    assert list(rows) == example.COLUMNS
    assert set(rows["arm"]) == ARMS
    assert rows.groupby("arm")["frames"].apply(list).tolist() == [[50, 100]] * 3
    assert all(arm in done.stdout for arm in ARMS)
    assert (tmp_path / "dqn_cartpole.png").read_bytes().startswith(b"\x89PNG")
    arm = {"arm": "n=3, done_at=end", "n_steps": 3, "done_at": "end", "seed": 0}
    again = example.run(arm, {"frames": 100, "gamma": 0.99, "backend": "reference", "device": CPU})
    assert rows[rows["arm"] == arm["arm"]]["return"].tolist() == pytest.approx([row["return"] for row in again])
    assert len({row["return"] for row in again}) > 1


def rows_of(end, start):
    """One evaluation of every seed of both arms, at 50 frames."""
    return pd.DataFrame(
        [
            (f"n=3, done_at={at}", 3, at, seed, 50, value)
            for at, values in (("end", end), ("start", start))
            for seed, value in enumerate(values)
        ],
        columns=example.COLUMNS,
    )


def test_verdict():
    # 10, 9, 12 and 8 more, while the returns of each arm overlap. Of the 256 ways to draw four of them, 5 have a mean
    # below 8.5 (8 8 8 8 and 8 8 8 9), which is less than 2.5%, and 15 have one of at most that; likewise 11.25 above.
    better = example.summary(rows_of([400.0, 420.0, 300.0, 310.0], [390.0, 411.0, 288.0, 302.0]))
    assert better.count("paired by seed: 10 [8, 11]: seeds separate them") == 2
    # 50, -50 and 1: one in 27 draws is the lowest alone.
    same = example.summary(rows_of([400.0, 300.0, 350.0], [350.0, 350.0, 349.0]))
    assert same.count("paired by seed: 0 [-50, 50]: seeds do not separate them") == 2
    alone = example.summary(rows_of([400.0], [350.0]))
    assert alone.count("paired by seed: 50 (one seed): seeds do not separate them") == 2
    equal = example.summary(rows_of([400.0, 390.0], [400.0, 390.0]))
    assert equal.count("paired by seed: 0 [0, 0]: seeds do not separate them") == 2


def test_an_interval_stays_within_the_returns():
    values = np.array([[500.0, 9.0], [500.0, 500.0], [498.0, 9.0]])
    low, high = example.interval(values)
    assert ((values.min(0) <= low) & (low < values.mean(0)) & (values.mean(0) < high) & (high <= values.max(0))).all()
    assert (example.interval(values) == [low, high]).all()
    assert example.interval(values[:1]).tolist() == [[500, 9]] * 2


@pytest.mark.parametrize("spoil", ["a seed less", "no return", "too many arms"])
def test_rows_that_cannot_be_compared_are_refused(spoil, tmp_path, capsys):
    rows = rows_of([400.0, 420.0], [390.0, 411.0])
    if spoil == "a seed less":
        rows = rows[1:]
    elif spoil == "no return":
        rows.loc[0, "return"] = float("nan")
    else:
        rows = pd.concat([rows.assign(arm=rows["arm"] + more) for more in ("", " again")])
    path = tmp_path / "rows.csv"
    rows.to_csv(path, index=False)
    with pytest.raises(SystemExit) as stopped:
        example.main(["--redraw", str(path), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "redraw must have at most 3 arms, with the same seeds and frames" in capsys.readouterr().err


def test_committed_results_are_of_a_default_run_and_are_drawn_again(tmp_path, capsys):
    rows = example.read(COMMITTED)
    defaults = example.parse(["--out", str(tmp_path)])
    assert set(rows["arm"]) == ARMS
    assert (rows.groupby("arm")["seed"].nunique() >= 8).all()
    assert rows["frames"].max() == defaults.frames
    assert rows.groupby(["arm", "seed"]).size().unique().tolist() == [example.EVALUATIONS]
    assert "# wall time" in COMMITTED.read_text()
    example.main(["--redraw", str(COMMITTED), "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert all(arm in out for arm in ARMS)
    assert (tmp_path / "dqn_cartpole.png").stat().st_size > 10_000
    assert not (tmp_path / "dqn_cartpole.csv").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seeds", "0", "seeds must be an int >= 1, got 0"),
        ("--jobs", "two", "argument --jobs: invalid int value: 'two'"),
        ("--frames", "120", "frames must be a multiple of 50, got 120"),
        ("--n-steps", "1", "n_steps must be at least 2 and less than the frames, got 1"),
        ("--gamma", "1.5", "gamma must be a finite number in [0, 1], got 1.5"),
        ("--backend", "numpy", "argument --backend: invalid choice: 'numpy'"),
        ("--device", "abacus", "device type at start of device string: abacus"),
        ("--redraw", "missing.csv", "No such file or directory: 'missing.csv'"),
        ("--redraw", __file__, "redraw must be a CSV with rows of arm, n_steps, done_at, seed, frames, return, got "),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(option, value, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        example.main([option, value, "--out", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert "error: " in err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
