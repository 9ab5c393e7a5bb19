"""The specification of a ring: the frames of a window and, if observations are kept once, the rows after them.

May import ``task`` and ``samples``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multistep_triton.samples import Samples
from multistep_triton.task import AFTER_END, Keys, Leaves


def with_next(samples: Samples, data: Leaves, keys: Keys) -> tuple[Samples, Leaves, Tensor]:
    """Returns samples, leaves of the live frames, and which of these frames are ends whose rows are gone.

    In a leaf kept once, each frame has the row after it. The frame before replaces a sampled end that is gone; if that
    is an end, too, or no frame is there, the newest frame does.
    """
    time, *others = samples.indices
    if samples.ends is None or keys.count is None:
        sizes = next(iter(data.values())).shape[: len(samples.indices)]
        return samples, data, torch.zeros(sizes, dtype=torch.bool, device=time.device)
    ends, live, newest = samples.ends, samples.live, samples.newest
    count = data[keys.count][:live].reshape(live, *next(iter(data.values())).shape[1 : len(others) + 1])
    not_newest = torch.arange(live, device=time.device).view(-1, *[1] * len(others)) != newest
    end = (count != count.roll(-1, 0)) & not_newest
    gone = end & (count[newest] - count > ends.slots)
    leaves = {key: leaf[:live] for key, leaf in data.items()}
    for _, key, at in keys.outputs:
        if at == AFTER_END:
            features = [1] * (data[key].ndim - count.ndim)
            row, kept = torch.where(not_newest, count % ends.slots, ends.slots), end & ~gone | ~not_newest
            every = ends.rows[key].view(ends.slots + 1, *data[key].shape[1:])
            along = (torch.arange(size, device=time.device) for size in count.shape)
            rows = every[(row, *torch.meshgrid(*along, indexing="ij")[1:])]
            leaves[key] = torch.where(kept.view(*kept.shape, *features), rows, leaves[key].roll(-1, 0))
    before = (time - 1) % live
    stands = torch.where(end[(before, *others)], newest, before)
    return samples._replace(indices=[torch.where(gone[(time, *others)], stands, time), *others]), leaves, gone


def rows_of(samples: Samples, count: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Returns the index ``[N, count]`` of sampled frames and those after them, and how many newer ones exist, ``[N]``.

    The newest frame replaces frames that have not come yet.
    """
    time, *others = samples.indices
    after = (samples.newest - time) % samples.live
    ahead = torch.minimum(torch.arange(count, device=time.device), after[:, None])
    return ((time[:, None] + ahead) % samples.live, *(index[:, None] for index in others)), after
