"""The state of frames held back: what is saved of them, and how they are read again.

Owns the layout of that state. May import ``carry`` and ``frames``.
"""

from __future__ import annotations

import io
import sys
from typing import Any

import torch
from tensordict import is_tensorclass

from multistep_triton.carry import Carry
from multistep_triton.frames import Frames, KeyPath, Node, Structure, frames_of


def to_state(carry: Carry) -> dict[str, Any]:
    """Frames in tensors and plain containers, which ``torch.load`` reads with ``weights_only=True``.

    Raises:
        TypeError: a non-tensor entry holds anything else.
    """
    frames = frames_of(carry)
    structure = frames.structure
    for path, objects in structure.objects.items():
        _check_loadable(path, objects)
    nodes = {
        path: {
            "tensorclass": None if node.kind is None else [node.kind.__module__, node.kind.__qualname__],
            "tail": list(node.tail),
            "names": node.names,
            "on_device": node.device is not None,
        }
        for path, node in structure.nodes.items()
    }
    copies = {path: list(objects) for path, objects in structure.objects.items()}
    return {"batch_size": list(frames.batch_size), "leaves": frames.leaves, "objects": copies, "nodes": nodes}


def from_state(state: dict[str, Any]) -> Carry:
    """The frames of :func:`to_state`, copied, on whatever device its tensors are now.

    Raises:
        ValueError: it is none, or a tensorclass in it has not been imported.
    """
    try:
        batch_size, leaves, objects = torch.Size(state["batch_size"]), dict(state["leaves"]), dict(state["objects"])
        device = next((leaf.device for leaf in leaves.values()), None)
        nodes = {
            path: Node(
                kind=None if node["tensorclass"] is None else _find_tensorclass(*node["tensorclass"]),
                tail=tuple(node["tail"]),
                names=node["names"],
                device=device if node["on_device"] else None,
            )
            for path, node in state["nodes"].items()
        }
        whole = all(leaf.shape[: len(batch_size)] == batch_size and path[:-1] in nodes for path, leaf in leaves.items())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the state of frames held back must be one that was saved, got {state!r:.200}") from error
    if not whole or not leaves.keys() >= objects.keys() or not leaves:
        raise ValueError(f"the state of frames held back must be whole, got {state!r:.200}")
    structure = Frames(batch_size, leaves, Structure(batch_size[:-1], nodes, objects)).find_layout().structure
    return Carry.of(leaves, batch_size[-1], structure)


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
