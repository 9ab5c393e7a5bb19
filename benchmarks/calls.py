"""Where the time of a small call goes: the operators that it dispatches, and what is left without them.

Usage: ``python -m benchmarks.calls``. At [1, 64] a call moves 10 kB; what it costs is how many operators it runs.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from benchmarks.cases import Case, make_rollout
from benchmarks.contenders import CONTENDERS, REFERENCE, TORCHRL
from benchmarks.gate import check
from benchmarks.measure import Operators, in_turns, set_up
from multistep_triton import eager
from multistep_triton.task import Results

CASE = Case("state", 1, 64, 0.0)
SECONDS = 3.0


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(arguments)
    set_up()
    rollout = make_rollout(CASE)
    print(f"{CASE}, torch {torch.__version__}, median of {SECONDS:g} s")
    contenders = {contender.name: contender for contender in CONTENDERS}
    subjects = {name: contenders[name].make(CASE, "transform", rollout.device) for name in (TORCHRL, REFERENCE)}
    for subject in subjects.values():
        check(CASE, rollout, subject)
    times = in_turns({name: partial(subject.call, rollout) for name, subject in subjects.items()}, SECONDS)
    for name, subject in subjects.items():
        with Operators() as operators:
            subject.call(rollout)
        print(f"{name}: {times[name].median * 1e6:.0f} us, {operators.names.total()} operators")
        for operator, calls in operators.names.most_common():
            print(f"    {calls:3d} {operator}")

    # With the reference's result at hand, what is left is reading and building tensordicts.
    compute, recorded = eager.n_step_extend, []

    def record(*arguments):
        results = compute(*arguments)
        recorded[:] = results.leaves.copy(), results.returns.copy(), *results[2:]
        return results

    def replay(*arguments):
        leaves, returns, *rest = recorded
        return Results(leaves.copy(), returns.copy(), *rest)

    call = partial(subjects[REFERENCE].call, rollout)
    eager.n_step_extend = record
    call()
    eager.n_step_extend = replay
    rest = in_turns({REFERENCE: call}, SECONDS)[REFERENCE]
    print(f"{REFERENCE}, without what it computes: {rest.median * 1e6:.0f} us")


if __name__ == "__main__":
    main()
