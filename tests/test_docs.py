"""The pages in Markdown: every link leads somewhere, every page is linked, and every command is run or says why not."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recgpt_torchrec.config.fields import options
from recgpt_torchrec.config.stages import STAGES
from tools.documented.blocks import commands, read_blocks
from tools.documented.pages import PAGES as DOCUMENTED_PAGES
from tools.site_hooks import docstrings, notebook_page, options_page

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTED = [page for page in PAGES if page.name not in ("CONTRIBUTING.md", "CHANGELOG.md")]


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
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        reached.add(page)
        linked = {(page.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text())}
        ahead += sorted(linked - reached - {*ahead})
    assert {page.resolve() for page in PAGES} - {ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"} <= reached


def test_the_site_has_every_page():
    text = (ROOT / "mkdocs.yml").read_text()
    pages = set(re.findall(r": (\w+\.md)$", text, re.MULTILINE))
    assert {page.name for page in PAGES if page.parent.name == "docs"} | {"index.md", "notebook.md"} <= pages
    assert yaml.safe_load(text)["strict"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_page_of_a_stage_explains_each_of_its_options(stage):
    rows = re.findall(r"^\| `--([\w.]+)` \| (.+) \| (.+) \| (.+) \|$", options_page(stage), re.MULTILINE)
    assert [name for name, *_ in rows] == [option.name for option in options(STAGES[stage].config)]
    assert all(len(cell) > 1 for row in rows for cell in row[1:])


def test_docstrings_are_those_under_the_fields():
    assert docstrings(STAGES["retrieve"].config)["export"] == "Folder of the export."


def test_the_notebook_is_a_page_with_what_it_gave():
    page = notebook_page(ROOT / "docs" / "notebook.ipynb")
    assert page.startswith("# From a data frame to lists\n")
    assert re.search(r"k=5\).items\n```\n\n(```text\n\[.*\]\n```\n\n)?```text\n\['series ", page)


@pytest.mark.parametrize("page", DOCUMENTED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_is_run_or_says_why_not(page):
    name = str(page.relative_to(ROOT))
    text = page.read_text()
    assert not re.search(r"^    (recgpt|python|torchx|make) ", text, re.MULTILINE), "indented commands: fence them"
    runnable = []
    for block in read_blocks(page):
        where = f"{name}:{block.line}"
        assert block.language, f"{where}: the fence names no language; bash and python are run, text is not"
        assert block.language == "bash" or not block.shows_commands, f"{where}: commands in a block of {block.language}"
        assert block.reason or block.mark in ("", "stays running"), f"{where}: a block that is {block.mark} says why"
        if block.language in ("bash", "python") and block.mark != "not run":
            runnable.append(where)
    assert len(re.findall(r"^<!-- (?:not run|run by hand|stays running)", text, re.MULTILINE)) == sum(
        bool(block.mark) for block in read_blocks(page)
    ), "a mark that is not above a fence"
    assert not runnable or name in DOCUMENTED_PAGES, f"{runnable[0]}: tools/documented/pages.py says how a page is run"
    assert runnable or name not in DOCUMENTED_PAGES


def test_pages_that_are_run_elsewhere_name_a_test():
    for name, page in DOCUMENTED_PAGES.items():
        assert not page.elsewhere or Path(name).name in (ROOT / page.elsewhere).read_text()
        assert not (page.elsewhere and page.by_hand)


def test_blocks_are_read_with_their_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: a reason -->\n```bash\nmake \\\n  x\n\n# no\nls\n```\n"
        "```\nrecgpt a\n```\n- a\n  ```python\n  b\n  ```\n"
    )
    first, second, third = read_blocks(page)
    assert (first.line, first.mark, first.reason) == (2, "not run", "a reason")
    assert commands(first.code) == ["make x", "ls"]
    assert second.shows_commands and not second.language and not second.mark
    assert (third.language, third.code) == ("python", "b\n")


def test_a_command_that_fails_fails_its_page(tmp_path, capfd):
    (tmp_path / "page.md").write_text("```bash\nrecgpt nothing\n```\n```bash\ntouch after\n```\n")
    code = (
        "import sys, pathlib; from tools.documented import running; running.ROOT = pathlib.Path(sys.argv[1]);"
        "from tools.documented.pages import Page;"
        "running.run_page('page.md', Page(), pathlib.Path(sys.argv[1]), all_blocks=False, show=False)"
    )
    ended = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode and "page.md:1: recgpt nothing" in ended.stderr and "unknown stage nothing" in ended.stderr
    assert not (tmp_path / "after").exists()
