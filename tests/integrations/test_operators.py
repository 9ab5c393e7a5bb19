"""``torch.compile(fullgraph=True)`` of functions that call ``n_step_return`` and ``gather_future``; ``torch.func``."""

import itertools

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from multistep_triton import gather_future, n_step_return

BATCH, FRAMES, N, GAMMA = 3, 9, 3, 0.5
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def draw(dtype=torch.float32, frames=FRAMES, features=(2,), seed=0):
    """Rewards, dones, a mask and observations."""
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randint(-8, 8, (BATCH, frames, *features), generator=generator).to(dtype)
    done, padding = (torch.rand(BATCH, frames, generator=generator) < p for p in (0.3, 0.2))
    return reward, done, ~padding, torch.randn(BATCH, frames, 4, generator=generator)


def draw_rows():
    """Four of these, stacked."""
    return [torch.stack(parts) for parts in zip(*(draw(torch.float64, seed=seed) for seed in range(4)), strict=True)]


def targets(reward, done, mask, observation, n_steps=N, backend="auto"):
    """What a loss makes of them, with operators of torch before and after ours."""
    out = n_step_return(reward * 2, done, gamma=GAMMA, n_steps=n_steps, mask=mask, backend=backend)
    future = gather_future(observation, out.steps, backend=backend)
    return out.reward + out.discount[..., None] * future.sum(-1, keepdim=True), out.steps


def assert_equal(left, right):
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_that_gives_what_eager_gives(backend):
    compiled = torch.compile(targets, fullgraph=True, backend=backend)
    for arguments in (draw(), draw(seed=1)):
        for one, other in zip(compiled(*arguments), targets(*arguments), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_dtypes_are_those_of_eager(dtype):
    reward, done, mask, observation = draw(dtype)
    observation[0, 0, 0] = torch.nan

    def both(reward, done, mask, value):
        out = n_step_return(reward, done, gamma=GAMMA, n_steps=N, mask=mask)
        return *out, gather_future(value.view(torch.int32), out.steps)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(reward, done, mask, observation), both(reward, done, mask, observation))


def test_the_kernels_run_in_a_graph(monkeypatch):
    from multistep_triton.kernels import launch

    launches = []
    for name in ("n_step_extend", "gather_future"):
        launch_it = getattr(launch, name)
        monkeypatch.setattr(launch, name, lambda *a, it=launch_it, of=name, **k: launches.append(of) or it(*a, **k))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = [each.to(device) for each in draw()]
    compiled = torch.compile(targets, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*arguments, backend="triton"), targets(*arguments, backend="reference"))
    assert launches == ["n_step_extend", "gather_future"]


def test_another_n_or_number_of_frames_is_no_new_graph():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(targets, fullgraph=True, backend=counter)
    for n_steps in (2, 3, 5, 8, 13):
        for frames in (7, 9, 20):
            arguments = *draw(frames=frames), n_steps
            assert_equal(compiled(*arguments), targets(*arguments))
    # The first one, and one each in which the compiler learns that a number varies.
    assert counter.frame_count == 3


@pytest.mark.parametrize("n_steps", [1, 3, FRAMES, 50])
def test_gradients_are_those_of_eager(n_steps):
    reward, done, mask, observation = draw(torch.float64)
    weight = torch.randn(reward.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def gradients(function):
        leaves = reward.clone().requires_grad_(), observation.double().requires_grad_()
        target, _ = function(leaves[0], done, mask, leaves[1], n_steps)
        return torch.autograd.grad((target * weight).sum(), leaves)

    compiled = torch.compile(targets, fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(compiled), gradients(targets), strict=True):
        torch.testing.assert_close(one, other)


def test_with_gradients_another_n_or_number_of_frames_is_no_new_graph():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(targets, fullgraph=True, backend=counter)
    for n_steps in (2, 5, 13, 50):
        for frames in (7, 9, 20, 23):
            reward, done, mask, observation = draw(frames=frames)
            gradients = []
            for function in (compiled, targets):
                leaf = reward.clone().requires_grad_()
                gradients += torch.autograd.grad(
                    function(leaf, done, mask, observation, n_steps)[0].square().sum(), leaf
                )
            torch.testing.assert_close(*gradients)
    assert counter.frame_count == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_halves(dtype):
    reward, done, mask, observation = draw(dtype)

    def gradient(function):
        leaf = reward.clone().requires_grad_()
        return torch.autograd.grad(function(leaf, done, mask, observation, 5)[0].sum(), leaf)[0]

    one, other = gradient(torch.compile(targets, fullgraph=True, backend="aot_eager")), gradient(targets)
    assert one.dtype == other.dtype == dtype
    torch.testing.assert_close(one, other)


def test_the_kernels_run_where_gradients_are_wanted():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reward, done, mask, observation = (each.to(device) for each in draw())
    gradients = []
    compiled = torch.compile(targets, fullgraph=True, backend="aot_eager")
    for function, backend in ((compiled, "triton"), (targets, "reference")):
        leaf = reward.clone().requires_grad_()
        target, _ = function(leaf, done, mask, observation, N, backend)
        gradients += torch.autograd.grad(target.square().sum(), leaf)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap of grad"])
def test_derivatives_that_the_operators_lack_are_those_of_eager(transform):
    reward, done, mask, observation = draw()

    def total(reward):
        return targets(reward, done, mask, observation)[0].square().sum()

    def derivative(reward):
        if transform == "jvp":
            return torch.func.jvp(total, (reward,), (torch.ones_like(reward),))[1]
        if transform == "grad":
            return torch.func.grad(total)(reward)
        return torch.func.vmap(torch.func.grad(total))(torch.stack([reward, 2 * reward]))

    compiled = torch.compile(derivative, backend="aot_eager")
    torch.testing.assert_close(compiled(reward), derivative(reward))


@pytest.mark.parametrize("n_steps", [1, N, 50])
def test_vmap_is_one_more_batch_dimension(n_steps):
    rows = draw_rows()

    def function(*row):
        return targets(*row, n_steps)

    for dims in itertools.product((0, -1, None), repeat=4):
        if set(dims) == {None}:
            continue
        arguments = [row[0] if dim is None else row.movedim(0, dim) for row, dim in zip(rows, dims, strict=True)]
        each = [[row[0 if dim is None else i] for row, dim in zip(rows, dims, strict=True)] for i in range(4)]
        expected = [torch.stack(parts) for parts in zip(*(function(*row) for row in each), strict=True)]
        for one, other in zip(torch.vmap(function, in_dims=dims)(*arguments), expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_every_row(compiled):
    rows = draw_rows()

    def gradients(reward, done, mask, observation):
        total = torch.func.grad(lambda *row: targets(*row)[0].square().sum(), argnums=(0, 3))
        return torch.func.vmap(total)(reward, done, mask, observation.double())

    function = torch.compile(gradients, backend="aot_eager") if compiled else gradients
    leaves = [row.double().clone().requires_grad_() if row.is_floating_point() else row for row in rows]
    expected = torch.autograd.grad(targets(*leaves)[0].square().sum(), (leaves[0], leaves[3]))
    for one, other in zip(function(*rows), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_vmap_cuts_windows_that_leave_the_row():
    value, steps = torch.arange(6).view(2, 3), torch.tensor([[0, 3, 9], [-4, 2, 1]])
    assert torch.vmap(gather_future)(value, steps).tolist() == [[0, 2, 2], [3, 5, 5]]


def test_gradients_by_hand():
    # Windows of frames 0 and 1 are (0, 1) and (1), as 1 is done; of 2 and 3 (2, 3) and (3).
    done = torch.tensor([False, True, False, False])
    reward, value = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(reward, value):
        out = n_step_return(reward, done, gamma=0.5, n_steps=2)
        weight = torch.tensor([1.0, 10.0, 100.0, 1000.0])
        return (out.reward * weight).sum() + (gather_future(value, out.steps) * weight).sum()

    loss(reward, value).backward()
    assert reward.grad.tolist() == [1.0, 10.5, 100.0, 1050.0]
    assert value.grad.tolist() == [0.0, 11.0, 0.0, 1100.0]


# torch 2.14's own, of its check
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("frames", [FRAMES, 1, 0])
def test_opcheck(frames, requires_grad):
    reward, done, mask, observation = draw(frames=frames)
    for rewards in (reward, reward.transpose(0, 1).contiguous().transpose(0, 1), reward[..., 0]):
        for masks in (None, mask):
            leaf = rewards.detach().requires_grad_(requires_grad)
            for n_steps, flag in ((N, done), (1, done[..., None])):
                arguments = leaf, flag, masks, GAMMA, n_steps, "auto"
                torch.library.opcheck(torch.ops.multistep_triton.n_step_return, arguments)
    steps = n_step_return(reward, done, gamma=GAMMA, n_steps=N).steps
    for values in (observation, observation.transpose(0, 1).contiguous().transpose(0, 1), observation[..., 0]):
        leaf = values.detach().requires_grad_(requires_grad)
        torch.library.opcheck(torch.ops.multistep_triton.gather_future, (leaf, steps, "auto"))
    gradient = torch.ones_like(reward).transpose(0, 1).contiguous().transpose(0, 1)
    arguments = gradient, steps, GAMMA, N, torch.float32
    torch.library.opcheck(torch.ops.multistep_triton.n_step_return_backward, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_of_dtypes(dtype):
    reward, done, _, _ = draw(dtype)
    torch.library.opcheck(torch.ops.multistep_triton.n_step_return, (reward, done, None, GAMMA, N, "auto"))
    steps = torch.ones(BATCH, FRAMES, dtype=torch.int64)
    torch.library.opcheck(torch.ops.multistep_triton.gather_future, (reward, steps, "auto"))


def test_gamma_as_one_of_numpys_numbers():
    def function(gamma):
        return n_step_return(torch.ones(3), torch.zeros(3, dtype=torch.bool), gamma=gamma, n_steps=2).reward

    assert torch.compile(function, backend="aot_eager")(np.float64(0.5)).tolist() == [1.5, 1.5, 1.0]


WRONG = {
    "n_steps must be an int >= 1, got 0": {"n_steps": 0},
    "gamma must be a finite number in [0, 1], got 1.5": {"gamma": 1.5},
    "done must be bool, got torch.float32": {"done": torch.zeros(BATCH, FRAMES)},
    "mask must have shape": {"mask": torch.ones(BATCH, FRAMES + 1, dtype=torch.bool)},
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_keep_their_words(message):
    reward, done, mask, _ = draw()
    arguments = {"done": done, "mask": mask, "gamma": GAMMA, "n_steps": N, **WRONG[message]}
    compiled = torch.compile(lambda: n_step_return(reward, **arguments), fullgraph=True, backend="aot_eager")
    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.TorchRuntimeError)) as caught:
        compiled()
    assert message in str(caught.value)


def test_steps_that_leave_the_row_are_an_error_when_it_runs():
    compiled = torch.compile(gather_future, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"steps must be within 1 .. T - t = 1, got 2 at frame \(1,\)"):
        compiled(torch.arange(2), torch.tensor([1, 2]))


# Dtypes of one byte, no environments, tensors without values


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_dtypes_of_one_byte(dtype, compiled):
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0]]).to(dtype)
    steps, done = torch.tensor([[2, 2, 1, 1]]), torch.tensor([[False, False, True, False]])

    def gather(value):
        return gather_future(value, steps)

    def add(value):
        return n_step_return(value, done, gamma=0.5, n_steps=2).reward

    for function, expected in ((gather, [0.0, 1, 2, 1]), (add, [1.0, 1.5, 1.5, 1])):
        leaf = values.clone().requires_grad_()
        out = torch.compile(function, backend="aot_eager")(leaf) if compiled else function(leaf)
        out.float().sum().backward()
        assert leaf.grad.float().flatten().tolist() == expected


def test_no_environments_in_a_transform_of_functions():
    done, steps = torch.zeros(0, 8, dtype=torch.bool), torch.ones(0, 8, dtype=torch.int64)
    returns = torch.func.vmap(lambda reward, done: n_step_return(reward, done, gamma=0.9, n_steps=3).reward)
    assert returns(torch.zeros(0, 8), done).shape == (0, 8)
    assert torch.func.vmap(gather_future)(torch.zeros(0, 8, 2), steps).shape == (0, 8, 2)


def test_fake_tensors():
    with FakeTensorMode() as mode:
        value, steps = (mode.from_tensor(each) for each in (torch.zeros(3, 6, 2), torch.ones(3, 6, dtype=torch.int64)))
        assert gather_future(value, steps).shape == (3, 6, 2)
        out = n_step_return(value[..., 0], steps > 1, gamma=0.9, n_steps=3)
        assert [each.shape for each in out] == [(3, 6)] * 3


def test_fake_tensors_cannot_be_verified():
    with FakeTensorMode() as mode:
        arguments = [mode.from_tensor(each) for each in draw()]
        _, steps = targets(*arguments, backend="verify")
        assert steps.shape == (BATCH, FRAMES)
        with pytest.raises(RuntimeError, match=r"cannot run: (a tensor is (a FakeTensor|on cpu)|Triton)"):
            targets(*arguments, backend="triton")


def test_symbolic_sizes():
    reward, done, mask, observation = draw()
    traced = make_fx(lambda *arguments: targets(*arguments), tracing_mode="symbolic")(reward, done, mask, observation)
    assert_equal(traced(reward, done, mask, observation), targets(reward, done, mask, observation))


@pytest.mark.xfail(
    torch.__version__ < "2.13", raises=RuntimeError, strict=True, reason="torch 2.11 cannot batch view(dtype)"
)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_vmap_gathers_dtypes_of_one_byte(dtype):
    reward, done, _, observation = draw()
    value, steps = observation.to(dtype), n_step_return(reward, done, gamma=GAMMA, n_steps=N).steps
    future = torch.func.vmap(gather_future)(value, steps)
    assert future.dtype == dtype
    assert_equal([future.float()], [gather_future(value, steps).float()])
