"""Ways to sample the n-step buffer."""

from contextlib import nullcontext

import pytest
from paths import kernels


@pytest.fixture(params=["reference", "reference, few at a time", "kernels"])
def size(request):
    """How many frames are sampled at a time: all, by either backend, or a few, which the reference reads otherwise."""
    with kernels() if request.param == "kernels" else nullcontext():
        yield 2 if "few" in request.param else None
