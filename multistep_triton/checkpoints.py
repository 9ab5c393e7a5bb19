"""CheckpointedReplayBuffer: what a buffer whose frames lie in order saves of that, and how it is loaded.

Reaches into private attributes of torchrl's buffers, storages and writers. May import torchrl, ``ends``, ``stored`` and
``compact_buffer`` and what it may.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torchrl.data import RoundRobinWriter

from multistep_triton.compact_buffer import CompactReplayBuffer
from multistep_triton.ends import Ends
from multistep_triton.stored import leaves_of, versions_of

_RING_FILE, _ENDS_FILE = "n_step_ring.json", "n_step_ends.pt"


class CheckpointedReplayBuffer(CompactReplayBuffer):
    """One that goes on where it was when it was saved; nothing is stored or sampled meanwhile."""

    @contextlib.contextmanager
    def _settled(self) -> Iterator[None]:
        """Within, nothing is sampled, prefetched or stored by another thread."""
        with self._futures_lock:
            # A sample that is being prefetched waits for the other lock.
            self._synchronize_futures_locked()
            with self._replay_lock:
                yield

    def _ring_state(self) -> dict[str, Any]:
        position = self._order.position()
        return {"newest": None if position is None else position.newest, "torn": [*self._order.torn]}

    def _load_ring(self, ring: dict[str, Any] | None) -> None:
        """Puts the storage where it was when it was saved; a buffer of torchrl's saves its writer's cursor alone."""
        order, newest = self._order, None if ring is None else ring["newest"]
        entries = order.stored()
        order.forget()
        if entries is None:
            return
        if isinstance(self._writer, RoundRobinWriter):
            # A file of another time may lie beside what a buffer of torchrl's has saved since.
            at = (self._writer._cursor - 1) % entries.shape[0]
            ring, newest = ring if newest == at else None, at
        order.set_last(newest)
        if ring is not None:
            first, torn = ring["torn"]
            order.torn = first, torn
        if newest is not None:
            order.go_on(newest, entries.shape[0])

    def _ends_state(self) -> dict[str, Any] | None:
        """What comes after frames, as tensors and plain containers; None if there are no frames."""
        order, ends = self._order, self._order.ends
        if ends is None:
            return None
        if lost := self.ends_lost():
            warnings.warn(
                f"{lost} ends of trajectories have lost what comes after them, so that windows end a frame earlier "
                f"there: end_slots = {ends.slots} of an environment are too few, of {len(ends.count)} slots",
                stacklevel=3,
            )
        names = {name: getattr(ends, name) for name in ("count", "rows", "done", "mask", "traj")}
        return {**names, "kept_by": order.kept_by}

    def _check_saved(self, ends: bool) -> None:
        """Checks that what was saved is of a buffer that is compact, or of one that is not, as this one."""
        if ends != bool(self._compact):
            saver = "with compact" if ends else "without compact"
            raise ValueError(f"compact must be {ends} to load what a buffer {saver} has saved, got {self.compact}")

    def _load_ends(self, state: dict[str, Any] | None) -> None:
        order, entries = self._order, self._order.entries()
        order.ends = None
        if state is not None and entries is not None:
            device = next(iter(entries.values(True, True))).device
            rows = {tuple(path): leaf.to(device, copy=True) for path, leaf in state["rows"].items()}
            flags = [None if key is None else tuple(key) for key in (state["mask"], state["traj"])]
            done = tuple(map(tuple, state["done"]))
            order.ends = Ends(state["count"].to(device, copy=True), rows, done, *flags)
            order.kept_by, order.kept_writes = tuple(state["kept_by"]), order.writes

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        """Within, a checkpoint is loaded; where that fails when frames were loaded already, they are in no order."""
        with self._settled():
            before = self._fingerprint()
            try:
                yield
            except BaseException:
                if before != self._fingerprint():
                    self._order.broken = "a checkpoint was loaded in part"
                raise

    def _fingerprint(self) -> tuple[Any, ...]:
        """What is another one when frames are."""
        storage, entries = self._storage, self._order.entries()
        versions = [] if entries is None else versions_of(leaves_of(entries, storage.ndim).values())
        return id(entries), len(storage), storage._mutation_revision, versions

    def state_dict(self) -> dict[str, Any]:
        """As in torchrl, and which frame is the newest, whatever the writer; with compact, what comes after frames."""
        with self._settled():
            ends = {"_ends": self._ends_state()} if self._compact else {}
            return {**super().state_dict(), "_ring": self._ring_state(), **ends}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torchrl, whose buffers' states are taken, too."""
        self._check_saved("_ends" in state_dict)
        with self._loading():
            super().load_state_dict(state_dict)
            self._load_ring(state_dict.get("_ring"))
            self._load_ends(state_dict.get("_ends"))

    def dumps(self, path: str | Path) -> None:
        """As in torchrl, and what else :meth:`state_dict` holds."""
        file = Path(path) / _ENDS_FILE
        with self._settled():
            super().dumps(path)
            (Path(path) / _RING_FILE).write_text(json.dumps(self._ring_state()))
            if self._compact:
                torch.save(self._ends_state(), file)
            else:
                file.unlink(missing_ok=True)

    def loads(self, path: str | Path) -> None:
        """As in torchrl, whose buffers' files are taken, too."""
        ring, ends = Path(path) / _RING_FILE, Path(path) / _ENDS_FILE
        self._check_saved(ends.exists())
        with self._loading():
            super().loads(path)
            self._load_ring(json.loads(ring.read_text()) if ring.exists() else None)
            self._load_ends(torch.load(ends) if ends.exists() else None)
