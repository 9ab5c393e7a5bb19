"""Checks of the parts of a buffer whose frames lie in order, and of data that continues the stored frames.

Owns these checks; knows no windows. May import ``layouts`` and torchrl, by its public names alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from tensordict import LazyStackedTensorDict, TensorDictBase, is_leaf_nontensor, is_tensor_collection
from torch import Tensor
from torchrl.data import ImmutableDatasetWriter, RandomSampler, RoundRobinWriter, Storage, TensorStorage, Writer
from torchrl.data.replay_buffers.samplers import ConsumingSampler, Sampler, SliceSampler

from multistep_triton.layouts import KeyPath

Leaves = dict[KeyPath, Any]
"""Leaves by path: tensors and non-tensors."""


class Position(NamedTuple):
    """Which slots of a storage hold frames."""

    newest: int
    """The slot of the newest frame; the slot after it holds the oldest frame, or no frame yet."""
    live: int
    """The number of slots that hold frames: all slots, or those up to the newest."""
    slots: int
    written: Tensor | None = None
    """The device's write count, int64, if it replaces ``newest`` and ``live``; see ``CapturableReplayBuffer``."""


def draws_alike(sampler: Sampler | None) -> bool:
    """Whether a sampler draws all frames with equal probability: its ``sample`` is that of ``RandomSampler``."""
    return getattr(sampler.sample, "__func__", None) is RandomSampler.sample if sampler else False


class TornError(RuntimeError):
    """The error of a sample while a failed write has left slots overwritten in part."""


def was_torn(batch: Future[Any]) -> bool:
    """Whether a prefetched batch is a :class:`TornError`, which was raised before anything was drawn."""
    return batch.done() and isinstance(batch.exception(), TornError)


def check_parts(storage: Storage, writer: Writer | None, sampler: Sampler | None, of_other: bool = False) -> None:
    """Checks that storage and writer keep frames in the order of arrival, and that the sampler leaves them unchanged.

    With ``of_other`` the parts belong to another buffer on the storage, whose sampler may write into its samples.
    """
    if not isinstance(storage, TensorStorage):
        raise TypeError(f"storage must be a TensorStorage, such as LazyTensorStorage, got {type(storage).__name__}")
    if not isinstance(writer, RoundRobinWriter | ImmutableDatasetWriter | None):
        raise TypeError(f"writer must be a RoundRobinWriter, which stores in order, got {type(writer).__name__}")
    if isinstance(sampler, ConsumingSampler):
        raise TypeError(
            f"sampler must leave frames where windows read them, got {type(sampler).__name__}; "
            f"consume_after_n_samples must be None"
        )
    if isinstance(sampler, SliceSampler) and sampler.truncated_key is not None and not of_other:
        raise TypeError(
            f"sampler must leave the done flags to the windows, got {type(sampler).__name__} with truncated_key="
            f"{sampler.truncated_key!r}, which writes the ends of slices into them; truncated_key must be None"
        )


def mended(torn: tuple[int, int], newest: int, frames: int, slots: int) -> tuple[int, int]:
    """Returns the torn slots, the first and their number, that remain after a write of ``frames`` after ``newest``."""
    first, count = torn
    overwritten = frames - (first - newest - 1) % slots
    return ((first + overwritten) % slots, max(count - overwritten, 0)) if count and overwritten > 0 else torn


def check_dims(data: TensorDictBase, dims: int, ndim: int) -> None:
    """Checks that data has ``dims`` batch dimensions, as a storage of ``ndim`` dimensions needs."""
    if data.batch_dims == dims:
        return
    kind = "[*B, T]" if dims == ndim else "[*B]"
    message = (
        f"data must have a batch size {kind} of {dims} dimensions, as the storage has ndim={ndim}, "
        f"got {list(data.batch_size)}"
    )
    if data.batch_dims > dims and dims == ndim:
        message += f": for several environments use a storage of ndim={ndim + 1} and data [num_envs, T]"
    elif data.batch_dims > dims:
        message += ": add stores a single frame of every environment; extend with data [*B, T]"
    raise ValueError(message)


def check_time_dim(data: TensorDictBase, storage: Storage, dim_extend: int) -> None:
    """Checks that a ``TensorStorage`` is extended along time, the last batch dimension of data."""
    if isinstance(storage, TensorStorage) and data.ndim and data.ndim - 1 != dim_extend:
        raise ValueError(
            f"data must have time where the buffer is extended, in dimension {dim_extend}, and last, got "
            f"{[*data.batch_size]}: for several environments use a storage of ndim=2 and data [num_envs, T]"
        )


def check_layout(storage: Storage, entries: TensorDictBase) -> None:
    """Checks that entries have the storage's ``ndim`` batch dimensions, and that its ``max_size`` counts all frames."""
    ndim = storage.ndim
    if not is_tensor_collection(entries):
        raise TypeError(f"storage must hold a tensordict, got {type(entries).__name__}")
    if entries.batch_dims != ndim:
        raise ValueError(
            f"storage must hold frames of batch size {[*entries.shape[:ndim]]}, as it has ndim={ndim}, got "
            f"{[*entries.shape]}: for several environments use a storage of ndim=2 and data [num_envs, T]"
        )
    if entries.numel() != storage.max_size:
        raise ValueError(
            f"storage must count the frames of all its dimensions, got max_size = {storage.max_size} for "
            f"{[*entries.shape]}, as torchrl makes it of data or of a storage of another size that is loaded: extend a "
            f"LazyTensorStorage({entries.numel()}, ndim={ndim}) with the data"
        )


def check_index(index: Any, ndim: int, device: torch.device) -> list[Tensor]:
    """Checks that a sampler drew integers for every dimension of the storage, and returns them as int64."""
    dims = index if isinstance(index, tuple) else (index,)
    if len(dims) != ndim or any(isinstance(dim, slice) for dim in dims):
        raise TypeError(
            f"sampler must draw {ndim} tensors of indices, as the storage has ndim={ndim}, got {index!r:.200}"
        )
    tensors = [torch.as_tensor(dim, device=device) for dim in dims]
    for tensor in tensors:
        if tensor.dtype == torch.bool or tensor.is_floating_point():
            raise TypeError(f"sampler must draw integers, got indices of {tensor.dtype}")
    return [tensor.to(torch.int64) for tensor in tensors]


def check_continues(new: Leaves, stored: Leaves, new_dims: int, dims: int, like: str = "as what is stored") -> None:
    """Checks that entries of the data have the dtypes and trailing shapes of the stored entries of their paths."""
    for path in new.keys() & stored.keys():
        kinds = [_kind_of(leaf, ndim) for leaf, ndim in ((new[path], new_dims), (stored[path], dims))]
        if kinds[0] != kinds[1]:
            got, expected = (" ".join(map(str, kind)) for kind in kinds)
            raise ValueError(f"{path} must be {expected}, {like}, got {got}")


def _kind_of(leaf: Any, ndim: int) -> tuple[Any, ...]:
    return (leaf.dtype, [*leaf.shape[ndim:]]) if isinstance(leaf, Tensor) else ("a non-tensor",)


def leaves_of(data: TensorDictBase, dims: int) -> Leaves:
    """Returns leaves by path; of a lazy stack along one of the first ``dims`` dimensions, those of one element."""
    if isinstance(data, LazyStackedTensorDict) and data.stack_dim < dims and data.tensordicts:
        # Reading its entries would stack them; one element has the same kinds, here with a dimension of size 1.
        first, *others = (leaves_of(element, dims - 1) for element in data.tensordicts)
        for other in others:
            if odd := sorted(first.keys() ^ other.keys()):
                raise ValueError(f"data must hold the same entries in all of a lazy stack, got {odd} in some alone")
            check_continues(other, first, dims - 1, dims - 1, "as others of a lazy stack")
        return {path: leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf for path, leaf in first.items()}
    items = data.items(True, True, is_leaf=is_leaf_nontensor)
    return {(key,) if isinstance(key, str) else key: leaf for key, leaf in items}


def device_of(data: TensorDictBase) -> torch.device | None:
    """Returns the device of the first tensor."""
    while isinstance(data, LazyStackedTensorDict) and data.tensordicts:
        data = data.tensordicts[0]
    return next((leaf.device for leaf in data.values(True, True) if isinstance(leaf, Tensor)), None)


def move_to(data: TensorDictBase, device: Any, told: bool = True) -> TensorDictBase:
    """Returns data on a device; unless that is the CPU, its own ``device`` says so if ``told``."""
    if device is None or data.device == device:
        return data
    is_there = (device.type == "cpu" or not told) and _lies_on(data, device)
    # The host waits, as the caller may write into its memory when the call returns.
    return data if is_there else data.to(device, non_blocking=False)


def _lies_on(data: TensorDictBase, device: torch.device) -> bool:
    if isinstance(data, LazyStackedTensorDict):
        return all(_lies_on(element, device) for element in data.tensordicts)
    return all(leaf.device == device for leaf in data.values(True, True) if isinstance(leaf, Tensor))


def versions_of(leaves: Iterable[Any]) -> list[int | None]:
    """Returns torch's version counter of every tensor; None for inference tensors, which have no counter."""
    return [None if leaf.is_inference() else leaf._version for leaf in leaves if isinstance(leaf, Tensor)]
