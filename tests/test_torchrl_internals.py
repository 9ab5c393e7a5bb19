"""The private attributes of torchrl that the package reaches into: all of them, and in one file."""

import ast
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import (
    LazyTensorStorage,
    OfflineToOnlineReplayBuffer,
    ReplayBufferEnsemble,
    SliceSampler,
    TensorDictReplayBuffer,
    TensorDictRoundRobinWriter,
)
from torchrl.envs.transforms import Compose, transforms

import multistep_triton

PACKAGE = Path(multistep_triton.__file__).parent
FILE = "torchrl_internals.py"

# Each with what would break without it.
NAMES = {
    # a buffer's parts, and how it is put together
    "_init", "_initialized", "_maybe_make_transform", "_get_collate_fn", "_collate_fn", "_pin_memory", "_sample_unit",
    "_storage", "_sampler", "_writer", "_transform", "_rng",
    # its locks, and what it prefetches
    "_replay_lock", "_write_lock", "_futures_lock", "_prefetch", "_prefetch_queue", "_clear_prefetch_queue_locked",
    "_synchronize_futures_locked",
    # how it stores and samples
    "_extend", "_add", "_sample", "_set_index_in_td",
    # where the newest frame is
    "_len", "_last_cursor", "_last_cursor_index", "_set_last_cursor", "_dim_extend",
    "_mutation_revision", "_attached_entities", "_cursor",
    "_write_count", "_empty",
    # what a sampler finds episodes by, the buffers of an ensemble, and transforms that were inverted
    "_fetch_traj", "_rbs", "_InvertTransform",
}  # fmt: skip


def used_in(file):
    """Private names of attributes, of methods and of what is imported."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torchrl"):
            names.update(alias.name for alias in node.names)
            assert not any(part.startswith("_") for part in node.module.split(".")), f"{file}: {node.module}"
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


@pytest.fixture(scope="module")
def private():
    """All private attributes of torchrl's buffers and their parts, once they are in use."""
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(4), transform=Compose(), writer=TensorDictRoundRobinWriter()
    )
    buffer.extend(TensorDict({"a": torch.zeros(2)}, [2]))
    ensemble = ReplayBufferEnsemble(buffer, buffer)
    objects = [
        buffer,
        buffer.storage,
        buffer.writer,
        buffer.sampler,
        buffer.transform,
        ensemble,
        SliceSampler(slice_len=1),
    ]
    names = {name for each in (*objects, OfflineToOnlineReplayBuffer, transforms) for name in dir(each)}
    return {name for name in names - {*dir(torch.nn.Module())} if name.startswith("_") and not name.startswith("__")}


def test_every_name_is_one_of_torchrls(private):
    assert NAMES - private == set()


def test_one_file_uses_them(private):
    assert used_in(PACKAGE / FILE) & private == NAMES
    for file in (*PACKAGE.glob("*.py"), *(PACKAGE.parent / "kernels").glob("*.py")):
        if file.name != FILE:
            # with which torchrl's transforms are extended
            assert used_in(file) & private - {"_inv_call"} == set(), file.name
