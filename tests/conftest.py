"""Settings for every test, made before anything imports Triton, and the paths that a result can come by."""

import gc
import os

import torch

# Kernels run on a GPU where there is one, else interpreted on the CPU. Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.pop("MULTISTEP_TRITON_BACKEND", None)

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
from hypothesis import Phase, settings

from multistep_triton import engine, spec
from multistep_triton.backends import BACKEND_VARIABLE

torch.set_num_threads(2)
# torchrl's return is a convolution, which a GPU would otherwise compute of rounded operands.
torch.backends.cudnn.allow_tf32 = False
settings.register_profile("default", deadline=None, max_examples=200, derandomize=True)
settings.register_profile("nightly", deadline=None, max_examples=5000)
# For those who want to know whether a test fails, and not how.
settings.register_profile("unshrunk", settings.get_profile("default"), phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

POISON = 0xA5


def poisoned(allocate):
    """Allocates memory in which an output that nobody wrote is seen."""

    def empty(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0).view(
                torch.uint8
            ).fill_(POISON)
        return tensor

    return empty


@contextmanager
def no_collection():
    """No garbage is collected on its own.

    Buffers hold semaphores, whose tracker cannot be called from a collection that begins while it is at work.
    """
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def kernels():
    """Whatever is created is where the kernels run, and ``auto`` is they; new memory is poisoned.

    The interpreter heeds ``tl.device_assert``, which compiled kernels leave out.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            from triton.runtime.interpreter import interpreter_builder

            patch.setattr(interpreter_builder, "options", replace(interpreter_builder.options, debug=True))
        patch.setenv(BACKEND_VARIABLE, "triton")
        torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
        torch.zeros(())  # with the first tensor torch notes which functions heed that: those that are not patched yet
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, poisoned(getattr(torch, name)))
        try:
            yield
        finally:
            torch.set_default_device(None)


@contextmanager
def specification():
    """The reference is the specification."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "eager", spec)
        yield


@pytest.fixture
def where(request):
    """The context that a test is given as its parameter, which runs within it."""
    with request.param():
        yield request.param


PATHS = {"reference": nullcontext, "kernels": kernels, "specification": specification}


@pytest.fixture(scope="module", params=["reference", "kernels"])
def path(request):
    """The reference and the kernels."""
    with PATHS[request.param]():
        yield


@pytest.fixture(scope="module", params=PATHS)
def every_path(request):
    """The reference, the kernels, and the specification."""
    with PATHS[request.param]():
        yield
