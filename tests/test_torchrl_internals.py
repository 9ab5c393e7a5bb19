"""The private attributes of torchrl that the package reaches into: all of them, and in which files."""

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

# By the file that uses them; without one of them that file breaks.
NAMES = {
    "torchrl_internals.py": {
        # functions that call
        "_maybe_make_transform", "_extend", "_sample",
        # a buffer's lock and parts, and the buffers of an ensemble
        "_replay_lock", "_sample_unit", "_transform", "_rbs",
        # what a sampler finds episodes by, and transforms that were inverted
        "_fetch_traj", "_InvertTransform",
    },
    "buffer/storage_order.py": {
        # where the newest frame is
        "_last_cursor", "_last_cursor_index", "_set_last_cursor", "_mutation_revision", "_storage",
        # what a write leaves there
        "_len", "_bump_mutation_revision",
        # which writers there are, and how far each has come
        "_attached_entities", "_cursor", "_write_count", "_replay_lock",
    },
    "buffer/ordered.py": {
        # a buffer's parts, and how it is put together
        "_init", "_initialized", "_get_collate_fn", "_collate_fn", "_storage", "_sampler", "_writer", "_rng", "_empty",
        "_attached_entities", "_dim_extend", "_transform", "_delayed_init", "_initialize_prioritized_sampler",
        # its locks, and what it prefetches
        "_replay_lock", "_futures_lock", "_prefetch_queue", "_synchronize_futures_locked",
        "_clear_prefetch_queue_locked",
    },
    "buffer/storing.py": {
        # a buffer's parts and locks
        "_storage", "_sampler", "_writer", "_replay_lock", "_write_lock", "_attached_entities",
        # how it stores, and what is put back where that fails
        "_extend", "_add", "_len", "_last_cursor_index", "_write_count", "_generation",
    },
    "buffer/capturable.py": {
        # a buffer's parts and locks
        "_rng", "_storage", "_writer", "_sample_unit", "_prefetch", "_attached_entities",
        "_replay_lock",
    },
    "buffer/compact.py": {
        # where frames lie
        "_storage",
    },
    "buffer/arriving.py": {
        # a buffer's parts and its lock, and how it stores
        "_storage", "_sampler", "_replay_lock", "_extend", "_add",
    },
    "replay_buffer.py": {
        # whether samples are prefetched
        "_prefetch",
    },
    "buffer/checkpointed.py": {
        # where a buffer was
        "_storage", "_writer", "_cursor", "_mutation_revision",
    },
    "buffer/sampled.py": {
        # how a buffer samples
        "_sample", "_set_index_in_td", "_storage", "_sampler", "_writer", "_transform", "_sample_unit", "_collate_fn",
        "_pin_memory", "_batch_size", "_sample_dependency", "_service_shutdown",
        # its locks, and what it prefetches
        "_replay_lock", "_write_lock", "_futures_lock", "_prefetch", "_prefetch_queue", "_clear_prefetch_queue_locked",
    },
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
    assert set().union(*NAMES.values()) - private == set()


def test_these_files_alone_use_them(private):
    files = [each for each in PACKAGE.rglob("*.py") if "debug" not in each.parts]
    files += (PACKAGE.parent / "kernels").glob("*.py")
    names = {file: str(file.relative_to(PACKAGE.parent)).removeprefix("multistep_triton/") for file in files}
    assert NAMES.keys() <= {*names.values()}
    for file, name in names.items():
        # with which torchrl's transforms are extended
        assert used_in(file) & private - {"_inv_call"} == NAMES.get(name, set()), name
