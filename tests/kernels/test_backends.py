"""Which backend runs, and what is said when one cannot."""

from functools import partial

import pytest
import torch
from fresh import run
from paths import kernels
from rollouts import make_rollout
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from multistep_triton import MultiStepTransform, backends, eager, gather_future, n_step_return
from multistep_triton.backends import BACKENDS, resolve_backend
from multistep_triton.debug import verify

ON_CPU = torch.ones(2, 5)
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from tensordict import TensorDict
from multistep_triton import MultiStep, MultiStepTransform, gather_future, n_step_return
data = TensorDict({"next": {"reward": torch.ones(4, 1), "done": torch.zeros(4, 1, dtype=torch.bool)}}, [4])
"""


def last_line(code: str, **environment: str | None) -> str:
    done = run(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_without_triton_everything_runs_but_the_kernels():
    code = """
out = MultiStepTransform(2, 1.0).inv(data)["next", "reward"].flatten().tolist()
out += MultiStep(1.0, 2)(data)["next", "reward"].flatten().tolist()
steps = n_step_return(torch.ones(3), torch.zeros(3, dtype=torch.bool), gamma=1.0, n_steps=2).steps
print(out, gather_future(torch.arange(3), steps).tolist())
"""
    assert last_line(WITHOUT_TRITON + code) == "[2.0, 2.0, 2.0, 2.0, 2.0, 1.0] [1, 2, 2]"


def test_without_triton_the_kernels_say_what_to_install():
    code = """
try:
    MultiStepTransform(2, 1.0, backend="triton").inv(data)
except RuntimeError as error:
    print(error)
"""
    message = last_line(WITHOUT_TRITON + code)
    assert message.startswith("backend 'triton' cannot run: Triton is missing")
    assert "pip install triton" in message


def test_without_a_gpu_and_without_the_interpreter_the_kernels_say_so():
    code = """
import torch
from multistep_triton import gather_future
try:
    gather_future(torch.ones(3), torch.ones(3, dtype=torch.int64), backend="triton")
except RuntimeError as error:
    print(error)
"""
    message = last_line(code, CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    assert message.startswith("backend 'triton' cannot run: Triton finds no GPU")
    assert "TRITON_INTERPRET=1" in message
    assert message.endswith("or use backend='reference'")


def test_importing_and_running_on_the_cpu_imports_no_kernels_and_no_triton():
    code = """
import sys, torch, torchrl.envs.transforms
before = "triton" in sys.modules
from tensordict import TensorDict
from multistep_triton import MultiStepTransform
data = TensorDict({"next": {"reward": torch.ones(4, 1), "done": torch.zeros(4, 1, dtype=torch.bool)}}, [4])
MultiStepTransform(2, 1.0).inv(data)
print("multistep_triton.kernels.launch" in sys.modules, not before and "triton" in sys.modules)
"""
    assert last_line(code) == "False False"


def test_auto_is_the_reference_on_the_cpu(monkeypatch):
    assert resolve_backend("auto", [ON_CPU]) == "reference"
    monkeypatch.setenv("MULTISTEP_TRITON_BACKEND", "")
    assert resolve_backend("auto", [ON_CPU]) == "reference"


def test_the_environment_overrides_auto_and_nothing_else(monkeypatch):
    where_kernels_run = ON_CPU.to("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setenv("MULTISTEP_TRITON_BACKEND", "triton")
    assert resolve_backend("auto", [where_kernels_run]) == "triton"
    assert resolve_backend("reference", [where_kernels_run]) == "reference"
    monkeypatch.setenv("MULTISTEP_TRITON_BACKEND", "reference")
    assert resolve_backend("auto", [where_kernels_run]) == "reference"
    assert resolve_backend("triton", [where_kernels_run]) == "triton"
    monkeypatch.setenv("MULTISTEP_TRITON_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"environment variable MULTISTEP_TRITON_BACKEND must be one of .*got 'fast'"):
        resolve_backend("auto", [where_kernels_run])


@pytest.mark.parametrize("backend", ["Triton", "cuda", None, 1])
def test_an_unknown_backend_is_refused_with_the_valid_ones(backend):
    with pytest.raises(ValueError, match=rf"must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}"):
        n_step_return(ON_CPU, ON_CPU > 1, gamma=0.9, n_steps=2, backend=backend)


SCRIPT = """
import logging
logging.basicConfig(level=logging.INFO, format="%(name)s %(levelname)s %(message)s")
import torch
from tensordict import TensorDict
from multistep_triton import MultiStepTransform, n_step_return
data = TensorDict({"next": {"reward": torch.ones(2, 9, 1), "done": torch.zeros(2, 9, 1, dtype=torch.bool)}}, [2, 9])
transform = MultiStepTransform(2, 1.0)
for _ in range(3):
    out = transform.inv(data)
n_step_return(torch.ones(3), torch.zeros(3, dtype=torch.bool), gamma=1.0, n_steps=2)
print(out["next", "reward"].sum().item())
"""


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, "backend 'reference' runs: the tensors are on the CPU, where it is the fast one"),
        (
            {"MULTISTEP_TRITON_BACKEND": "reference"},
            "backend 'reference' runs: the environment variable MULTISTEP_TRITON_BACKEND asks for it",
        ),
        (
            {"MULTISTEP_TRITON_BACKEND": "verify", "TRITON_INTERPRET": "1"},
            "backend 'verify' runs: the environment variable MULTISTEP_TRITON_BACKEND asks for it",
        ),
    ],
    ids=["auto", "reference", "verify"],
)
def test_an_unchanged_script_is_told_once_what_runs_and_why(environment, told):
    done = run(SCRIPT, **{"TRITON_INTERPRET": None, "MULTISTEP_TRITON_BACKEND": None, **environment})
    assert done.stdout == "36.0\n"
    assert [line for line in done.stderr.splitlines() if "multistep_triton" in line] == [
        f"multistep_triton INFO {told}"
    ]


def test_an_unchanged_script_is_verified_where_the_environment_asks_for_it():
    fault = """
from multistep_triton.kernels import launch as launchers
launch = launchers.n_step_extend
def fault(*arguments):
    out = launch(*arguments)
    out[2][1, 3] += 1
    return out
launchers.n_step_extend = fault
"""
    done = run(fault + SCRIPT, MULTISTEP_TRITON_BACKEND="verify", TRITON_INTERPRET="1")
    assert (
        "EquivalenceError: the kernels and the reference differ at steps (steps_to_next_obs), frame (1, 3): 3 and 2"
        in done.stderr
    )


def test_the_fast_path_is_verified_where_the_kernels_cannot_run():
    fault = """
from multistep_triton import eager
compute = eager.n_step_extend
def fault(*arguments):
    out = compute(*arguments)
    out.steps[1, 3] += 1
    return out
"""
    environment = {"MULTISTEP_TRITON_BACKEND": "verify", "TRITON_INTERPRET": None, "CUDA_VISIBLE_DEVICES": ""}
    done = run(fault + SCRIPT, **environment)
    assert done.stdout == "36.0\n"
    assert "asks for it, of the reference, as the kernels cannot run: Triton finds no GPU" in done.stderr
    done = run(fault + "eager.n_step_extend = fault\n" + SCRIPT, **environment)
    assert (
        "EquivalenceError: the reference and the specification differ at steps (steps_to_next_obs), frame (1, 3): 3 and"
        in done.stderr
    )


def test_a_fallback_on_an_accelerator_is_a_warning(caplog):
    tensors = [torch.ones(2, device="meta")]
    backends._told.clear()
    for _ in range(2):
        assert resolve_backend("auto", tensors) == "reference"
    (record,) = [record for record in caplog.records if record.name == "multistep_triton"]
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("backend 'reference' runs: the kernels cannot run: a tensor is on meta, and")


def no_reference(monkeypatch):
    for name in ("n_step_extend", "gather_future"):
        monkeypatch.setattr(eager, name, None)


def test_triton_never_falls_back(monkeypatch):
    no_reference(monkeypatch)
    with kernels():
        out = MultiStepTransform(2, 0.9, backend="triton").inv(make_rollout((2,), 9))
        assert out.batch_size == (2, 7)
        steps = n_step_return(torch.ones(2, 5), torch.ones(2, 5) > 1, gamma=0.9, n_steps=2, backend="triton").steps
        assert gather_future(torch.arange(10).view(2, 5), steps, backend="triton")[1].tolist() == [6, 7, 8, 9, 9]


OBSTACLES = {
    "requires grad": (
        lambda reward: reward.requires_grad_(),
        "a tensor requires grad, and the kernels have no backward pass. Detach it or use torch.no_grad()",
    ),
    "float8": (
        lambda reward: reward.to(torch.float8_e4m3fn),
        "a reward is torch.float8_e4m3fn, which the kernels do not sum. Convert it to torch.float32",
    ),
}


@pytest.mark.parametrize("kind", OBSTACLES)
def test_what_the_kernels_cannot_do_is_refused_and_auto_takes_the_reference(kind):
    spoil, message = OBSTACLES[kind]
    with kernels():
        reward, done = spoil(torch.ones(2, 5)), torch.zeros(2, 5, dtype=torch.bool)
        with pytest.raises(RuntimeError, match=message):
            n_step_return(reward, done, gamma=0.5, n_steps=2, backend="triton")
    if reward.is_cuda:
        out = n_step_return(reward, done, gamma=0.5, n_steps=2)
        assert out.reward.float()[0].tolist() == [1.5, 1.5, 1.5, 1.5, 1.0]


def tangent_of(function, reward):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(reward, torch.ones_like(reward)))).tangent


TRANSFORMS = {
    "vmap": lambda function, reward: torch.vmap(function)(reward),
    "jvp": lambda function, reward: torch.func.jvp(function, (reward,), (torch.ones_like(reward),))[1],
    "forward mode": tangent_of,
}


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_the_kernels_are_refused_inside_a_transform_and_auto_takes_the_reference(kind):
    def function(reward, backend="auto"):
        return n_step_return(reward, reward > 1, gamma=0.5, n_steps=2, backend=backend).reward

    with kernels():
        reward = torch.ones(2, 5)
        with pytest.raises(RuntimeError, match=r"inside forward-mode differentiation or a transform of torch.func"):
            TRANSFORMS[kind](partial(function, backend="triton"), reward)
    assert TRANSFORMS[kind](function, reward).tolist() == [[1.5, 1.5, 1.5, 1.5, 1.0]] * 2


def test_the_kernels_run_without_grad_on_a_tensor_that_requires_it():
    with kernels(), torch.no_grad():
        reward, done = torch.ones(2, 5, requires_grad=True), torch.zeros(2, 5, dtype=torch.bool)
        out = n_step_return(reward, done, gamma=0.5, n_steps=2, backend="triton")
    assert out.reward[0].tolist() == [1.5, 1.5, 1.5, 1.5, 1.0]


def test_the_kernels_refuse_tensors_that_they_cannot_reach():
    value, steps = torch.ones(2, 5, device="meta"), torch.ones(2, 5, dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError, match=r"cannot run: a tensor is on meta, and .*Move all to one"):
        gather_future(value, steps, backend="triton")


@pytest.mark.parametrize("failure", ["AssertionError('libcuda.so cannot be found')", "OSError('no compiler')"])
def test_a_driver_that_fails_in_whatever_way_leaves_the_reference(failure):
    code = f"""
import torch, triton
class Driver:
    def get_active_torch_device(self):
        raise {failure}
triton.runtime.driver.set_active(Driver())
from multistep_triton.backends import resolve_backend
tensors = [torch.ones(2, device="meta")]
print(resolve_backend("auto", tensors))
try:
    resolve_backend("triton", tensors)
except RuntimeError as error:
    print(error)
"""
    lines = run(code, TRITON_INTERPRET=None).stdout.splitlines()
    assert lines[0] == "reference"
    assert lines[1].startswith("backend 'triton' cannot run: Triton finds no GPU")


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_backend_can_change_between_calls(channels_last):
    with kernels():
        rollout = make_rollout((2,), 40)
        for data in (rollout, rollout["next"]):
            data["pixels"] = torch.randint(256, (2, 40, 4, 5, 3), dtype=torch.uint8)
            if channels_last:
                data["pixels"] = data["pixels"].permute(0, 1, 4, 2, 3)
        mixed, steady = MultiStepTransform(3, 0.9), MultiStepTransform(3, 0.9, backend="reference")
        for i, part in enumerate(rollout.split(8, -1)):
            mixed.backend = ("triton", "reference")[i % 2]
            out, expected = mixed.inv(part), steady.inv(part)
            for key in expected.keys(True, True):
                if key == ("next", "reward"):
                    torch.testing.assert_close(out[key], expected[key])
                else:
                    assert torch.equal(out[key], expected[key]), key


def test_where_values_cannot_be_compared_the_reference_runs():
    reward, done = torch.randn(3, 5), torch.zeros(3, 5, dtype=torch.bool)
    windows = partial(n_step_return, gamma=0.9, n_steps=2)
    expected = windows(reward, done).reward
    verified = partial(windows, backend="verify")
    assert torch.equal(torch.func.vmap(lambda *row: verified(*row).reward)(reward, done), expected)
    on_meta = verified(reward.to("meta"), done.to("meta"))
    assert on_meta.reward.shape == (3, 5)
    assert gather_future(torch.ones(3, 5, 2, device="meta"), on_meta.steps, backend="verify").shape == (3, 5, 2)


def test_fake_tensors_choose_a_backend_of_their_own(monkeypatch):
    verified = []
    compute = verify.n_step_extend
    monkeypatch.setattr(verify, "n_step_extend", lambda *arguments: verified.append(1) or compute(*arguments))
    with FakeTensorMode():
        MultiStepTransform(2, 0.9, backend="verify").inv(make_rollout((2,), 5))
    assert not verified
    MultiStepTransform(2, 0.9, backend="verify").inv(make_rollout((2,), 5))
    assert verified
