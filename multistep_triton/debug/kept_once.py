"""Checks whether observations can be kept once: a frame's entry under "next" must be the next frame's at the root.

Owns the printed report. May import ``ends``, ``postproc`` and what they may, ``explain`` and ``verify``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from multistep_triton.backends import EquivalenceError
from multistep_triton.debug.explain import load_rollout
from multistep_triton.debug.verify import check_kept_once
from multistep_triton.ends import Ends
from multistep_triton.frames import Frames
from multistep_triton.postproc import MultiStep
from multistep_triton.roles import find_pairs, find_twins, marks_of


def run(path: Path, keys: Mapping[str, Any]) -> int:
    """Prints for every entry under "next" that also exists at the root whether it can be kept once, or why not.

    Args:
        path: the file that holds the rollout.
        keys: keyword arguments of :class:`multistep_triton.MultiStep` that name the rollout's entries.

    Returns:
        0 if all such entries can be kept once; else 1.

    Raises:
        KeyError: there is no such entry, or an entry that ``keys`` name is missing.
        TypeError: an entry that ``keys`` name has the wrong dtype or kind.
        ValueError: the file cannot be read, holds no frames ``[*B, T]``, or an entry has the wrong shape.
    """
    data = load_rollout(path)
    if not data.batch_size.numel() or not data.ndim:
        raise ValueError(f"FILE must hold frames [*B, T], got {[*data.batch_size]}")
    dims, frames = data.ndim, Frames.read(data)
    leaves = {entry: leaf.movedim(dims - 1, 0) for entry, leaf in frames.tensors.items()}
    multistep = MultiStep(1.0, 1, **keys)
    roles = multistep._roles_in(leaves)
    multistep._groups_in(frames, roles)  # raises if flags or rewards are wrong
    pairs, twins, marks = find_pairs(roles, leaves), find_twins(roles, leaves), marks_of(roles, leaves)
    if not pairs or not marks[0]:
        raise KeyError(f"FILE must hold a done flag, and entries both at the root and under 'next', got {list(leaves)}")
    lead, unlike = leaves[pairs[0]].shape[1:dims], [pair for pair in pairs if pair not in twins]
    odd = len(unlike)
    for pair in unlike:
        own, after = (f"{leaf.dtype} {[*leaf.shape[dims:]]}" for leaf in (leaves[pair[1:]], leaves[pair]))
        print(f"{pair[1:]}: must be kept twice, as each frame has {own} at the root and {after} under 'next'")
    for twin in twins:
        # No frame precedes the first one, whose own entry stands in for the row to compare with and so passes.
        ends = Ends(torch.empty(1, *lead), {twin: leaves[twin[1:]][:1]}, *marks)
        try:
            check_kept_once(ends, leaves, ends.find_ended(leaves, {}, None))
            print(f"{twin[1:]}: can be kept once, compact=True")
        except EquivalenceError as error:
            print(f"{twin[1:]}: must be kept twice\n{error}")
            odd += 1
    return 1 if odd else 0
