"""Ways to save a transform or a buffer, and to resume another one from it."""

import copy
import io
import pickle
import tempfile

import pytest
import torch
from torchrl.data import LazyMemmapStorage, LazyTensorStorage

from multistep_triton import MultiStepTransform

N_STEPS = 3


def make_transform(**arguments):
    return MultiStepTransform(**{"n_steps": N_STEPS, "gamma": 0.9, **arguments})


def load_transform(transform):
    """A new transform with what ``torch.save`` and ``torch.load`` kept of another's state."""
    file = io.BytesIO()
    torch.save(transform.state_dict(), file)
    file.seek(0)
    resumed = make_transform()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    return resumed


def load_state_dict(transform):
    resumed = make_transform()
    resumed.load_state_dict(transform.state_dict())
    return resumed


TRANSFORMS = {
    "state_dict": load_state_dict,
    "torch.save": load_transform,
    "pickle": lambda transform: pickle.loads(pickle.dumps(transform)),
    "deepcopy": copy.deepcopy,
    "clone": lambda transform: transform.clone(),
}


def dumps_and_loads(buffer, make):
    with tempfile.TemporaryDirectory() as folder:
        buffer.dumps(folder)
        resumed = make()
        resumed.loads(folder)
    return resumed


def through_state_dict(buffer, make):
    resumed = make()
    resumed.load_state_dict(copy.deepcopy(buffer.state_dict()))
    return resumed


WAYS = {
    "dumps": dumps_and_loads,
    "state_dict": through_state_dict,
    "pickle": lambda buffer, make: pickle.loads(pickle.dumps(buffer)),
    "deepcopy": lambda buffer, make: copy.deepcopy(buffer),
}
EVERY_WAY = [
    *((way, LazyTensorStorage) for way in WAYS),
    # torchrl's memory-mapped storages cannot be pickled or copied
    ("dumps", LazyMemmapStorage),
    ("state_dict", LazyMemmapStorage),
]
loading_is_told = pytest.mark.filterwarnings("ignore:Loading the storage on an uninitialized TensorDict:UserWarning")
