"""CheckpointedReplayBuffer: what a buffer whose frames lie in order saves of that, and how it is loaded.

Reaches into private attributes of torchrl's buffers, storages and writers. May import torchrl, ``stored`` and
``storing_buffer``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchrl.data import RoundRobinWriter

from multistep_triton.compact_buffer import CompactReplayBuffer
from multistep_triton.stored import leaves_of, versions_of

_RING_FILE = "n_step_ring.json"


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
        """As in torchrl, and which frame is the newest, whatever the writer."""
        with self._settled():
            return {**super().state_dict(), "_ring": self._ring_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torchrl, whose buffers' states are taken, too."""
        with self._loading():
            super().load_state_dict(state_dict)
            self._load_ring(state_dict.get("_ring"))

    def dumps(self, path: str | Path) -> None:
        """As in torchrl, and which frame is the newest, whatever the writer."""
        with self._settled():
            super().dumps(path)
            (Path(path) / _RING_FILE).write_text(json.dumps(self._ring_state()))

    def loads(self, path: str | Path) -> None:
        """As in torchrl, whose buffers' files are taken, too."""
        with self._loading():
            super().loads(path)
            file = Path(path) / _RING_FILE
            self._load_ring(json.loads(file.read_text()) if file.exists() else None)
