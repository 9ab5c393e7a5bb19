"""Settings for every test, made before anything imports Triton."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.pop("MULTISTEP_TRITON_BACKEND", None)

import torch
from hypothesis import settings

torch.set_num_threads(2)
settings.register_profile("default", deadline=None, max_examples=200, derandomize=True)
settings.register_profile("nightly", deadline=None, max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
