"""What the kernels cost, counted on compiled code: what the two smallest cases are to reach, and how it is counted."""

from functools import partial

import fresh

PREAMBLE = """
import json
import ptx_driver
import torch
from benchmarks import kernel_cost
"""


run = partial(fresh.found, PREAMBLE)


def test_single_frames_cost_what_they_may():
    found = run("""
driver = ptx_driver.install(kernel_cost.CAPABILITY)
found = []
for target in (each for each in kernel_cost.TARGETS if each.case.kind == "streaming"):
    cost = kernel_cost.measure(driver, target)
    more = target._replace(bytes_per_instruction=1000, bus=1)
    worse = cost._replace(launches=cost.launches * 2)
    theirs = cost.torchrl_bytes / cost.least
    found.append([kernel_cost.missed(target, cost), len(kernel_cost.missed(more, worse)), theirs, cost.bus])
print(json.dumps(found))
""")
    assert len(found) == 2
    for missed, missed_of_more, theirs, ours in found:
        assert not missed
        assert missed_of_more == 3
        assert theirs > 2 * ours


def test_storing_is_one_launch_and_moves_no_more_than_it_must():
    found = run("""
driver = ptx_driver.install(kernel_cost.CAPABILITY)
found = []
for target in (each for each in kernel_cost.TARGETS if each.case.kind == "storing" and each.case.frames == 1):
    cost = kernel_cost.measure(driver, target)
    found.append([kernel_cost.missed(target, cost), len(cost.launches), cost.bus])
print(json.dumps(found))
""")
    assert len(found) == 3
    for missed, launches, bus in found:
        assert not missed
        assert launches == 1
        # The newest row is read, too, where it is passed on.
        assert bus < 1.02


def test_traffic_of_operators():
    def traffic(call: str) -> str:
        return f"""
x, y = torch.zeros(8, 4), torch.zeros(1, 4)
with kernel_cost.Traffic() as traffic:
    {call}
found.append(traffic.bytes)
"""

    bytes_of = {
        "x.view(4, 8)[1:].transpose(0, 1)": 0,
        "torch.empty_like(x)": 0,
        "x + 1": 2 * 128,
        "x * x": 2 * 128,
        "x.add_(y)": 128 + 16,
        "y.expand(8, 4) + x": 16 + 2 * 128,
        "x.sum()": 128 + 4,
    }
    found = run("found = []\n" + "".join(map(traffic, bytes_of)) + "print(json.dumps(found))")
    assert dict(zip(bytes_of, found, strict=True)) == bytes_of
