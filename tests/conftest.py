"""Settings for every test, made before anything imports Triton."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.pop("MULTISTEP_TRITON_BACKEND", None)

import pytest
import torch
from hypothesis import settings

from multistep_triton import reference

torch.set_num_threads(2)
settings.register_profile("default", deadline=None, max_examples=200, derandomize=True)
settings.register_profile("nightly", deadline=None, max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="module", params=["joined", "where they lie"])
def read(request):
    """Both ways in which the reference reads carry and data, whatever the size of the data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_JOIN_BYTES", {"joined": 1 << 62, "where they lie": -1}[request.param])
        yield
