"""Requests from a command line and from files of JSON lines, and the answers to them as JSON lines."""

import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import IO, TYPE_CHECKING, Any

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.serving.requests import History
from recgpt_torchrec.storage import filesystem, remote
from recgpt_torchrec.texts.words import count

if TYPE_CHECKING:
    from recgpt_torchrec.serving.recommender import Recommender

AT_ONCE = 256
"""Number of requests that are answered together."""
LINE_BYTES = 2**24
"""Maximum length of a line."""


@dataclass
class Counts:
    """What became of a file of requests."""

    requests: int = 0
    popular: int = 0
    """Number of requests that were answered with popular items."""
    unknown: int = 0
    """Number of items of histories that the dataset does not know."""
    strangers: int = 0
    """Number of requests of users whom the dataset does not know, or that name none."""

    def describe(self) -> str:
        """One line for the summary."""
        words = [count(self.requests, "history")]
        words += [f"{count(self.unknown, 'unknown item')} left out"] if self.unknown else []
        words += [f"{self.strangers:,} of strangers (user vector 0)"] if self.strangers else []
        words += [f"{self.popular:,} got popular items"] if self.popular else []
        return f"answered    {', '.join(words)}"


def parse_command(history: str, user: str | None, times: str | None, events: str | None, shown: str | None) -> History:
    """The request of a command line.

    Raises:
        InputError: there are not as many times, event types or lists of shown items as items.

    Example:
        >>> parse_command("shoe,hat", None, None, None, "glove").shown
        [[], ['glove']]
    """
    items = _split(history)
    after = None
    if shown is not None:
        if not items:
            raise InputError("--shown says what was shown after items of --history, which is empty; leave it out")
        after = [_split(keys) for keys in shown.split(";")]
        after = [[] for _ in items[1:]] + after if ";" not in shown else after
    words = None if events is None else [word.strip() or None for word in events.split(",")]
    return History(items=items, user=user, times=None if times is None else _split(times), events=words, shown=after)


def answer_file(recommender: "Recommender", path: str, output: str | None, k: int, options: dict[str, Any]) -> Counts:
    """Answer the requests of a file, some at a time, and write a JSON object for each, in order.

    Args:
        recommender: answers them.
        path: file with a JSON object per line, see `History.from_json`.
        output: file to write, whole or not at all; None: standard output.
        k, options: of `Recommender.recommend`.

    Raises:
        InputError: a file cannot be read or written; or a line is malformed or cannot be answered, which names it.
    """
    counts = Counts()
    with _open_output(output) as stream:
        read = _read_requests(path)
        while lines := list(islice(read, AT_ONCE)):
            requests = [request for _, request in lines]
            try:
                answers = recommender.recommend(requests, k, **options)
            except InputError:
                answers = [_answer_line(recommender, path, number, each, k, options) for number, each in lines]
            for request, answer in zip(requests, answers, strict=True):
                known = {"user": request.user} if request.user is not None else {}
                stream.write(json.dumps({**known, **asdict(answer)}) + "\n")
                counts.requests += 1
                counts.popular += answer.fallback is not None
                counts.unknown += len(answer.unknown)
                counts.strangers += not answer.user_known
    return counts


def _answer_line(
    recommender: "Recommender", path: str, number: int, request: History, k: int, options: dict[str, Any]
) -> Any:
    try:
        return recommender.recommend(request, k, **options)
    except InputError as error:
        raise InputError(f"--input {path}, line {number}: {error}") from None


def _read_requests(path: str) -> Iterator[tuple[int, History]]:
    """Yield the number of each line that is not blank, from 1, and its request."""
    fs, root = filesystem(path)
    try:
        with fs.open_input_stream(root) as raw:
            for number, line in enumerate(io.BufferedReader(raw, 2**20), 1):
                if not line.strip():
                    continue
                if len(line) > LINE_BYTES:
                    raise InputError(
                        f"--input {path}, line {number} has {len(line):,} bytes; give one history per line"
                    )
                try:
                    yield number, History.from_json(json.loads(line))
                except InputError as error:  # also a ValueError
                    raise InputError(f"--input {path}, line {number}: {error}") from None
                except (ValueError, RecursionError) as error:
                    raise InputError(
                        f"--input {path}, line {number} is no JSON object ({error}); a line is a history, such as "
                        f'{{"items": ["shoe", "hat"]}}'
                    ) from None
    except OSError as error:
        raise InputError(f"--input {path} cannot be read: {error}") from None


@contextmanager
def _open_output(path: str | None) -> Iterator[IO[str]]:
    """A stream of text to a file that appears only once it is whole; None: to standard output."""
    if path is None:
        yield sys.stdout
        return
    if remote(path):
        raise InputError(f"--output {path}: lists of requests are written to a local file; name one and copy it")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise InputError(f"--output {path}: the folder {folder} does not exist; make it first")
    if os.path.isdir(path):
        raise InputError(f"--output {path} is a folder; name a file, such as {path}/lists.jsonl")
    try:
        with open(f"{path}.tmp", "w") as stream:
            yield stream
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        raise InputError(f"--output {path} cannot be written: {error}") from None
    finally:
        if os.path.exists(f"{path}.tmp"):
            os.remove(f"{path}.tmp")


def _split(text: str) -> list[Any]:
    """The words between commas, as a line of CSV has them: one with a comma is in double quotes."""
    rows = csv.reader([" ".join(text.splitlines())], skipinitialspace=True)
    return [word.strip() for row in rows for word in row if word.strip()]
