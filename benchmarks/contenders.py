"""Contenders: who can do which operation on which case, or why not, and how to make one.

Operations:

- ``transform``: the inverse of the transform alone;
- ``extend``: all of ``rb.extend(rollout)``, the transform and writing to the storage;
- ``store and sample``: store a rollout, then sample as many transitions as it has frames;
- ``sample``: sample a batch, of a ring that is full and begins anywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs.transforms import MultiStepTransform as TorchRLMultiStepTransform
from torchrl.envs.transforms import Transform, rb_transforms

from benchmarks.cases import GAMMA, Case
from benchmarks.peers import RowGathers, SelectingRing, StableBaselines3, VectorizedRing
from multistep_triton import MultiStepTransform, NStepReplayBuffer
from multistep_triton.backends import choose_backend

OPERATIONS = TRANSFORM, EXTEND, STORE_AND_SAMPLE, SAMPLE = ("transform", "extend", "store and sample", "sample")
OPERATIONS_OF = {
    "state": OPERATIONS[:3],
    "streaming": OPERATIONS[:3],
    # Peers store pixels in ways of their own, so that sampling those is not compared.
    "pixels": OPERATIONS[:2],
    "rows": OPERATIONS[:2],
    "sampling": (SAMPLE,),
}
"""By the kind of a case."""
TORCHRL, COMPILED = "torchrl", "torchrl, compiled"
REFERENCE, TRITON = "multistep_triton reference", "multistep_triton triton"
BUFFER_REFERENCE, BUFFER_TRITON = "NStepReplayBuffer reference", "NStepReplayBuffer triton"
COMPACT_REFERENCE, COMPACT_TRITON = (f"{name}, compact" for name in (BUFFER_REFERENCE, BUFFER_TRITON))
SB3 = "stable-baselines3"
RING, SELECTING_RING = "FastTD3-style", "FastTD3-style, index_select"
CLONE, GATHERS = "clone", "row gathers"
OURS, BUFFERS, FLOORS = (REFERENCE, TRITON), (BUFFER_REFERENCE, BUFFER_TRITON), (CLONE, GATHERS)

FLAGS = ("done", "terminated", "truncated")
NEXT: tuple[NestedKey, ...] = (("next", "reward"), ("next", "observation"))
PROMISES: tuple[NestedKey, ...] = (
    *("observation", "steps_to_next_obs", "gamma", "nonterminal"),
    *NEXT,
    *(("next", flag) for flag in FLAGS),
)


class Subject(NamedTuple):
    """A contender that is ready for the rollouts of one case."""

    call: Callable[[TensorDict], Any]
    """What is timed."""
    transitions: Callable[[Sequence[Any]], TensorDict]
    """n-step transitions, from what the last calls returned."""
    promises: Sequence[NestedKey] = PROMISES
    """The keys that the gate checks."""
    done_at: str = "start"
    """Which frame of the window the done flags are from, "start" or "end"."""
    in_order: bool = True
    """The transitions are ``[B, T']``, each frame once, in time order."""
    store: Callable[[TensorDict], Any] | None = None
    """What fills it beforehand; None if what is timed does."""
    counted: bool = True
    """Its work is done by operators that torch dispatches one by one, which can be counted, and their memory."""


class Contender(NamedTuple):
    name: str
    operations: Sequence[str]
    make: Callable[[Case, str, torch.device], Subject]
    """Of a case, an operation and a device."""
    obstacle: Callable[[Case, torch.device], str | None] = lambda case, device: None
    """Why it cannot run, None if it can."""
    known_errors: Callable[[Case], Sequence[str]] = lambda case: ()
    """Keys of which it is documented that they are wrong, which does not keep it from being timed."""


def joined(outputs: Sequence[TensorDict]) -> TensorDict:
    # A copy of one would have more memory than it, where two of its keys are one tensor.
    return outputs[0] if len(outputs) == 1 else torch.cat(list(outputs), 1)


def with_transform(
    make: Callable[[Case], Transform], counted: bool = True
) -> Callable[[Case, str, torch.device], Subject]:
    """Every operation of a transform of torchrl's kind."""

    def subject(case: Case, operation: str, device: torch.device) -> Subject:
        transform = make(case)
        if operation == TRANSFORM:
            return Subject(transform._inv_call, joined, counted=counted)
        buffer = ReplayBuffer(storage=storage_of(case, device, operation != EXTEND), transform=transform)
        if operation == EXTEND:
            return Subject(buffer.extend, lambda _: buffer[:], counted=counted)
        # Until more than n frames have come, there is nothing to sample.
        return sampled(case, operation, buffer.extend, lambda batch: buffer.sample(batch) if len(buffer) else None)

    return subject


def storage_of(case: Case, device: torch.device, is_sampled: bool) -> LazyTensorStorage:
    return LazyTensorStorage(case.envs * case.capacity(is_sampled), ndim=2, device=device)


def sampled(
    case: Case,
    operation: str,
    store: Callable[[TensorDict], Any],
    sample: Callable[[int], Any],
    transitions: Callable[[Any], TensorDict] = lambda sample: sample,
    **promised: Any,
) -> Subject:
    """A buffer that is stored into and sampled, or filled beforehand and sampled; the rest as in ``Subject``."""

    def call(rollout: TensorDict) -> Any:
        if operation == STORE_AND_SAMPLE:
            store(rollout)
        return sample(case.sample_size)

    before = store if operation == SAMPLE else None
    return Subject(call, lambda samples: transitions(samples[-1]), in_order=False, store=before, **promised)


def ours(backend: str) -> Callable[[Case, str, torch.device], Subject]:
    return with_transform(lambda case: MultiStepTransform(case.n_steps, GAMMA, backend=backend))


def buffer_of_ours(backend: str, compact: bool = False) -> Callable[[Case, str, torch.device], Subject]:
    def subject(case: Case, operation: str, device: torch.device) -> Subject:
        # Of one row for every slot no end is lost, however many there are, and every window is as long as the others'.
        once = {"compact": True, "end_slots": case.capacity(True)} if compact else {}
        storage = storage_of(case, device, True)
        buffer = NStepReplayBuffer(n_steps=case.n_steps, gamma=GAMMA, backend=backend, storage=storage, **once)
        return sampled(case, operation, buffer.extend, buffer.sample, done_at="end")

    return subject


def triton_obstacle(case: Case, device: torch.device) -> str | None:
    try:
        choose_backend("triton", [torch.empty(0, device=device)])
    except RuntimeError as error:
        return str(error)
    return "interpreted kernels are for debugging" if device.type == "cpu" else None


@functools.lru_cache(maxsize=1)
def compiled_computation(case: Case) -> Callable[..., TensorDict]:
    """torchrl's computation, compiled for one case: graphs of others count towards the limit of recompilations."""
    torch._dynamo.reset()
    return torch.compile(rb_transforms._multi_step_func)


def compiled_transform(case: Case) -> Transform:
    """torchrl's transform with its computation compiled, and no other instance's."""
    transform = TorchRLMultiStepTransform(case.n_steps, GAMMA)
    call = TorchRLMultiStepTransform._inv_call
    scope = {**call.__globals__, "_multi_step_func": compiled_computation(case)}
    transform._inv_call = FunctionType(call.__code__, scope).__get__(transform)
    return transform


def compiled_obstacle(case: Case, device: torch.device) -> str | None:
    if case.kind == "rows" or (case.n_steps, case.p_done) != (3, 0.01):
        return "left out: each case compiles for many seconds, so that only those with n=3 and p=0.01 are run"
    return None


def torchrl_errors(case: Case) -> Sequence[str]:
    return ["nonterminal"] if case.n_steps == 1 else []


def clone(case: Case, operation: str, device: torch.device) -> Subject:
    return Subject(TensorDict.clone, lambda copies: copies[-1], promises=(), in_order=False)


def stable_baselines3(case: Case, operation: str, device: torch.device) -> Subject:
    peer = StableBaselines3(case)
    return sampled(
        case,
        operation,
        peer.store,
        peer.buffer.sample,
        peer.transitions,
        promises=("observation", "gamma", *NEXT, ("next", "terminated")),
        done_at="end",
        counted=False,
    )


def vectorized_ring(ring: type[VectorizedRing]) -> Callable[[Case, str, torch.device], Subject]:
    def subject(case: Case, operation: str, device: torch.device) -> Subject:
        peer = ring(case, device)
        return sampled(
            case,
            operation,
            peer.store,
            peer.sample,
            promises=("observation", "steps_to_next_obs", *NEXT, ("next", "done"), ("next", "truncated")),
            done_at="end",
        )

    return subject


def row_gathers(case: Case, operation: str, device: torch.device) -> Subject:
    rows = RowGathers(case, device)
    return sampled(
        case,
        operation,
        rows.store,
        rows.sample,
        lambda sample: TensorDict(sample, batch_size=case.sample_size),
        promises=("observation",),
    )


CONTENDERS = [
    Contender(
        TORCHRL,
        OPERATIONS,
        with_transform(lambda case: TorchRLMultiStepTransform(case.n_steps, GAMMA)),
        known_errors=torchrl_errors,
    ),
    Contender(
        COMPILED, OPERATIONS[:2], with_transform(compiled_transform, counted=False), compiled_obstacle, torchrl_errors
    ),
    Contender(REFERENCE, OPERATIONS[:3], ours("reference")),
    Contender(TRITON, OPERATIONS[:3], ours("triton"), triton_obstacle),
    Contender(BUFFER_REFERENCE, OPERATIONS[2:], buffer_of_ours("reference")),
    Contender(BUFFER_TRITON, OPERATIONS[2:], buffer_of_ours("triton"), triton_obstacle),
    Contender(COMPACT_REFERENCE, OPERATIONS[2:], buffer_of_ours("reference", compact=True)),
    Contender(COMPACT_TRITON, OPERATIONS[2:], buffer_of_ours("triton", compact=True), triton_obstacle),
    Contender(
        SB3,
        OPERATIONS[2:],
        stable_baselines3,
        lambda case, device: None if device.type == "cpu" else "stores and samples in NumPy, on the CPU",
    ),
    Contender(RING, OPERATIONS[2:], vectorized_ring(VectorizedRing)),
    Contender(SELECTING_RING, OPERATIONS[2:], vectorized_ring(SelectingRing)),
    Contender(CLONE, OPERATIONS[:3], clone),
    Contender(GATHERS, OPERATIONS[3:], row_gathers),
]


def applies(contender: Contender, operation: str, case: Case) -> bool:
    return operation in contender.operations and operation in OPERATIONS_OF[case.kind]
