"""Data and states that a transform refuses: how each is spoiled, and what is said."""

import torch
from tensordict import lazy_stack


def without(key):
    return lambda data: data.exclude(key)


def with_leaf(key, make):
    def change(data):
        data = data.clone()
        data[key] = make(data[key])
        return data

    return change


BAD_DATA = {
    "done missing": (without(("next", "done")), KeyError, r"tensor at \('next', 'done'\), got the entries \[.*'obs"),
    "reward missing": (without(("next", "reward")), KeyError, r"tensor at \('next', 'reward'\), got the entries"),
    "done not bool": (
        with_leaf(("next", "done"), lambda done: done.float()),
        TypeError,
        r"done \('next', 'done'\) must be bool, got torch.float32",
    ),
    "done of another shape": (
        with_leaf(("next", "done"), lambda done: done.expand(2, 10, 4)),
        ValueError,
        r"done .* must have shape \[\*B, T\] = \[2, 10\] or \[\*B, T, 1\] = \[2, 10, 1\] or, per agent, that of a "
        r"reward beside it, got \[2, 10, 4\]",
    ),
    "mask not bool": (
        lambda data: data.clone().set("mask", torch.ones(2, 10)),
        TypeError,
        r"mask \('mask',\), named by mask_key, must be bool, got torch.float32",
    ),
    "complex reward": (
        with_leaf(("next", "reward"), lambda reward: reward.to(torch.complex64)),
        TypeError,
        r"reward .* must be floating point, integer or bool, got torch.complex64",
    ),
    "other batch": (
        lambda data: torch.cat([data, data], 0),
        ValueError,
        r"continue the frames held back from the last call \(clear\(\) .*\*B must be \[2\], got \[4\]",
    ),
    "other number of batch dimensions": (lambda data: data[0], ValueError, r"\*B must be \[2\], got \[\]"),
    "a key less": (without("action"), ValueError, r"\('action',\) must be torch.int64 \[\] on cpu, got absent"),
    "a key more": (
        lambda data: data.clone().set("extra", torch.ones(2, 10)),
        ValueError,
        r"\('extra',\) must be absent, got torch.float32 \[\] on cpu",
    ),
    "other trailing shape": (
        with_leaf("observation", lambda leaf: leaf[..., :2]),
        ValueError,
        r"\('observation',\) must be torch.float32 \[3\] on cpu, got torch.float32 \[2\] on cpu",
    ),
    "other dtype": (
        with_leaf(("next", "observation"), lambda leaf: leaf.double()),
        ValueError,
        r"\('next', 'observation'\) must be torch.float32 \[3\] on cpu, got torch.float64 \[3\] on cpu",
    ),
    "other device": (
        lambda data: data.to("meta"),
        ValueError,
        r"\('observation',\) must be torch.float32 \[3\] on cpu, got torch.float32 \[3\] on meta",
    ),
    "a non-tensor where a tensor was": (
        lambda data: data.clone().set("action", "left"),
        ValueError,
        r"\('action',\) must be torch.int64 \[\] on cpu, got non-tensor \[\]$",
    ),
    "a mask that is no tensor": (
        lambda data: data.clone().set("mask", "left"),
        TypeError,
        r"\('mask',\), named by mask_key, must be a tensor, got a non-tensor",
    ),
    "a reward that is no tensor": (
        lambda data: data.clone().set(("next", "reward"), "much"),
        TypeError,
        r"\('next', 'reward'\), named by reward_keys, must be a tensor, got a non-tensor",
    ),
    "a sparse entry": (
        lambda data: data.clone().set("action", torch.ones(*data.shape, 3).to_sparse()),
        TypeError,
        r"entry \('action',\) must be a dense tensor, got one of torch.sparse_coo",
    ),
    "a lazy stack with a key in some elements": (
        lambda data: lazy_stack([data[0].clone().set("extra", torch.ones(10)), data[1]]),
        ValueError,
        r"entries \[\('extra',\)\] must be in every element of a lazily stacked tensordict, got some without",
    ),
    "a lazy stack of several shapes": (
        lambda data: lazy_stack([data[0].clone().set("action", torch.ones(10, 2)), data[1]]),
        ValueError,
        r"entry \('action',\) must have one shape in every element of a lazily stacked tensordict, got ",
    ),
    "not a tensordict": (lambda data: [data], TypeError, r"must be a TensorDict of batch size \[\*B, T\], got list"),
    "a dict": (lambda data: data.to_dict(), TypeError, r"must be a TensorDict of batch size \[\*B, T\], got dict"),
}

CARRY = {
    "batch_size": [2],
    "leaves": {("action",): torch.zeros(2)},
    "objects": {},
    "nodes": {(): {"tensorclass": None, "tail": [], "names": None, "on_device": False}},
}
BAD_STATES = {
    "no dict": (3, "the state must be one of a MultiStepTransform, got 3"),
    "another's": ({"weight": 1}, r"the state must be one of a MultiStepTransform, got \{'weight': 1\}"),
    "n_steps": ({"n_steps": 0, "gamma": 0.9, "carry": None}, "n_steps must be an int >= 1, got 0"),
    "gamma": ({"n_steps": 3, "gamma": 2.0, "carry": None}, r"gamma must be a finite number in \[0, 1\], got 2.0"),
    "frames": ({"n_steps": 3, "gamma": 0.9, "carry": {"leaves": {}}}, "state of frames held back must be one that was"),
    **{
        kind: ({"n_steps": 3, "gamma": 0.9, "carry": {**CARRY, **change}}, "state of frames held back must be whole")
        for kind, change in {
            "no leaves": {"leaves": {}},
            "no nodes": {"nodes": {}},
            "another batch size": {"batch_size": [3]},
            "objects of no leaf": {"objects": {("name",): ["a"]}},
        }.items()
    },
}
