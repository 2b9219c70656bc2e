"""Latency and throughput of an export's encoder, and of the example service under load on the loopback interface.

    OMP_NUM_THREADS=1 python -m tools.benchmarks.serving --export vectors/mine --output serving.json

The encoder runs on one thread, with histories of drawn items. p50 and p99 are wall time; `cpu_ms` is processor time per
call, which other work on the machine changes less. The service (docs/examples/serve.py) runs in a process of its own;
clients in this one send /recommend over connections that stay open, each its next request when the last is answered.
An encoder.onnx in the export is measured too where onnxruntime can be imported.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recgpt_torchrec.retrieval.exports.reading import Export, open_export
from recgpt_torchrec.serving.exported.opening import OpenedEncoder, open_encoder

WARM_UP = 5
"""Calls before those that are measured."""
SERVICE = Path(__file__).parents[2] / "docs" / "examples" / "serve.py"


def main() -> None:
    """Measure, print a line for each figure, and write all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", required=True, help="with an encoder")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64], help="histories per call")
    parser.add_argument("--length", type=int, default=20, help="entries per history")
    parser.add_argument("--calls", type=int, default=200, help="of the encoder, for each batch size")
    parser.add_argument("--clients", type=int, default=4, help="of the service")
    parser.add_argument("--seconds", type=float, default=10.0, help="of load")
    parser.add_argument("--output", help="JSON file; without, figures are only printed")
    given = parser.parse_args()
    torch.set_num_threads(1)
    export = open_export(given.export)
    encoder, rng = open_encoder(export), np.random.default_rng(0)
    manifest = encoder.manifest
    figures: dict[str, Any] = {"encoder": manifest.kind, "interests": manifest.interests, "bytes": manifest.bytes}
    about = f"{export.manifest.items:,} items, {manifest.interests} interests, {given.length} entries"
    print(f"{manifest.kind} encoder, {about}")
    session = open_onnx(export)
    for batch in given.batches:
        arguments = draw(encoder, export, batch, given.length, rng)
        ways: dict[str, Callable[[], Any]] = {"pt2": partial(encoder.run, arguments)}
        if session is not None:
            ways["onnx"] = partial(session.run, None, {name: value.numpy() for name, value in arguments.items()})
        for way, call in ways.items():
            figures[f"{way}, batch {batch}"] = found = time_calls(call, given.calls, batch)
            print(f"{way:5} batch {batch:3}  {describe(found)}", flush=True)
    figures["service"] = found = load_service(export, given.clients, given.seconds, given.length)
    print(f"service, {given.clients} clients  {describe(found)}, answers by status {found['statuses']}")
    if given.output:
        Path(given.output).write_text(json.dumps(figures, indent=1))


def draw(encoder: OpenedEncoder, export: Export, batch: int, length: int, rng: Any) -> dict[str, torch.Tensor]:
    """Arguments of a program for histories of drawn items, all of one length."""
    sizes, arguments = {"batch": batch, "length": length}, {}
    for each in encoder.manifest.inputs:
        shape = [sizes[size] if size in sizes else int(size) for size in each.shape]
        if each.dtype == "float32":
            arguments[each.name] = torch.from_numpy(rng.standard_normal(shape, np.float32))
        else:
            most = {"items": export.manifest.items, "users": export.manifest.users}.get(each.name, 1)
            arguments[each.name] = torch.from_numpy(rng.integers(0, most, shape))
    return arguments | {"lengths": torch.full((batch,), length)}


def open_onnx(export: Export) -> Any:
    """A session of the export's ONNX program on one thread; None: there is no such program, or no onnxruntime."""
    assert export.manifest.encoder is not None
    program = export.manifest.encoder.program(".onnx")
    if program is None or importlib.util.find_spec("onnxruntime") is None:
        return None
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return runtime.InferenceSession(f"{export.path}/{program.path}", options)


def time_calls(call: Callable[[], Any], calls: int, batch: int) -> dict[str, Any]:
    """Times of calls that come one after the other."""
    for _ in range(WARM_UP):
        call()
    times, cpu = [], time.process_time()
    for _ in range(calls):
        since = time.perf_counter()
        call()
        times.append(time.perf_counter() - since)
    return summarize(times, batch / float(np.mean(times))) | {"cpu_ms": (time.process_time() - cpu) / calls * 1e3}


def summarize(times: list[float], rate: float) -> dict[str, Any]:
    """p50 and p99 in milliseconds, and histories per second."""
    p50, p99 = (float(value) * 1e3 for value in np.percentile(times, (50, 99)))
    return {"p50_ms": p50, "p99_ms": p99, "histories_s": rate, "calls": len(times)}


def describe(found: dict[str, Any]) -> str:
    """The figures in one line."""
    cpu = f", {found['cpu_ms']:.2f} ms of a core" if "cpu_ms" in found else ""
    return f"p50 {found['p50_ms']:.2f} ms, p99 {found['p99_ms']:.2f} ms, {found['histories_s']:,.0f} histories/s{cpu}"


def load_service(export: Export, clients: int, seconds: float, length: int) -> dict[str, Any]:
    """Start the example service on a free port and send it requests for lists of ten.

    Returns:
        As `summarize`, and `statuses`: number of answers by HTTP status.
    """
    keys = next(iter(export.items(["key"], rows=10_000)))["key"].to_pylist()
    words = [sys.executable, str(SERVICE), "--export", export.path, "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit("the service did not start; its message is above")
        port = int(line.rsplit(":", 1)[1])
        times: list[float] = []
        statuses: Counter[int] = Counter()
        since = time.perf_counter()

        def send(seed: int) -> None:
            rng, connection = np.random.default_rng(seed), HTTPConnection("127.0.0.1", port, timeout=60)
            while time.perf_counter() - since < seconds:
                history = [keys[place] for place in rng.integers(0, len(keys), length)]
                begin = time.perf_counter()
                connection.request("POST", "/recommend", json.dumps({"histories": [history], "k": 10}))
                answer = connection.getresponse()
                answer.read()
                times.append(time.perf_counter() - begin)
                statuses[answer.status] += 1
            connection.close()

        threads = [threading.Thread(target=send, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rate = len(times) / (time.perf_counter() - since)
    finally:
        process.terminate()
        process.wait(30)
    return {**summarize(times, rate), "statuses": {str(status): count for status, count in statuses.items()}}


if __name__ == "__main__":
    main()
