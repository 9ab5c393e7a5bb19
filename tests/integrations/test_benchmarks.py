"""The benchmarks: an oracle that is right, a gate that stops what is wrong, rows that say so, and their files."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import compare, contenders, gate, growth, plots, report, training_step
from benchmarks.cases import CASES, GAMMA, Case, Stream, make_rollout, select
from benchmarks.contenders import (
    BUFFER_REFERENCE,
    CLONE,
    COMPACT_REFERENCE,
    COMPILED,
    CONTENDERS,
    GATHERS,
    REFERENCE,
    RING,
    SB3,
    SELECTING_RING,
    TORCHRL,
    TRITON,
    Contender,
    with_transform,
)
from benchmarks.gate import check, oracle
from benchmarks.measure import launches_and_syncs
from benchmarks.peers import RowGathers, VectorizedRing
from multistep_triton import MultiStep, MultiStepTransform

CPU = torch.device("cpu")
CASE = Case("state", 4, 8, 0.2)
BY_NAME = {contender.name: contender for contender in CONTENDERS}


def run(*contenders, case=CASE, operations=("transform",), left_out=None):
    return compare.run([case], list(operations), CPU, 0.001, left_out or {}, list(contenders))


def test_oracle_by_hand():
    reward, done = np.array([[1.0, 2.0, 4.0, 8.0, 16.0]]), np.array([[False, True, False, False, False]])
    windows = oracle(reward, done, 3, 0.5)
    assert windows.returns.tolist() == [[1 + 1, 2, 4 + 4 + 4, 8 + 8, 16]]
    assert windows.ends.tolist() == [[1, 1, 4, 4, 4]]
    assert oracle(-reward, done, 3, 0.5).magnitude.tolist() == windows.returns.tolist()
    assert oracle(reward, done, 1, 0.5).ends.tolist() == [[0, 1, 2, 3, 4]]


def test_a_stream_is_where_its_source_says():
    stream = Stream(make_rollout(CASE), 37)
    joined = torch.cat(list(stream), 1)
    env, frame = np.divmod(joined["action"][..., 0].long().numpy(), stream.length)
    assert (frame == np.arange(37)).all()
    assert torch.equal(stream.rollout["observation"][stream.source(env, frame)], joined["observation"])
    assert len(joined["observation"].flatten(0, 1).unique(dim=0)) == 32


@pytest.mark.parametrize("case", [CASE, Case("streaming", 4, 1, 0.2), Case("state", 1, 8, 0.2)], ids=str)
def test_what_comes_after_a_frame_is_what_the_next_one_holds_but_at_a_done(case):
    rollout = make_rollout(case)
    for frames in (torch.cat(list(Stream(rollout, 5 * case.frames - case.frames // 2)), 1), rollout.repeat(1, 9)):
        goes_on = (frames["next", "observation"][:, :-1] == frames["observation"][:, 1:]).all(-1)
        assert torch.equal(goes_on, ~frames["next", "done"][:, :-1, 0])


class WrongGamma(MultiStepTransform):
    def __init__(self, n_steps, gamma):
        super().__init__(n_steps, gamma * 1.001)


class NextOfAnotherFrame(MultiStepTransform):
    def _inv_call(self, tensordict):
        out = super()._inv_call(tensordict)
        if out is not None:
            out["next", "observation"] = out["next", "observation"].roll(1, 1)
        return out


class LosesAFrame(MultiStepTransform):
    def _inv_call(self, tensordict):
        return super()._inv_call(tensordict[:, 1:])


class EndsAtTheSeam(MultiStep):
    def __init__(self, n_steps, gamma):
        super().__init__(gamma, n_steps)

    def _inv_call(self, tensordict):
        return self(tensordict)


class DoneAtTheEnd(MultiStepTransform):
    def __init__(self, n_steps, gamma):
        super().__init__(n_steps, gamma, done_at="end")


FAULTS = {
    WrongGamma: "next.reward",
    NextOfAnotherFrame: "next.observation",
    LosesAFrame: "frames are lost",
    EndsAtTheSeam: "frames are lost",
    DoneAtTheEnd: "next.done",
}


@pytest.mark.parametrize("operation", ["transform", "extend"])
@pytest.mark.parametrize(("make", "what"), FAULTS.items(), ids=[make.__name__ for make in FAULTS])
def test_what_is_wrong_is_not_timed(make, what, operation):
    wrong = Contender("wrong", [operation], with_transform(lambda case: make(case.n_steps, GAMMA)))
    rows = run(wrong, BY_NAME[REFERENCE], operations=[operation]).set_index("contender")
    assert rows.loc["wrong", "status"].startswith("wrong: ")
    assert what in rows.loc["wrong", "status"]
    assert pd.isna(rows.loc["wrong", "median_ms"])
    assert rows.loc[REFERENCE, "status"] == "ok"
    assert rows.loc[REFERENCE, "median_ms"] > 0


SAMPLING = Case("sampling", 64, 8, 0.2, 3, 17, 128)
SAMPLED = [
    CASE,
    Case("state", 64, 3, 0.1, 5),
    Case("streaming", 64, 1, 0.1, 3),
    SAMPLING,
    SAMPLING._replace(n_steps=6, p_done=0.05),
]


@pytest.mark.parametrize("name", [SB3, RING, SELECTING_RING, BUFFER_REFERENCE, COMPACT_REFERENCE])
@pytest.mark.parametrize("case", SAMPLED, ids=str)
def test_buffers_that_look_ahead_are_checked(name, case):
    rollout = make_rollout(case)
    contender = BY_NAME[name]
    operation = "sample" if case.batch else "store and sample"
    assert not check(case, rollout, contender.make(case, operation, CPU))
    other = case._replace(n_steps=case.n_steps + 1)
    assert ("next", "reward") in check(case, rollout, contender.make(other, operation, CPU))


class TakesAnotherFrameForTheNewest(VectorizedRing):
    def sample(self, batch):
        self.stored += self.n_steps
        return super().sample(batch)


class SamplesWholeWindows(VectorizedRing):
    def sample(self, batch):
        out = super().sample(8 * batch)
        whole = out[out["steps_to_next_obs"] == self.n_steps]
        return whole[torch.randperm(len(whole))[:batch]]


class SamplesOneEnvironment(VectorizedRing):
    def sample(self, batch):
        return super().sample(batch)[:8].repeat(batch // 8)


FAULTS_OF_SAMPLES = {
    TakesAnotherFrameForTheNewest: "next.reward",
    SamplesWholeWindows: "never sampled",
    SamplesOneEnvironment: "too few of them",
}


@pytest.mark.parametrize(("ring", "what"), FAULTS_OF_SAMPLES.items(), ids=[ring.__name__ for ring in FAULTS_OF_SAMPLES])
def test_samples_that_are_wrong_are_not_timed(ring, what):
    wrong = BY_NAME[RING]._replace(make=contenders.vectorized_ring(ring))
    rows = run(wrong, BY_NAME[GATHERS], case=SAMPLING, operations=["sample"]).set_index("contender")
    assert rows.loc[RING, "status"].startswith("wrong: ")
    assert what in rows.loc[RING, "status"]
    assert rows.loc[GATHERS, "status"] == "ok"


def test_row_gathers_read_a_frame_and_one_of_its_window():
    (part,) = Stream(make_rollout(SAMPLING), SAMPLING.frames)
    number = part["action"][..., 0].long()
    part["next", "reward"] = number.unsqueeze(-1)
    gathers = RowGathers(SAMPLING, CPU)
    gathers.store(part)
    first, second = (gathers.sample(SAMPLING.batch) for _ in range(2))
    assert not torch.equal(first["action"], second["action"])
    here, there = first["action"][:, 0].long(), first["next"]["reward"].squeeze(-1)
    assert torch.equal(here // 8, there // 8)
    assert set(((there - here) % 8).tolist()) == {0, 1, 2}
    env, frame = here // 8, here % 8
    assert torch.equal(first["observation"], part["observation"][env, frame])
    assert first["next"].keys() == set(part["next"].keys())


def test_a_documented_error_is_a_note():
    rows = run(BY_NAME[TORCHRL], case=CASE._replace(n_steps=1))
    assert rows["status"].tolist() == ["ok"]
    assert rows["note"].tolist() == ["nonterminal is wrong"]


RESULTS = Path(compare.__file__).parent / "results"


def test_the_documentation_quotes_the_results_that_are_committed():
    page = (RESULTS.parent.parent / "docs" / "benchmarks.md").read_text()
    rows = report.read(RESULTS / "cpu-compare.csv")
    assert report.excerpt(rows) in page
    assert report.table(report.ratios_of(rows)) in page
    assert report.table(report.sampling_of(rows)) in page
    slopes = report.table(growth.slopes(pd.read_csv(RESULTS / "cpu-growth.csv")))
    assert slopes in page
    assert slopes in (RESULTS / "cpu-growth.md").read_text()
    verdict = training_step.verdict(pd.read_csv(RESULTS / "cpu-training-step.csv"))
    assert verdict in page
    assert verdict in (RESULTS / "cpu-training-step.md").read_text()
    step = (RESULTS / "cpu-host.txt").read_text().split("\n\n")[2]
    assert step.startswith("A replay step") and step in page
    for kind in ("ratio", "n-steps", "bandwidth", "sample", "growth"):
        assert (RESULTS / f"cpu-{kind}.png").is_file()


@pytest.mark.parametrize(
    ("device", "transform", "buffer"),
    [("cpu", "ours (CPU)", "our buffer (CPU)"), ("cuda", "ours (GPU)", "our buffer (GPU)")],
)
def test_pictures_of_ratios_are_of_the_transform_and_the_buffer(device, transform, buffer):
    rows = report.read(RESULTS / f"{device}-compare.csv")
    rows = rows[rows["status"].eq("ok")]
    panels = plots.ratio_by_case(rows).axes
    assert [axes.get_title("left") for axes in panels] == [f"transform: {transform}", f"store and sample: {buffer}"]
    texts = {float(text.get_text()) for text in panels[1].texts if text.get_text()}
    ours = rows["contender"].isin(contenders.BUFFERS if device == "cpu" else [contenders.BUFFER_TRITON])
    ratios = rows.loc[rows["operation"].eq("store and sample") & ours, report.RATIO]
    assert (min(texts), max(texts)) == pytest.approx((ratios.min(), ratios.max()), rel=0.05)


def test_bars_of_samples_begin_at_zero():
    rows = report.read(RESULTS / "cpu-compare.csv")
    figure = plots.sampling(rows[rows["status"].eq("ok")])
    (axes,), (legend,) = figure.axes, figure.legends
    assert (axes.get_xscale(), axes.get_xlim()[0]) == ("linear", 0)
    assert "our buffer (CPU)" in [text.get_text() for text in legend.texts]
    widths = {bar.get_width() for bars in axes.containers for bar in bars}
    sampled = rows[rows["operation"].eq("sample") & rows["contender"].ne(GATHERS)]
    assert widths == set(sampled[report.ROWS].dropna())


def test_what_takes_too_long_to_check_is_a_row(monkeypatch):
    monkeypatch.setattr(gate, "SECONDS", 0.0)
    (status,) = run(BY_NAME[REFERENCE], case=CASE._replace(n_steps=10 * CASE.frames))["status"]
    assert re.fullmatch(r"skipped: a call takes .* s, and to check it takes \d+ more", status)


def test_what_fails_is_a_row():
    def fail(case):
        raise MemoryError("too large\nby far")

    rows = run(Contender("failing", ["transform"], with_transform(fail)), BY_NAME[CLONE])
    assert rows["status"].tolist() == ["failed: MemoryError: too large", "ok"]


def test_skipped_rows_say_why():
    rows = run(BY_NAME[TRITON], BY_NAME[COMPILED], BY_NAME[CLONE], left_out={TRITON: "not today"})
    assert rows["status"].tolist()[0] == "skipped: not today"
    assert "n=3 and p=0.01" in rows["status"].tolist()[1]
    assert BY_NAME[TRITON].obstacle(CASE, CPU)
    assert "NumPy" in BY_NAME[SB3].obstacle(CASE, torch.device("cuda"))


def test_cases_are_selected_by_name():
    assert len(select("all", CASES)) == len(CASES) == len(set(map(str, CASES)))
    assert {case.kind for case in select("streaming", CASES)} == {"streaming"}
    assert [str(case) for case in select(r"1x64 p=0 n=3$", CASES)] == ["state 1x64 p=0 n=3"]


def test_the_command_writes_files_and_redraws_them(tmp_path, capsys):
    arguments = ["--quick", "--device", "cpu", "--cases", "state|rows", "--operations", "transform", "extend"]
    compare.main([*arguments, "--seconds", "0.003", "--out", str(tmp_path / "first")])
    names = {f"cpu-{name}" for name in ("compare.csv", "compare.md", "ratio.png", "n-steps.png")}
    assert {path.name for path in (tmp_path / "first").iterdir()} == names | {"cpu-bandwidth.png"}
    rows = pd.read_csv(tmp_path / "first" / "cpu-compare.csv")
    assert set(rows.loc[rows["status"] == "ok", "contender"]) == {TORCHRL, REFERENCE, CLONE}
    assert rows.loc[rows["contender"] == TORCHRL, "torchrl_over_this"].eq(1).all()
    assert "geometric mean" in capsys.readouterr().out
    compare.main(["--redraw", str(tmp_path / "first" / "cpu-compare.csv"), "--out", str(tmp_path / "again")])
    for path in (tmp_path / "first").glob("*.md"):
        assert (tmp_path / "again" / path.name).read_text() == path.read_text()


def test_a_run_of_one_operation_has_files_of_its_own(tmp_path, capsys):
    compare.main(["--quick", "--device", "cpu", "--cases", "sampling", "--seconds", "0.003", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {f"cpu-sample.{suffix}" for suffix in ("csv", "md", "png")}
    rows = report.read(tmp_path / "cpu-sample.csv")
    timed = rows[rows["status"] == "ok"].set_index(["case", "contender"])
    for case, group in timed.groupby(level="case"):
        median = group.loc[case, "median_ms"]
        assert set(median.index) == {TORCHRL, BUFFER_REFERENCE, COMPACT_REFERENCE, SB3, RING, SELECTING_RING, GATHERS}
        ours = timed.loc[case, BUFFER_REFERENCE]
        assert ours["this_over_row_gathers"] == pytest.approx(median[BUFFER_REFERENCE] / median[GATHERS])
        for column, peer in (("fasttd3_over_this", RING), ("fasttd3_index_select_over_this", SELECTING_RING)):
            assert ours[column] == pytest.approx(median[peer] / median[BUFFER_REFERENCE])
        assert ours["sb3_over_this"] == pytest.approx(median[SB3] / median[BUFFER_REFERENCE])
    assert report.table(report.sampling_of(rows)) in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_launches_and_waits_of_a_gpu():
    x = torch.ones(1000, device="cuda")
    assert launches_and_syncs(lambda: x + 1) == (1, 0)
    launches, waits = launches_and_syncs(lambda: (x + 1).sum().item())
    assert launches >= 3
    assert waits >= 1


def test_slopes_are_exponents():
    rows = pd.DataFrame({"sweep": "n", "contender": TORCHRL, "value": [2, 4, 8, 16, 32, 64]})
    rows["median_ms"] = 3 * rows["value"] ** 1.5
    assert growth.slopes(rows)[["fitted over", "exponent"]].to_numpy().tolist() == [["8 to 64", "1.50"]]


def test_growth_keeps_the_number_of_dones():
    rollout = growth.with_episodes(make_rollout(Case("state", 3, 16, 0.5)), 4)
    assert rollout["next", "done"].sum(1).flatten().tolist() == [4, 4, 4]
    assert len(growth.with_keys(rollout, 5)["next"].select(*[f"observation {key}" for key in range(4)]).keys()) == 4


def test_a_training_iteration_and_its_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(training_step, "CASES", [Case("state", 8, 64, 0.01)])
    training_step.main(["--device", "cpu", "--seconds", "0.001", "--out", str(tmp_path)])
    rows = pd.read_csv(tmp_path / "cpu-training-step.csv")
    assert rows["updates"].tolist() == [1] * 3 + [2] * 3
    free = rows[rows["transform"] == training_step.NONE]
    assert free["limit"].eq(1).all()
    assert "would be" in (tmp_path / "cpu-training-step.md").read_text()
