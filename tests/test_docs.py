"""The pages in Markdown: every link leads somewhere, and every page is linked."""

import re
from pathlib import Path

import pytest
import yaml

from recgpt_torchrec.config.fields import options
from recgpt_torchrec.config.stages import STAGES
from tools.site_hooks import docstrings, options_page

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


def test_every_page_can_be_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached and page.exists():
            reached.add(page)
            linked = re.findall(r"\]\(([^)#\s]+\.md)", page.read_text())
            waiting += [(page.parent / link).resolve() for link in linked if not link.startswith("http")]
    assert {*PAGES} <= reached | {page for page in PAGES if page.parent == ROOT}


def test_the_site_has_every_page():
    text = (ROOT / "mkdocs.yml").read_text()
    pages = set(re.findall(r": (\w+\.md)$", text, re.MULTILINE))
    assert {page.name for page in PAGES if page.parent.name == "docs"} | {"index.md"} <= pages
    assert yaml.safe_load(text)["strict"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_page_of_a_stage_explains_each_of_its_options(stage):
    rows = re.findall(r"^\| `--([\w.]+)` \| (.+) \| (.+) \| (.+) \|$", options_page(stage), re.MULTILINE)
    assert [name for name, *_ in rows] == [option.name for option in options(STAGES[stage].config)]
    assert all(len(cell) > 1 for row in rows for cell in row[1:])


def test_docstrings_are_those_under_the_fields():
    assert docstrings(STAGES["retrieve"].config)["export"] == "Folder of the export."
