"""Memory that lies otherwise than the kernels read it: carries of other calls, storages of a user's own."""

import gc
import weakref

import pytest
import torch
from paths import kernels
from tensordict import TensorDict
from torchrl.data import SamplerWithoutReplacement, TensorStorage

from multistep_triton import MultiStep, MultiStepTransform, NStepReplayBuffer, gather_future
from multistep_triton.kernels import plan
from multistep_triton.kernels import run as running

BACKENDS = ("triton", "reference")


def agents(begin, frames=5):
    """One flag of each of three agents, and one of all; values count through frames and agents."""
    values = torch.arange(2 * 15 * 3).view(2, 15, 3, 1)[:, begin : begin + frames].clone()
    over = torch.zeros(2, frames, 3, 1, dtype=torch.bool)
    group = {"over": over, "reward": values.float(), "observation": values}
    return TensorDict({"next": {"episode_over": over[:, :, 0].clone(), "agents": group}}, [2, frames])


def test_flags_of_agents_that_stop_being_flags():
    keys = {"reward_keys": [("agents", "reward")], "done_key": ("agents", "over"), "done_keys": [("agents", "over")]}
    streams = []
    with kernels():
        for backend in BACKENDS:
            transform, out = MultiStepTransform(3, 0.9, **keys, backend=backend), []
            for begin in (0, 5, 10):
                if begin == 5:
                    transform.done_key, transform.done_keys = "episode_over", ["episode_over"]
                out.append(transform.inv(agents(begin)))
            out = [each["next", "agents"].exclude("over_orig") for each in (*out, transform.flush())]
            streams.append(torch.cat([each.select("reward", "reward_orig", "observation") for each in out], 1))
    one, other = streams
    assert torch.equal(one["reward_orig"].flatten().cpu(), torch.arange(90.0))
    for key, leaf in other.items():
        assert torch.allclose(one[key].double(), leaf.double()), key


@pytest.mark.parametrize("backends", [("reference", "triton", "triton"), ("triton", "reference", "triton")])
def test_pixels_with_channels_last_that_another_backend_held_back(backends):
    def call(k):
        pixels = torch.arange(5 * 4 * 4 * 3).view(5, 4, 4, 3).add(1000 * k).permute(0, 3, 1, 2)
        done = torch.zeros(5, 1, dtype=torch.bool)
        return TensorDict({"next": {"pixels": pixels, "reward": torch.ones(5, 1), "done": done}}, [5])

    streams = []
    with kernels():
        for each in (backends, ["reference"] * 3):
            transform, out = MultiStepTransform(3, 0.9), []
            for k, backend in enumerate(each):
                transform.backend = backend
                out.append(transform.inv(call(k)))
            streams.append(torch.cat([*out, transform.flush()])["next", "pixels"])
    assert torch.equal(*streams)


def test_a_storage_that_lies_agent_by_agent_and_is_partly_filled():
    def frames(count):
        torch.manual_seed(count)
        values = [torch.rand(3, count).movedim(0, 1) for _ in range(2)]
        return TensorDict({"next": {"agents": {"reward": values[0], "done": values[1] < 0.2}}}, [count])

    samples = []
    keys = {"done_key": ("agents", "done"), "done_keys": [("agents", "done")], "reward_keys": [("agents", "reward")]}
    with kernels():
        for backend in BACKENDS:
            sampler = SamplerWithoutReplacement(shuffle=False)
            storage = TensorStorage(frames(8), device=torch.get_default_device())
            buffer = NStepReplayBuffer(
                n_steps=3, gamma=0.9, storage=storage, batch_size=4, sampler=sampler, backend=backend, **keys
            )
            buffer.empty()
            buffer.extend(frames(4))
            samples.append(buffer.sample())
    one, other = samples
    for key, leaf in other.items(True, True):
        assert torch.allclose(one[key].double(), leaf.double()), key


def test_what_does_not_change_is_passed_on_however_it_lies():
    observation = torch.randn(3, 6, 4)[..., ::2]
    done = torch.zeros(3, 6, 1, dtype=torch.bool)
    data = TensorDict({"observation": observation, "next": {"reward": torch.randn(3, 6, 1), "done": done}}, [3, 6])
    with kernels():
        data = data.to(torch.get_default_device())
        out = MultiStep(0.9, 3, backend="triton")(data)
    assert out["observation"].data_ptr() == data["observation"].data_ptr()


def test_powers_that_a_graph_reads_outlive_their_cache(monkeypatch):
    plan._powers.cache_clear()
    kept = []
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        kept.append(weakref.ref(plan.powers(0.5 + 0.25 * capturing, 3, torch.device("cpu"))))
    plan._powers.cache_clear()
    gc.collect()
    assert [each() is not None for each in kept] == [False, True]
    plan._CAPTURED.clear()


def test_frames_whose_future_is_gathered_are_counted(monkeypatch):
    monkeypatch.setattr(running, "MOST_ROWS", 10)
    with kernels(), pytest.raises(RuntimeError, match="at most 10 frames in a call, got 12"):
        gather_future(torch.ones(3, 4), torch.ones(3, 4, dtype=torch.int64), backend="triton")
