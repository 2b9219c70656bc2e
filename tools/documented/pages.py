"""What the pages assume that they do not make themselves, and which of them CI runs.

Every scratch folder gets the small files of `files.py`; `before` are commands that a reader of that page has run before
it, on other pages. Nothing that a page shows is changed, but for the port of the service.
"""

from dataclasses import dataclass


@dataclass(kw_only=True)
class Page:
    """How a page is run."""

    before: tuple[str, ...] = ()
    """Commands that come before its own."""
    by_hand: str = ""
    """Why CI leaves the page to `python -m tools.documented --all`; empty: CI runs it."""
    elsewhere: str = ""
    """The test that runs the page; empty: this tool does."""


PREPARE = "recgpt prepare --input log.csv --output data/mine"
PRETRAIN = "recgpt pretrain --data data/mine --output runs/first --train.epochs 2"
EVALUATE = "recgpt evaluate --data data/mine --checkpoint runs/first --output runs/first/test.json"
EXPORT = "recgpt export --data data/mine --checkpoint runs/first --output vectors/mine"
SLOW = "a minute; other tests run these options of the stages"

PAGES = {
    "README.md": Page(),
    "docs/tutorial.md": Page(),
    "docs/stages.md": Page(before=(PREPARE, PRETRAIN), by_hand=SLOW),
    "docs/python.md": Page(by_hand=SLOW),
    "docs/appended_days.md": Page(by_hand=SLOW),
    "docs/attributes.md": Page(by_hand=SLOW),
    "docs/daily.md": Page(by_hand=SLOW),
    "docs/events.md": Page(by_hand=SLOW),
    "docs/feedback.md": Page(by_hand=SLOW),
    "docs/ids.md": Page(by_hand=SLOW),
    "docs/inputs.md": Page(by_hand=SLOW),
    "docs/logs.md": Page(by_hand=SLOW),
    "docs/new_items_and_users.md": Page(by_hand=SLOW),
    "docs/report.md": Page(before=(PREPARE, PRETRAIN, EVALUATE), by_hand=SLOW),
    "docs/retrieval.md": Page(before=(PREPARE, PRETRAIN.replace("first", "mine")), by_hand=SLOW),
    "docs/scale.md": Page(by_hand=SLOW),
    "docs/serving.md": Page(before=(PREPARE, PRETRAIN), by_hand=SLOW),
    "docs/time.md": Page(by_hand=SLOW),
    "docs/troubleshooting.md": Page(before=(PREPARE, PRETRAIN), by_hand=SLOW),
    "docs/vector_stores.md": Page(elsewhere="tests/tools/test_vector_stores_page.py"),
    "docs/concepts.md": Page(by_hand=SLOW),
}
"""By path from the root. A page without blocks that are run needs no entry."""
