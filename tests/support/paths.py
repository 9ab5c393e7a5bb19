"""The paths that a result can come by, and what tests of any of them switch on or off."""

import gc
import shutil
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch

from multistep_triton import engine, spec
from multistep_triton.backends import BACKEND_VARIABLE

POISON = 0xA5
GCC = pytest.mark.skipif(
    not shutil.which("gcc") or torch.cuda.is_available(),
    reason="gcc compiles the recording libcuda, where there is no other",
)


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


def target_amd(patch, amd):
    """Makes the launchers take the target for AMD's, or for another's."""
    from multistep_triton.kernels import plan, run, store

    for module in (plan, run, store):
        patch.setattr(module, "is_amd", lambda: amd)


def _calling(usual):
    """Functions that a kernel calls find the language as its launch has patched it: once, not per call.

    Those of Triton itself find another module's.
    """

    def call(function, *args, **kwargs):
        ours = not function.fn.__module__.startswith("triton.")
        return function.rewrite()(*args, **kwargs) if ours else usual(function, *args, **kwargs)

    return call


def interpret(patch):
    """The interpreter heeds ``tl.device_assert``, which compiled kernels leave out."""
    from triton.runtime.interpreter import InterpretedFunction, interpreter_builder

    patch.setattr(InterpretedFunction, "__call__", _calling(InterpretedFunction.__call__))
    patch.setattr(interpreter_builder, "options", replace(interpreter_builder.options, debug=True))


@contextmanager
def kernels():
    """Whatever is created is where the kernels run, and ``auto`` is they; new memory is poisoned."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            interpret(patch)
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


PATHS = {"reference": nullcontext, "kernels": kernels, "specification": specification}
# For a test by itself, with the fixture "where"; all of a file take the fixture "path".
EITHER = pytest.mark.parametrize("where", [nullcontext, kernels], ids=["reference", "kernels"], indirect=True)
