"""A transform that carries frames from call to call: it saves, moves and copies them.

May import ``base``, ``carry``, ``checks``, ``frames`` and ``layouts``.
"""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable
from multiprocessing.context import get_spawning_popen
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, is_tensorclass
from torch import Tensor
from torchrl.envs.transforms import Transform

from multistep_triton.base import MultiStepBase
from multistep_triton.carry import Carry
from multistep_triton.checks import check_gamma, check_positive_int
from multistep_triton.frames import Structure, frames_of, moved
from multistep_triton.layouts import KeyPath, Layout, Node

if TYPE_CHECKING:
    from typing_extensions import Self


class CarryingTransform(MultiStepBase, Transform):
    """A transform that holds back the last frames of a stream, and a lock for its calls."""

    # Every call replaces the carry; the frames of the replaced one stay intact until the next call only.
    _carry: Carry | None = None

    def __init__(self) -> None:
        super().__init__()
        # The transform needs a lock, as a replay buffer calls its transforms outside its own.
        self._lock = threading.RLock()

    @property
    def frames_held(self) -> int:
        """The number of frames held back of every row: at most ``n_steps`` as of the last call."""
        carry = self._carry  # reads it once, as a call in another thread may replace it
        return 0 if carry is None else carry.count

    def _said(self) -> list[str]:
        return [*super()._said(), f"frames_held={self.frames_held}"]

    def clear(self) -> None:
        """Drops the frames held back."""
        with self._lock:
            self._carry = None

    def get_extra_state(self) -> dict[str, Any]:
        """Returns the state that :meth:`state_dict` holds: the frames held back, ``n_steps`` and ``gamma``.

        Raises:
            TypeError: a non-tensor entry holds objects that ``torch.load`` refuses with ``weights_only=True``.
        """
        with self._lock:
            carry = None if self._carry is None else to_state(self._carry)
            return {"n_steps": int(self._n_steps), "gamma": float(self._gamma), "carry": carry}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores the state that :meth:`get_extra_state` returned; the next call continues its stream."""
        if not isinstance(state, dict) or state.keys() != {"n_steps", "gamma", "carry"}:
            raise ValueError(f"the state must be one of a MultiStepTransform, got {state!r:.200}")
        n_steps, gamma = check_positive_int("n_steps", state["n_steps"]), check_gamma(state["gamma"])
        carry = None if state["carry"] is None else from_state(state["carry"])
        with self._lock:
            self._n_steps, self._gamma, self._carry = n_steps, gamma, carry

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *arguments: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *arguments)
        # torchrl's class saves no such entry: a transform that holds back no frames may load its state.
        if self._carry is None and (key := f"{prefix}_extra_state") in missing_keys:
            missing_keys.remove(key)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the frames held back to the device that ``fn`` moves tensors to; they keep the dtypes of the data."""
        super()._apply(fn, recurse)
        with self._lock:
            if self._carry is not None:
                self._carry = moved(
                    self._carry, lambda leaf: fn(torch.empty(0, dtype=torch.bool, device=leaf.device)).device
                )
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without the lock, and with a copy of the frames held back.

        A process that is being spawned, such as a collector's worker, begins a stream of its own and gets no frames:
        otherwise each of several workers would emit the same frames again.
        """
        with self._lock:
            state: dict[str, Any] = super().__getstate__()
            state["_carry"] = self._carry and self._carry.compact() if get_spawning_popen() is None else None
        del state["_lock"]
        return state

    def clone(self) -> Self:
        """Returns a copy without parent and container, with its own copy of the frames held back."""
        with self._lock:
            twin: Self = super().clone()
            twin._carry = self._carry and self._carry.compact()
        twin._lock = threading.RLock()
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores the state that :meth:`__getstate__` returned, with a new lock."""
        super().__setstate__({**state, "_lock": threading.RLock()})

    @property
    def _buffer(self) -> TensorDict | None:
        """A copy of the frames held back, under the name that torchrl's class gives them."""
        with self._lock:
            frames = None if self._carry is None else frames_of(self._carry)
        return None if frames is None else frames.structure.build(frames.leaves, frames.batch_size)


def to_state(carry: Carry) -> dict[str, Any]:
    """Converts a carry to tensors and plain containers, which ``torch.load`` reads with ``weights_only=True``.

    Raises:
        TypeError: a non-tensor entry holds objects that ``torch.load`` refuses.
    """
    frames = frames_of(carry)
    structure = frames.structure
    for path, objects in structure.objects.items():
        _check_loadable(path, objects)
    nodes = {
        path: {
            "tensorclass": None if node.kind is None else [node.kind.__module__, node.kind.__qualname__],
            "tail": list(node.tail),
            "names": node.names and [*node.names],
            "on_device": node.device is not None,
        }
        for path, node in structure.layout.nodes.items()
    }
    copies = {path: list(objects) for path, objects in structure.objects.items()}
    return {"batch_size": list(frames.batch_size), "leaves": frames.leaves, "objects": copies, "nodes": nodes}


def from_state(state: dict[str, Any]) -> Carry:
    """Builds a carry from a copy of what :func:`to_state` returned, on the devices where its tensors are now.

    Raises:
        ValueError: the state is not one of :func:`to_state`, or names a tensorclass that has not been imported.
    """
    try:
        batch_size, leaves, objects = torch.Size(state["batch_size"]), dict(state["leaves"]), dict(state["objects"])
        device = next((leaf.device for leaf in leaves.values()), None)
        nodes = {
            path: Node(
                kind=None if node["tensorclass"] is None else _find_tensorclass(*node["tensorclass"]),
                tail=tuple(node["tail"]),
                names=node["names"] and tuple(node["names"]),
                device=device if node["on_device"] else None,
            )
            for path, node in state["nodes"].items()
        }
        whole = all(leaf.shape[: len(batch_size)] == batch_size and path[:-1] in nodes for path, leaf in leaves.items())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the state of frames held back must be one that was saved, got {state!r:.200}") from error
    if not whole or not leaves.keys() >= objects.keys() or not leaves:
        raise ValueError(f"the state of frames held back must be whole, got {state!r:.200}")
    layout = Layout.of_leaves(leaves, len(batch_size), nodes, objects)
    return Carry.of(leaves, batch_size[-1], Structure(batch_size[:-1], layout, objects))


def _check_loadable(path: KeyPath, objects: list[Any]) -> None:
    file = io.BytesIO()
    try:
        torch.save(objects, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:
        kinds = ", ".join(sorted({type(each).__name__ for each in objects}))
        raise TypeError(
            f"non-tensor entry {path} must hold what torch.load reads with weights_only=True to be part of a state, "
            f"got {kinds}: allow it with torch.serialization.add_safe_globals, or flush before"
        ) from error


def _find_tensorclass(module: str, name: str) -> type:
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type) or not is_tensorclass(found):
        raise ValueError(
            f"tensorclass {name} of the frames held back must be imported from {module} before, got {found}"
        )
    return found
