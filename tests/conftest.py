"""Settings for every test, made before anything imports Triton, and fixtures of the paths that a result can come by."""

import gc
import os

import torch

# Kernels run on a GPU where there is one, else interpreted on the CPU. Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.pop("MULTISTEP_TRITON_BACKEND", None)


import pytest
from hypothesis import Phase, settings
from paths import PATHS

torch.set_num_threads(2)
# torchrl's return is a convolution, which a GPU would otherwise compute of rounded operands.
torch.backends.cudnn.allow_tf32 = False
settings.register_profile("default", deadline=None, max_examples=200, derandomize=True)
settings.register_profile("nightly", deadline=None, max_examples=5000)
# For those who want to know whether a test fails, and not how.
settings.register_profile("unshrunk", settings.get_profile("default"), phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_finish():
    """What was imported and collected stays: no collection of garbage looks at it again, which takes a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def where(request):
    """The context that a test is given as its parameter, which runs within it."""
    with request.param():
        yield request.param


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
