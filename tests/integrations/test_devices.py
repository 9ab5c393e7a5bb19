"""Data and storages on a GPU, which is simulated: what comes of them is what comes of the CPU alone."""

import copy
from functools import partial
from itertools import count, product

import pytest
import torch
from rings import TRAJ_KEY, kept_once, make_stream
from rollouts import extend
from saving import WAYS, loading_is_told
from simulated_cuda import CPU, GPU, NO_GPU, simulated_cuda
from tensordict import TensorDict, lazy_stack
from torch import Tensor
from torchrl.data import LazyTensorStorage, TensorStorage

from multistep_triton import MultiStep, MultiStepTransform, NStepReplayBuffer, gather_future, n_step_return

pytestmark = NO_GPU
ENVS, SLOTS, FRAMES = 2, 6, 11
OPTIONS = {
    "plain": {},
    "range": {"n_steps": (1, 3)},
    "compact": {"compact": True, "end_slots": 6},
    "narrow": {"compact": True, "end_slots": 6, "store_as": {"observation": torch.float16}},
    "capturable": {"capturable": True},
}
BACKENDS = pytest.mark.parametrize("backend", ["reference", "auto"], ids=["reference", "kernels"])
TOLD = pytest.mark.parametrize("told", [True, False], ids=["told", "untold"])
# A discount that no call has had before.
NEW_GAMMA = (1 / k for k in count(3))
READ = [*(("next", name) for name in ("done", "truncated", "reward", "observation")), ("mask",), TRAJ_KEY]


@pytest.fixture
def gpu():
    with simulated_cuda() as simulation:
        yield simulation


def make_data(device=CPU, told=True, **arguments):
    """A stream of rewards whose sums are exact, in a tensordict that is told its device or not."""
    data = kept_once(make_stream((ENVS,), FRAMES, **arguments))
    data["next", "reward"] = torch.arange(data.numel()).float().view(*data.shape, 1)
    data = data.to(device)
    return data if told else data.clear_device_()


def make(device, **arguments):
    storage = LazyTensorStorage(ENVS * SLOTS, ndim=2, device=device)
    return NStepReplayBuffer(**{"n_steps": 3, "gamma": 0.5, "batch_size": 64, "storage": storage, **arguments})


def extended(buffer, data, cuts):
    """Where calls of ``cuts`` frames were stored, all that is stored then, and samples of it."""
    torch.manual_seed(0)
    index = torch.cat([buffer.extend(part).cpu() for part in data.split(cuts, -1)])
    return {"index": index, "stored": buffer.storage[:], "sample": buffer.sample()}


def every_frame(sample):
    """Of each frame that was drawn, one sample."""
    number = sample["number"].tolist()
    return sample[torch.tensor([number.index(each) for each in sorted({*number})])]


def assert_equal(actual, expected, device):
    """The same entries, of which those that were sampled or computed are on the device."""
    actual, expected = TensorDict(actual), TensorDict(expected)
    assert set(actual.keys(True, True)) == set(expected.keys(True, True))
    for key, leaf in actual.items(True, True):
        assert "sample" not in key or leaf.device == device, key
        assert torch.equal(leaf.cpu(), expected[key].cpu()), key


# The kernels take their time in the interpreter.
PLACES = [
    *(("reference", *place) for place in product((GPU, CPU), (True, False), ("cuda:0", "auto", "cpu"))),
    *(("auto", *place) for place in ((GPU, True, "cuda:0"), (GPU, False, "auto"), (CPU, False, "cuda:0"))),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("backend", "device", "told", "storage"), PLACES, ids=str)
def test_a_buffer(gpu, backend, device, told, storage, options):
    def run(storage, data):
        results = extended(make(storage, backend=backend, **OPTIONS[options]), data, [3, 1, 4, 3])
        return results | {"sample": every_frame(results["sample"])} if options == "capturable" else results

    results = run(storage, make_data(device, told))
    assert not gpu.mixed and bool(gpu.launches) == (backend == "auto")
    assert_equal(results, run("cpu", make_data()), device if storage == "auto" else torch.device(storage))


@TOLD
@BACKENDS
def test_a_storage_of_data(gpu, backend, told):
    def run(device):
        data = make_data(device, told)[0]
        buffer = make("cpu", backend=backend, storage=TensorStorage(data[:SLOTS].clone()))
        return extended(buffer, data[SLOTS:], [1, 4])

    assert_equal(run(GPU), run(CPU), GPU)
    assert not gpu.mixed


@TOLD
@BACKENDS
def test_transforms_and_functions(gpu, backend, told):
    def run(device):
        data = make_data(device, told, traj=True, mask=True)
        streamed = extend(MultiStepTransform(3, 0.5, backend=backend), data, [4, 1, 1, 5])
        out = n_step_return(data["next", "reward"], data["next", "done"], gamma=0.5, n_steps=3, backend=backend)
        gathered = gather_future(data["observation"], out.steps, backend=backend)
        processed = MultiStep(0.5, 3, backend=backend)(data)
        return {"sample": {"stream": streamed, "post": processed, "gathered": gathered, **out._asdict()}}

    assert_equal(run(GPU), run(CPU), GPU)
    assert not gpu.mixed and bool(gpu.launches) == (backend == "auto")


def waits_of(gpu, call):
    """What the host waits for in a call after three like it."""
    for k in range(3):
        call(k)
    gpu.waits.clear()
    call(3)
    return gpu.waits


def copies_powers(waits):
    """Of each gamma and n the powers are copied once, or by the reference in each call."""
    return {what for what, _ in waits} <= {"copy cpu -> cuda:0"} and len(waits) <= 2


def put(owner, **arguments):
    for name, value in arguments.items():
        setattr(owner, name, value)
    return owner


# The reference looks on the host where ends are kept and how far a device's cursor is.
@pytest.mark.parametrize(
    ("backend", "options"), [("reference", "plain"), ("reference", "range"), *(("auto", each) for each in OPTIONS)]
)
def test_warm_calls_of_a_buffer_wait_for_nothing(gpu, backend, options):
    gpu.executes = False
    data = make_data(GPU, False)
    buffer = make("cuda:0", backend=backend, gamma=next(NEW_GAMMA), **OPTIONS[options])
    extended(buffer, data, [3, 1, 1, 6])
    assert not waits_of(gpu, lambda k: buffer.extend(data[:, k : k + 1]))
    assert not waits_of(gpu, lambda k: buffer.sample())
    assert not waits_of(gpu, lambda k: buffer.sample(n_steps=2))
    assert copies_powers(waits_of(gpu, lambda k: buffer.sample(n_steps=(1, k + 2))))
    assert copies_powers(waits_of(gpu, lambda k: put(buffer, gamma=next(NEW_GAMMA)).sample()))
    assert copies_powers(waits_of(gpu, lambda k: put(buffer, n_steps=k + 1).sample()))


@BACKENDS
def test_warm_calls_without_a_buffer_wait_for_nothing(gpu, backend):
    gpu.executes = False
    data, transform = make_data(GPU), MultiStepTransform(3, 0.5, backend=backend)
    reward, done = data["next", "reward"], data["next", "done"]

    def functions(gamma, n_steps):
        out = n_step_return(reward, done, gamma=gamma, n_steps=n_steps, backend=backend)
        if backend == "auto":  # the reference looks whether the steps lie within their rows
            gather_future(reward, out.steps)

    for part in (data, data[:, :1]):
        waits = waits_of(gpu, lambda k, part=part: transform.inv(part))
        assert not waits or (backend == "reference" and copies_powers(waits))
        assert copies_powers(waits_of(gpu, lambda k, part=part: put(transform, gamma=next(NEW_GAMMA)).inv(part)))
        assert copies_powers(waits_of(gpu, lambda k, part=part: put(transform, n_steps=k + 1).inv(part)))
    assert copies_powers(waits_of(gpu, lambda k: MultiStep(next(NEW_GAMMA), 3, backend=backend)(data)))
    assert copies_powers(waits_of(gpu, lambda k: functions(next(NEW_GAMMA), k + 1)))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("device", "storage"), [(GPU, CPU), (CPU, GPU)], ids=str)
def test_data_of_another_device_is_copied_once(gpu, device, storage, options):
    gpu.executes = False
    # Where data tell their device, torchrl copies the index to them, too.
    data, buffer = make_data(device, False), make(storage, **OPTIONS[options])
    waits = waits_of(gpu, lambda k: buffer.extend(data[:, k : k + 1]))
    assert {what for what, _ in waits} <= {f"copy {device} -> {storage}"}
    assert len(waits) == len([*data.keys(True, True)])


def to_cpu_(state):
    for key, each in state.items():
        state[key] = to_cpu_(each) if isinstance(each, dict) else each.cpu() if isinstance(each, Tensor) else each
    return state


def through_the_cpu(buffer, make):
    """As ``torch.load`` with ``map_location`` does it."""
    resumed = make()
    resumed.load_state_dict(to_cpu_(copy.deepcopy(buffer.state_dict())))
    return resumed


RESUMED = {"dumps": WAYS["dumps"], "state_dict": WAYS["state_dict"], "map_location": through_the_cpu}


@loading_is_told
@pytest.mark.parametrize("way", RESUMED)
@pytest.mark.parametrize(
    ("backend", "told", "options"),
    [*product(["reference"], [True, False], ["plain", "narrow", "capturable"]), ("auto", False, "narrow")],
)
def test_a_resumed_buffer(gpu, backend, told, options, way):
    new, data = partial(make, "cuda:0", backend=backend, **OPTIONS[options]), make_data(GPU, told)
    buffer = new()
    buffer.extend(data[:, :6]), buffer.extend(data[:, 6:8])
    resumed = RESUMED[way](buffer, new)
    assert_equal(*(extended(each, data[:, 8:], [2, 1]) for each in (resumed, buffer)), GPU)
    assert not gpu.mixed


@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
@pytest.mark.parametrize("entry", READ, ids=" ".join)
@BACKENDS
def test_what_windows_read_is_on_one_device(gpu, backend, entry, other):
    data, transform = make_data(GPU, False, traj=True, mask=True), MultiStepTransform(3, 0.5, backend=backend)
    data[entry] = data[entry].to(other)
    for part in (data, data[:, :1]):
        with pytest.raises(ValueError, match=rf"'{entry[-1]}'.* got (cuda:0|{other})"):
            transform.inv(part)
    assert transform.flush() is None


@pytest.mark.parametrize("cuts", [[11], [1] * 11], ids=len)
def test_root_entries_may_be_elsewhere(gpu, cuts):
    data, mixed = make_data(), make_data(GPU, False)
    mixed.update(data.select("observation", "action").clear_device_())
    out, expected = (extend(MultiStepTransform(3, 0.5, backend="reference"), each, cuts) for each in (mixed, data))
    assert_equal(out, expected, GPU)
    assert out["observation"].is_cpu and out["next", "observation"].is_cuda


def test_a_group_with_flags_of_its_own_may_be_elsewhere(gpu):
    def run(device):
        data = make_data(GPU if device == CPU else CPU, False)
        data["next", "mice"] = data["next"].select("reward", "done", "observation").to(device).clear_device_()
        transform = MultiStepTransform(3, 0.5, reward_keys=["reward", ("mice", "reward")], backend="reference")
        return extend(transform, data, [4, 1, 6])

    out, expected = run(CPU), run(GPU)
    assert out["next", "mice", "reward"].is_cpu and expected["next", "reward"].is_cpu
    assert_equal(out, expected, GPU)


@pytest.mark.parametrize("devices", [(CPU, GPU), (GPU, CPU)], ids=str)
@pytest.mark.parametrize("storage", ["cpu", "cuda:0"])
def test_frames_of_several_devices_in_a_lazy_stack(gpu, storage, devices):
    data, buffer = make_data(), make(storage)
    parts = [data[:, k].to(device).clear_device_() for k, device in enumerate(devices)]
    buffer.extend(lazy_stack(parts, 1))
    assert_equal(buffer.storage[:].transpose(0, 1).exclude("index"), data[:, :2], torch.device(storage))


@pytest.mark.parametrize("devices", [(CPU, GPU), (GPU, CPU)], ids=str)
def test_a_frame_that_waits_is_stored_where_the_next_one_is(gpu, devices):
    data, buffer = make_data(), make("auto", compact=True)
    data["final"] = data["next"].select("observation")
    del data["next", "observation"]
    for k, device in enumerate(devices):
        buffer.extend(data[:, k : k + 1].to(device).clear_device_())
    assert buffer.sample()["next", "observation"].device == devices[1]


def test_frames_stay_where_they_are_when_others_are_loaded(gpu):
    data, buffer = make_data(GPU), make("cpu", storage=TensorStorage(make_data(GPU)[0, :SLOTS]))
    entries, expected = buffer.storage[:], buffer.sample()
    buffer.load_state_dict(buffer.state_dict())
    buffer.extend(data[1, :1])
    assert (
        buffer.sample()["observation"].device == expected["observation"].device == entries["observation"].device == GPU
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_the_default_device_does_not_matter(gpu, options):
    def run():
        buffer = make("cpu", storage=LazyTensorStorage(SLOTS), **OPTIONS[options])
        for frame in data[:3]:
            buffer.add(frame)
        return extended(buffer, data[3:], [1, 6, 1])

    data = make_data()[0]
    expected = run()
    with GPU:
        results = run()
    assert not gpu.waits
    assert_equal(results, expected, CPU)
