"""The text that the program plan prints: sharding, memory, traffic, time, and the smallest cluster that fits."""

from dataclasses import dataclass

from recgpt_torchrec.config.reports.plan import MOST_NODES, Plan
from recgpt_torchrec.distributed.placements import table_text
from recgpt_torchrec.planning.cluster import Cluster, smallest_cluster
from recgpt_torchrec.planning.hardware import GIB, Hardware, hardware_of
from recgpt_torchrec.planning.memory import Memory, estimate_memory
from recgpt_torchrec.planning.sharded import Sharded, shard_workload
from recgpt_torchrec.planning.step_time import StepTime, estimate_step_time
from recgpt_torchrec.planning.traffic import Cause, step_traffic
from recgpt_torchrec.planning.workload import Workload
from recgpt_torchrec.texts.tables import table


@dataclass(frozen=True)
class Estimate:
    """All that is estimated of a run.

    Example: `print(Estimate.of(Plan(items=10**8, users=10**9, nodes=8)).text())`
    """

    workload: Workload
    hardware: Hardware
    sharded: Sharded
    memory: Memory
    traffic: list[Cause]
    time: StepTime

    @classmethod
    def of(cls, plan: Plan) -> "Estimate":
        """Estimate a run from its options.

        Raises:
            InputError: a table cannot be sharded as the options say, or they do not fit each other.
        """
        workload, hardware = Workload.of(plan), hardware_of(plan)
        sharded = shard_workload(workload, hardware)
        traffic = step_traffic(workload, sharded, hardware.precision)
        return cls(
            workload=workload,
            hardware=hardware,
            sharded=sharded,
            memory=estimate_memory(workload, sharded, hardware),
            traffic=traffic,
            time=estimate_step_time(workload, sharded, traffic, hardware),
        )

    def text(self) -> str:
        """The report."""
        cluster = smallest_cluster(self.workload, self.hardware)
        sections = [
            _heading(self.workload, self.hardware),
            "Sharding\n" + _indent(table_text(self.sharded.placements)),
            _memory_text(self.memory, self.sharded),
            _traffic_text(self.traffic, self.workload),
            _time_text(self.time, self.workload, self.hardware),
            _cluster_text(cluster, self.workload.plan),
        ]
        return "\n\n".join(sections)


def _heading(workload: Workload, hardware: Hardware) -> str:
    plan, model = workload.plan, workload.plan.model
    return "\n".join(
        [
            f"{workload.items:,} items, {workload.users:,} users on {plan.ranks:,} ranks ({plan.nodes} x {plan.gpus})",
            f"  hardware  {hardware}",
            f"  decoder   dim {model.dim}, {model.layers} layers, {workload.dense_parameters:,} parameters",
            f"  batch     {workload.tokens:,} tokens per rank in {workload.sequences:,} sequences of "
            f"{workload.history:.3g}, {workload.targets:,} targets x {workload.candidates:,} candidates",
            f"  lookups   {workload.distinct_items:,} items and {workload.sequences:,} users per rank, in "
            f"{workload.capacity.stride * workload.capacity.item_keys:,} and {workload.capacity.stride:,} bags",
        ]
    )


def _memory_text(memory: Memory, sharded: Sharded) -> str:
    cuda = memory.hardware.device_type == "cuda"

    def row(name: str, device: float, host: float, when: str, note: str) -> list[str]:
        sizes = [_gib(device), _gib(host)] if cuda else [_gib(device)]
        return [name, *sizes, when, note]

    rows = [row(i.name, i.device, i.host, i.phase, i.note) for i in memory.items]
    rows.append(row("total at the peak", memory.total("device"), memory.total("host"), "", ""))
    heading = ["GiB", "device", "host", "when", ""] if cuda else ["GiB", "rank", "when", ""]
    if cuda:
        verdict = _room("GPU", memory.total("device"), memory.device_limit)
        verdict += "; " + _room("node", memory.host_total, memory.host_limit)
    else:
        verdict = _room("node", memory.host_total, memory.host_limit)
    lines = table([heading, *rows], right=(1, 2) if cuda else (1,), indent="  ")
    return (
        f"Memory of the fullest rank, number {sharded.fullest}\n{lines}\n"
        f"  {'Fits' if memory.fits else 'DOES NOT FIT'}: {verdict}"
    )


def _room(place: str, used: float, limit: float) -> str:
    return f"{_gib(used)} of the {place}'s {limit / GIB:,.0f} GiB"


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}" if size >= 100 * GIB else f"{size / GIB:,.3f}"


def _traffic_text(traffic: list[Cause], workload: Workload) -> str:
    if workload.plan.ranks == 1:
        return "Sent per step: nothing, on one rank"
    rows = [[t.name, f"{t.sent.within / 1e6:,.2f}", f"{t.sent.between / 1e6:,.2f}", t.note] for t in traffic]
    within, between = (sum(getattr(t.sent, name) for t in traffic) / 1e6 for name in ("within", "between"))
    rows.append(["total", f"{within:,.2f}", f"{between:,.2f}", ""])
    heading = ["MB", "within a node", "between nodes", ""]
    return f"Sent per step by the busiest rank\n{table([heading, *rows], right=(1, 2), indent='  ')}"


def _time_text(time: StepTime, workload: Workload, hardware: Hardware) -> str:
    rows = [[part.name, f"{part.seconds * 1e3:,.3f}", part.arithmetic] for part in time.parts]
    rows.append(["sum", f"{sum(part.seconds for part in time.parts) * 1e3:,.3f}", ""])
    rows += [[part.name, f"{part.seconds * 1e3:,.3f}", f"beside: {part.arithmetic}"] for part in time.beside]
    seconds, ranks = time.seconds, workload.plan.ranks
    share = workload.flops.total / seconds / hardware.peak
    per_rank = workload.targets / seconds
    lines = [
        f"Estimated time of a step\n{table([['ms', '', ''], *rows], right=(1,), indent='  ')}",
        f"  A step takes {seconds * 1e3:,.3g} ms: {per_rank:,.0f} targets/s per rank, {per_rank * ranks:,.0f} in all; "
        f"{workload.flops.total / 1e9:,.3g} GFLOP per rank, {share:.1%} of the peak",
    ]
    if (slowest := time.limit) is not None:
        remedy = "; give more --stream.workers" if slowest.name == "loader" else ""
        lines.append(f"  The device waits: {slowest.name} takes longer than its parts{remedy}")
    if (steps := workload.steps) is not None:
        lines.append(
            f"  An epoch of {workload.plan.interactions:,} interactions has {steps:,.0f} steps and takes "
            f"{_duration(steps * seconds)}, without validation and checkpoints"
        )
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.1f} seconds"


def _cluster_text(cluster: Cluster | None, plan: Plan) -> str:
    if cluster is None:
        return f"Smallest cluster: none of up to {MOST_NODES} nodes x {plan.gpus} of this kind fits"
    nodes = f"{cluster.nodes} node{'s' * (cluster.nodes > 1)}"
    place = "of each GPU" if cluster.memory.hardware.device_type == "cuda" else "per rank"
    return (
        f"Smallest cluster that fits, with this batch per rank: {nodes} x {cluster.gpus} {plan.gpu}, "
        f"{_gib(cluster.memory.total('device'))} of {cluster.memory.device_limit / GIB:,.0f} GiB {place}"
    )


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
