"""The example in the style of Rainbow: target distributions by hand, its priorities, its runs and what is committed."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Categorical, RandomSampler, SamplerWithoutReplacement
from torchrl.data.replay_buffers.samplers import prioritized
from torchrl.objectives import SoftUpdate

with warnings.catch_warnings():  # what torchrl deprecates in itself
    warnings.simplefilter("ignore", DeprecationWarning)
    import rainbow_style as example

COMMITTED = Path(example.__file__).parent / "results" / f"{example.NAME}.csv"
ATOMS = 11
GAMMA = 0.5
_, SAMPLING, WHY = example.make_sampler("auto")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stream():
    """As many frames as atoms, so that none can be taken for the other; t = 4 terminates, t = 7 truncates."""
    terminated, truncated = (torch.arange(ATOMS).unsqueeze(-1) == t for t in (4, 7))
    ends = {"terminated": terminated, "truncated": truncated, "done": terminated | truncated}
    following = {"observation": torch.zeros(ATOMS, 4), "reward": torch.ones(ATOMS, 1), **ends}
    actions = torch.zeros(ATOMS, dtype=torch.int64)
    return TensorDict({"observation": torch.zeros(ATOMS, 4), "action": actions, "next": following}, [ATOMS])


def loss_of_constant_distributions():
    """A loss over the returns 0 to 10, and the logits ``[ATOMS, 2]`` of its online network.

    The online network prefers action 1, of which the target network is certain that it returns 4; of action 0, that it
    returns 10.
    """
    linear = torch.nn.Linear(4, ATOMS * 2)
    torch.nn.init.zeros_(linear.weight)
    network = torch.nn.Sequential(linear, torch.nn.Unflatten(-1, (ATOMS, 2)))
    loss = example.make_loss(network, torch.linspace(0, 10, ATOMS), Categorical(2), GAMMA)
    SoftUpdate(loss, tau=0.5)
    online = torch.stack([0.3 * torch.arange(ATOMS).float().sin(), torch.arange(ATOMS).float()], -1)
    linear.bias.data.copy_(online.flatten())
    (target,) = [value for key, value in loss.target_value_network_params.items(True, True) if key[-1] == "bias"]
    certain = torch.zeros(ATOMS, 2)
    certain[10, 0] = certain[4, 1] = 100
    target.data.copy_(certain.flatten())
    return loss, linear.bias, online


HALF = {2: 0.5, 3: 0.5}
"""1 + .5 * 1 + .25 * 4 is 2.5: halfway between two of the returns."""
TARGETS = [
    *[HALF] * 3,
    {1: 0.5, 2: 0.5},  # t = 3: its window ends in the termination; 1.5, and nothing of where it ended
    {1: 1.0},  # t = 4: the termination itself
    HALF,
    HALF,  # t = 6: its window of two frames ends in the truncation and bootstraps
    {3: 1.0},  # t = 7: the truncation itself, after one frame: 1 + .5 * 4
    HALF,
    HALF,
    {3: 1.0},  # the newest frame, of one frame
]


def test_target_distributions_by_hand(monkeypatch):
    monkeypatch.setattr(example, "BATCH_SIZE", ATOMS)
    loss, logits, online = loss_of_constant_distributions()
    buffer = example.make_buffer(SamplerWithoutReplacement(shuffle=False), 2, GAMMA)
    for batch in stream().split([3, 4, 4]):
        buffer.extend(batch)
    transitions = buffer.sample()
    assert transitions["steps_to_next_obs"].tolist() == [[2]] * 4 + [[1]] + [[2]] * 2 + [[1]] + [[2]] * 2 + [[1]]
    expected = torch.tensor([[target.get(atom, 0.0) for atom in range(ATOMS)] for target in TARGETS])
    for t in range(ATOMS):
        # The derivative of cross-entropy by the logits of the action taken is softmax minus target.
        (slope,) = torch.autograd.grad(loss(torch.stack([transitions[t]] * 2))["loss"], logits)
        found = online.softmax(0) * torch.tensor([1.0, 0.0]) - slope.view(ATOMS, 2)
        torch.testing.assert_close(found[:, 0], expected[t], msg=lambda text, t=t: f"t = {t}: {text}")
        assert (found[:, 1] == 0).all()
    # All at once, each with its own discount; what is written for priorities is the cross-entropy.
    loss(transitions)
    entropies = -(expected * online[:, 0].log_softmax(0)).sum(-1)
    torch.testing.assert_close(transitions["td_error"].flatten(), entropies)


def test_why_sampling_is_uniform(monkeypatch):
    sampler, name, why = example.make_sampler("no")
    assert (type(sampler), name, why) == (RandomSampler, "uniform", "as asked for")
    monkeypatch.setattr(prioritized, "SumSegmentTreeFp32", None)
    sampler, name, why = example.make_sampler("auto")
    assert (type(sampler), name) == (RandomSampler, "uniform")
    assert why.startswith("as torchrl's PrioritizedSampler raises RuntimeError: SumSegmentTreeFp32 is not available")


@pytest.mark.skipif(SAMPLING == "uniform", reason=f"sampling is uniform, {WHY}")
def test_priorities_are_those_of_the_loss(monkeypatch):
    count = 20_000
    monkeypatch.setattr(example, "BATCH_SIZE", count)
    np.random.seed(0)
    sampler, _, _ = example.make_sampler("auto")
    buffer = example.make_buffer(sampler, 2, GAMMA)
    buffer.extend(stream())
    loss, _, _ = loss_of_constant_distributions()
    transitions = buffer.sample()
    assert set(transitions["index"].tolist()) == set(range(ATOMS))
    assert (transitions["priority_weight"] == 1).all()
    loss(transitions)
    buffer.update_tensordict_priority(transitions)
    entropies = torch.zeros(ATOMS)
    entropies[transitions["index"]] = transitions["td_error"].flatten()
    assert entropies.unique().numel() > 2
    again = buffer.sample()
    masses = entropies**sampler.alpha
    torch.testing.assert_close(again["priority_weight"], (masses / masses.min())[again["index"]] ** -sampler.beta)
    # as often as their priorities say, within five standard deviations
    share, found = masses / masses.sum(), torch.bincount(again["index"], minlength=ATOMS) / count
    assert ((found - share).abs() <= 5 * (share * (1 - share) / count).sqrt()).all()


def run(seed, sampling="no", n_steps=(3, 3)):
    return list(example.train(n_steps, seed, example.make_sampler(sampling)[0], frames=200))


@pytest.mark.parametrize("sampling", ["auto", "no"])
def test_a_seed_is_a_run(sampling):
    first = run(3, sampling)
    assert [frames for frames, _ in first] == [50, 100, 150, 200]
    assert first == run(3, sampling)
    assert first != run(4, sampling)


def test_of_equal_values_one_is_acted_upon(monkeypatch):
    class Zeros(example.MLP):
        def __init__(self, **options):
            super().__init__(**options)
            for parameter in self.parameters():
                torch.nn.init.zeros_(parameter)

    monkeypatch.setattr(example, "MLP", Zeros)
    # In its second batch, the policy is nearly greedy, and nothing has been learned yet.
    assert len(run(0)) == 4


def test_evaluations_end_with_the_last_frame():
    found = list(example.train((1, 1), 0, RandomSampler(), frames=1150))
    assert len(found) == example.EVALUATIONS
    assert found[-1][0] == 1150


def test_n_is_annealed(monkeypatch):
    made, make = [], example.make_buffer
    monkeypatch.setattr(example, "make_buffer", lambda *arguments: made.append(make(*arguments)) or made[-1])
    training = example.train((10, 3), 0, RandomSampler(), frames=200)
    # 10 * .3 ** (1/4, 2/4, 3/4, 1) is 7.4, 5.5, 4.1, 3
    assert [made[0].n_steps for _ in training] == [7, 5, 4, 3]
    assert made[0].sample()["steps_to_next_obs"].max() == 3


def test_intervals_stay_within_what_seeds_reach():
    # The mean of five seeds, four of which reach the maximum, and of two at another evaluation.
    low, high = example.interval(np.array([[500.0, 0.0], [500, 0], [500, 10], [500, 10], [400, 10]]))
    assert high[0] == 500
    assert 400 <= low[0] < 480
    assert 0 <= low[1] < 6 < high[1] <= 10
    np.testing.assert_array_equal(example.interval(np.array([[3.0, 4.0]])), [[3, 4], [3, 4]])


def test_the_script_runs_what_its_file_lacks(tmp_path, capsys):
    options = ["--frames", "100", "--seeds", "0", "--prioritized", "no", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, example.__file__, *options, "--n-steps", "3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "sampling: uniform, as asked for"
    path = tmp_path / f"{example.NAME}.csv"
    first = path.read_text()
    assert "# n = 3, seed 0: " in first
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    example.main([*options, "--n-steps", "3", "10:3"])
    second = path.read_text()
    assert second.startswith(first)
    assert second.count(",".join(example.COLUMNS)) == 1
    rows = example.read(path)
    assert rows[example.RUN].drop_duplicates().to_numpy().tolist() == [["3", "uniform", 0], ["10:3", "uniform", 0]]
    found = list(example.train((3, 3), 0, RandomSampler(), frames=100))
    assert rows[rows["n_steps"] == "3"][["frames", "return"]].to_numpy().tolist() == [list(each) for each in found]
    example.main([*options, "--n-steps", "10:3"])
    assert path.read_text() == second
    out = capsys.readouterr().out
    assert "n = 3, uniform sampling, seeds: 1: final return " in out
    assert "n = 10 to 3, uniform sampling, seeds: 1: final return " in out


def test_the_committed_runs_learned(tmp_path):
    rows = example.read(COMMITTED)
    assert rows["frames"].max() == example.parse(["--out", str(tmp_path)]).frames
    curves = dict(example.curves_of(rows))
    assert curves["n = 3, uniform sampling, seeds: 5"].iloc[:, -example.FINAL :].to_numpy().mean() > 400
    for n in (1, 3):
        curve = curves[f"n = {n}, uniform sampling, seeds: 5"]
        assert curve.shape == (5, example.EVALUATIONS)
        low, high = example.interval(curve.to_numpy())
        assert ((low <= curve.mean()) & (curve.mean() <= high) & (high <= 500)).all()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seeds", "-1", "seeds must be ints in [0, 2**32), got [-1]"),
        ("--frames", "0", "frames must be an int >= 1, got 0"),
        ("--frames", "120", "frames must be a multiple of 50, got 120"),
        ("--n-steps", "0", "n_steps must be an int >= 1, got 0"),
        ("--n-steps", "3:0", "n_steps must be an int >= 1, got 0"),
        ("--n-steps", "three", "invalid literal for int() with base 10: 'three'"),
        ("--prioritized", "yes", "argument --prioritized: invalid choice: 'yes'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(option, value, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        example.main([option, value, "--out", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows, "frames must be those of the runs that "),
        (lambda rows: rows[1:], "n_steps, sampling, seed, frames, return of whole runs, each once"),
        (lambda rows: rows.rename(columns={"seed": "run"}), "n_steps, sampling, seed, frames, return of whole runs"),
        (lambda rows: pd.concat([rows, rows]), "duplicate"),
    ],
    ids=["other frames", "in part", "other columns", "twice"],
)
def test_a_file_that_cannot_be_gone_on_with_is_refused(change, message, tmp_path, capsys):
    rows = [("3", "uniform", seed, frames, 9.0) for seed in (0, 1) for frames in (50, 100)]
    path = tmp_path / f"{example.NAME}.csv"
    change(pd.DataFrame(rows, columns=example.COLUMNS)).to_csv(path, index=False)
    before = path.read_text()
    with pytest.raises(SystemExit):
        example.main(["--out", str(tmp_path), "--frames", "150"])
    assert message in capsys.readouterr().err
    assert path.read_text() == before
