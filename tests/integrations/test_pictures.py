"""The picture of windows at the top of the README: what it draws is what the transform returned."""

from pathlib import Path

from docs.pictures import window


def test_calls_emit_what_the_picture_says():
    calls, held = window.emitted()
    ends = [dict(zip(call["frame"].tolist(), call["next", "frame"].tolist(), strict=True)) for call in calls]
    assert ends == [{0: 2, 1: 2, 2: 2}, {3: 5, 4: 6, 5: 7, 6: 8}]
    assert held["frame"].tolist() == [7, 8, 9]


def test_a_cell_for_every_reward_in_the_colour_of_what_became_of_it():
    (axes,) = window.draw().axes
    rows = {t: [] for t in range(10)}
    for bar in axes.patches:
        if (t := round(bar.get_y() + bar.get_height() / 2)) in rows:
            rows[t].append((round(bar.get_x() + bar.get_width() / 2), bar.get_facecolor()))
    assert [[s for s, _ in row] for row in rows.values()] == [
        *([0, 1, 2], [1, 2], [2]),
        *([3, 4, 5], [4, 5, 6], [5, 6, 7]),
        [6, 7, 8],
        *([7], [8], [9]),
    ]
    colors = [{color for _, color in row} for row in rows.values()]
    assert all(len(color) == 1 for color in colors)
    assert colors[0] == colors[1] == colors[2] == colors[6]
    assert colors[3] == colors[4] == colors[5]
    assert colors[7] == colors[8] == colors[9]
    assert len(set.union(*colors)) == 3
    assert Path(window.__file__).with_suffix(".png").is_file()
