"""Stage `recommend`: a checkpoint and histories of raw keys -> a list of items for each, at once."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from recgpt_torchrec import cli
from recgpt_torchrec.config.serving.recommend import Recommend
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.texts.tables import table as text_table
from recgpt_torchrec.texts.words import count

if TYPE_CHECKING:
    from recgpt_torchrec.serving.recommender import Recommendation, Recommender
    from recgpt_torchrec.serving.requests import History


def main(config: Recommend) -> None:
    """Print the list of one history, or write those of a file of histories."""
    from recgpt_torchrec.serving.recommender import Recommender
    from recgpt_torchrec.serving.request_file import answer_file, parse_command

    given: dict[str, Any] = {"pretrained": config.pretrained, "neighbours": config.neighbours}
    recommender = Recommender.load(config.checkpoint, config.data, device=config.device, **given)
    items = recommender.dataset.manifest.items
    if config.k > items:
        place = recommender.dataset.path
        raise InputError(f"--k is {config.k}, but {place} has {count(items, 'item')}; give at most that many")
    options: dict[str, Any] = {"interests": config.interests, "merge": config.merge, "allow": config.allow or None}
    options |= {"time": config.time, "event": config.event, "seen": config.seen}
    if config.input is not None:
        counts = answer_file(recommender, config.input, config.output, config.k, options)
        if config.output is not None:
            print(counts.describe(), f"Written: {config.output}", sep="\n")
        return
    request = parse_command(config.history or "", config.user, config.times, config.events, config.shown)
    answer = recommender.recommend(request, config.k, exclude=config.exclude, **options)
    if config.json:
        print(json.dumps(asdict(answer)))
        return
    print(table(recommender, answer))
    for line in describe(recommender, request, answer):
        print(line)


def table(recommender: "Recommender", answer: "Recommendation") -> str:
    """The list as text: rank, key, name where the dataset has one, score."""
    column, names = recommender.names(answer.items)
    heads = ["rank", "item", *([column] if column else []), "interactions" if answer.fallback else "score"]
    rows = [heads]
    for rank, (key, name, score) in enumerate(zip(answer.items, names, answer.scores, strict=True), 1):
        rows.append(
            [str(rank), key, *([name] if column else []), f"{score:,.0f}" if answer.fallback else f"{score:.4f}"]
        )
    return text_table(rows, right=(0, len(heads) - 1))


def describe(recommender: "Recommender", request: "History", answer: "Recommendation") -> list[str]:
    """What the list was made of, where that is not all that was given."""
    from recgpt_torchrec.data.reading.targets import describe_untargeted

    lines = []
    if answer.fallback:
        lines.append(f"fallback    {answer.fallback}")
    if answer.unknown:
        keys = ", ".join(map(str, answer.unknown[:3])) + (", ..." if len(answer.unknown) > 3 else "")
        lines.append(f"unknown     {count(len(answer.unknown), 'item')} of the history left out: {keys}")
        if answer.fallback:
            like = ", ".join(recommender.keys[:2].to_pylist())
            lines.append(f"{'':<11} keys of {recommender.dataset.path} are such as {like}")
    read = len(request.items) - len(answer.unknown)
    if read > recommender.max_len:
        lines.append(f"history     of its {read:,} items the newest {recommender.max_len:,} are read, as in training")
    if request.user is not None and not answer.user_known:
        lines.append(f"user        {recommender.dataset.path} does not know {request.user}: the user vector is 0")
    return lines + describe_untargeted(recommender.dataset.manifest, recommender.reads_attributes)


if __name__ == "__main__":
    cli.run(Recommend, main, "recgpt_torchrec.recommend")
