"""Owns the text about windows: why a window ends, a table of its frames, and numbers. May import torch only."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

# A table of more frames, or a sum of more terms, than this leaves some out.
MOST = 24
# The significant digits that distinguish neighbouring floats, by the bytes of the dtype.
_DIGITS = {1: 3, 2: 5, 4: 9, 8: 17}
_NUMBER = re.compile(r"-|\.{3}|-?inf|nan|-?[0-9.]+(e[+-][0-9]+)?")


class Row(NamedTuple):
    """The flags and ids that decide where the windows of one row end, one element for each frame."""

    done: list[bool]
    valid: list[bool] | None = None
    """False where a frame is padding; None if there is no mask."""
    traj: list[int] | None = None
    """Trajectory ids; None if the row has none."""
    name: str = "done"
    """The name of the done flag in tables."""
    others: Mapping[str, list[bool]] = {}
    """The other flags that end windows, by name."""

    @classmethod
    def read(cls, dones: Mapping[str, Tensor], mask: Tensor | None, traj: Tensor | None, name: str = "done") -> Row:
        """Reads tensors of one element per frame; the first of ``dones`` is the done flag, whatever its key."""
        valid, ids = (None if flag is None else flag.reshape(-1).tolist() for flag in (mask, traj))
        (_, done), *others = [(key, flag.reshape(-1).tolist()) for key, flag in dones.items()]
        return cls(done, valid, ids, name, dict(others))

    def ended(self, t: int) -> str | None:
        """Returns ``"done"`` if the done flag is set at frame ``t``, else the name of another set flag, or None."""
        return "done" if self.done[t] else next((name for name, flags in self.others.items() if flags[t]), None)

    def boundary(self, t: int) -> str | None:
        """Says why frame ``t`` is a boundary; returns None if it is none."""
        if flag := self.ended(t):
            return flag
        if self.valid is not None and not self.valid[t]:
            return "padding, by the mask"
        if t + 1 < len(self.done):
            if self.valid is not None and not self.valid[t + 1]:
                return "padding follows, by the mask"
            if self.traj is not None and self.traj[t] != self.traj[t + 1]:
                return f"trajectory id changes from {self.traj[t]} to {self.traj[t + 1]}"
        return None

    def why(self, begin: int, end: int, n_steps: int) -> str:
        """Says why the window that begins at frame ``begin`` ends at ``end``."""
        if reason := self.boundary(end):
            return reason
        if end - begin + 1 == n_steps:
            return "full"
        return "end of data" if end + 1 == len(self.done) else "nothing ends it"

    def table(
        self, begin: int, last: int, columns: Mapping[str, Callable[[int], object]], notes: Mapping[int, Sequence[str]]
    ) -> str:
        """Tabulates columns, flags and notes of frames ``begin .. last``; of many, those near an edge or a note."""
        flags = ((self.name, self.done), ("mask", self.valid), ("trajectory", self.traj))
        shown = [*columns.items(), *((name, flag.__getitem__) for name, flag in flags if flag is not None)]
        header = ["t", *(name for name, _ in shown), ""]
        lines = []
        frames = list(range(begin, last + 1))
        if len(frames) > MOST:
            near = range(-MOST // 8, MOST // 8 + 1)
            frames = sorted({t + i for t in (begin, last, *notes) for i in near}.intersection(frames))
        for before, t in zip([begin, *frames], frames, strict=False):
            if t > before + 1:
                lines.append(["..."] * (len(header) - 1) + [""])
            lines.append([str(t), *(number(cell(t)) for _, cell in shown), "; ".join(notes.get(t, ()))])
        return layout(header, lines)


def number(value: Any, digits: int = 6) -> str:
    """Formats a scalar: a tensor's with the digits that tell it from its neighbours, a float with ``digits`` digits."""
    if isinstance(value, Tensor):
        value, digits = value.item(), _DIGITS[min(value.dtype.itemsize, 8)]
    return f"{value:.{digits}g}" if isinstance(value, float | complex) else str(value)


def layout(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Formats a table as indented text, with columns of numbers aligned to the right."""
    columns = []
    for name, *cells in zip(header, *lines, strict=True):
        width = max(map(len, [name, *cells]))
        align = str.rjust if all(map(_NUMBER.fullmatch, cells)) else str.ljust
        columns.append([align(cell, width) for cell in (name, *cells)])
    return "\n".join(f"  {'  '.join(line)}".rstrip() for line in zip(*columns, strict=True))


def shortened(terms: Sequence[str]) -> list[str]:
    """Returns all terms of a sum or, of more than ``MOST``, the first and last ones."""
    return [*terms] if len(terms) <= MOST else [*terms[: MOST // 2], "...", *terms[-MOST // 2 :]]
