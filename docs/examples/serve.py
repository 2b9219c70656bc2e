"""An example service: histories in, interest vectors or a list out, as JSON over HTTP. See docs/serving.md.

    python docs/examples/serve.py --export vectors/mine
    curl -s localhost:8080/recommend -d '{"histories": [["key 1", "key 2"]], "k": 10}'

It needs an export with an encoder (`export --encoder.kind auto`), and neither checkpoint nor dataset. It is meant to be
read and changed: it trusts whoever can reach it, so it listens on this machine alone unless told otherwise.
"""

import argparse
import json
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch

from recgpt_torchrec.catalogue.best import BestFinder
from recgpt_torchrec.catalogue.pairs import pairs_of
from recgpt_torchrec.data.ragged import Ragged
from recgpt_torchrec.data.segments import FEEDBACK, GENERATED, INTERACTED
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports.reading import Export, open_export
from recgpt_torchrec.retrieval.merging import Lists, merge_rule
from recgpt_torchrec.serving.exported.opening import open_encoder

KINDS = {"clicked": INTERACTED, "generated": GENERATED, **FEEDBACK}
"""Segment ids by the word of an entry's `kind`."""
FIELDS = {"histories", "users", "time", "event", "k", "merge"}
OF_ENTRIES = {"item", "kind", "time", "event", "place"}
LARGEST = 2**62


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    body: int = 2**20
    """Bytes."""
    batch: int = 64
    """Histories."""
    length: int = 1000
    """Entries per history."""
    k: int = 500
    """Items per list."""
    at_once: int = 8
    """Requests that are answered at the same time; others get the status 503."""
    seconds: float = 10.0
    """For which a client may keep the service waiting."""


class BadRequest(Exception):
    """A request that cannot be answered; the message says what to change."""


def need(condition: Any, message: str) -> None:
    """Refuse a request unless a condition holds."""
    if not condition:
        raise BadRequest(message)


class Recommender:
    """An export in memory: its encoder, its items by key, and a search."""

    def __init__(self, path: str, limits: Limits, users: bool = True) -> None:
        """`users` says whether the keys of the users are held; without, all are served as unknown ones."""
        export = open_export(path)
        self.limits, self.items = limits, export.manifest.items
        self.encoder = open_encoder(export)
        self.reads = {each.name for each in self.encoder.manifest.inputs}
        self.keys: list[str] = [""] * self.items
        for batch in export.items(["item_id", "key"]):
            for item, key in zip(batch["item_id"].to_pylist(), batch["key"].to_pylist(), strict=True):
                self.keys[item] = key
        self.item_ids = {key: item for item, key in enumerate(self.keys)}
        self.user_ids: dict[str, int] = {}
        if users:
            for batch in export.batches(export.manifest.user_parts, ["user_id", "key"]):
                self.user_ids.update(zip(batch["key"].to_pylist(), batch["user_id"].to_pylist(), strict=True))
        self.shards = open_index(export)
        self.vectors = None if self.shards else torch.from_numpy(export.item_vectors()[1])

    # ----------------------------------------------------------------------------------------------- requests

    def parse(self, request: dict[str, Any]) -> tuple[dict[str, np.ndarray], list[list[int]], list[int]]:
        """Check a request, and make arrays of it.

        Returns:
            Columns by name, padded: `items`, `lengths`, `users` and what the model reads besides; the items that each
            user clicked; and how many entries of each history were left out because their item is unknown.

        Raises:
            BadRequest: says what is wrong.
        """
        extra = set(request) - FIELDS
        need(not extra, f"unknown field {sorted(extra)[:1]}; a request has {', '.join(sorted(FIELDS))}")
        histories, limits = request.get("histories"), self.limits
        need(isinstance(histories, list) and histories, "give histories, a list of lists of items")
        need(len(histories) <= limits.batch, f"{len(histories)} histories are more than {limits.batch}")
        users = request.get("users", [None] * len(histories))
        need(isinstance(users, list) and len(users) == len(histories), "give as many users as histories, or none")
        need(all(user is None or isinstance(user, str) for user in users), "users are keys (text) or null")
        rows = [self.parse_history(number, history) for number, history in enumerate(histories)]
        known = [[entry for entry in row if entry["items"] >= 0] for row in rows]
        kept = [[entry for entry in row if self.is_held(entry)] for row in known]
        room = max(1, *map(len, kept))
        names = ["items", *(each for each in ("segments", "times", "events", "places") if each in self.reads)]
        columns = {name: np.zeros((len(rows), room), np.int64) for name in names}
        for name, column in columns.items():
            for number, row in enumerate(kept):
                column[number, : len(row)] = [entry[name] for entry in row]
        columns["lengths"] = np.array([len(row) for row in kept])
        columns["users"] = np.array([self.user_ids.get(user, -1) for user in users])
        if "request_times" in self.reads:
            need("time" in request, "the model reads times: give the time of the request, in the unit of the log")
            columns["request_times"] = np.full(len(rows), whole("time", request["time"]))
        if "asked_events" in self.reads:
            columns["asked_events"] = np.full(len(rows), self.event_id(request.get("event")))
        clicked = [[entry["items"] for entry in row if entry["segments"] == INTERACTED] for row in known]
        return columns, clicked, [len(row) - len(rest) for row, rest in zip(rows, known, strict=True)]

    def is_held(self, entry: dict[str, int]) -> bool:
        """Whether an entry is given to the program. A full one leaves out types of events itself; before the steps
        between interests, the service has to."""
        encoder = self.encoder.manifest
        if encoder.kind == "full" or not encoder.history_events or entry["segments"] != INTERACTED:
            return True
        return entry["events"] in [encoder.events.index(word) + 1 for word in encoder.history_events]

    def parse_history(self, number: int, history: Any) -> list[dict[str, int]]:
        """The entries of a history, oldest first: keys of items, or objects; the item is -1 where it is unknown."""
        limits, where = self.limits, f"history {number}"
        need(isinstance(history, list), f"{where} is not a list")
        need(len(history) <= limits.length, f"{where} has {len(history)} entries, more than {limits.length}")
        entries = []
        for given in history:
            entry = {"item": given} if isinstance(given, str) else given
            need(
                isinstance(entry, dict) and isinstance(entry.get("item"), str), f"{where}: an entry has no item (text)"
            )
            extra = set(entry) - OF_ENTRIES
            need(not extra, f"{where}: unknown field {sorted(extra)[:1]}; entries have {', '.join(sorted(OF_ENTRIES))}")
            kind = entry.get("kind", "clicked")
            need(isinstance(kind, str) and kind in KINDS, f"{where}: kind is one of {', '.join(KINDS)}")
            segment = KINDS[kind]
            need(
                segment == INTERACTED or segment < self.encoder.manifest.segments,
                f"{where}: the model does not read entries that are {kind}",
            )
            need("times" not in self.reads or "time" in entry, f"{where}: the model reads times, and an entry has none")
            entries.append(
                {
                    "items": self.item_ids.get(entry["item"], -1),
                    "segments": segment,
                    "times": whole(f"{where}: time", entry.get("time", 0)),
                    "events": self.event_id(entry.get("event")),
                    "places": whole(f"{where}: place", entry.get("place", 0)),
                }
            )
        return entries

    def event_id(self, word: Any) -> int:
        """Id of an event type; 0: any, or one that the model does not know."""
        need(word is None or isinstance(word, str), "event is the word of an event type")
        events = self.encoder.manifest.events
        return events.index(word) + 1 if word in events else 0

    # ----------------------------------------------------------------------------------------------- answers

    def encode(self, columns: dict[str, np.ndarray], clicked: list[list[int]]) -> np.ndarray:
        """[histories, interests, dim] float32 interest vectors."""
        encoder = self.encoder
        given = {name: torch.from_numpy(values) for name, values in columns.items()}
        if encoder.users is not None:
            given["user_vectors"] = torch.from_numpy(encoder.users.of(columns["users"]))
        if encoder.manifest.kind == "full":
            return encoder.run(given).numpy()
        assert encoder.items is not None, "a step program has its items outside"
        # The steps between interests: the best new item joins each history as a generated entry.
        columns = {name: values.copy() for name, values in columns.items()}
        seen, made = [list(row) for row in clicked], []
        all_rows = np.arange(len(seen))
        for step in range(encoder.manifest.interests):
            if step:
                best = np.maximum(self.search(made[-1], 1, seen).items[:, 0, 0].numpy(), 0)
                ends = columns["lengths"]
                values = {"items": best, "segments": GENERATED, "events": columns.get("asked_events", 0), "places": 0}
                if "times" in columns:
                    values["times"] = columns["times"][all_rows, np.maximum(ends - 1, 0)]
                for name in {*values} & {*columns}:
                    columns[name] = np.pad(columns[name], ((0, 0), (0, 1)))
                    columns[name][all_rows, ends] = values[name]
                columns["lengths"] = ends + 1
                for row, item in zip(seen, best.tolist(), strict=True):
                    row.append(item)
            given |= {name: torch.from_numpy(values) for name, values in columns.items()}
            looked_up = encoder.items.of(columns["items"].ravel()).reshape(*columns["items"].shape, -1)
            made.append(encoder.run({**given, "item_vectors": torch.from_numpy(looked_up)}).numpy()[:, None])
        return np.concatenate(made, axis=1)

    def search(self, vectors: np.ndarray, k: int, seen: list[list[int]]) -> Lists:
        """The `k` best items of every interest [histories, interests, dim], without those seen by its user."""
        rows, interests, dim = vectors.shape
        queries = np.ascontiguousarray(vectors.reshape(-1, dim))
        owners = np.repeat(np.arange(rows), interests)
        if self.vectors is not None:
            left_out = pairs_of(Ragged.from_lists([seen[row] for row in owners]))
            finder = BestFinder(torch.from_numpy(queries), k, left_out, self.items)
            finder.update(self.vectors, 0)
            items, scores = finder.best
        else:
            depth = min(k + max(len(set(row)) for row in seen), self.items)
            found = [shard.search(queries, depth) for shard in self.shards]
            ids, values = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
            is_seen = np.stack([np.isin(ids[number], seen[row]) for number, row in enumerate(owners)])
            values = np.where(is_seen | (ids < 0), -np.inf, values)
            order = np.argsort(-values, axis=1, kind="stable")[:, :k]
            values = np.take_along_axis(values, order, axis=1)
            ids = np.where(np.isfinite(values), np.take_along_axis(ids, order, axis=1), -1)
            items, scores = torch.from_numpy(ids), torch.from_numpy(values)
        return Lists(items.view(rows, interests, -1), scores.view(rows, interests, -1))

    def answer_vectors(self, request: dict[str, Any]) -> dict[str, Any]:
        """The interest vectors of each history; none where no entry is known."""
        columns, clicked, unknown = self.parse(request)
        vectors = self.encode(columns, clicked)
        made = [each.tolist() if length else [] for each, length in zip(vectors, columns["lengths"], strict=True)]
        return {"vectors": made, "unknown": unknown}

    def answer_lists(self, request: dict[str, Any]) -> dict[str, Any]:
        """The merged list of each history; an empty one where no entry is known."""
        k, limits = whole("k", request.get("k", 10)), self.limits
        need(1 <= k <= min(limits.k, self.items), f"k is {k}; it must be 1 to {min(limits.k, self.items)}")
        columns, clicked, unknown = self.parse(request)
        vectors = self.encode(columns, clicked)
        name = request.get("merge", "two_step")
        need(name in ("two_step", "quota", "score"), "merge is one of two_step, quota, score")
        if name == "two_step":
            vectors = vectors[:, :2]
        rule = merge_rule(name if vectors.shape[1] > 1 else "quota")
        merged = rule.merge(self.search(vectors, k, clicked), k)
        lists = []
        for length, *columns_of_list in zip(columns["lengths"], *(each.tolist() for each in merged), strict=True):
            places = zip(*columns_of_list, strict=True) if length else ()
            lists.append([{"item": self.keys[i], "score": s, "interest": n} for i, s, n in places if i >= 0])
        return {"lists": lists, "unknown": unknown}


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in a body."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise BadRequest("the body is not JSON") from None
    need(isinstance(request, dict), "the body is not a JSON object")
    return request


def whole(name: str, value: Any) -> int:
    """A whole number of a request."""
    need(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST, f"{name} is a whole number")
    return value


def open_index(export: Export) -> list[Any]:
    """The shards of the export's FAISS index; none: it holds no index, and every item is scored."""
    if export.manifest.index is None:
        return []
    from recgpt_torchrec.retrieval.search.index_files import open_shards

    return open_shards(export.path, export.manifest.index, export.manifest.index.shards, export.manifest.dim)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: "Service"

    def setup(self) -> None:
        """Give up on a client that sends nothing."""
        self.timeout = self.server.limits.seconds
        super().setup()

    def do_GET(self) -> None:
        """Answer /health."""
        if self.path != "/health":
            return self.reply(404, {"error": "there is GET /health, POST /encode and POST /recommend"})
        encoder = self.server.recommender.encoder.manifest
        health = {"status": "ok", "items": self.server.recommender.items, "interests": encoder.interests}
        self.reply(200, {**health, "encoder": encoder.kind, "reads": sorted(self.server.recommender.reads)})

    def do_POST(self) -> None:
        """Answer /encode and /recommend."""
        service = self.server
        answers = {"/encode": service.recommender.answer_vectors, "/recommend": service.recommender.answer_lists}
        length = self.headers.get("Content-Length", "")
        if self.path not in answers or not (length.isascii() and length.isdigit() and len(length) < 16):
            self.close_connection = True  # a body may follow, which is not read
            known = self.path in answers
            message = "give a Content-Length" if known else "there is GET /health, POST /encode and POST /recommend"
            return self.reply(400 if known else 404, {"error": message})
        if int(length) > service.limits.body:
            self.close_connection = True
            return self.reply(413, {"error": f"the body has {length} bytes, more than {service.limits.body}"})
        body = self.rfile.read(int(length))
        if not service.places.acquire(blocking=False):
            return self.reply(503, {"error": "too many requests at once; try again"})
        status, content = 500, {"error": "the service failed; its log says why"}
        try:
            status, content = 200, answers[self.path](parse_json(body))
        except BadRequest as error:
            status, content = 400, {"error": str(error)}
        except Exception:
            traceback.print_exc()
        finally:
            service.places.release()
        self.reply(status, content)

    def reply(self, status: int, content: dict[str, Any]) -> None:
        """Send JSON."""
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Keep the log to what goes wrong: tracebacks."""


class Service(ThreadingHTTPServer):
    """The service: a thread per connection."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], recommender: Recommender) -> None:
        self.recommender, self.limits = recommender, recommender.limits
        self.places = threading.BoundedSemaphore(recommender.limits.at_once)
        super().__init__(address, Handler)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", required=True, help="folder of an export with an encoder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; the default is this machine alone")
    parser.add_argument("--port", type=int, default=8080, help="0: any that is free")
    parser.add_argument("--threads", type=int, default=1, help="of torch, per request")
    parser.add_argument("--no_users", action="store_true", help="hold no keys of users; all are served as unknown ones")
    for name, value in vars(Limits()).items():
        parser.add_argument(f"--max_{name}", type=type(value), default=value)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    limits = Limits(**{name: getattr(given, f"max_{name}") for name in vars(Limits())})
    try:
        service = Service((given.host, given.port), Recommender(given.export, limits, not given.no_users))
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=service.shutdown).start())
    print(f"Serving {given.export} on http://{given.host}:{service.server_address[1]}", flush=True)
    try:
        service.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
