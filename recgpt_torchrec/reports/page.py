"""The page of a report: one HTML file without scripts and without anything to load."""

import json
from collections.abc import Sequence

from recgpt_torchrec import __version__
from recgpt_torchrec.reports import quality, training
from recgpt_torchrec.reports.markup import chip, dot, escape, section, tag
from recgpt_torchrec.reports.style import STYLE
from recgpt_torchrec.reports.values import Ahead, EvaluationValues, ReportValues, RunValues

DATA = "report-data"
"""Id of the element that holds the values as JSON."""
COLORS = ("c0", "c1", "c2", "c3", "c4", "c5")
"""Classes of the runs' colours."""


def make_page(values: ReportValues) -> str:
    """The HTML of a report."""
    colors = {run.name: color for run, color in zip(values.runs, COLORS, strict=False)}
    sections = [
        ("summary", "Summary", summary_section(values, colors)),
        ("quality", "Recall paths", quality.quality_section(values.runs, colors)),
        ("differences", "Between runs", quality.comparison_section(values.comparisons, colors)),
        ("groups", "Groups of users", quality.groups_section(values.runs, colors)),
        ("lists", "Coverage and novelty", quality.lists_section(values.runs, colors)),
        ("training", "Training", training.curves_section(values.runs, colors)),
        ("tables", "Tables", training.tables_section(values.runs, colors)),
        ("examples", "Examples", quality.examples_section(values.runs, colors)),
        ("runs", "What was run", training.runs_section(values.runs, colors)),
    ]
    shown = [each for each in sections if each[2]]
    nav = tag("nav", *(tag("a", escape(title), href=f"#{name}") for name, title, _ in shown[1:]), aria_label="Sections")
    names = ", ".join(run.name for run in values.runs)
    lead = "Recall paths beside baselines, differences beyond chance, training, and lists to read."
    head = tag("header", tag("h1", escape(title_of(values.runs))), tag("p", escape(lead)), nav)
    footer = tag(
        "footer",
        f"recgpt_torchrec {escape(__version__)}. Intervals are 95%, from a bootstrap over users. The values of this "
        f"page are JSON in its element <code>{DATA}</code>.",
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(names)} · RecGPT report</title><style>{STYLE}</style></head><body>\n{head}\n<main>\n"
        + "\n".join(html for _, _, html in shown)
        + f"\n</main>\n{footer}\n{data_element(values)}\n</body></html>\n"
    )


def title_of(runs: Sequence[RunValues]) -> str:
    """The title of the page."""
    return f"Report on {runs[0].name}" if len(runs) == 1 else f"Report on {len(runs)} runs"


def data_element(values: ReportValues) -> str:
    """The values as JSON, in an element that no browser runs; `<` is written so that nothing in it ends the element."""
    text = json.dumps(values.to_json(), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{DATA}">{text}</script>'


def headline(run: RunValues) -> EvaluationValues | None:
    """The evaluation that stands for a run: the first on test, else the first."""
    return next((each for each in run.evaluations if each.split == "test"), next(iter(run.evaluations), None))


def summary_section(values: ReportValues, colors: dict[str, str]) -> str:
    """A card per run: how it is doing, in a figure and a line per baseline."""
    notes = [tag("p", escape(note), class_="note") for note in values.notes]
    cards = [_card(run, colors[run.name]) for run in values.runs]
    return section("summary", "Summary", "", *notes, tag("div", *cards, class_="cards"))


def _card(run: RunValues, color: str) -> str:
    state = chip("finished" if run.finished else "unfinished", "good" if run.finished else "warn")
    parts = [tag("h3", dot(color), escape(run.name)), tag("p", f"{escape(run.kind)} {state}", class_="kind")]
    if not run.finished:
        parts.append(tag("p", escape(run.state), class_="what"))
    evaluation = headline(run)
    if evaluation is None:
        parts.append(tag("p", "Not evaluated, or its evaluation was not found.", class_="what"))
        return tag("div", *parts, class_=f"card {color}")
    main = next(each for each in evaluation.paths if each.path == evaluation.main)
    figure = main.masked[evaluation.metric]
    between = "" if figure.low is None else f", 95% interval {figure.low:.4f} to {figure.high:.4f}"
    parts.append(tag("div", f"{figure.value:.4f}", class_="big"))
    told = (
        f"{evaluation.metric} of {evaluation.main} on {evaluation.split}, masked{between}, {evaluation.users:,} users"
    )
    parts.append(tag("p", escape(told), class_="what"))
    verdicts = [tag("li", tag("span", escape(_against(each))), verdict_chip(each)) for each in evaluation.ahead]
    if verdicts:
        parts.append(tag("ul", *verdicts, class_="verdicts"))
    return tag("div", *parts, class_=f"card {color}")


def _against(ahead: Ahead) -> str:
    return (
        f"{ahead.difference.value:+.4f} over {ahead.other}"
        if ahead.difference.value >= 0
        else (f"{-ahead.difference.value:.4f} under {ahead.other}")
    )


def verdict_chip(ahead: Ahead) -> str:
    """Whether a difference is beyond chance, as a chip."""
    if not ahead.beyond_chance:
        return chip("not beyond chance")
    return chip("ahead, beyond chance", "good") if ahead.difference.value > 0 else chip("behind, beyond chance", "bad")
