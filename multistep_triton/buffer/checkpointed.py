"""CheckpointedReplayBuffer: a buffer that saves and loads the order of its frames, and how it stores entries.

Reaches into private attributes of torchrl's buffers, storages and writers. May import torchrl, ``ends``, ``stored`` and
``compact`` and what it may.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection
from torch import Tensor
from torchrl.data import RoundRobinWriter

from multistep_triton.buffer.compact import CompactReplayBuffer
from multistep_triton.buffer.stored import check_layout, device_of, leaves_of, move_to, versions_of
from multistep_triton.ends import Ends
from multistep_triton.layouts import KeyPath
from multistep_triton.roles import as_path

_FILE = "n_step_order.pt"


class CheckpointedReplayBuffer(CompactReplayBuffer):
    """A buffer that goes on where it was saved; other threads neither store nor sample while it saves or loads."""

    def _order_state(self) -> dict[str, Any]:
        """Returns where frames lie and how entries are stored, with the ends and the pending frame.

        It consists of tensors and plain containers.
        """
        order, ends, kept = self._order, self._order.ends, None
        position, entries, pending = order.position(), order.entries(), order.pending
        if ends is not None:
            names = ("count", "rows", "done", "mask", "traj")
            kept = {**{name: getattr(ends, name) for name in names}, "by": tuple(order.ends_keys)}
        if lost := self.ends_lost():
            warnings.warn(
                f"{lost} ends of trajectories have lost what comes after them, so that windows end a frame earlier "
                f"there: {'' if ends is None else ends.slots} rows of an environment, end_slots, are too few",
                stacklevel=3,
            )
        return {
            "newest": None if position is None else position.newest,
            "torn": order.torn,
            "shape": None if entries is None else [*entries.shape],
            "paths": None if entries is None else [*leaves_of(entries, self._storage.ndim)],
            "compact": bool(self._compact),
            "wide": dict(order.wide_dtypes),
            "ends": kept,
            "waiting": None if pending is None else [[*pending.shape], pending.to_dict(), _group_sizes(pending)],
        }

    def _check_state(self, state: dict[str, Any], shape: Sequence[int] | None) -> None:
        """Checks that a checkpoint was saved with a size, ``compact`` and dtypes that agree with this buffer's."""
        entries, storage = self._order.entries(), self._storage
        if shape and (
            (storage.ndim, storage.max_size) != (len(shape), math.prod(shape))
            or (entries is not None and entries.shape != torch.Size(shape))
        ):
            got = f"ndim={storage.ndim} and max_size={storage.max_size}" if entries is None else [*entries.shape]
            raise ValueError(f"storage must count the frames of the one that was saved, {[*shape]}, got {got}")
        wide, own = state.get("wide", {}), dict(self._order.wide_dtypes)
        has_frames = not state or state["newest"] is not None
        if has_frames and entries is not None and wide != own:
            raise ValueError(
                f"store_as must be that of what a buffer has saved, whose entries came as {wide} and others as they "
                f"were stored, got a storage whose entries came as {own}: load into a new buffer"
            )
        if (saved := state.get("compact", False)) != bool(self._compact):
            saver = "with" if saved else "without"
            raise ValueError(f"compact must be {saved} to load what a buffer {saver} it has saved, got {self.compact}")
        ends = state.get("ends")
        if ends is not None and not isinstance(self._compact, bool):
            kept = {path[1:] for path in ends["rows"]}
            if kept != {*self._compact}:
                raise ValueError(
                    f"compact must name {sorted(kept)} to load what a buffer has saved, got {self.compact}"
                )

    def _load_order(self, state: dict[str, Any], place: tuple[torch.device | None, bool]) -> None:
        """Restores what :meth:`_order_state` returned; a checkpoint of torchrl's buffer has a cursor alone.

        Moves the storage's leaves to ``place``, the result of ``_place`` before the load.
        """
        order, storage, newest, torn = self._order, self._storage, state.get("newest"), state.get("torn")
        order.forget()
        if is_tensor_collection(entries := order.entries()):
            # torchrl leaves them where they were saved.
            storage._storage = entries = move_to(entries, *place)
        if entries is not None and len(storage):
            check_layout(storage, entries)
            if isinstance(self._writer, RoundRobinWriter):
                # The file may be older than a checkpoint that torchrl's buffer has saved beside it since.
                at = (self._writer._cursor - 1) % entries.shape[0]
                newest, torn = at, torn if newest == at else None
            order.set_last(newest)
            order.torn = torn or (0, 0)
            if newest is not None:
                order.go_on(newest, entries.shape[0])
        order.ends, order.wide_dtypes, order.pending, ends = None, state.get("wide", {}), None, state.get("ends")
        if waiting := state.get("waiting"):
            size, leaves, sizes = waiting
            order.pending = TensorDict(leaves, size)
            for path, each in sizes.items():
                order.pending.get(path).batch_size = each
        saved = state.get("paths")
        # Some of torchrl's checkpointers add entries, which later frames would lack.
        if entries is not None and saved and (added := leaves_of(entries, storage.ndim).keys() - {*saved}):
            with entries.unlock_():
                for path in added:
                    entries.del_(path)
        if ends is not None and entries is not None:
            device = device_of(entries)
            rows = {path: leaf.to(device, copy=True) for path, leaf in ends["rows"].items()}
            order.ends = Ends(ends["count"].to(device, copy=True), rows, ends["done"], ends["mask"], ends["traj"])
            order.ends_keys, order.ends_writes = ends["by"], order.writes

    @contextlib.contextmanager
    def _loading(self, state: dict[str, Any]) -> Iterator[None]:
        """Encloses a load, and restores ``state`` after it; if either fails with frames changed, marks their order."""
        with self._undisturbed():
            before, place = self._fingerprint(), self._place()
            try:
                yield
                self._load_order(state, place)
            except BaseException:
                if before != self._fingerprint():
                    self._order.broken = "a checkpoint was loaded in part"
                raise

    def _fingerprint(self) -> tuple[Any, ...]:
        """Returns a value that changes when the frames change."""
        storage, entries = self._storage, self._order.entries()
        versions = [] if entries is None else versions_of(leaves_of(entries, storage.ndim).values())
        return id(entries), len(storage), storage._mutation_revision, versions

    def state_dict(self) -> dict[str, Any]:
        """Returns torchrl's state, with the order of the frames and how entries are stored."""
        with self._undisturbed(keep=True):
            return {**super().state_dict(), "_order": self._order_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class or of a buffer of torchrl."""
        self._begin()
        entries, state = state_dict["_storage"].get("_storage"), state_dict.get("_order", {})
        leaves = entries.values() if isinstance(entries, Mapping) else ()
        shape = next((leaf.shape[: self._storage.ndim] for leaf in leaves if isinstance(leaf, Tensor)), None)
        self._check_state(state, state.get("shape", shape))
        with self._loading(state):
            super().load_state_dict(state_dict)

    def dumps(self, path: str | Path) -> None:
        """Saves the buffer into a folder, as in torchrl, with what :meth:`state_dict` adds."""
        with self._undisturbed(keep=True):
            super().dumps(path)
            torch.save(self._order_state(), Path(path) / _FILE)

    def loads(self, path: str | Path) -> None:
        """Loads the folder that :meth:`dumps`, or a buffer of torchrl, has written."""
        self._begin()
        file = Path(path) / _FILE
        state = torch.load(file, map_location="cpu", weights_only=True) if file.exists() else {}
        self._check_state(state, state.get("shape"))
        with self._loading(state):
            super().loads(path)


def _group_sizes(data: TensorDictBase) -> dict[KeyPath, list[int]]:
    """Returns the batch size of every group, by path; groups come before those in them."""
    return {as_path(key): [*each.batch_size] for key, each in data.items(True) if isinstance(each, TensorDictBase)}
