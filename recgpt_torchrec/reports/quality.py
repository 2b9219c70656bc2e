"""Sections about evaluations: recall paths, differences between runs, groups of users, lists, examples."""

from collections.abc import Iterator, Sequence

from recgpt_torchrec.reports.charts import Mark, Scale, describe, interval_axis, interval_track, legend
from recgpt_torchrec.reports.markup import chip, details, dot, escape, section, table, tag
from recgpt_torchrec.reports.values import (
    Ahead,
    Comparison,
    Estimate,
    EvaluationValues,
    Example,
    Group,
    Item,
    PathFigures,
    RunValues,
)

BASELINE_COLORS = {"cooccurrence": "cb2", "popularity": "cb"}
SHOWN_LISTS = 4
"""Number of lists that an example shows."""
SHOWN_EXAMPLES = 4
"""Number of examples that are open."""


def evaluations_of(runs: Sequence[RunValues]) -> Iterator[tuple[RunValues, EvaluationValues]]:
    """Every run with each of its evaluations."""
    for run in runs:
        for evaluation in run.evaluations:
            yield run, evaluation


def quality_section(runs: Sequence[RunValues], colors: dict[str, str]) -> str:
    """Every recall path beside the baselines, with intervals."""
    parts: list[str] = []
    splits = dict.fromkeys(each.split for _, each in evaluations_of(runs))
    for split in splits:
        chosen = [(run, each) for run, each in evaluations_of(runs) if each.split == split]
        scale = Scale.around(
            [end for _, each in chosen for path in each.paths for end in _ends(path.masked[each.metric])], True
        )
        for run, each in chosen:
            name = dot(colors[run.name]) + escape(run.name)
            where = tag("small", f" {escape(each.metric)} on {escape(split)}, masked, {each.users:,} users")
            parts.append(tag("h3", name, where, class_="of-run"))
            parts += [tag("p", escape(note), class_="note") for note in each.notes]
            parts.append(_path_rows(each, colors[run.name], scale))
            parts.append(details("All figures", _all_figures(each)))
    lead = (
        "Each dot is a recall path, the line its 95% interval over users. <b>Masked</b>: items of the history are left "
        "out of the ranking; unmasked figures are under All figures, and must not be compared with masked ones."
    )
    return section("quality", "Recall paths and baselines", lead, *parts) if parts else ""


def _ends(estimate: Estimate) -> list[float]:
    return [each for each in (estimate.value, estimate.low, estimate.high) if each is not None]


def color_of(path: PathFigures | str, color: str) -> str:
    """The colour class of a path: baselines have their own, the model's paths that of the run."""
    return BASELINE_COLORS.get(path if isinstance(path, str) else path.path, color)


def path_text(path: str) -> str:
    """The name of a path, which may be broken after each of its words."""
    return escape(path).replace("_", "_<wbr>")


def _path_rows(evaluation: EvaluationValues, color: str, scale: Scale) -> str:
    cells = []
    for path in evaluation.paths:
        estimate = path.masked[evaluation.metric]
        told = f"{path.path}: {evaluation.metric} {describe(estimate)}"
        mark = Mark(estimate, color_of(path, color), told, hollow=path.is_baseline)
        kind = tag("small", " baseline") if path.is_baseline else ""
        cells.append(_row(path_text(path.path) + kind, interval_track([mark], scale), _figure(estimate)))
    return _rows(cells, scale)


def _row(name: str, plot: str, figure: str) -> str:
    cells = [tag("div", name, class_="name"), tag("div", plot, class_="plot-cell")]
    return tag("div", *cells, *([tag("div", figure, class_="figure")] if figure else []), class_="row")


def _rows(rows: Sequence[str], scale: Scale, kind: str = "") -> str:
    axis = tag("div", class_="gap") + tag("div", interval_axis(scale), class_="plot-cell")
    return tag("div", *rows, tag("div", axis, class_="row axis-row"), class_=f"rows {kind}".strip())


def _figure(estimate: Estimate, sign: bool = False) -> str:
    value = f"{estimate.value:+.4f}" if sign else f"{estimate.value:.4f}"
    if estimate.low is None:
        return value
    between = f"{estimate.low:+.4f} to {estimate.high:+.4f}" if sign else f"{estimate.low:.4f} to {estimate.high:.4f}"
    return value + tag("small", f" {between}")


def _all_figures(evaluation: EvaluationValues) -> str:
    parts = []
    for how, words in (("masked", "Masked"), ("unmasked", "Unmasked")):
        names = list(getattr(evaluation.paths[0], how))
        rows = []
        for path in evaluation.paths:
            cells = []
            for name in names:
                each: Estimate = getattr(path, how)[name]
                between = "" if each.low is None else tag("small", f"{each.low:.4f} to {each.high:.4f}")
                cells.append(f"{each.value:.4f}{between}")
            rows.append([path_text(path.path), *cells])
        parts.append(table([words, *map(escape, names)], rows, name=f"{words} figures"))
    return "".join(parts) + tag("p", f"From {escape(evaluation.file)}", class_="label")


def comparison_section(comparisons: Sequence[Comparison], colors: dict[str, str]) -> str:
    """Paired differences between runs."""
    parts: list[str] = []
    for each in comparisons:
        title = (
            dot(colors[each.run])
            + escape(each.run)
            + " against "
            + dot(colors[each.reference])
            + escape(each.reference)
        )
        parts.append(tag("h3", title, tag("small", f" {escape(each.split)}, masked")))
        if each.reason is not None:
            parts.append(tag("p", escape(f"No paired differences: {each.reason}."), class_="note"))
            continue
        if each.note is not None:
            parts.append(tag("p", escape(f"{each.note}."), class_="note"))
        if not each.differences:
            parts.append(tag("p", "All shared paths are equal for every user.", class_="lead"))
            continue
        ends = [end for difference in each.differences for end in _ends(difference.difference)]
        scale = Scale.around(ends, True)
        cells = []
        for difference in each.differences:
            color = color_of(difference.path, colors[each.run])
            mark = Mark(
                difference.difference, color, f"{difference.metric} {describe(difference.difference, sign=True)}"
            )
            name = _pair_name(difference) + tag("small", f" {escape(difference.metric)}")
            figure = _figure(difference.difference, sign=True) + " " + _verdict(difference)
            cells.append(_row(name, interval_track([mark], scale, 0.0), figure))
        parts.append(_rows(cells, scale, "wide"))
        parts.append(tag("p", f"{each.differences[0].users:,} shared users", class_="label"))
    lead = (
        "First run minus second, user by user, on the same held-out items: right of the line the first is ahead. Where "
        "the interval leaves out 0, the difference is beyond chance."
    )
    return section("differences", "Differences between runs", lead, *parts) if parts else ""


def _pair_name(difference: Ahead) -> str:
    if difference.path == difference.other:
        return path_text(difference.path)
    return f"{path_text(difference.path)} against {path_text(difference.other)}"


def _verdict(difference: Ahead) -> str:
    if not difference.beyond_chance:
        return chip("chance")
    return chip("ahead", "good") if difference.difference.value > 0 else chip("behind", "bad")


def groups_section(runs: Sequence[RunValues], colors: dict[str, str]) -> str:
    """The main paths by groups of users."""
    charts: list[str] = []
    shown: list[tuple[str, str]] = []
    for split in dict.fromkeys(each.split for _, each in evaluations_of(runs)):
        chosen = [(run, each) for run, each in evaluations_of(runs) if each.split == split]
        for title in dict.fromkeys(title for _, each in chosen for title in each.groups):
            by_users: dict[tuple[tuple[str, int], ...], list[tuple[RunValues, EvaluationValues]]] = {}
            for run, each in chosen:
                if title in each.groups:
                    users = tuple((group.label, group.users) for group in each.groups[title])
                    by_users.setdefault(users, []).append((run, each))
            for alike in by_users.values():  # evaluations of the same users share a chart
                charts.append(_group_chart(title, split, alike, colors))
                shown += [(run.name, colors[run.name]) for run, _ in alike]
    names = [*dict.fromkeys(shown), *((name, color) for name, color in BASELINE_COLORS.items())]
    lead = "The one-step path of each run beside the baselines, by what is known of the user or of the held-out item."
    return (
        section("groups", "Groups of users", lead, legend(names), tag("div", *charts, class_="blocks"))
        if charts
        else ""
    )


def _group_chart(
    title: str, split: str, alike: Sequence[tuple[RunValues, EvaluationValues]], colors: dict[str, str]
) -> str:
    groups: list[Group] = alike[0][1].groups[title]
    metric = alike[0][1].metric
    rows: list[list[Mark]] = []
    for number, group in enumerate(groups):
        marks = []
        for name in reversed(BASELINE_COLORS):
            if name in group.figures:
                marks.append(_group_mark(name, BASELINE_COLORS[name], group.figures[name], hollow=True))
        for run, evaluation in alike:
            own = evaluation.groups[title][number].figures
            if evaluation.main in own:
                marks.append(_group_mark(f"{run.name}, {evaluation.main}", colors[run.name], own[evaluation.main]))
        rows.append(marks)
    scale = Scale.around([end for marks in rows for mark in marks for end in _ends(mark.estimate)], True)
    cells = [
        _row(f"{escape(group.label)}{tag('small', f' {group.users:,} users')}", interval_track(marks, scale), "")
        for group, marks in zip(groups, rows, strict=True)
    ]
    caption = tag("h3", escape(f"By {title}"), tag("small", escape(f" {metric}, masked, {split}")))
    return tag("div", caption, _rows(cells, scale, "slim"))


def _group_mark(name: str, color: str, estimate: Estimate, hollow: bool = False) -> Mark:
    return Mark(estimate, color, f"{name}: {describe(estimate)}", hollow)


def lists_section(runs: Sequence[RunValues], colors: dict[str, str]) -> str:
    """Coverage and novelty of lists by path."""
    parts: list[str] = []
    for run, each in evaluations_of(runs):
        paths = [path for path in each.paths if path.coverage is not None and path.novelty is not None]
        if not paths:
            continue
        most = max(path.novelty or 0 for path in paths) or 1
        rows = []
        for path in paths:
            color = color_of(path, colors[run.name])
            rows.append(
                [
                    dot(color) + path_text(path.path),
                    f"{100 * (path.coverage or 0):.1f}%" + _meter(path.coverage or 0, color),
                    f"{path.novelty:.2f}" + _meter((path.novelty or 0) / most, color),
                ]
            )
        where = tag("small", f" {escape(each.split)}, masked lists of {each.list_length} of {each.list_users:,} users")
        parts.append(tag("h3", dot(colors[run.name]), escape(run.name), where))
        parts.append(table(["Path", "Coverage", "Novelty, bits"], rows, name=f"lists of {run.name}"))
    lead = (
        "Coverage: share of the catalogue that is in a list of any of these users. Novelty: mean of -log2 of an item's "
        "share of the training interactions; more is further from what is popular."
    )
    return section("lists", "Coverage and novelty of lists", lead, *parts) if parts else ""


def _meter(share: float, color: str) -> str:
    return tag(
        "span", tag("i", style=f"width:{100 * min(1.0, share):.1f}%"), class_=f"meter {color}", aria_hidden="true"
    )


def examples_section(runs: Sequence[RunValues], colors: dict[str, str]) -> str:
    """Some users: history, held-out item, lists."""
    parts: list[str] = []
    for run in runs:
        evaluation = next((each for each in run.evaluations if each.examples), None)
        if evaluation is None:
            continue
        body = "".join(_example(each, evaluation, colors[run.name]) for each in evaluation.examples[:SHOWN_EXAMPLES])
        if more := evaluation.examples[SHOWN_EXAMPLES:]:
            body += details(f"{len(more)} more", *(_example(each, evaluation, colors[run.name]) for each in more))
        name = dot(colors[run.name]) + escape(f"{run.name}, {evaluation.split}")
        parts.append(details(name, body, is_open=not parts))
    lead = (
        "Users drawn at random: the newest entries of the history, oldest first, what was held out, and the masked "
        "lists. Dashed entries are prompts: what the model generated, or what was shown and not clicked."
    )
    return section("examples", "Histories and recommendations", lead, *parts) if parts else ""


def _example(example: Example, evaluation: EvaluationValues, color: str) -> str:
    history = [
        tag("li", item_text(each), tag("small", escape(each.prompt)), class_="prompt")
        if each.prompt
        else tag("li", item_text(each))
        for each in example.history
    ]
    chosen = [each.path for each in evaluation.paths if each.path in example.lists][:SHOWN_LISTS]
    baselines = [each.path for each in evaluation.paths if each.is_baseline and each.path in example.lists]
    models = [path for path in chosen if path not in baselines]
    columns = [*models[: SHOWN_LISTS - len(baselines)], *baselines]
    lists = []
    for path in columns:
        rows = [
            tag("li", item_text(each), class_="target" if each.key == example.held_out.key else None)
            for each in example.lists[path]
        ]
        lists.append(tag("div", tag("h4", dot(color_of(path, color)), escape(path)), tag("ol", *rows)))
    return tag(
        "div",
        tag("h3", "User ", tag("span", escape(example.user), class_="key")),
        tag("p", "History", class_="label"),
        tag("ul", *history, class_="items"),
        tag("p", "Held out", class_="label"),
        tag("ul", tag("li", item_text(example.held_out), class_="target"), class_="items"),
        tag("p", "Lists", class_="label"),
        tag("div", *lists, class_="lists"),
        class_="example",
    )


def item_text(item: Item) -> str:
    """An item's name, or its key where it has none."""
    if item.name is None:
        return tag("span", escape(item.key), class_="key")
    return tag("span", escape(item.name), title=item.key)
