"""The commands with which one looks for what is wrong: doctor and explain."""

import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import fresh
import mutate
import pytest
import torch
import triton
from rollouts import frames, make_rollout
from tensordict import LazyStackedTensorDict, NonTensorData, TensorDict, tensorclass

from multistep_triton import MultiStep, MultiStepTransform, __version__
from multistep_triton.debug import doctor, parity, streams
from multistep_triton.debug.cli import main
from multistep_triton.debug.explain import Windows, load_rollout
from multistep_triton.debug.plot import FRAMES, draw_windows
from multistep_triton.debug.streams import TORCHRL_KINDS, Result, Stream, run_torchrl
from multistep_triton.debug.tables import MOST, Row, layout, shortened

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def saved(tmp_path):
    """A file with a row of eight frames: frame 3 is done, frame 6 is padding, trajectory 8 begins at frame 5."""
    data = frames(
        [1.0, 2, 4, 8, 16, 32, 64, 128],
        [t == 3 for t in range(8)],
        mask=torch.arange(8) != 6,
        collector={"traj_ids": torch.tensor([7, 7, 7, 7, 7, 8, 8, 8])},
    )
    data["next", "truncated"] = data["next", "done"].clone()
    torch.save(torch.stack([data, data.apply(lambda leaf: leaf.clone().zero_())]), tmp_path / "rollout.pt")
    return tmp_path / "rollout.pt"


def explain(capsys, *arguments):
    assert main(["explain", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments):
    """The one line with which the command line refuses to explain."""
    with pytest.raises(SystemExit) as stopped:
        main(["explain", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    start = "python -m multistep_triton explain: error: "
    assert err.startswith(start)
    assert err.count("\n") == 1
    return err[len(start) : -1]


def test_explain_a_window_that_a_done_ends(saved, capsys):
    out = explain(capsys, saved, "--env", 0, "--t", 2, "--gamma", 0.5, "--traj-key", "none")
    assert out == (
        "rollout.pt, env 0: n_steps = 3, gamma = 0.5\n"
        "window t = 2 .. 3, 2 of 3 frames; ends: done\n"
        "\n"
        "  t  next.reward  discount  next.truncated  next.done  mask\n"
        "  2            4         1  False           False      True  this frame\n"
        "  3            8       0.5  True            True       True  the window ends: done\n"
        "  4           16         -  False           False      True  not in the window\n"
        "\n"
        "next.reward = 4 + 0.5 * 8 = 8 (stored as 8)\n"
        "steps_to_next_obs = 2\n"
        "gamma = 0.5 ** 2 = 0.25\n"
        "nonterminal = True\n"
        "next entries are those of t = 3: next.observation\n"
        'next.done = False with done_at="start", True with done_at="end"\n'
        'next.truncated = False with done_at="start", True with done_at="end"\n'
    )


NO_IDS = ["--traj-key", "none"]


@pytest.mark.parametrize(
    ("t", "n_steps", "options", "expected"),
    [
        (0, 3, [], ["window t = 0 .. 2, 3 of 3 frames; ends: full\n", "= 1 + 0.5 * 2 + 0.25 * 4 = 3 "]),
        (3, 3, [], ["window t = 3 .. 3, 1 of 3 frames; ends: done", "nonterminal = False: t = 3 is done"]),
        (4, 3, NO_IDS, ["t = 4 .. 5, 2 of 3 frames; ends: padding follows, by the mask", "= 16 + 0.5 * 32 = 32 "]),
        (6, 3, [], ["window t = 6 .. 6, 1 of 3 frames; ends: padding, by the mask", "t = 6 is padding, by the mask"]),
        (7, 3, [], ["window t = 7 .. 7, 1 of 3 frames; ends: end of data", "t = 7 is the last known frame"]),
        (4, 3, ["--traj-key", "collector.traj_ids"], ["ends: trajectory id changes from 7 to 8", "= 16 = 16 "]),
        (4, 3, [], ["ends: trajectory id changes from 7 to 8", "= 16 = 16 "]),
        (
            4,
            3,
            ["--mask-key", "none", *NO_IDS],
            ["window t = 4 .. 6, 3 of 3 frames", "= 16 + 0.5 * 32 + 0.25 * 64 = 48 "],
        ),
        (1, 9, ["--done-key", "truncated"], ["window t = 1 .. 3, 3 of 9 frames; ends: done", "next.truncated = False"]),
    ],
)
def test_explain_says_why_a_window_ends(saved, capsys, t, n_steps, options, expected):
    out = explain(capsys, saved, "--env", 0, "--t", t, "--n-steps", n_steps, "--gamma", 0.5, *options)
    for text in expected:
        assert text in out


def test_explain_agrees_with_the_transform_on_every_frame():
    rollout = make_rollout((2, 3), 30, p_done=0.3)
    out = MultiStep(0.9, 4)(rollout)
    for env in ((0, 0), (1, 2)):
        windows = Windows(rollout, env, None, MultiStep(0.9, 4))
        assert windows.steps == out["steps_to_next_obs"][env].tolist()
        assert windows.returns["next.reward"] == out["next", "reward"][env].flatten().tolist()
        for t in range(30):
            end = windows.end(t)
            assert torch.equal(rollout["next", "observation"][env][end], out["next", "observation"][env][t])
            assert windows.why(t) != "nothing ends it"


def test_explain_an_agent_and_several_rewards(tmp_path, capsys):
    done = torch.zeros(5, 2, 1, dtype=torch.bool)
    done[2, 1] = True
    reward = torch.arange(10.0).view(5, 2, 1)
    agents = TensorDict({"done": done, "reward": reward, "observation": reward}, [5])
    shared = TensorDict({"agents": agents, "state": torch.zeros(5, 3)}, [5])
    torch.save(TensorDict({"next": shared}, [5]), tmp_path / "agents.pt")
    keys = ["--reward-keys", "agents.reward", "--done-key", "agents.done"]
    out = explain(capsys, tmp_path / "agents.pt", "--t", 1, "--agent", 1, "--gamma", 1, *keys)
    assert out.startswith("agents.pt, agent 1: n_steps = 3, gamma = 1\nwindow t = 1 .. 2, 2 of 3 frames; ends: done\n")
    assert "next.agents.reward = 3 + 1 * 5 = 8 (stored as 8)" in out
    assert "next entries are those of t = 2: next.agents.observation\n" in out
    assert "window t = 1 .. 3" in explain(capsys, tmp_path / "agents.pt", "--t", 1, "--agent", 0, *keys)
    assert "agent must be one of those that have a done flag each" in refused(
        capsys, tmp_path / "agents.pt", "--t", 1, *keys
    )
    assert "agent must be an int in 0 .. 1, got 2" in refused(
        capsys, tmp_path / "agents.pt", "--t", 1, "--agent", 2, *keys
    )

    both = frames([1.0, 2, 4], [False] * 3)
    both["next", "cost"] = torch.tensor([[1.0, 10], [2, 20], [3, 30]])
    torch.save(both, tmp_path / "both.pt")
    out = explain(capsys, tmp_path / "both.pt", "--t", 1, "--gamma", 1, "--reward-keys", "reward,cost")
    assert "next.cost[0] = 2 + 1 * 3 = 5 (stored as 5)" in out
    assert "next.cost[1] = 20 + 1 * 30 = 50 (stored as 50)" in out


def test_explain_reads_what_torch_saves_of_tensordicts(tmp_path):
    data = frames([1.0, 2], [False, True])
    kinds = {
        "plain": data,
        "locked": data.clone().lock_(),
        "lazy": LazyStackedTensorDict(data, data.clone()),
        "non-tensor": data.clone().set("name", NonTensorData("a", batch_size=[2])),
        "stacked non-tensors": torch.stack([data[0].set("name", "a"), data[1].set("name", "b")]),
    }
    for name, each in kinds.items():
        torch.save(each, tmp_path / name)
        assert (load_rollout(tmp_path / name)["next", "reward"] == each["next", "reward"]).all(), name
    others = (
        data.memmap(tmp_path / "mapped"),
        frames([1.0, 2], [False, True], inner=Inner(torch.ones(2), batch_size=[2])),
    )
    for each in others:
        torch.save(each, tmp_path / "other")
        with pytest.raises(ValueError, match=r"save rollout.to_tensordict\(\).clone\(\), plain tensors, instead"):
            load_rollout(tmp_path / "other")
        torch.save(each.to_tensordict().clone(), tmp_path / "other")
        assert (load_rollout(tmp_path / "other")["next", "reward"] == data["next", "reward"]).all()


@tensorclass
class Inner:
    value: torch.Tensor


class Evil:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('ran').touch()",)


def test_explain_refuses_bad_files_with_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rule = "FILE must be a tensordict saved with torch.save, got "
    assert refused(capsys, "none.pt", "--t", 0).startswith(f"{rule}none.pt: [Errno 2]")
    assert refused(capsys, ".", "--t", 0).startswith(f"{rule}.: [Errno 21]")
    Path("text.pt").write_text("no checkpoint")
    assert refused(capsys, "text.pt", "--t", 0).startswith(f"{rule}text.pt: ")
    torch.save(frames([1.0], [False]), "whole.pt")
    Path("cut.pt").write_bytes(Path("whole.pt").read_bytes()[:700])
    assert refused(capsys, "cut.pt", "--t", 0).startswith(f"{rule}cut.pt: ")
    torch.save({"reward": torch.ones(3)}, "dict.pt")
    assert refused(capsys, "dict.pt", "--t", 0) == f"{rule}dict.pt, a dict"
    torch.save({"x": Evil()}, "evil.pt")
    assert refused(capsys, "evil.pt", "--t", 0).startswith(f"{rule}evil.pt, with builtins.exec in it: save rollout.")
    assert not Path("ran").exists()


def test_explain_refuses_bad_indices_and_keys_with_one_line(saved, capsys):
    assert refused(capsys, saved, "--env", 0, "--t", 8) == "t must be an int in 0 .. 7, got 8"
    assert refused(capsys, saved, "--env", 0, "--t", -1) == "t must be an int in 0 .. 7, got -1"
    assert refused(capsys, saved, "--env", 2, "--t", 0) == "env must be an int in 0 .. 1, got 2"
    assert refused(capsys, saved, "--t", 0) == "env must be one index for each dimension of *B = [2], got []"
    assert "data must hold a tensor at ('next', 'cost')" in refused(
        capsys, saved, "--env", 0, "--t", 0, "--reward-keys", "cost"
    )
    assert "agent must be left out" in refused(capsys, saved, "--env", 0, "--t", 0, "--agent", 0)
    assert "is not supported" in refused(capsys, saved, "--env", 0, "--t", 0, "--plot", saved.with_suffix(".xyz"))
    assert "[Errno 2]" in refused(capsys, saved, "--env", 0, "--t", 0, "--plot", saved.parent / "none" / "a.png")
    assert "the following arguments are required: --t" in refused(capsys, saved)
    assert "argument --env: must be one index or several, as in 3,1, got 'x'" in refused(capsys, saved, "--env", "x")
    assert "argument --plot: must end in .png" in refused(capsys, saved, "--t", 0, "--plot", "picture")
    torch.save(frames([1.0, 2], [False, True])[:0], saved)
    assert "the rollout must hold frames, [*B, T], got batch size [0]" in refused(capsys, saved, "--t", 0)
    torch.save(frames([1.0, 2], [False, False]).to("meta"), saved)
    assert f"{saved} cannot be explained: NotImplementedError: " in refused(capsys, saved, "--t", 0)
    torch.save(MultiStep(0.9, 2)(frames([1.0, 2], [False, False])), saved)
    assert "must hold 1-step transitions, got n-step ones, with steps_to_next_obs" in refused(capsys, saved, "--t", 0)


def test_the_picture_has_a_bar_for_every_window(saved, capsys):
    explain(capsys, saved, "--env", 0, "--t", 2, "--plot", saved.with_suffix(".png"))
    assert saved.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    windows = Windows(load_rollout(saved), [0], None, MultiStep(0.5, 3, mask_key="mask", traj_key=None))
    above, below = draw_windows(windows, 2, "title").axes
    bars = {round(bar.get_x() + 0.4): bar for bar in above.patches if bar.get_height() < 1}
    assert {t: round(bar.get_width() + 0.2) for t, bar in bars.items()} == dict(enumerate([3, 3, 2, 1, 2, 1, 1, 1]))
    lanes = [(round(bar.get_y() + 0.33), t, t + bar.get_width()) for t, bar in bars.items()]
    for one in lanes:
        for other in lanes:
            assert one == other or one[0] != other[0] or one[2] < other[1] or other[2] < one[1]
    dones = {round(line.get_xdata()[0] - 0.5): line.get_linestyle() for line in above.lines}
    assert dones == {3: "-", 5: ":", 6: ":"}
    assert [bar.get_height() for bar in below.patches[:8]] == windows.rewards["next.reward"]
    assert below.lines[0].get_ydata().tolist() == windows.returns["next.reward"]


@pytest.mark.parametrize("t", [0, 100, 199])
def test_the_picture_of_a_long_row_is_around_the_frame(t):
    windows = Windows(make_rollout((), 200), [], None, MultiStep(0.9, 5))
    low, high = draw_windows(windows, t, "title").axes[0].get_xlim()
    assert low < t < high
    assert round(high - low) == FRAMES


def arrows_of(windows, t):
    lines = draw_windows(windows, t, "title").axes[0].lines
    return {line.get_marker(): line.get_xydata().tolist() for line in lines if line.get_marker() != "None"}


def test_windows_that_go_on_outside_the_picture_have_arrows_there():
    windows = Windows(frames([1.0] * 200, [t in (84, 116) for t in range(200)]), [], None, MultiStep(0.9, 5))
    # Frames 87 to 118 are shown. Of the windows that a done ends, all end in the picture or before it.
    assert arrows_of(windows, 100) == {"<": [[86.4, 0], [86.4, 1]], ">": [[118.6, 2], [118.6, 3]]}
    # What the row's end cuts does not go on.
    assert arrows_of(windows, 199).keys() == {"<"}


def test_a_long_window_shows_its_ends_and_what_has_a_note(tmp_path, capsys):
    data = frames([float(t) for t in range(200)], [t == 150 for t in range(200)])
    torch.save(data, tmp_path / "long.pt")
    lines = explain(capsys, tmp_path / "long.pt", "--t", 20, "--n-steps", 180, "--gamma", 1).splitlines()
    assert [line.split()[0] for line in lines[4:14]] == [
        *("20", "21", "22", "23", "..."),
        *("147", "148", "149", "150", "151"),
    ]
    assert lines[12].endswith("True       the window ends: done")
    assert "next.reward = 20 + 1 * 21 + " in lines[15]
    assert " + ... + " in lines[15]
    assert lines[15].endswith(f" = {sum(range(20, 151))} (stored as {sum(range(20, 151))})")
    assert Row([False, False]).why(0, 0, 3) == "nothing ends it"
    assert len(layout(["t", ""], [[str(i), ""] for i in range(100)]).splitlines()) == 101
    assert shortened(["a"] * MOST) == ["a"] * MOST


def test_rewards_that_are_not_finite_are_explained_and_drawn(tmp_path, capsys):
    torch.save(frames([1.0, torch.inf, -torch.inf, torch.nan, 1.0], [False] * 5), tmp_path / "a$b_{.pt")
    picture = tmp_path / "picture.png"
    out = explain(capsys, tmp_path / "a$b_{.pt", "--t", 1, "--n-steps", 2, "--gamma", 1, "--plot", picture)
    assert "next.reward = inf + 1 * -inf = nan (stored as nan)" in out
    assert picture.exists()
    windows = Windows(load_rollout(tmp_path / "a$b_{.pt"), [], None, MultiStep(1.0, 2))
    crosses = [line for line in draw_windows(windows, 1, "$").axes[1].lines if line.get_marker() == "x"]
    assert crosses[0].get_xdata().tolist() == [0, 1, 2, 3]
    data = frames([1.0, 1.0], [False] * 2)
    data["next", "reward"] = torch.full((2, 1), 1.7e308, dtype=torch.float64)
    torch.save(data, tmp_path / "a.pt")
    assert "= inf (stored as inf)" in explain(capsys, tmp_path / "a.pt", "--t", 0, "--gamma", 1)


def test_the_picture_shows_the_whole_window():
    windows = Windows(make_rollout((), 400, p_done=0.0), [], None, MultiStep(0.9, 150))
    low, high = draw_windows(windows, 100, "title").axes[0].get_xlim()
    assert low < 100
    assert high > 249


def doctored(capsys, *arguments):
    status = main(["doctor", "--json", *arguments])
    return status, json.loads(capsys.readouterr().out)


COMPARED = (
    ("kernels, interpreted,", "specification"),
    ("reference", "torchrl"),
)


def test_the_doctor_reports_what_runs_and_that_it_is_equal(capsys):
    status, report = doctored(capsys, "--streams", "2")
    assert status == 0
    assert report["ok"] is True
    assert report["versions"].keys() == {"python", "multistep_triton", "torch", "triton", "torchrl", "tensordict"}
    assert report["versions"]["torch"] == torch.__version__
    on_cpu = {each["backend"]: each for each in report["backends"] if each["device"].startswith("cpu")}
    assert on_cpu.keys() == {"auto", "reference", "triton", "verify"}
    assert on_cpu["auto"]["runs"] == "reference"
    assert on_cpu["auto"]["why"] == "the tensors are on the CPU, where it is the fast one"
    compared = {each["compared"]: each for each in report["equivalence"]}
    assert {f"{one} with {other}" for one, other in COMPARED} <= compared.keys()
    for each in report["equivalence"]:
        assert (each["result"], each["streams"], each["difference"]) == ("equal", 2, None)
        assert each["frames"] > 20


def test_the_doctor_as_tables(capsys, monkeypatch):
    monkeypatch.setattr(
        doctor,
        "_comparisons",
        lambda devices: [("ours with theirs", CPU, lambda seed, device: Result(7), nullcontext(map))],
    )
    assert main(["doctor", "--streams", "3"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^  torch +{re.escape(torch.__version__)}$", out, re.MULTILINE)
    assert re.search(r"^  cpu \(\d threads\) +auto +reference  the tensors are on the CPU", out, re.MULTILINE)
    assert re.search(r"^  ours with theirs  cpu \(\d threads\)  equal +3 +21  ", out, re.MULTILINE)
    assert out.endswith("all that was compared is equal\n")


def test_the_doctor_finds_a_kernel_that_is_wrong():
    """End to end: in a copy, the kernels take no notice of a done."""
    assert mutate.MUTATIONS[0].decides == "boundary: done"
    with mutate.altered_copy(mutate.MUTATIONS[0]) as copy:
        done = mutate.run_python(copy, "-m", "multistep_triton", "doctor", "--streams", "4")
    assert done.returncode == 1, done.stderr
    assert "kernels, interpreted, with specification" in done.stdout
    assert "different" in done.stdout
    assert "the kernels and the reference differ at steps" in done.stdout
    assert "the reference ends it: done" in done.stdout
    assert done.stdout.endswith("\nNOT EQUAL, see above\n")


def test_the_doctor_where_triton_is_missing(monkeypatch, capsys):
    """Nothing is wrong: the kernels cannot run, auto takes the reference."""
    why = "backend 'triton' cannot run: Triton is missing"
    monkeypatch.setattr(
        doctor, "_backend", lambda device, name: {"device": "cpu", "backend": name, "runs": name == "auto", "why": why}
    )
    monkeypatch.setattr(doctor, "_interpreter", lambda: nullcontext(map))
    monkeypatch.setattr(doctor, "_accelerators", list)
    status, report = doctored(capsys, "--streams", "2")
    assert status == 0
    found = [(each["result"], each["why"]) for each in report["equivalence"]]
    assert found == [("skipped", why), ("equal", ""), ("equal", "")]
    assert doctor._verdict(report) == "all that was compared is equal; 1 of 3 comparisons cannot run here"


OTHER_TRITONS = ["0.1", "99.0.0+git1234"]


@pytest.mark.parametrize("version", OTHER_TRITONS)
@pytest.mark.parametrize(("seen", "result"), [("module 'triton' has no attribute 'x'", "unsupported"), (None, "equal")])
def test_the_doctor_says_that_a_triton_is_unsupported(version, seen, result, monkeypatch, capsys):
    monkeypatch.setattr(triton, "__version__", version)
    compared = [
        ("kernels with specification", CPU, lambda seed, device: Result(7, seen), nullcontext(map)),
        ("reference with torchrl", CPU, lambda seed, device: Result(7), nullcontext(map)),
    ]
    row = {"device": "cpu", "runs": "triton", "why": "asked for"}
    monkeypatch.setattr(doctor, "_backend", lambda device, name: {"backend": name, **row})
    monkeypatch.setattr(doctor, "_comparisons", lambda devices: compared)
    assert main(["doctor", "--streams", "3"]) == (1 if seen else 0)
    out = capsys.readouterr().out
    (allowed,) = re.findall(r"^triton = \[.triton(.+).\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    allowed = ",".join(sorted(allowed.split(",")))
    said = f'Triton {version} is UNSUPPORTED, install "triton{allowed}" and the torch that it belongs to'
    assert out.endswith(f"\n{said}; {'all else that' if seen else 'all that'} was compared is equal\n")
    assert re.search(rf"^  kernels with specification +cpu .*  {result} ", out, re.MULTILINE)
    assert (f"kernels with specification, cpu ({torch.get_num_threads()} threads): {seen}\n" in out) == bool(seen)
    assert "NOT EQUAL" not in out


def test_the_doctor_calls_what_another_triton_has_nothing_to_do_with_different(monkeypatch, capsys):
    monkeypatch.setattr(triton, "__version__", OTHER_TRITONS[0])
    wrong = "reference with torchrl", CPU, lambda seed, device: Result(7, "seen"), nullcontext(map)
    monkeypatch.setattr(doctor, "_comparisons", lambda devices: [wrong])
    status, report = doctored(capsys, "--streams", "2")
    assert (status, report["equivalence"][0]["result"]) == (1, "different")
    assert doctor._verdict(report).endswith("; NOT EQUAL, see above")


def test_the_doctor_says_nothing_of_tritons_that_are_supported_missing_or_not_to_be_judged(monkeypatch):
    assert doctor._unsupported_triton() is None
    monkeypatch.setattr(triton, "__version__", OTHER_TRITONS[0])
    assert doctor._unsupported_triton()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton", None)
        assert doctor._unsupported_triton() is None
    monkeypatch.setattr(doctor, "requires", lambda name: None)  # of a package that is not installed, it raises
    assert doctor._unsupported_triton() is None


def test_the_doctor_refuses_a_wrong_variable(monkeypatch, capsys):
    monkeypatch.setenv("MULTISTEP_TRITON_BACKEND", "fast")
    monkeypatch.setattr(doctor, "_comparisons", lambda devices: [])
    status, report = doctored(capsys, "--streams", "2")
    assert status == 1
    assert report["environment"]["MULTISTEP_TRITON_BACKEND"] == "fast"
    assert "must be one of" in report["backends"][0]["why"]
    assert doctor._verdict(report) == "all that was compared is equal; auto CANNOT RUN, see above"


def test_streams_are_the_same_every_time_and_of_every_kind():
    one, other = (list(Stream(3, TORCHRL_KINDS).rollouts(CPU)) for _ in range(2))
    assert all((mine == its).all() for mine, its in zip(one, other, strict=True))
    assert {Stream(seed, TORCHRL_KINDS).kind for seed in range(len(TORCHRL_KINDS))} == set(TORCHRL_KINDS)


@pytest.mark.parametrize("key", [("next", "reward"), "gamma", "steps_to_next_obs", ("next", "observation")])
def test_a_difference_from_torchrl_is_found(key, monkeypatch):
    assert run_torchrl(0, CPU).difference is None
    inverse = MultiStepTransform._inv_call

    def spoiled(self, data):
        out = inverse(self, data)
        if out is not None:
            out[key][..., -1:] += 1
        return out

    monkeypatch.setattr(MultiStepTransform, "_inv_call", spoiled)
    assert f"key {key}, frame " in run_torchrl(0, CPU).difference


def test_a_torchrl_that_fails_is_a_difference(monkeypatch):
    monkeypatch.setattr(streams.TorchRLMultiStepTransform, "_inv_call", lambda self, data: 1 / 0)
    assert "ZeroDivisionError: division by zero" in run_torchrl(0, CPU).difference


def test_other_keys_shapes_and_batch_sizes_than_torchrls_are_found():
    ours = MultiStepTransform(2, 0.9).inv(make_rollout((2,), 9))
    theirs = ours.exclude(parity.DOCUMENTED_REWARD)
    assert parity.find_difference(ours, theirs, 2) is None
    assert parity.find_difference(ours, theirs.exclude("action"), 2).what == "keys"
    assert parity.find_difference(ours, theirs[:1], 2).what == "batch size"
    assert parity.find_difference(ours, theirs.clone().set("action", ours["action"].int()), 2).what == "key action"


def demo(capsys, *arguments):
    """The lines of the demo's table, and what it prints after them."""
    assert main(["demo", *map(str, arguments)]) == 0
    backend, where, *lines = capsys.readouterr().out.splitlines()
    assert (backend, where) == ("backend: reference (asked for: auto)", "environment 0, as it is stored:")
    return [line for line in lines if line.startswith(" ")], [line for line in lines if not line.startswith(" ")]


def test_the_demo_shows_five_frames_around_a_done_and_what_was_compared(tmp_path, capsys):
    chosen = ["--n-steps", 3, "--gamma", 0.5, "--chunks", 3, "--frames-per-chunk", 30, "--capacity", 120]
    (header, *rows), said = demo(capsys, *chosen, "--save", tmp_path / "rollout.pt")
    assert re.split("  +", header.strip()) == (
        ["t", "step_count", "next step_count", "steps", "reward", "n-step reward", "done"]
    )
    # The rollout was saved before any transform: what is shown of a frame is what its window makes of it.
    rollout = load_rollout(tmp_path / "rollout.pt")[0]
    done, count = rollout["next", "done"].flatten().tolist(), rollout["step_count"].flatten().tolist()
    windows = Windows(rollout, [], None, MultiStep(0.5, 3))
    frames = [int(row.split()[0]) for row in rows]
    oldest = 90 - 3 - 60
    first = done.index(True, oldest)
    assert frames == list(range(max(first - 3, oldest), max(first - 3, oldest) + 5))
    for t, row in zip(frames, rows, strict=True):
        end, steps = windows.end(t), windows.steps[t]
        returned = f"{windows.returns['next.reward'][t]:.6g}"
        assert row.split() == [str(each) for each in (t, count[t], count[end] + 1, steps, 1, returned, done[t])]
    assert {"1", "2", "3"} == {row.split()[3] for row in rows}
    assert said[0] == "stored: 174 frames in 3 extends, of which the buffer holds 120"
    assert said[1].startswith("compared with torchrl ") and said[1].endswith(": all equal")


def test_the_demo_shows_as_many_frames_as_there_are(capsys):
    (_, *rows), _ = demo(capsys, "--n-steps", 4, "--chunks", 6, "--frames-per-chunk", 1, "--capacity", 12)
    assert [row.split()[:4] for row in rows] == [["0", "0", "4", "4"], ["1", "1", "5", "4"]]


def test_the_demo_shows_the_newest_frames_where_none_is_done(capsys):
    (_, *rows), _ = demo(capsys, "--n-steps", 2, "--chunks", 1, "--frames-per-chunk", 10, "--capacity", 20)
    assert [row.split()[0] for row in rows] == ["3", "4", "5", "6", "7"]


@pytest.mark.parametrize("arguments", [["--version"], ["--version", "doctor"]])
def test_the_version(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert not stopped.value.code
    assert capsys.readouterr().out == f"multistep_triton {__version__}\n"


def shown_output(name):
    """The block of output that follows a comment on the page of debugging."""
    return (ROOT / "docs" / "debugging.md").read_text().split(f"<!-- output: {name} -->\n```\n")[1].split("```")[0]


def test_a_reader_that_stops_reading_is_no_error(saved):
    command = f"{sys.executable} -m multistep_triton explain {saved} --env 0 --t 0 | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_documentation_shows_what_explain_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command, expected = shown_output("explain").split("\n", 1)
    assert main(["demo", "--save", "rollout.pt"]) == 0
    capsys.readouterr()
    assert main(command.removeprefix("$ python -m multistep_triton ").split()) == 0
    assert capsys.readouterr().out == expected
    assert Path("explain.png").stat().st_size > 0


def test_the_documentation_shows_what_a_wrong_kernel_gives(monkeypatch):
    monkeypatch.setenv("MULTISTEP_TRITON_BACKEND", "verify")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with mutate.altered_copy(mutate.MUTATIONS[0]) as copy:
        done = mutate.run_python(copy, "-m", "multistep_triton", "demo")
    assert done.returncode == 1
    assert done.stderr.endswith(f"\nmultistep_triton.backends.{shown_output('verify')}")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ["demo", "--save", "none/rollout.pt"],
            "argument --save: must be a file that can be written, got [Errno 2]",
        ),
        (["demo", "--n-steps", "0"], "argument --n-steps: n_steps must be an int >= 1, got 0"),
        (["demo", "--gamma", "x"], "argument --gamma: gamma must be a finite number in [0, 1], got 'x'"),
        (["demo", "--seed", "-1"], "argument --seed: seed must be an int in [0, 4294967295], got -1"),
        (["demo", "--chunks", "1", "--frames-per-chunk", "3"], "argument --n-steps: must be less than the 3 frames"),
        (["doctor", "--streams", "0"], "argument --streams: streams must be an int >= 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused_with_one_line(capsys, arguments, error):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"python -m multistep_triton {arguments[0]}: error: {error}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("module", ["tqdm", "matplotlib"])
def test_a_missing_package_is_named(saved, module):
    command = ["explain", str(saved), "--env", "0", "--t", "0", "--plot", "a.png"]
    command = ["doctor"] if module == "tqdm" else command
    code = f"import sys; sys.modules['{module}'] = None; from multistep_triton.debug.cli import main; main({command})"
    done = fresh.run(code)
    assert done.returncode == 2
    line = f"""error: this needs {module}: pip install "multistep_triton[debug]"\n"""
    assert done.stderr.endswith(line)
