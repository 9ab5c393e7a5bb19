"""What the documentation shows runs, and what it links to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def python_blocks(text):
    """Every block of Python, on the lines on which it stands."""
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield "\n" * text[: block.start(1)].count("\n") + block[1]


@pytest.mark.filterwarnings("ignore:Creating .*WeightUpdater:DeprecationWarning")  # torchrl's own, of its collector
@pages
def test_python_runs(page):
    """Block after block, as a reader would paste them."""
    namespace = {"__name__": "__main__"}
    for block in python_blocks(page.read_text()):
        exec(compile(block, page, "exec"), namespace)


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if heading:
            assert heading in map(anchor, re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)), target


def anchor(heading):
    """What GitHub calls it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_readme_is_read_in_one_go():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250


@pages
def test_users_are_not_shown_names_of_tests(page):
    if page.name != "CONTRIBUTING.md":
        assert not re.findall(r"`test_\w+`", page.read_text())
