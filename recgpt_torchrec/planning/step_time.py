"""Estimated time of a training step by part, each with its arithmetic.

Parts of the device add up: a part takes as long as its operations at the assumed share of the peak, or as its bytes at
the assumed memory bandwidth, whichever is longer. Exchanges are counted in full, as if nothing ran beside them, but ids
are exchanged one step ahead. The host launches operations meanwhile: a step takes no less than that.
"""

from dataclasses import dataclass

from recgpt_torchrec.model.losses.fused_loss import picoseconds_per_logit
from recgpt_torchrec.model.peaks import rated_peak
from recgpt_torchrec.planning.hardware import LINK_SHARE, Hardware
from recgpt_torchrec.planning.memory import CHUNK, bags_of_table, exchanged_rows, fuses_loss
from recgpt_torchrec.planning.sharded import Sharded
from recgpt_torchrec.planning.traffic import Cause
from recgpt_torchrec.planning.workload import Workload

PASSES = 30
"""Vectors [dim] that a decoder block reads and writes per token beside its feed-forward layer, in the forward: counted
in `model.decoder` without fusion; the backward moves twice as many."""
FEED_FORWARD_PASSES = 4
"""The same per multiple of dim in the feed-forward layer."""
LAUNCH_SECONDS = 5e-6
"""Time in which the host launches one operation on a GPU."""
OPERATIONS = 210, 90
"""Operations on the device per step: of the whole, and per decoder block (930 at 8 blocks)."""
LOADER_SECONDS = 0.45e-6
"""Time of one core per token of a batch that is read and packed: 14 ms for 32,768."""


@dataclass(frozen=True)
class TimePart:
    """A part of a step."""

    name: str
    seconds: float
    arithmetic: str


@dataclass(frozen=True)
class StepTime:
    """The time of a step."""

    parts: list[TimePart]
    """Of the device, in turn."""
    beside: list[TimePart]
    """What runs beside them: a step takes no less than the longest."""

    @property
    def seconds(self) -> float:
        """Of one step."""
        return max(sum(part.seconds for part in self.parts), *(part.seconds for part in self.beside))

    @property
    def limit(self) -> TimePart | None:
        """What the device waits for; None: it waits for nothing."""
        longest = max(self.beside, key=lambda part: part.seconds)
        return longest if longest.seconds >= self.seconds else None


def estimate_step_time(workload: Workload, sharded: Sharded, traffic: list[Cause], hardware: Hardware) -> StepTime:
    """Estimate the time of one training step."""
    parts = [
        _lookup(workload, sharded, hardware),
        _decoder(workload, hardware),
        _loss(workload, hardware),
        _optimizers(workload, sharded, hardware),
        *(_exchange(cause, hardware) for cause in traffic if cause.name != "ids" and cause.sent.total),
    ]
    ids = next(cause for cause in traffic if cause.name == "ids")
    layers = workload.plan.model.layers
    operations = OPERATIONS[0] + OPERATIONS[1] * layers
    workers = max(1, workload.plan.stream.workers)
    beside = [_exchange(ids, hardware)] if ids.sent.total else []
    if hardware.device_type == "cuda":
        beside.append(
            TimePart(
                "launches", operations * LAUNCH_SECONDS, f"{operations:,} operations x {LAUNCH_SECONDS * 1e6:.0f} us"
            )
        )
    loading = LOADER_SECONDS * workload.tokens / workers
    beside.append(
        TimePart("loader", loading, f"{workload.tokens:,} tokens x {LOADER_SECONDS * 1e6:.2f} us / {workers} workers")
    )
    return StepTime(parts, beside)


def _roofline(name: str, hardware: Hardware, flops: float, size: float) -> TimePart:
    """A part that computes and moves memory at the same time."""
    computing, moving = flops / hardware.flop_rate, size / hardware.memory_rate
    counts = f"{_si(flops)}FLOP at {_si(hardware.flop_rate)}FLOP/s" if flops else ""
    bytes_ = f"{_si(size)}B at {_si(hardware.memory_rate)}B/s" if size else ""
    first, second = (counts, bytes_) if computing >= moving else (bytes_, counts)
    return TimePart(name, max(computing, moving), f"{first} (longer than {second})" if second else first)


def _lookup(workload: Workload, sharded: Sharded, hardware: Hardware) -> TimePart:
    """Rows gathered, laid out for the exchange and back, and the same of their gradients, which end in the update."""
    size = 0.0
    for placement in sharded.placements:
        bags = bags_of_table(workload, placement.table)
        used = workload.ids_of(placement.table)
        sent = exchanged_rows(placement, bags, sharded.group)
        # Forward: read used rows, write and read what is sent, write, regroup. Backward: alike, then update the rows.
        size += 4.0 * placement.dim * (4 * used + 4 * sent + 6 * bags)
    return _roofline("lookup", hardware, 0.0, size)


def _decoder(workload: Workload, hardware: Hardware) -> TimePart:
    model, flops = workload.plan.model, workload.flops
    itemsize = 3 if hardware.precision == "bf16" else 4  # of the passes about half are in float32
    passes = 3 * model.layers * (PASSES + FEED_FORWARD_PASSES * model.feed_forward) + 3 * 16
    return _roofline(
        "decoder", hardware, flops.decoder + flops.attention, passes * workload.tokens * model.dim * itemsize
    )


def _loss(workload: Workload, hardware: Hardware) -> TimePart:
    """On GPUs by the estimate of `model.fused_loss`, for an H100 and in proportion to the peak of others."""
    flops = workload.flops.loss
    if hardware.device_type == "cpu" or workload.plan.loss.candidates == "bce" or hardware.precision == "fp32":
        return _roofline("loss", hardware, flops, 0.0)
    itemsize = 2 if hardware.precision == "bf16" else 4
    fused, chunked = picoseconds_per_logit(workload.plan.model.dim, workload.candidates, CHUNK["cuda"], itemsize)
    fuses = fuses_loss(workload, hardware)
    h100 = rated_peak("H100", hardware.precision) or hardware.peak
    per_logit = (fused if fuses else chunked) * h100 / hardware.peak
    logits = float(workload.targets) * workload.candidates
    how = "fused" if fuses else "chunked"
    return TimePart("loss", logits * per_logit * 1e-12, f"{_si(logits)}logits x {per_logit:.2f} ps, {how}")


def _optimizers(workload: Workload, sharded: Sharded, hardware: Hardware) -> TimePart:
    """AdamW of the decoder, and of tables whose optimizer visits every row."""
    size = 7 * 4.0 * workload.dense_parameters
    for placement in sharded.placements:
        if placement.kernel == "dense":
            size += 6 * sharded.bytes_of(placement)
    return _roofline("optimizers", hardware, 0.0, size)


def _exchange(cause: Cause, hardware: Hardware) -> TimePart:
    """Both kinds of links work at the same time."""
    seconds = [cause.sent.within / hardware.within / LINK_SHARE, cause.sent.between / hardware.between / LINK_SHARE]
    sizes = [
        f"{_si(size)}B at {_si(rate * LINK_SHARE)}B/s {where}"
        for size, rate, where in (
            (cause.sent.within, hardware.within, "within"),
            (cause.sent.between, hardware.between, "between nodes"),
        )
        if size
    ]
    return TimePart(f"exchange of {cause.name}", max(seconds), " beside ".join(sizes))


def _si(value: float) -> str:
    """A number with a prefix: 1.07 G."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.3g} "
