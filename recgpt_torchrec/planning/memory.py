"""Memory of the fullest rank, by what it is for.

What is always there adds up. Of what is there in one phase alone (a step, a validation) the largest phase counts. A
CUDA rank has two memories, the device's and its share of the node's; a CPU rank one.

What cannot be known from the options is assumed: `CUDA_CONTEXT`, `FRAGMENTATION`, `PROCESS`. Activations are those that
autograd keeps, counted in the decoder's source.
"""

from dataclasses import dataclass
from typing import Literal

from recgpt_torchrec.catalogue.catalogue import HELD_SHARE, PASS_BYTES
from recgpt_torchrec.catalogue.counting import SCORES
from recgpt_torchrec.catalogue.vectors import BLOCK_BYTES
from recgpt_torchrec.checkpoints.records import RECORD_BYTES
from recgpt_torchrec.checkpoints.saving import COPY_SHARE
from recgpt_torchrec.config import Tables
from recgpt_torchrec.config.tables import is_of_users
from recgpt_torchrec.distributed.placements import Placement
from recgpt_torchrec.distributed.processes import KERNELS
from recgpt_torchrec.distributed.sharding_types import COPY
from recgpt_torchrec.model.losses import shared_loss
from recgpt_torchrec.model.losses.fused_loss import MAX_DIM, picoseconds_per_logit
from recgpt_torchrec.planning.hardware import GIB, Hardware
from recgpt_torchrec.planning.sharded import HOST_KERNELS, Sharded
from recgpt_torchrec.planning.workload import VALUES, Workload
from recgpt_torchrec.storage.buffers import IN_MEMORY

CUDA_CONTEXT = 1.5 * GIB
"""Device memory of CUDA's context, the libraries' kernels and NCCL's buffers (assumed)."""
FRAGMENTATION = 0.04
"""Share of a GPU's memory that its allocator cannot give out in the sizes asked for (assumed)."""
PROCESS = {"cuda": 3.0 * GIB, "cpu": 0.6 * GIB}
"""Host memory of one rank's process after its imports (assumed; of CPU ranks `tools.check_plan` measures it)."""
KERNEL = 3 * 2**20
"""Bytes of a oneDNN kernel in bf16 on AMX, as measured."""
CHUNK = {"cpu": shared_loss.CHUNK, "cuda": shared_loss.CHUNK_CUDA}
"""Targets scored at once, where their logits are not too many bytes."""
Phase = Literal["always", "step", "validation"]
Place = Literal["device", "host"]


@dataclass(frozen=True)
class Item:
    """One use of memory on the fullest rank, in bytes."""

    name: str
    device: float = 0.0
    """On the GPU; on CPU in the rank's own memory."""
    host: float = 0.0
    """In host memory, of CUDA ranks."""
    phase: Phase = "always"
    note: str = ""


@dataclass(frozen=True)
class Memory:
    """The memory of the fullest rank."""

    items: list[Item]
    hardware: Hardware
    ranks_per_node: int

    def total(self, place: Place, phase: Phase | None = None) -> float:
        """Bytes at the peak, or in one phase: what is always there, and what the phase adds."""
        sums = dict.fromkeys(("always", "step", "validation"), 0.0)
        for item in self.items:
            sums[item.phase] += getattr(item, place)
        if phase is None:
            return sums["always"] + max(sums["step"], sums["validation"])
        return sums["always"] + (0.0 if phase == "always" else sums[phase])

    @property
    def device_limit(self) -> float:
        """Bytes of the device; of a CPU rank its share of the node's memory."""
        return self.hardware.hbm * GIB

    @property
    def host_total(self) -> float:
        """Bytes of host memory on one node, if all its ranks are as full."""
        place: Place = "device" if self.hardware.device_type == "cpu" else "host"
        return self.total(place) * self.ranks_per_node

    @property
    def host_limit(self) -> float:
        """Bytes of host memory of a node."""
        return self.hardware.host * GIB

    @property
    def fits(self) -> bool:
        """Whether the fullest rank has room on its device and on its node."""
        return self.total("device") <= self.device_limit and self.host_total <= self.host_limit


def estimate_memory(workload: Workload, sharded: Sharded, hardware: Hardware) -> Memory:
    """Estimate the memory of the fullest rank.

    A checkpoint is saved from a copy where the copy fits the host's memory, and else without one, as a run chooses; the
    catalogue of a validation is held where it fits, and else streamed.
    """
    plan, cuda = workload.plan, hardware.device_type == "cuda"
    parameters = 4.0 * workload.dense_parameters
    items = [
        Item("process", CUDA_CONTEXT + FRAGMENTATION * hardware.hbm * GIB, PROCESS["cuda"])
        if cuda
        else Item("process", PROCESS["cpu"]),
        *_kernels(workload, cuda),
        *_tables(sharded, plan.tables),
        Item("decoder weights", parameters),
        Item("decoder gradients", parameters, note="DDP's buckets, which are the gradients"),
        Item("decoder AdamW", 2 * parameters),
        *_batches(workload, cuda),
        *_statistics(workload, cuda),
        *_attribute_values(workload, cuda),
        *_neighbours(workload, cuda),
        *_step(workload, sharded, hardware),
    ]
    state = 3 * parameters + sum(sharded.bytes_of(placement) for placement in sharded.placements)
    items.append(_checkpoint(plan.saving.asynchronous, state, Memory(items, hardware, plan.gpus), cuda))
    items += _validation(workload, sharded, Memory(items, hardware, plan.gpus))
    return Memory(items, hardware, plan.gpus)


def _kernels(workload: Workload, cuda: bool) -> list[Item]:
    """oneDNN's kernels of a CPU rank, one for each shape of a matrix product; few are kept in fp32."""
    if cuda or workload.plan.train.precision == "fp32":
        return []
    return [Item("kernels", KERNELS * KERNEL, note="of matrix products in bf16, where the CPU has it")]


def _tables(sharded: Sharded, tables: Tables) -> list[Item]:
    items = []
    for placement in sharded.placements:
        size = sharded.bytes_of(placement)
        note = f"weights and moments ({tables.optimizer}), {placement.sharding}"
        if placement.kernel in HOST_KERNELS:
            cache = size * tables.cache_ratio if "caching" in placement.kernel else 0.0
            note += f", {placement.kernel}"
            items.append(Item(f"table {placement.table}", cache, size, note=note))
            continue
        items.append(Item(f"table {placement.table}", size, note=note))
        if placement.kernel == "dense":
            gradient = float(sharded.numbers_of(placement) * placement.itemsize)
            items.append(Item(f"gradient of {placement.table}", gradient, note="dense: of every row"))
    return items


def _batches(workload: Workload, cuda: bool) -> list[Item]:
    """Batches that are read ahead, and those on the device, in 8-byte integers."""
    slots, bags = workload.tokens / (1.0 if cuda else 0.9), workload.capacity.stride * (workload.capacity.item_keys + 1)
    ids = workload.sequences + workload.distinct_items
    for each in workload.inputs.attributes:
        bags, ids = bags + bags_of_table(workload, each.table), ids + workload.ids_of(each.table)
    one = 8 * (5 * slots + 3 * workload.targets + ids + 2 * workload.own_candidates) + 4 * bags
    ahead = workload.plan.stream.prefetch * max(1, workload.plan.stream.workers) + 2
    groups = workload.plan.stream.window_groups * min(8192, max(16, workload.users // 64))
    window = 6 * 8 * groups * (workload.history + 3)  # ids, times, and copies while it is shuffled
    note = f"{ahead} batches read ahead, 2 windows of {groups:,} users"
    read = ahead * one + 2 * window
    return [Item("batches", 3 * one, read, note=note) if cuda else Item("batches", read, note=note)]


def _statistics(workload: Workload, cuda: bool) -> list[Item]:
    """What candidates drawn by popularity need of every item, on every rank.

    While it is computed it takes more, which is freed before there are tables.
    """
    loss = workload.plan.loss
    if loss.candidates != "in_batch" and (loss.candidates == "all" or loss.negatives_by == "uniform"):
        return []
    size = 4.0 * workload.items
    device, host = (0.0, size) if cuda else (size, 0.0)
    return [Item("item statistics", device, host, note="popularity of every item, on each rank")]


def _attribute_values(workload: Workload, cuda: bool) -> list[Item]:
    """The attribute values of all users and items, on every rank, where they are not mapped from a file."""
    size = float(workload.items) if workload.inputs.of_entity("item") else 0.0  # whether its own row is trained
    for each in workload.inputs.attributes:
        rows = workload.users if each.entity == "user" else workload.items
        size += (8 + 4 * VALUES if each.table in workload.several else 4) * rows
    return _read_on_node("attribute values", size, "of all users and items", cuda)


def _neighbours(workload: Workload, cuda: bool) -> list[Item]:
    """An id and a score of each neighbour of every item, on every rank, where they are not mapped from a file."""
    count = workload.neighbours
    return _read_on_node("neighbours", 8.0 * count * workload.items, f"{count} of each item", cuda)


def _read_on_node(name: str, size: float, note: str, cuda: bool) -> list[Item]:
    """What `distributed.shared_folder.read_on_node` reads: small, each rank has a copy; large, each node has one."""
    if not size:
        return []
    if size > IN_MEMORY:
        return [Item(name, note=f"{size / GIB:,.1f} GiB in a file that each node's ranks map")]
    return [Item(name, *((0.0, size) if cuda else (size, 0.0)), note=f"{note}, on each rank")]


def exchanged_rows(placement: Placement, bags: int, ranks: int) -> float:
    """Rows [dim] that a holder of a table makes for all ranks: with rows in shards a partial sum per bag of each."""
    return 0.0 if placement.sharding == COPY else bags * ranks / placement.blocks


def bags_of_table(workload: Workload, table: str) -> int:
    """Bags per rank that a table is asked for in a step, empty ones included."""
    return workload.capacity.stride * (1 if is_of_users(table) else workload.capacity.item_keys)


def _step(workload: Workload, sharded: Sharded, hardware: Hardware) -> list[Item]:
    """Lookups, activations and logits of one training step."""
    model, cuda = workload.plan.model, hardware.device_type == "cuda"
    dim, itemsize = model.dim, 2 if hardware.precision == "bf16" else 4
    sent = received = 0.0
    for placement in sharded.placements:
        bags = bags_of_table(workload, placement.table)
        if sharded.bytes_of(placement):
            sent += 4 * dim * exchanged_rows(placement, bags, sharded.group)
        received += 4 * dim * bags
    slots = workload.tokens if cuda and _varlen(workload, hardware) else workload.tokens / 0.9
    kept = model.layers * slots * dim * (8 + 2 * model.feed_forward) * itemsize + 8 * 4 * slots * dim
    scores = 0.0
    if not _varlen(workload, hardware):
        scores = 3 * model.layers * slots * model.heads * max(64, model.max_len) * itemsize
    candidates = workload.own_candidates
    seen = workload.targets * (workload.plan.ranks if workload.scores_all_ranks else 1)
    vectors = 4 * dim * (6 * workload.targets + 3 * (seen - workload.targets) + 5 * candidates)
    kind = hardware.device_type
    logits = itemsize * seen * candidates  # of targets that travel all are kept, or a block at a time
    if not workload.scores_all_ranks:
        logits = min(shared_loss.LOGITS[kind], itemsize * min(CHUNK[kind], seen) * candidates)
    elif logits > shared_loss.LOGITS[kind]:
        logits = shared_loss.BLOCK[kind]
    logits *= not fuses_loss(workload, hardware)
    return [
        Item("lookups", 2 * sent + 4 * received, phase="step", note="vectors sent, received, regrouped; gradients"),
        Item("activations", kept + scores, phase="step", note=f"{model.layers} layers, {workload.tokens:,} tokens"),
        Item(
            "loss", vectors + logits, phase="step", note=f"{candidates:,} candidates, logits {logits / 2**20:,.0f} MiB"
        ),
    ]


def fuses_loss(workload: Workload, hardware: Hardware) -> bool:
    """Whether the softmax loss runs in kernels that never write the logits, as `auto` would choose on the GPU."""
    train, loss, dim = workload.plan.train, workload.plan.loss, workload.plan.model.dim
    if hardware.device_type == "cpu" or loss.candidates == "bce" or hardware.precision == "fp32":
        return False
    if workload.scores_all_ranks or dim > MAX_DIM:
        return False
    if train.fused_loss != "auto":
        return bool(train.fused_loss)
    itemsize = 2 if hardware.precision == "bf16" else 4
    fused, chunked = picoseconds_per_logit(dim, workload.candidates, CHUNK["cuda"], itemsize)
    return fused < chunked


def _varlen(workload: Workload, hardware: Hardware) -> bool:
    """Whether attention keeps no scores: flash attention, on CUDA in bf16 without attention dropout."""
    possible = hardware.precision == "bf16" and hardware.device_type == "cuda"
    return possible and workload.plan.model.attention_dropout == 0 and workload.plan.train.attention != "dense"


def _checkpoint(asynchronous: bool, state: float, so_far: Memory, cuda: bool) -> Item:
    """The copy that a checkpoint is written from, or, where it does not fit, what is written at once."""
    place: Place = "host" if cuda else "device"
    limit = so_far.host_limit if cuda else so_far.device_limit * so_far.ranks_per_node
    left = limit / so_far.ranks_per_node - so_far.total(place, "always")
    fits = state <= COPY_SHARE * left
    size, note = state, "asynchronous saving"
    if not (asynchronous and fits):
        why = "asynchronous saving does not fit" if asynchronous else "--saving.asynchronous false"
        size, note = min(state, RECORD_BYTES), f"{why}: a record at a time"
    return Item("checkpoint copy", *((0.0, size) if cuda else (size, 0.0)), note=note)


def _validation(workload: Workload, sharded: Sharded, so_far: Memory) -> list[Item]:
    """The catalogue's vectors of this rank, and the scores of a block of users."""
    own = -(-workload.items // workload.plan.ranks)
    whole = 4.0 * workload.plan.model.dim * own
    sent = sum(exchanged_rows(p, 1, sharded.group) for p in sharded.placements if not is_of_users(p.table))
    working = 4 * SCORES[so_far.hardware.device_type] + 2 * PASS_BYTES + BLOCK_BYTES * (sent + 3)
    left = so_far.device_limit - so_far.total("device", "always") - working
    held = whole <= HELD_SHARE * left
    how = "held" if held else "streamed: looked up anew for each pass"
    return [
        Item("catalogue", whole if held else 0.0, phase="validation", note=f"{own:,} items per rank, {how}"),
        Item("scores", working, phase="validation", note="scores, queries, a block of vectors and its exchange"),
    ]
