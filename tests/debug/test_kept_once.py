"""``python -m multistep_triton doctor FILE``: whether the observations of a rollout can be kept once, and where not."""

import pytest
import torch
from rings import kept_once, make_stream
from tensordict import lazy_stack

from multistep_triton.debug.cli import main


def saved(tmp_path, data):
    torch.save(data, tmp_path / "rollout.pt")
    return ["doctor", str(tmp_path / "rollout.pt")]


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_a_rollout_that_can_be_kept_once(batch, tmp_path, capsys):
    assert main(saved(tmp_path, kept_once(make_stream(batch, 20, p_done=0.3)))) == 0
    assert capsys.readouterr().out.count("can be kept once") == 2


def test_a_rollout_of_other_keys(tmp_path, capsys):
    stream = kept_once(make_stream((3,), 20, p_done=0.3)).exclude(("next", "truncated"), ("next", "terminated"))
    stream["next", "agents"] = {"dead": stream["next", "done"]}
    command = saved(tmp_path, stream.exclude(("next", "done")))
    with pytest.raises(SystemExit):
        main(command)
    assert "('next', 'done')" in capsys.readouterr().err
    assert main([*command, "--done-key", "agents.dead", "--done-keys", "agents.dead"]) == 0


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("altered", [False, True])
def test_every_element_of_a_lazy_stack_is_read(altered, dim, tmp_path, capsys):
    stream = kept_once(make_stream((2,), 20, p_done=0.3))
    if altered:
        stream["next", "observation"][1] += 1
    assert main(saved(tmp_path, lazy_stack([*stream.unbind(dim)], dim))) == altered
    assert capsys.readouterr().out.count("can be kept once") == 2 - altered


def test_an_entry_of_another_dtype_or_shape_is_kept_twice(tmp_path, capsys):
    stream = kept_once(make_stream((2,), 20, p_done=0.3))
    stream["next", "observation"] = stream["next", "observation"].double()
    assert main(saved(tmp_path, stream)) == 1
    said = capsys.readouterr().out
    assert "('observation',): must be kept twice, as each frame has torch.float32 [" in said
    assert "('number',): can be kept once" in said


def test_the_first_frame_that_was_altered_is_named(tmp_path, capsys):
    stream = kept_once(make_stream((3,), 20, p_done=0.0))
    stream["observation"][1, 7] += 1
    assert main(saved(tmp_path, stream)) == 1
    said = capsys.readouterr().out
    assert "('number',): can be kept once" in said
    assert "('observation',): must be kept twice" in said
    assert "batch index (1,), t = 7" in said and "t = 6, which no flag ends" in said


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda data: data[0, 0], "frames [*B, T]"),
        (lambda data: data[:, :0], "frames [*B, T]"),
        (lambda data: data.exclude("observation", "number"), "both at the root and under 'next'"),
        (lambda data: data.exclude(("next", "done")), "done"),
        (lambda data: data.update({"next": {"done": data["next", "done"].float()}}), "must be bool"),
        (lambda data: data.to("meta"), "cannot be explained: "),
    ],
    ids=["no time", "no frames", "no twins", "no flag", "floats", "meta"],
)
def test_what_is_no_such_rollout_is_refused_in_a_line(alter, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exited:
        main(saved(tmp_path, alter(make_stream((3,), 20)).clone()))
    assert exited.value.code == 2
    assert message in capsys.readouterr().err


def test_no_json_is_made_of_a_file(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*saved(tmp_path, kept_once(make_stream((3,), 20))), "--json"])
    assert "argument --json: must be left out with FILE" in capsys.readouterr().err
