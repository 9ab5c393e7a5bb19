"""Launches of the kernels read what they are given, write what they made, and touch no other memory."""

import numpy
import pytest
import torch
from paths import kernels, target_amd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.errors import InterpreterError

from multistep_triton.carry import Carry
from multistep_triton.debug.streams import KINDS, run_verified
from multistep_triton.kernels import launch, rows
from multistep_triton.kernels.windows import INTERPRETED
from multistep_triton.samples import Samples


@pytest.fixture(autouse=True, scope="module")
def on_the_kernels():
    with kernels():
        yield


class Bounds(TorchDispatchMode):
    """Checks, in the interpreter, that a launch reads what it was given and what it has made, and writes the latter."""

    def __init__(self):
        super().__init__()
        self.accesses = 0
        self.given, self.made = [], []

    def add(self, regions, *tensors):
        for tensor in filter(torch.Tensor.numel, tensors):
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            regions.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.add(self.made, out)
        return out

    def check(self, pointers, mask, regions):
        begin = pointers.data[mask.data.astype(bool)].astype("uint64")
        end = begin + pointers.get_element_ty().primitive_bitwidth // 8
        inside = numpy.zeros(begin.shape, dtype=bool)
        for low, high in regions:
            inside |= (begin >= low) & (end <= high)
        assert inside.all(), "an address is outside of all tensors"
        self.accesses += len(begin)

    def launching(self, launch):
        def launch_in_bounds(*arguments, **options):
            self.given.clear()
            self.made.clear()
            if launch.__name__ == "store_frames":
                data, (ring, numbers, *_), slot = arguments
                self.add(self.given, *data.values(), *([slot] if isinstance(slot, torch.Tensor) else []))
                self.add(self.made, *ring.values(), *([] if numbers is None else [numbers]))
                arguments_read = ()
            else:
                arguments_read = arguments
            for each in arguments_read:
                if isinstance(each, Carry):
                    time_dim, free = arguments[0].time_dim, each.capacity - each.count
                    self.add(self.made, *each.spare.values())
                    for key in each.leaves:
                        self.add(self.given, *each.pieces(key, time_dim))
                        self.add(self.made, *(each.pieces(key, time_dim, each.count, free) if each.time_first else ()))
                elif isinstance(each, Samples):
                    # Of the storage, slots that hold frames.
                    _, samples, data = arguments
                    own = [each for each in (samples.n_steps, samples.written) if each is not None]
                    self.add(self.given, *samples.indices, *own, *(leaf[: samples.live] for leaf in data.values()))
                    break
                else:
                    tensors = [leaf for leaf in tree_leaves(each) if isinstance(leaf, torch.Tensor)]
                    self.add(self.given, *tensors)
            with self:
                return launch(*arguments, **options)

        return launch_in_bounds


@pytest.fixture
def bounds(monkeypatch):
    """Compiled kernels are not checked."""
    bounds = Bounds()
    if not INTERPRETED:
        return bounds
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def checked_load(self, pointers, mask, *arguments):
        bounds.check(pointers, mask, bounds.given + bounds.made)
        return load(self, pointers, mask, *arguments)

    def checked_store(self, pointers, value, mask, *arguments):
        bounds.check(pointers, mask, bounds.made)
        return store(self, pointers, value, mask, *arguments)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
    for name in ("n_step_extend", "n_step_sample", "store_frames", "gather_future"):
        monkeypatch.setattr(launch, name, bounds.launching(getattr(launch, name)))
    return bounds


@pytest.mark.parametrize(
    ("seed", "amd"), [(seed, amd) for seed in range(len(KINDS)) for amd in (False, True) if not amd or seed % 4 == 0]
)
def test_random_streams_are_as_the_reference_has_them_and_touch_no_other_memory(bounds, seed, amd, monkeypatch):
    target_amd(monkeypatch, amd)
    result = run_verified(seed, torch.get_default_device())
    assert result.difference is None
    assert result.frames > 0
    assert bounds.accesses > 0 or not INTERPRETED


def test_steps_that_leave_the_row_touch_no_other_memory(bounds):
    steps = torch.tensor([[2, 9, 1], [-3, 2, 7]])
    assert launch.gather_future(torch.arange(6).view(2, 3), steps).tolist() == [[1, 2, 2], [3, 5, 5]]


@pytest.mark.skipif(not INTERPRETED, reason="addresses are checked in the interpreter")
def test_an_access_outside_of_the_tensors_is_seen(bounds, monkeypatch):
    run = launch.run

    def run_one_row_more(plan, kernel, *arguments):
        *others, count, frames, tile = arguments
        run(plan, kernel, *((*others, count + 1, frames, tile) if kernel is rows.future_rows_kernel else arguments))

    monkeypatch.setattr(launch, "run", run_one_row_more)
    with pytest.raises(InterpreterError, match="an address is outside of all tensors"):
        launch.gather_future(torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.int64))
