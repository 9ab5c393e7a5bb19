"""Whatever a rollout is made of comes out as it went in: nesting, names, dtypes, layouts, non-tensors."""

import numpy as np
import pytest
import torch
from rollouts import extend, make_rollout, window_ends
from tensordict import NonTensorData, NonTensorStack, TensorDict, lazy_stack, tensorclass
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement
from torchrl.envs.transforms import MultiStepTransform as TorchRLMultiStepTransform

from multistep_triton import MultiStep, MultiStepTransform, NStepReplayBuffer
from multistep_triton.debug.streams import run_verified
from multistep_triton.frames import Frames

pytestmark = pytest.mark.usefixtures("path")

FRAMES = 40
N_STEPS = 3


def at_window_ends(rollout, leaf):
    """``leaf`` at the end of the window of every emitted frame."""
    ends = window_ends(rollout["next", "done"].squeeze(-1), N_STEPS)
    rows = torch.meshgrid(*(torch.arange(size) for size in ends.shape), indexing="ij")[:-1]
    return leaf[(*rows, ends)].narrow(ends.ndim - 1, 0, FRAMES - N_STEPS)


def transformed(rollout, cuts=(17, 2, 21)):
    return extend(MultiStepTransform(N_STEPS, 0.9), rollout, cuts)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
def test_batch_dimensions_before_time(batch):
    rollout = make_rollout(batch, FRAMES)
    out = transformed(rollout)
    assert out.batch_size == (*batch, FRAMES - N_STEPS)
    assert torch.equal(out["next", "observation"], at_window_ends(rollout, rollout["next", "observation"]))


@pytest.mark.parametrize("batch", [(0,), (2, 0)], ids=str)
def test_no_environments(batch):
    out = transformed(make_rollout(batch, FRAMES))
    assert out.batch_size == (*batch, FRAMES - N_STEPS)
    assert out["next", "reward"].shape == (*batch, FRAMES - N_STEPS, 1)


def test_empty_extends_change_nothing():
    rollout = make_rollout((2,), FRAMES)
    transform = MultiStepTransform(N_STEPS, 0.9)
    assert transform.inv(rollout[:, :0]) is None
    assert transform.inv(rollout[:, :20]).shape == (2, 17)
    assert transform.inv(rollout[:, 20:20]) is None
    assert torch.equal(transform.inv(rollout[:, 20:])["observation"], rollout["observation"][:, 17:37])


def test_an_empty_extend_after_shrinking_emits_what_is_no_longer_held_back():
    rollout = make_rollout((2,), FRAMES)
    transform = MultiStepTransform(10, 0.9)
    transform.inv(rollout)
    transform.n_steps = 4
    out = transform.inv(rollout[:, :0])
    assert torch.equal(out["observation"], rollout["observation"][:, 30:36])


def test_a_single_frame_without_batch_dimensions():
    rollout = make_rollout((), FRAMES)
    transform = MultiStepTransform(N_STEPS, 0.9)
    parts = [transform.inv(frame) for frame in rollout]
    assert parts[:N_STEPS] == [None] * N_STEPS
    assert all(part.batch_size == () for part in parts[N_STEPS:])
    assert (torch.stack(parts[N_STEPS:]) == transformed(rollout)).all()


def test_nested_tensordicts_keep_their_batch_sizes_names_and_devices():
    rollout = make_rollout((2,), FRAMES)
    agents = TensorDict(
        {"position": torch.randn(2, FRAMES, 4, 2), "deep": {"id": torch.randint(9, (2, FRAMES, 4))}},
        batch_size=[2, FRAMES, 4],
        device=torch.get_default_device(),
        names=["env", "time", "agent"],
    )
    rollout["agents"], rollout["next", "agents"] = agents, agents + 1
    rollout.names = ["env", "time"]
    rollout["empty"] = TensorDict({}, [2, FRAMES])
    out = transformed(rollout)
    emitted = FRAMES - N_STEPS
    assert out.names == ["env", "time"]
    for nested in (out["agents"], out["next", "agents"]):
        assert nested.batch_size == (2, emitted, 4)
        assert nested.names == ["env", "time", "agent"]
        assert nested.device == rollout["observation"].device
    assert out["empty"].batch_size == (2, emitted)
    assert torch.equal(out["agents", "position"], agents["position"][:, :emitted])
    assert torch.equal(out["next", "agents", "deep", "id"], at_window_ends(rollout, agents["deep", "id"] + 1))


def test_tensorclasses_stay_tensorclasses():
    @tensorclass
    class Pose:
        position: torch.Tensor
        frame: str

    rollout = make_rollout((2,), FRAMES)
    pose = Pose(position=torch.randn(2, FRAMES, 3), frame="world", batch_size=[2, FRAMES])
    rollout["pose"], rollout["next", "pose"] = pose, pose.clone()
    out = transformed(rollout)
    assert type(out["pose"]) is type(out["next", "pose"]) is Pose
    assert out["next", "pose"].frame == "world"
    assert torch.equal(out["next", "pose"].position, at_window_ends(rollout, pose.position))


def test_a_tensorclass_without_room_for_what_is_written():
    @tensorclass
    class Next:
        reward: torch.Tensor
        done: torch.Tensor

    rollout = make_rollout((2,), FRAMES).select("observation", ("next", "reward"), ("next", "done"))
    expected = transformed(rollout)
    rollout["next"] = Next(**rollout["next"].to_dict(), batch_size=[2, FRAMES])
    out = transformed(rollout)
    assert type(out["next"]) is TensorDict
    assert (out == expected).all()
    storage = LazyTensorStorage(2 * FRAMES, ndim=2, device=torch.get_default_device())
    buffer = NStepReplayBuffer(n_steps=N_STEPS, gamma=0.9, storage=storage, sampler=SamplerWithoutReplacement())
    buffer.extend(rollout)
    sample = buffer.sample(2 * FRAMES)
    assert type(sample["next"]) is TensorDict and {"reward_orig", "done_orig"} <= {*sample["next"].keys()}


def test_one_non_tensor_for_all_frames():
    rollout = make_rollout((2,), FRAMES)
    rollout["task"] = rollout["next", "task"] = "walk to the " + "door"
    out = transformed(rollout)
    theirs = TorchRLMultiStepTransform(N_STEPS, 0.9).inv(rollout)
    for key in ("task", ("next", "task")):
        assert out[key] == theirs[key] == "walk to the door"
        assert isinstance(out.get(key), NonTensorData)
        assert out.get(key).batch_size == (2, FRAMES - N_STEPS)


def test_a_non_tensor_that_is_equal_and_not_the_same():
    transform, rollout, out = MultiStepTransform(1, 0.9), make_rollout((), 6), []
    for t, value in enumerate((0.0, -0.0, 0.0, 0, False, 0)):
        frame = rollout[t : t + 1]
        frame["value"] = NonTensorData(value)
        out.append(transform.inv(frame))
    assert [repr(each[0]["value"]) for each in out[1:]] == ["0.0", "-0.0", "0.0", "0", "False"]


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_a_non_tensor_for_every_frame(batch):
    rollout = make_rollout(batch, FRAMES)
    numbers = torch.arange(rollout.numel())

    def stack(first):
        return NonTensorStack(*(NonTensorData({"frame": first + int(i)}) for i in numbers)).view(rollout.batch_size)

    rollout["info"], rollout["next", "info"] = stack(0), stack(1000)
    out = transformed(rollout)
    numbers = numbers.view(rollout.batch_size)
    expected = numbers.narrow(len(batch), 0, FRAMES - N_STEPS)
    assert [entry.data["frame"] for entry in out.get("info").reshape(-1)] == expected.flatten().tolist()
    expected = at_window_ends(rollout, numbers) + 1000
    assert [entry.data["frame"] for entry in out.get(("next", "info")).reshape(-1)] == expected.flatten().tolist()


def test_a_non_tensor_that_changes_between_calls():
    rollout = make_rollout((2,), FRAMES)
    transform = MultiStepTransform(N_STEPS, 0.9)
    tasks = [np.zeros(2), np.ones(2), "text"]
    seen = []
    for task, part in zip(tasks, rollout.split([10, 10, 20], -1), strict=True):
        out = transform.inv(part.clone().set("task", NonTensorData(task, batch_size=part.batch_size)))
        seen += [entry.data for entry in out.get("task")[0].unbind(0)]
    assert [task if isinstance(task, str) else task.tolist() for task in seen] == (
        [[0.0, 0.0]] * 10 + [[1.0, 1.0]] * 10 + ["text"] * 17
    )


def test_non_tensors_with_more_batch_dimensions():
    rollout = make_rollout((2,), FRAMES)
    names = NonTensorStack(*(NonTensorData((i,)) for i in range(2 * FRAMES * 3))).view(2, FRAMES, 3)
    agents = TensorDict({"position": torch.randn(2, FRAMES, 3, 2), "team": "red"}, [2, FRAMES, 3])
    agents["name"] = names
    rollout["agents"], rollout["next", "agents"] = agents, agents.clone()
    out = transformed(rollout)
    numbers = torch.arange(2 * FRAMES * 3).view(2, FRAMES, 3)
    for key, expected in {
        "agents": numbers[:, : FRAMES - N_STEPS],
        ("next", "agents"): at_window_ends(rollout, numbers),
    }.items():
        nested = out[key]
        assert nested.get("name").batch_size == nested.get("team").batch_size == nested.batch_size
        assert [entry.data[0] for entry in nested.get("name").reshape(-1)] == expected.flatten().tolist()
        assert nested["team"] == "red"


def test_a_non_tensor_repeated_across_calls_is_held_once():
    rollout = make_rollout((2,), FRAMES)
    transform = MultiStepTransform(N_STEPS, 0.9)
    for part in rollout.split(10, -1):
        out = transform.inv(part.clone().set("task", "".join(["wa", "lk"])))
        assert isinstance(out.get("task"), NonTensorData)
        assert transform._carry.structure.objects == {("task",): ["walk"]}


def test_only_the_non_tensors_of_frames_held_back_are_kept():
    rollout = make_rollout((), FRAMES)
    rollout["info"] = NonTensorStack(*(NonTensorData((i,)) for i in range(FRAMES)))
    transform = MultiStepTransform(N_STEPS, 0.9)
    for part in rollout.split(10, -1):
        transform.inv(part)
        assert len(transform._carry.structure.objects["info",]) == N_STEPS
    assert transform.inv(rollout[:0]) is None


TEXT, LEAF, NODE = "text", torch.zeros(2, FRAMES), TensorDict({}, [2, FRAMES])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("gamma", TEXT), ("gamma", NODE), ("nonterminal", LEAF)),
        *((("next", "reward_orig"), TEXT), (("next", "reward_orig"), LEAF), (("next", "original_reward"), NODE)),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, torch.Tensor | TensorDict) else str(each),
)
def test_entries_of_the_names_that_are_written_are_replaced(key, value):
    rollout = make_rollout((2,), FRAMES)
    expected = transformed(rollout)
    out = transformed(rollout.clone().set(key, value))
    assert set(out.keys(True, True)) == set(expected.keys(True, True))
    assert torch.equal(out[key], expected[key])


def test_its_own_output_is_no_input():
    once, transform = transformed(make_rollout((2,), FRAMES)), MultiStepTransform(1, 0.5)
    with pytest.raises(ValueError, match=r"data must hold single steps, got n-step transitions"):
        transform.inv(once)
    assert transform.flush() is None


@pytest.mark.parametrize("stack_dim", [0, 1])
def test_lazily_stacked_rollouts(stack_dim):
    rollout = make_rollout((2,), FRAMES)
    rollout["task"] = "walk"
    lazy = lazy_stack(list(rollout.unbind(stack_dim)), stack_dim)
    out, expected = MultiStepTransform(N_STEPS, 0.9).inv(lazy), MultiStepTransform(N_STEPS, 0.9).inv(rollout)
    assert isinstance(out, TensorDict)
    for key in expected.exclude("task").keys(True, True):
        assert torch.equal(out[key], expected[key]), key


def test_uint8_pixels():
    rollout = make_rollout((2,), FRAMES)
    pixels = torch.randint(256, (2, FRAMES, 4, 12, 12), dtype=torch.uint8)
    rollout["pixels"], rollout["next", "pixels"] = pixels, 255 - pixels
    out = transformed(rollout)
    assert out["next", "pixels"].dtype == torch.uint8
    assert torch.equal(out["pixels"], pixels[:, :-N_STEPS])
    assert torch.equal(out["next", "pixels"], at_window_ends(rollout, 255 - pixels))


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.int8, torch.uint16, torch.uint64, torch.float8_e4m3fn, torch.float16, torch.complex128],
    ids=str,
)
def test_dtypes_under_next(dtype):
    rollout = make_rollout((2,), FRAMES)
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (2, FRAMES, 5 * size), dtype=torch.uint8)
    rollout["next", "value"] = raw.view(dtype)
    out = transformed(rollout)["next", "value"]
    assert out.dtype == dtype
    assert torch.equal(out.view(torch.uint8), at_window_ends(rollout, raw))


def test_nan_payloads_survive():
    rollout = make_rollout((2,), FRAMES)
    payloads = torch.arange(2 * FRAMES, dtype=torch.int32).view(2, FRAMES) + 0x7FC00000
    rollout["value"] = rollout["next", "value"] = payloads.view(torch.float32)
    out = transformed(rollout)
    assert torch.equal(out["value"].view(torch.int32), payloads[:, :-N_STEPS])
    assert torch.equal(out["next", "value"].view(torch.int32), at_window_ends(rollout, payloads))


def test_time_major_strides():
    rollout = make_rollout((4,), FRAMES)
    time_major = rollout.apply(lambda leaf: leaf.transpose(0, 1).contiguous().transpose(0, 1))
    assert not time_major["observation"].is_contiguous()
    out, expected = transformed(time_major), transformed(rollout)
    assert (out == expected).all()


def test_several_reward_keys_keep_their_originals_apart():
    rollout = make_rollout((2,), FRAMES)
    rollout["next", "bonus"] = torch.ones(2, FRAMES, 1)
    rollout["next", "agent", "reward"] = torch.ones(2, FRAMES, 3, dtype=torch.float64)
    keys = ["reward", "bonus", ("agent", "reward")]
    out = MultiStepTransform(2, 0.5, reward_keys=keys).inv(rollout)
    assert ("next", "original_reward") not in out.keys(True)
    passed_on = MultiStepTransform(2, 0.5, reward_keys=keys).inv(
        rollout.clone().set(("next", "original_reward"), "mine")
    )
    assert passed_on["next", "original_reward"] == "mine"
    for key in ("reward", "bonus", ("agent", "reward")):
        path = (key,) if isinstance(key, str) else key
        original = out[("next", *path[:-1], f"{path[-1]}_orig")]
        assert torch.equal(original, rollout["next", key][:, :-2])
    alone = rollout["next", "done"].squeeze(-1)[:, :-2]
    assert torch.equal(out["next", "bonus"].squeeze(-1), torch.where(alone, 1.0, 1.5))
    assert out["next", "agent", "reward"].dtype == torch.float64
    assert torch.equal(out["next", "agent", "reward"], out["next", "bonus"].double().expand(2, FRAMES - 2, 3))


def test_a_shared_done_with_a_reward_per_agent():
    rollout = make_rollout((2,), FRAMES)
    rollout["next", "reward"] = torch.randn(2, FRAMES, 3, 1)
    out = transformed(rollout)
    for agent in range(3):
        alone = rollout.clone()
        alone["next", "reward"] = rollout["next", "reward"][:, :, agent]
        assert torch.equal(out["next", "reward"][:, :, agent], transformed(alone)["next", "reward"])


def test_a_done_key_outside_done_keys_stays_as_it_came():
    rollout = make_rollout((2,), FRAMES)
    rollout["next", "end"] = rollout["next", "done"].clone()
    out = MultiStepTransform(N_STEPS, 0.9, done_key="end").inv(rollout)
    assert torch.equal(out["next", "end"], rollout["next", "end"][:, :-N_STEPS])


def test_gamma_can_change_between_calls():
    rollout = make_rollout((2,), FRAMES, p_done=0.0)
    transform = MultiStepTransform(2, 0.5)
    assert (transform.inv(rollout[:, :20])["gamma"] == 0.25).all()
    transform.gamma = 1
    assert (transform.inv(rollout[:, 20:])["gamma"] == 1.0).all()


def test_key_lists_can_be_changed_in_place():
    rollout = make_rollout((2,), FRAMES)
    rollout["next", "bonus"] = torch.ones(2, FRAMES, 1)
    transform = MultiStepTransform(2, 0.5)
    transform.reward_keys.append("bonus")
    assert ("next", "bonus_orig") in transform.inv(rollout).keys(True)


def test_the_default_device_does_not_matter():
    rollout = make_rollout((2,), FRAMES).set("task", "walk")
    expected = transformed(rollout)
    with torch.device("meta"):
        out = transformed(rollout)
        results = [run_verified(seed, torch.device("cpu")) for seed in (3, 9)]
        buffer = NStepReplayBuffer(n_steps=2, gamma=0.9, storage=LazyTensorStorage(12, ndim=2))
        index = buffer.extend(rollout[:, :0])
    assert (out == expected).all()
    assert [each.difference for each in results] == [None, None]
    assert index.is_cpu and index.shape == (0, 2)


def test_gradients_flow_through_the_reference():
    reward = torch.ones(1, 4, requires_grad=True)
    data = TensorDict({"next": {"reward": reward, "done": torch.zeros(1, 4, dtype=torch.bool)}}, [1, 4])
    transform = MultiStepTransform(2, 0.5, backend="reference")
    transform.inv(data)["next", "reward"].sum().backward()
    assert not any(leaf.requires_grad for leaf in transform._carry.leaves.values())
    assert reward.grad.tolist() == [[1.0, 1.5, 0.5, 0.0]]


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)])
def test_no_rows_and_a_leaf_without_elements(shape):
    next_ = {
        "nothing": torch.zeros(*shape, 0),
        "reward": torch.zeros(shape),
        "done": torch.zeros(shape, dtype=torch.bool),
    }
    data = TensorDict({"next": next_}, shape)
    out = MultiStepTransform(2, 0.9).inv(data)
    assert out is None if shape[1] <= 2 else out.shape == (shape[0], shape[1] - 2)
    assert MultiStep(0.9, 2)(data).shape == shape


def test_what_is_found_out_about_a_layout_has_a_bound():
    data = TensorDict({"next": {"reward": torch.zeros(4), "done": torch.zeros(4, dtype=torch.bool)}}, [4])
    multi_step, layout = MultiStep(0.9, 2), Frames.read(data).structure.layout
    for i in range(300):
        multi_step.mask_key = f"mask {i}"
        multi_step(data)
        assert len(layout._found) <= 256
    assert Frames.read(data).structure.layout is layout


def test_flags_as_they_came_follow_the_entries_in_the_order_of_done_keys():
    rollout = make_rollout((2,), FRAMES)
    rollout["next", "done"] = rollout["next"].pop("done")
    out = MultiStepTransform(N_STEPS, 0.9, done_at="end").inv(rollout)
    keys = [key for key in out["next"].keys() if key.endswith("_orig")]  # noqa: SIM118
    assert keys == ["done_orig", "truncated_orig", "terminated_orig", "reward_orig"]
