"""Estimates of a run: sizes of a batch, memory, traffic, time, and the smallest cluster, against plain arithmetic."""

from typing import Any

import numpy as np
import pytest
import torch

from recgpt_torchrec.config import AttributeChoice, Loss, Model, Plan, Tables, TrainingBatch
from recgpt_torchrec.data.candidates import candidate_source
from recgpt_torchrec.data.reading.histories import HistoryReader, cut_pieces
from recgpt_torchrec.data.stream import BatchMaker
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.model.dense import Dense
from recgpt_torchrec.planning.cluster import smallest_cluster
from recgpt_torchrec.planning.hardware import RATINGS, Hardware, hardware_of
from recgpt_torchrec.planning.report import Estimate
from recgpt_torchrec.planning.sharded import shard_workload
from recgpt_torchrec.planning.workload import Workload
from tests.support import SmallAttribute, write_dataset

FAST: dict[str, Any] = {"peak": 0.1, "hbm_bandwidth": 10.0}
"""Rates of a CPU, which are measured otherwise."""


def on_cpu(**options: Any) -> Plan:
    given: dict[str, Any] = {"items": 200_000, "users": 5000, "gpu": "cpu", "gpus": 2, "memory": 24.0, **FAST}
    return Plan(**{**given, "batch": TrainingBatch(tokens=512), "model": Model(dim=32), **options})


def bytes_of(estimate: Estimate, name: str) -> float:
    """Bytes of the uses of memory whose name begins so."""
    return sum(item.device + item.host for item in estimate.memory.items if item.name.startswith(name))


@pytest.mark.parametrize("candidates", ["sampled", "in_batch", "bce"])
@pytest.mark.parametrize("items", [40, 3000])
def test_bags_and_parameters_are_those_of_a_run(tmp_path: Any, candidates: Any, items: int) -> None:
    model, loss, batch = Model(dim=8, max_len=10), Loss(candidates=candidates, negatives=70), TrainingBatch(tokens=60)
    dataset = write_dataset(tmp_path, [[1, 2, 3, 4]] * 30, items=items)
    reader = HistoryReader(dataset=dataset, split="training", max_len=10)
    maker = BatchMaker(reader=reader, batch=batch.of(60), source=candidate_source(loss, dataset, batch.of(60)))
    workload = Workload.of(on_cpu(items=items, users=30, model=model, loss=loss, batch=batch, gpus=1))
    assert workload.capacity == maker.capacity
    assert workload.dense_parameters == sum(p.numel() for p in Dense(model, loss).parameters())


def test_users_per_batch_decide_steps_and_bags() -> None:
    batch = TrainingBatch(users=50)
    workload = Workload.of(on_cpu(batch=batch, history=6.0, gpus=1))
    assert (workload.tokens, workload.sequences, workload.capacity.users) == (300, 50, 50)
    assert workload.steps is None
    assert Workload.of(on_cpu(batch=batch, interactions=35_000, gpus=1)).steps == 100  # 5,000 users


def test_sizes_come_from_the_dataset_where_they_are_not_given(tmp_path: Any) -> None:
    write_dataset(tmp_path, [[1, 2, 3, 4, 5]] * 20, items=30)
    taken = Workload.of(Plan(data=str(tmp_path), gpu="cpu", **FAST))
    assert (taken.items, taken.users, taken.plan.interactions) == (30, 20, 100)
    assert taken.history == 2  # two of five are held out, and the first is no target
    given = Workload.of(Plan(data=str(tmp_path), items=99, gpu="cpu", **FAST))
    assert (given.items, given.users, given.plan.interactions) == (99, 20, None)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
@pytest.mark.parametrize("sharding", ["data_parallel", "column_wise", "row_wise"])
def test_the_tables_bytes_are_their_elements_and_moments(sharding: Any, optimizer: Any) -> None:
    tables = Tables(sharding=sharding, optimizer=optimizer)
    estimate = Estimate.of(on_cpu(tables=tables))
    for table, rows in (("item", 200_000), ("user", 5000)):
        held = {"data_parallel": (rows, 32), "column_wise": (rows, 16), "row_wise": (rows // 2, 32)}[sharding]
        moments = {"rowwise_adagrad": held[0], "adagrad": held[0] * held[1], "sgd": 0}[optimizer]
        assert bytes_of(estimate, f"table {table}") == 4 * (held[0] * held[1] + moments)
    copied = 4 * 32 * 205_000 if sharding == "data_parallel" else 0
    assert bytes_of(estimate, "gradient of") == copied


@pytest.mark.parametrize(
    ("loss", "held"),
    [
        ({"candidates": "in_batch"}, 800_000),
        ({"negatives_by": "log_uniform"}, 800_000),
        ({}, 0),
        ({"candidates": "all", "negatives_by": "log_uniform"}, 0),
    ],
)
def test_candidates_by_popularity_keep_four_bytes_of_every_item(loss: Any, held: int) -> None:
    assert bytes_of(Estimate.of(on_cpu(loss=Loss(**loss))), "item statistics") == held


def test_the_fullest_rank_is_that_with_the_larger_table() -> None:
    estimate = Estimate.of(on_cpu(tables=Tables(sharding="table_wise")))
    held = {name: bytes_of(estimate, f"table {name}") for name in ("user", "item")}
    assert held == {"user": 0, "item": 4 * 200_000 * 33}
    whole = Estimate.of(on_cpu(gpus=1, tables=Tables(sharding="table_wise")))
    assert bytes_of(whole, "table user") == 4 * 5000 * 33


def test_the_peak_is_what_is_always_there_and_the_largest_phase() -> None:
    memory = Estimate.of(on_cpu()).memory
    sums = {
        phase: sum(i.device for i in memory.items if i.phase == phase) for phase in ("always", "step", "validation")
    }
    assert memory.total("device") == sums["always"] + max(sums["step"], sums["validation"])
    assert memory.total("device", "step") == sums["always"] + sums["step"]
    assert memory.host_total == 2 * memory.total("device")  # on CPU the ranks share the node's memory


def test_what_does_not_fit_is_streamed_and_saved_without_a_copy_and_then_does_not_fit() -> None:
    # Per rank .75 GiB for kernels, .6 each for the process, the tables and a copy of them, .48 for the catalogue.
    roomy, tight, small = (
        Estimate.of(on_cpu(items=32 * 10**6, memory=memory, model=Model(dim=8))).memory for memory in (24.0, 4.9, 3.9)
    )
    notes = [{item.name: item.note for item in memory.items} for memory in (roomy, tight, small)]
    assert [memory.fits for memory in (roomy, tight, small)] == [True, True, False]
    assert notes[0]["checkpoint copy"] == "asynchronous saving"
    assert notes[1]["checkpoint copy"] == "asynchronous saving does not fit: a record at a time"
    assert "held" in notes[0]["catalogue"] and "streamed" in notes[1]["catalogue"]


@pytest.mark.parametrize(("sharding", "factor"), [("column_wise", 1 / 2), ("row_wise", 1.0)])
def test_vectors_travel_as_the_sharding_has_it(sharding: Any, factor: float) -> None:
    """On two ranks: half of each vector comes from the other rank; or a whole sum of its rows for each bag."""
    estimate = Estimate.of(on_cpu(tables=Tables(sharding=sharding)))
    capacity = estimate.workload.capacity
    bags = capacity.stride * (1 + capacity.item_keys)
    sent = {cause.name: cause.sent for cause in estimate.traffic}
    assert sent["vectors"].within == sent["gradients"].within == pytest.approx(4 * 32 * bags * factor)
    assert sent["decoder"].within == 4 * estimate.workload.dense_parameters
    assert sum(each.between for each in sent.values()) == 0


def test_one_rank_sends_nothing_and_a_copied_table_its_whole_gradient() -> None:
    assert sum(cause.sent.total for cause in Estimate.of(on_cpu(gpus=1)).traffic) == 0
    sent = {c.name: c.sent.total for c in Estimate.of(on_cpu(tables=Tables(sharding="data_parallel"))).traffic}
    assert sent["copied tables"] == 4 * 32 * 205_000 and sent["vectors"] == 0


def test_the_busiest_rank_sends_more_where_one_rank_has_the_table() -> None:
    def vectors(sharding: Any) -> float:
        estimate = Estimate.of(on_cpu(gpus=4, tables=Tables(sharding=sharding)))
        return next(cause.sent.total for cause in estimate.traffic if cause.name == "vectors")

    capacity = Workload.of(on_cpu()).capacity
    assert vectors("table_wise") == pytest.approx(3 * 4 * 32 * capacity.stride * capacity.item_keys)
    assert vectors("table_wise") > vectors("column_wise")


def test_groups_of_ranks_look_up_among_themselves_and_average_their_tables() -> None:
    alone = Estimate.of(on_cpu(gpus=2))
    groups = Estimate.of(on_cpu(gpus=4, tables=Tables(shard_ranks=2, sync_steps=10)))
    of_alone, of_groups = ({c.name: c.sent.total for c in e.traffic} for e in (alone, groups))
    assert of_groups["vectors"] == of_alone["vectors"] and bytes_of(groups, "table ") == bytes_of(alone, "table ")
    # Ring of two groups: each rank sends its part of the tables once per average.
    assert of_groups["averages"] == pytest.approx(
        sum(p.total_bytes for p in alone.sharded.placements) / 2 / 10, rel=0.01
    )
    assert "averages" not in of_alone


def test_a_table_that_the_gpus_do_not_hold_goes_to_the_host_with_a_cache_on_the_gpu() -> None:
    estimate = Estimate.of(Plan(items=10**9, users=1000, gpus=2, hbm=48.0))
    (item,) = (item for item in estimate.memory.items if item.name == "table item")
    assert item.host > 100e9 and item.device == pytest.approx(0.2 * item.host)
    assert estimate.sharded.spills(estimate.workload.plan.tables)
    explicit = Plan(items=10**9, users=1000, gpus=2, tables=Tables(kernel="uvm"))
    assert not Estimate.of(explicit).sharded.spills(explicit.tables)


def test_time_follows_peak_bandwidth_and_links() -> None:
    def parts(**options: Any) -> dict[str, float]:
        given: dict[str, Any] = {"items": 10**7, "users": 10**7, "nodes": 2, "model": Model(dim=256, layers=4)}
        plan = Plan(**{**given, **options})
        estimate = Estimate.of(plan)
        assert estimate.time.seconds >= sum(part.seconds for part in estimate.time.parts) > 0
        return {part.name: part.seconds for part in (*estimate.time.parts, *estimate.time.beside)}

    base = parts()
    assert parts(interconnect=25.0)["exchange of vectors"] == pytest.approx(2 * base["exchange of vectors"])
    assert parts(hbm_bandwidth=RATINGS["h100"].bandwidth / 2)["lookup"] == pytest.approx(2 * base["lookup"])
    assert parts(peak=10.0)["decoder"] > 5 * base["decoder"]
    double = parts(batch=TrainingBatch(tokens=32768))
    assert double["decoder"] == pytest.approx(2 * base["decoder"]) and double["loader"] == 2 * base["loader"]
    assert double["launches"] == base["launches"]


def test_a_part_takes_as_long_as_its_operations_or_its_bytes() -> None:
    plan = on_cpu(peak=1e-3, efficiency=0.5)
    estimate = Estimate.of(plan)
    loss = next(part for part in estimate.time.parts if part.name == "loss")
    assert loss.seconds == pytest.approx(6 * 512 * 4096 * 32 / 0.5e9)


def test_the_smallest_cluster_fits_and_the_next_smaller_one_does_not() -> None:
    plan = Plan(items=10**8, users=4 * 10**9, nodes=4, gpus=8)
    workload, hardware = Workload.of(plan), hardware_of(plan)
    found = smallest_cluster(workload, hardware)
    assert found is not None and found.memory.fits and found.nodes > 1
    fewer = Estimate.of(Plan(items=10**8, users=4 * 10**9, nodes=found.nodes - 1, gpus=8))
    assert not fewer.memory.fits or fewer.sharded.spills(plan.tables)
    huge = Plan(items=10**8, users=10**12, nodes=1, gpus=1, memory=10.0)
    assert smallest_cluster(Workload.of(huge), hardware_of(huge)) is None


def test_rates_are_those_of_the_kind_unless_they_are_given() -> None:
    def hardware(**options: Any) -> Hardware:
        return hardware_of(Plan(items=1, users=1, **options))

    h100, h200 = hardware(), hardware(gpu="h200")
    assert (h100.peak, h100.hbm, h100.precision, h100.device_type) == (989e12, 80, "bf16", "cuda")
    assert (h200.hbm, h200.bandwidth) == (141, 4800e9)
    given = hardware(hbm=40, peak=100, hbm_bandwidth=1000, nvlink=100, interconnect=10)
    assert (given.hbm, given.peak, given.bandwidth, given.within, given.between) == (40, 100e12, 1e12, 1e11, 1e10)
    cpu = hardware(gpu="cpu", gpus=4, memory=32.0)
    assert cpu.hbm == 8 and 1e8 < cpu.peak < 1e14 and 1e8 < cpu.bandwidth < 1e13  # measured


def test_plans_need_no_process_group_and_hold_no_table() -> None:
    plan = Plan(items=10**9, users=10**10, nodes=64, gpus=8)
    workload = Workload.of(plan)
    sharded = shard_workload(workload, hardware_of(plan))
    assert not torch.distributed.is_initialized()
    assert all(parameter.is_meta for parameter in workload.meta_model.parameters())
    assert sum(each.rows for each in sharded.placements) == 11 * 10**9


def test_a_loss_over_all_ranks_is_computed_in_chunks_on_gpus_and_holds_all_that_travels() -> None:
    plan = Plan(items=10**6, users=10**6, gpus=8, batch=TrainingBatch(tokens=1024), loss=Loss(candidates="in_batch"))
    (loss,) = (item for item in Estimate.of(plan).memory.items if item.name == "loss")
    outputs, of_others, candidates = 6 * 1024, 3 * 7 * 1024, 5 * 1024
    assert loss.device == 4 * 64 * (outputs + of_others + candidates) + 2 * (8 * 1024) * 1024


def test_an_epoch_has_the_newest_entries_of_each_history_or_all_of_them() -> None:
    sizes: dict[str, Any] = {"items": 10**6, "users": 10**6, "interactions": 10**9}
    newest, windows = (
        Workload.of(Plan(**sizes, batch=TrainingBatch(tokens=1000, long_histories=long), gpus=1))
        for long in ("newest", "windows")
    )
    assert newest.steps == 10**6 * 50 / 1000 and windows.steps == (10**9 - 10**6) / 1000
    # Mean tokens of a window, cut at any place.
    targets, shifts = np.full(1000, 999), np.arange(1000) % 50
    _, start, stop = cut_pieces(np.zeros(1000, np.int64), targets + 1, 50, shifts)
    assert newest.history == 50 and windows.history == pytest.approx(float(np.mean(stop - start - 1)), rel=0.01)


def test_groups_of_ranks_that_would_need_a_cache_are_refused_as_a_run_refuses_them() -> None:
    with pytest.raises(InputError, match="has a cache"):
        Estimate.of(Plan(items=10**9, users=1000, gpus=4, hbm=40, tables=Tables(shard_ranks=2)))


def test_attributes_of_the_dataset_count_with_their_tables_bags_and_ids(tmp_path: Any) -> None:
    users, items = 30, 200
    attributes = [
        SmallAttribute.draw("item", "brand", items, 50),
        SmallAttribute.draw("item", "tags", items, 90, multiple=True),
        SmallAttribute.draw("user", "country", users, 20),
    ]
    write_dataset(tmp_path, [[1, 2, 3, 4, 5]] * users, items=items, attributes=attributes)
    options: dict[str, Any] = {"data": str(tmp_path), "gpu": "cpu", "gpus": 2, "model": Model(dim=32), **FAST}
    with_them = Estimate.of(Plan(**options))
    without = Estimate.of(Plan(**options, attributes=AttributeChoice(use=[])))
    assert {each.table: each.rows for each in with_them.sharded.placements} == {
        "user": users,
        "item": items,
        "item-brand": 50,
        "item-tags": 90,
        "user-country": 20,
    }
    assert bytes_of(with_them, "table item-tags") == 90 * (32 + 1) * 4
    assert bytes_of(with_them, "attribute values") == items * (4 + 16 + 1) + users * 4
    assert not bytes_of(without, "attribute values")
    capacity = with_them.workload.capacity
    assert with_them.workload.ids_of("item-tags") == 2 * with_them.workload.distinct_items
    assert with_them.workload.ids_of("user-country") == with_them.workload.sequences
    more = bytes_of(with_them, "lookups") - bytes_of(without, "lookups")
    assert more > 4 * 32 * capacity.stride * (2 * capacity.item_keys + 1)
    one = Estimate.of(Plan(**options, attributes=AttributeChoice(use=["country"])))
    assert "item-brand" not in {each.table for each in one.sharded.placements}
    assert "item-tags" in with_them.text()
