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
PROMPTS = (
    "recgpt generate_prompts --data data/mine --checkpoint runs/first --output data/prompts",
    "recgpt prompt_tune --data data/prompts --checkpoint runs/first --output runs/tuned --train.epochs 1",
)
SHOWN = (
    "recgpt prepare --input log.csv --output data/shown --click_column label --click_values click"
    " --dislike_values dislike --min_count 1",
    "recgpt pretrain --data data/shown --output runs/shown --train.epochs 1",
    "recgpt generate_prompts --data data/shown --checkpoint runs/shown --output data/prompts --prompts.source exposed",
    "recgpt prompt_tune --data data/prompts --checkpoint runs/shown --output runs/tuned --train.epochs 1",
)
SLOW = "a minute; other tests run these options of the stages"

PAGES = {
    "README.md": Page(),
    "docs/tutorial.md": Page(),
    "docs/stages.md": Page(before=(PREPARE, PRETRAIN), by_hand=SLOW),
    "docs/python.md": Page(before=SHOWN, by_hand=SLOW),
    "docs/appended_days.md": Page(by_hand=SLOW),
    "docs/attributes.md": Page(by_hand=SLOW),
    "docs/daily.md": Page(by_hand=SLOW),
    "docs/events.md": Page(by_hand=SLOW),
    "docs/feedback.md": Page(by_hand=SLOW),
    "docs/ids.md": Page(by_hand=SLOW),
    "docs/inputs.md": Page(by_hand=SLOW),
    "docs/logs.md": Page(by_hand=SLOW),
    "docs/report.md": Page(before=(PREPARE, PRETRAIN, EVALUATE, *PROMPTS), by_hand=SLOW),
    "docs/retrieval.md": Page(before=(PREPARE, PRETRAIN.replace("first", "mine")), by_hand=SLOW),
    "docs/scale.md": Page(),
    "docs/serving.md": Page(before=(PREPARE, PRETRAIN), by_hand=SLOW),
    "docs/time.md": Page(by_hand=SLOW),
    "docs/troubleshooting.md": Page(before=(PREPARE, PRETRAIN), by_hand=SLOW),
    "docs/vector_stores.md": Page(elsewhere="tests/tools/test_vector_stores_page.py"),
    "docs/concepts.md": Page(),
}
"""By path from the root. A page without blocks that are run needs no entry."""
