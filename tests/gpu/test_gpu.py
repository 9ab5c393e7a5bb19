"""What only a GPU can show: no synchronization, launches as the profiler counts them, CUDA graphs, other devices."""

import copy
import io
import pickle

import pytest
import torch
from rings import Drawn
from rollouts import make_rollout
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement

from multistep_triton import MultiStep, MultiStepTransform, NStepReplayBuffer, gather_future, n_step_return
from multistep_triton.backends import resolve_backend

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

# What torch says of its own tools.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "Synchronization debug mode is a prototype",
        "The CUDA Graph is empty",
        ".*have lost what comes after",
    )
]
N_STEPS = [3, 20]
KERNELS = ["n_step_windows_kernel", "n_step_rows_kernel"]


def rollout_on(device, frames=40):
    return make_rollout((16,), frames).to(device)


def ran_on_gpu(profile):
    """The names of kernels and copies, in the order in which they began."""
    ran = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name for event in sorted(ran, key=lambda event: event.time_range.start)]


def same(ours, expected):
    for key in expected.keys(True, True):
        if key == ("next", "reward"):
            torch.testing.assert_close(ours[key].cpu(), expected[key].cpu())
        else:
            assert torch.equal(ours[key].cpu(), expected[key].cpu()), key


def test_auto_takes_the_kernels_on_a_gpu():
    tensor = torch.ones(2, 5, device="cuda")
    assert resolve_backend("auto", [tensor]) == "triton"
    assert resolve_backend("auto", [tensor.requires_grad_()]) == "reference"


@pytest.mark.parametrize("n_steps", N_STEPS)
def test_a_replay_buffers_stream(n_steps):
    ours, expected = MultiStepTransform(n_steps, 0.97), MultiStepTransform(n_steps, 0.97)
    for part in make_rollout((16,), 100).split([40, 1, 0, 19, 40], -1):
        out, reference = ours.inv(part.cuda()), expected.inv(part)
        assert (out is None) == (reference is None)
        if out is not None:
            assert {leaf.device.type for leaf in out.values(True, True)} == {"cuda"}
            same(out, reference)


@pytest.mark.parametrize("n_steps", N_STEPS)
def test_nothing_waits_for_the_gpu(n_steps):
    transform, rollout = MultiStepTransform(n_steps, 0.97), rollout_on("cuda")
    for _ in range(3):
        transform._inv_call(rollout)
    reward, done = rollout["next", "reward"], rollout["next", "done"]
    steps = n_step_return(reward, done, gamma=0.9, n_steps=n_steps).steps
    gather_future(rollout["observation"], steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        transform._inv_call(rollout)
        gather_future(rollout["observation"], n_step_return(reward, done, gamma=0.9, n_steps=n_steps).steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("n_steps", [3, 20])
def test_launches_as_the_profiler_counts_them(n_steps):
    transform, rollout = MultiStepTransform(n_steps, 0.97), rollout_on("cuda")
    for _ in range(3):
        transform._inv_call(rollout)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        transform._inv_call(rollout)
        torch.cuda.synchronize()
    ran = ran_on_gpu(profile)
    assert ran == KERNELS


def test_a_cuda_graph_would_repeat_what_it_captured():
    transform, buffer, rollout = MultiStepTransform(3, 0.97), buffer_on("cuda"), rollout_on("cuda")
    transform.inv(rollout)
    held = transform._buffer
    for call in (lambda: transform.inv(rollout), lambda: buffer.extend(rollout), lambda: buffer.sample(4)):
        with (
            pytest.raises(RuntimeError, match="outside of the capture of a CUDA graph"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            call()
    torch.cuda.synchronize()
    assert (transform._buffer == held).all()
    # what holds nothing back can be captured
    reward, done = rollout["next", "reward"], rollout["next", "done"]
    expected, graph = n_step_return(reward, done, gamma=0.97, n_steps=3), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = n_step_return(reward, done, gamma=0.97, n_steps=3)
    graph.replay()
    assert all(map(torch.equal, out, expected))


def test_a_window_that_goes_on_on_another_stream():
    rollout, transform, expected = rollout_on("cuda"), MultiStepTransform(3, 0.97), MultiStepTransform(3, 0.97)
    # Long calls, that write what they hold back into two rings in turn, and short ones, that write into free slots.
    cuts, streams, outs = [5, 6, 7, 2, 1, 9, 10], [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for i, part in enumerate(rollout.split(cuts, -1)):
        with torch.cuda.stream(streams[i % 2]):
            torch.cuda._sleep(10**6)  # so that the frames held back are late
            outs.append(transform.inv(part))
            # which takes the memory that they were in, if that is free
            junk = [torch.full_like(part["observation"], 7.0) for _ in range(8)]
    torch.cuda.synchronize()
    del junk
    for part, out in zip(rollout.split(cuts, -1), outs, strict=True):
        same(out, expected.inv(part))


def through_a_file(transform, device):
    file = io.BytesIO()
    torch.save(transform.state_dict(), file)
    file.seek(0)
    other = MultiStepTransform(1, 0.5)
    other.load_state_dict(torch.load(file, map_location=device))
    return other.to(device)


DUPLICATES = {
    "deep copy": lambda transform, device: copy.deepcopy(transform).to(device),
    "pickle": lambda transform, device: pickle.loads(pickle.dumps(transform)).to(device),
    "clone": lambda transform, device: transform.clone().to(device),
    "state": through_a_file,
}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
def test_a_stream_goes_on_in_a_copy_here_or_on_the_cpu(duplicate, device):
    transform, expected = MultiStepTransform(3, 0.97), MultiStepTransform(3, 0.97)
    first, then = make_rollout((16,), 40).split([25, 15], -1)
    transform.inv(first.cuda()), expected.inv(first)
    other = duplicate(transform, device)
    out, theirs = other.inv(then.to(device)), expected.inv(then)
    assert {leaf.device.type for leaf in out.values(True, True)} == {device}
    same(out, theirs)
    same(transform.inv(then.cuda()), theirs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one():
    ours, expected = MultiStepTransform(3, 0.97), MultiStepTransform(3, 0.97)
    rollout = make_rollout((4,), 40)
    same(ours.inv(rollout.to("cuda:1")), expected.inv(rollout))
    assert torch.cuda.current_device() == 0


def test_on_another_stream():
    rollout, expected = rollout_on("cuda"), MultiStepTransform(3, 0.97).inv(make_rollout((16,), 40))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = MultiStepTransform(3, 0.97).inv(rollout)
    torch.cuda.current_stream().wait_stream(stream)
    same(out, expected)


def buffer_on(device, n_steps=3, slots=20, sampler=None, **arguments):
    """A ring of 20 frames of 16 environments that wrapped around."""
    storage = LazyTensorStorage(16 * slots, ndim=2, device=device)
    buffer = NStepReplayBuffer(n_steps=n_steps, gamma=0.97, storage=storage, sampler=sampler, **arguments)
    for part in make_rollout((16,), 33).split([15, 1, 17], -1):
        buffer.extend(part.to(device))
    return buffer


def loaded(buffer, n_steps=3, **arguments):
    """A buffer of other arguments that holds the same."""
    storage = LazyTensorStorage(320, ndim=2, device="cuda")
    other = NStepReplayBuffer(n_steps=n_steps, gamma=0.97, storage=storage, **arguments)
    other.load_state_dict(copy.deepcopy(buffer.state_dict()))
    return other


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda buffer: pickle.loads(pickle.dumps(buffer))])
def test_a_copy_of_a_buffer(duplicate):
    buffer = buffer_on("cuda", sampler=SamplerWithoutReplacement(shuffle=False))
    same(duplicate(buffer).sample(320), buffer.sample(320))


def test_buffers_of_other_dimensions_in_one_process():
    for batch in ((), (4,), (2, 2), ()):
        rollout, samples = make_rollout(batch, 12), []
        for device in ("cuda", "cpu"):
            storage = LazyTensorStorage(rollout.numel(), ndim=rollout.ndim, device=device)
            sampler = SamplerWithoutReplacement(shuffle=False)
            buffer = NStepReplayBuffer(n_steps=3, gamma=0.97, storage=storage, sampler=sampler)
            buffer.extend(rollout.to(device))
            samples.append(buffer.sample(rollout.numel()))
        same(*samples)


@pytest.mark.parametrize("n_steps", N_STEPS)
def test_every_frame_of_a_ring(n_steps):
    ours, expected = (
        buffer_on(device, n_steps, sampler=SamplerWithoutReplacement(shuffle=False)).sample(320)
        for device in ("cuda", "cpu")
    )
    assert {leaf.device.type for leaf in ours.values(True, True)} == {"cuda"}
    same(ours, expected)


@pytest.mark.parametrize("n_steps", [*N_STEPS, (1, 20)])
def test_a_sample_waits_for_nothing(n_steps):
    buffer = buffer_on("cuda", n_steps)
    buffer.sample(64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        buffer.sample(64)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("n_steps", [3, (1, 3), 20])
def test_launches_of_a_sample_as_the_profiler_counts_them(n_steps):
    buffer = buffer_on("cuda", n_steps)
    buffer.sample(64)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        buffer.sample(64)
        torch.cuda.synchronize()
    ran = ran_on_gpu(profile)
    assert [name for name in ran if name in KERNELS] == KERNELS
    # Besides, frames are drawn, and n, if it is.
    assert len(ran) - len(KERNELS) == (2 if isinstance(n_steps, tuple) else 1)


def test_launches_of_storing_as_the_profiler_counts_them():
    buffer, frame = buffer_on("cuda"), rollout_on("cuda", 1)
    for _ in range(3):
        buffer.extend(frame)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            buffer.extend(frame)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert ran_on_gpu(profile) == ["store_rows_kernel"]


@pytest.mark.parametrize(
    "arguments", [{}, {"n_steps": (1, 4)}, {"outputs": ["observation", "next", "gamma"]}, {"compact": True}], ids=str
)
def test_a_step_in_a_cuda_graph(arguments):
    """Captured once and replayed across many wraps, it stores what a usual buffer does, and samples right."""
    buffer, usual = buffer_on("cuda", **arguments, capturable=True), buffer_on("cuda", **arguments)
    # What is replayed writes where the capture did.
    frame, stream = rollout_on("cuda", 1), rollout_on("cuda", 200)
    usual.extend(frame), buffer.extend(frame)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        buffer.extend(frame), buffer.sample(64)
        usual.extend(frame)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        buffer.extend(frame)
        sample = buffer.sample(64)
    drawn = []
    for t in range(200):
        frame.copy_(stream[:, t : t + 1])
        usual.extend(frame)
        graph.replay()
        drawn.append(sample["gamma"].sum() + sample["observation"].sum())
        if t % 20 == 0:
            assert len(buffer) == len(usual) == 320
            assert (buffer[:] == usual[:]).all()
            loaded(usual, backend="verify", compact=usual.compact).sample(64)
    assert len(set(torch.stack(drawn).tolist())) > 150
    with pytest.raises(RuntimeError, match="outside of the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        len(buffer)
    # Outside of the graph it goes on.
    usual.extend(stream[:, :5]), buffer.extend(stream[:, :5])
    assert (buffer[:] == usual[:]).all()


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("n_steps", N_STEPS)
def test_what_a_graph_samples_is_what_is_sampled_of_the_same_draws(n_steps, compact):
    buffer, frame = buffer_on("cuda", n_steps, capturable=True, compact=compact), rollout_on("cuda", 1)
    stream = rollout_on("cuda", 50)
    for _ in range(2):
        buffer.extend(frame), buffer.sample(64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        buffer.extend(frame)
        sample = buffer.sample(64)
    for t in range(50):
        frame.copy_(stream[:, t : t + 1])
        graph.replay()
        drawn = Drawn(sample["index"].unbind(-1))
        usual = loaded(buffer, n_steps, sampler=drawn, backend="reference", compact=compact)
        same(sample, usual.sample(64))


def test_samples_of_a_storage_on_the_cpu_are_pinned():
    assert buffer_on("cpu", pin_memory=True).sample(64)["next", "observation"].is_pinned()


def test_offsets_of_a_storage_beyond_32_bits():
    buffer = NStepReplayBuffer(
        n_steps=3,
        gamma=0.9,
        backend="verify",
        storage=LazyTensorStorage(9, device="cuda"),
        sampler=SamplerWithoutReplacement(shuffle=False),
    )
    rollout = make_rollout((), 12).to("cuda")
    rollout["next", "pixels"] = torch.randint(256, (12, 2**28), dtype=torch.uint8, device="cuda")
    buffer.extend(rollout)
    assert buffer.sample(9)["next", "pixels"].nbytes > 2**31


def test_offsets_beyond_32_bits():
    """2.4 GB of rows: the last ones lie beyond 2**31 bytes, in what is read and in what is written."""
    rollout = make_rollout((2,), 9).to("cuda")
    rollout["next", "pixels"] = torch.randint(256, (2, 9, 2**27), dtype=torch.uint8, device="cuda")
    out = MultiStep(0.9, 3, backend="verify")(rollout)
    assert out["next", "pixels"].nbytes > 2**31


def kept_once(stream):
    """A stream in which what comes after a frame is what the next one holds, but at ends."""
    ended, own, after = stream["next", "done"], stream["observation"], stream["next", "observation"]
    stream["next", "observation"] = torch.where(ended, after, own.roll(-1, 1))
    return stream


@pytest.mark.parametrize("arguments", [{}, {"store_as": {"observation": torch.bfloat16}}], ids=str)
@pytest.mark.parametrize("n_steps", N_STEPS)
def test_observations_kept_once(n_steps, arguments):
    stream, parts = kept_once(make_rollout((64,), 120)), [15, 1, 17, 1, 1, 20, 1, 30]
    buffers = []
    for device, compact in (("cuda", True), ("cuda", False), ("cpu", True)):
        storage = LazyTensorStorage(64 * 20, ndim=2, device=device)
        kept = {"compact": True, "end_slots": 20 if n_steps == 3 else 2} if compact else {}
        sampler = SamplerWithoutReplacement(shuffle=False)
        buffers.append(
            NStepReplayBuffer(n_steps=n_steps, gamma=0.97, storage=storage, sampler=sampler, **kept, **arguments)
        )
    for part in stream[:, : sum(parts)].split(parts, -1):
        for buffer, device in zip(buffers, ("cuda", "cuda", "cpu"), strict=True):
            buffer.extend(part.to(device))
        compact, full, on_cpu = (buffer.sample(len(buffer)) for buffer in buffers)
        same(compact, on_cpu)
        if n_steps == 3:
            for key, leaf in full.items(True, True):
                assert torch.equal(compact[key], leaf) or arguments, key
    assert buffers[0].ends_lost() == buffers[2].ends_lost()


def test_launches_of_a_step_with_observations_kept_once():
    buffer, stream = buffer_on("cuda", compact=True), kept_once(rollout_on("cuda", 12))
    # What does not lie in order is copied before.
    *frames, frame = (stream[:, t : t + 1].clone() for t in range(4))
    for each in frames:
        buffer.extend(each), buffer.sample(64)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            buffer.extend(frame), buffer.sample(64)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    ran = ran_on_gpu(profile)
    assert [name for name in ran if "kernel" in name and name.startswith(("n_step", "store"))] == [
        "store_rows_kernel",
        *KERNELS,
    ]
    assert len(ran) == 4  # the draw among them
