"""Whether a rollout's observations can be kept once: what comes after a frame is what the next one holds.

May import ``twins``, ``postproc`` and what they may, ``explain`` and ``verify``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from multistep_triton.backends import EquivalenceError
from multistep_triton.buffer.stored import leaves_of
from multistep_triton.buffer.twins import find_twins, marks_of
from multistep_triton.debug.explain import load_rollout
from multistep_triton.debug.verify import check_kept_once
from multistep_triton.ends import Ends
from multistep_triton.frames import Frames
from multistep_triton.postproc import MultiStep


def run(path: Path, keys: Mapping[str, Any]) -> int:
    """Prints of every entry under "next" that is at the root, too, whether it can be kept once, and why not.

    Args:
        path: of the rollout.
        keys: arguments that name its entries, as of :class:`multistep_triton.MultiStep`.

    Returns:
        0 if all can; else 1.

    Raises:
        KeyError: there is none, or no done flag.
        TypeError: a flag is no flag.
        ValueError: the file cannot be read, or holds no frames ``[*B, T]``.
    """
    data = load_rollout(path)
    if not data.numel() or not data.ndim:
        raise ValueError(f"FILE must hold frames [*B, T], got {[*data.batch_size]}")
    dims, every = data.ndim, leaves_of(data, data.ndim)
    leaves = {key: leaf.movedim(dims - 1, 0) for key, leaf in every.items() if isinstance(leaf, torch.Tensor)}
    multistep = MultiStep(1.0, 1, **keys)
    roles = multistep._roles_in(leaves)
    multistep._groups_in(Frames.read(data), roles)  # which looks at flags
    twins, marks = find_twins(roles, leaves), marks_of(roles, leaves)
    if not twins or not marks[0]:
        raise KeyError(f"FILE must hold a done flag, and entries both at the root and under 'next', got {list(every)}")
    lead, odd = leaves[twins[0]].shape[1:dims], 0
    for twin in twins:
        # Nothing came before the first frame.
        ends = Ends(torch.empty(1, *lead), {twin: leaves[twin[1:]][:1]}, *marks)
        try:
            check_kept_once(ends, leaves, ends.find_ended(leaves, {}, None))
            print(f"{twin[1:]}: can be kept once, compact=True")
        except EquivalenceError as error:
            print(f"{twin[1:]}: must be kept twice\n{error}")
            odd += 1
    return 1 if odd else 0
