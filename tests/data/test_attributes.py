"""Attribute values of users and items, by id: what is read, what is refused, and what the bags of a batch hold."""

import multiprocessing.util
import os
import pickle
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recgpt_torchrec.config import AttributeChoice, Batch, Model, Pretrain
from recgpt_torchrec.data.bags import bags_of
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.inputs.attributes import Attributes
from recgpt_torchrec.data.inputs.choosing import check_inputs, choose_inputs
from recgpt_torchrec.data.inputs.spec import Inputs
from recgpt_torchrec.data.packed import Capacity
from recgpt_torchrec.data.stream import encoding_stream
from recgpt_torchrec.distributed import shared_folder
from recgpt_torchrec.distributed.shared_folder import read_on_node
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage import buffers
from tests.support import SmallAttribute, promise_of, walks, write_dataset
from tools.ranks import run_ranks

USERS, ITEMS = 21, 37


def small_dataset(folder: Path, **more: Any) -> tuple[Dataset, list[SmallAttribute]]:
    """A dataset with one-valued and several-valued attributes of both, over several parts."""
    attributes = [
        SmallAttribute.draw("item", "brand", ITEMS, 5),
        SmallAttribute.draw("user", "country", USERS, 4),
        SmallAttribute.draw("item", "tags", ITEMS, 9, multiple=True),
        SmallAttribute.draw("user", "tags", USERS, 3, multiple=True),
    ]
    histories = walks(USERS, ITEMS - 6, seed=3)  # the last items are in no history
    return write_dataset(folder, histories, items=ITEMS, attributes=attributes, **more), attributes


def inputs_of(dataset: Dataset, **choice: Any) -> Inputs:
    return choose_inputs(Pretrain(data="", output="", attributes=AttributeChoice(**choice)), dataset)


def open_attributes(dataset: Dataset, *read: Any) -> Any:
    return Attributes.open(dataset, inputs_of(dataset), *read)


def bags_by_key(bags: Any) -> dict[str, list[list[int]]]:
    """The values of each bag of each key."""
    lengths, values = bags.lengths().view(len(bags.keys()), -1).tolist(), iter(bags.values().tolist())
    return {
        key: [[next(values) for _ in range(length)] for length in of_key]
        for key, of_key in zip(bags.keys(), lengths, strict=True)
    }


@settings(max_examples=30)
@given(data=st.data(), keys=st.integers(1, 5), room=st.integers(0, 3))
def test_bags_hold_the_values_of_each_user_and_item(tmp_path_factory, data, keys, room):
    """Against a plain loop over the lists."""
    dataset, attributes = small_dataset(tmp_path_factory.mktemp("data"))
    found = open_attributes(dataset)
    users = data.draw(st.lists(st.integers(0, USERS - 1), unique=True))
    items = data.draw(st.lists(st.integers(0, ITEMS - 1), unique=True))
    capacity = Capacity(len(users) + room, len(items) + room, keys)
    bags = bags_of(np.array(users, np.int64), np.array(items, np.int64), capacity, found)
    assert bags.values().dtype.is_floating_point is False and bags.values().element_size() == 8
    assert bags.length_per_key() == bags.lengths().view(len(bags.keys()), -1).sum(1).tolist()
    by_key = bags_by_key(bags)
    trained = {item for part in dataset.manifest.item_parts for item in trained_items(dataset, part)}

    def padded(lists: list[list[int]]) -> list[list[int]]:
        return lists + [[]] * (capacity.stride - len(lists))

    expected = {"user": padded([[user] for user in users])}
    for key in range(keys):
        expected[f"item_{key}"] = padded([[item] if item in trained else [] for item in items[key::keys]])
    for each in attributes:
        table, lists = each.described.table, each.lists
        if each.described.entity == "user":
            expected[f"{table}_0"] = padded([lists[user] for user in users])
        for key in range(keys) if each.described.entity == "item" else ():
            expected[f"{table}_{key}"] = padded([lists[item] for item in items[key::keys]])
    assert by_key == expected


def trained_items(dataset: Dataset, part: Any) -> list[int]:
    table = pq.read_table(f"{dataset.path}/{part.path}")
    return [row["item_id"] for row in table.to_pylist() if row["train_count"]]


def test_items_that_are_never_trained_are_among_those_tested(tmp_path):
    dataset, _ = small_dataset(tmp_path)
    found = open_attributes(dataset)
    assert 0 < found.items.trained.sum() < ITEMS - 5


def values_of(found: Attributes) -> list[Any]:
    rows = {"user": np.arange(USERS), "item": np.arange(ITEMS)}
    return [
        [values.tolist() for values in column.of(rows[entity])]
        for entity, of_entity in (("user", found.users), ("item", found.items))
        for column in of_entity.columns
    ]


def test_large_ones_are_mapped_from_a_file_that_has_no_name(tmp_path, monkeypatch):
    dataset, _ = small_dataset(tmp_path / "data")
    plain = open_attributes(dataset)
    monkeypatch.setattr(shared_folder, "IN_MEMORY", 0)
    (tmp_path / "scratch").mkdir()
    multiprocessing.util.get_temp_dir()  # of sockets, whose paths are short
    monkeypatch.setattr(buffers.tempfile, "tempdir", str(tmp_path / "scratch"))
    found = open_attributes(dataset, read_on_node)
    assert os.listdir(tmp_path / "scratch") == []
    assert values_of(found) == values_of(plain)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path / "scratch") in line]
    assert mapped and all(line.endswith("(deleted)") for line in mapped)
    # Another process gets the file, not its content.
    assert len(pickle.dumps(open_attributes(dataset))) > plain.source[1].bytes.size
    assert len(pickle.dumps(found)) < plain.source[1].bytes.size


def test_a_loader_process_maps_the_same_file(tmp_path, monkeypatch):
    dataset, _ = small_dataset(tmp_path)
    monkeypatch.setattr(shared_folder, "IN_MEMORY", 0)
    found = open_attributes(dataset, read_on_node)
    stream = encoding_stream(
        dataset,
        "all",
        Model(dim=8, max_len=10),
        Batch(tokens=40),
        item_keys=2,
        inputs=inputs_of(dataset),
        attributes=found,
    )
    expected = [bags_by_key(batch.bags) for batch in stream.batches()]
    stream.settings.workers = 1
    assert [bags_by_key(batch.bags) for batch in stream.batches()] == expected and len(expected) > 2


def read_in_ranks(rank: int, world_size: int, data: str, scratch: str) -> tuple[list[Any], set[str], list[str]]:
    buffers.tempfile.tempdir = scratch
    shared_folder.IN_MEMORY = 0
    dataset = Dataset.open(data)
    found = open_attributes(dataset, read_on_node)
    maps = Path("/proc/self/maps").read_text().splitlines()
    inodes = {line.split()[4] for line in maps if scratch in line}
    return values_of(found), inodes, os.listdir(scratch)


def test_ranks_of_a_node_map_one_file(tmp_path):
    dataset, _ = small_dataset(tmp_path / "data")
    (tmp_path / "scratch").mkdir()
    (first, inodes, left), (second, others, _) = run_ranks(
        read_in_ranks, 2, str(tmp_path / "data"), str(tmp_path / "scratch")
    )
    assert first == second == values_of(open_attributes(dataset))
    assert len(inodes) == 1 and inodes == others and left == []


def write_part(dataset: Dataset, part: Any, table: pa.Table) -> None:
    """Write other rows into a part, as if they were those that its manifest promises."""
    path = Path(dataset.path) / part.path
    pq.write_table(table, path)
    vars(part).update(promise_of(path), rows=table.num_rows)


def replaced(table: pa.Table, column: str, change: Any) -> pa.Table:
    values = table[column].to_pylist()
    values = change(values) or values
    place = table.column_names.index(column)
    return table.set_column(place, column, pa.array(values, table.schema.field(column).type))


def set_first(value: Any) -> Any:
    def change(values: list[Any]) -> None:
        values[0] = value

    return change


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("attribute_brand", set_first([5]), "item.brand has the value id 5, which is not from 0 to 4"),
        ("attribute_brand", set_first([-1]), "item.brand has the value id -1"),
        ("attribute_tags", set_first([0, 9]), "item.tags has the value id 9, which is not from 0 to 8"),
        ("attribute_brand", set_first([1, 1]), "item.brand has 2 values in one list, and the manifest promises one"),
        ("attribute_brand", set_first(None), "item.brand has a null: the list of row 0"),
        ("attribute_tags", set_first([1, None]), "item.tags has a null: the value in row 0"),
        ("item_id", set_first(3), "its item ids are not in order from 16 on"),
        ("item_id", set_first(None), "its item ids are not in order from 16 on"),
        ("item_id", lambda ids: ids[::-1], "its item ids are not in order from 16 on"),
    ],
)
def test_a_damaged_part_is_refused_by_name(tmp_path, column, change, message):
    dataset, _ = small_dataset(tmp_path)
    part = dataset.manifest.item_parts[1]
    write_part(dataset, part, replaced(pq.read_table(tmp_path / part.path), column, change))
    with pytest.raises(InputError) as error:
        open_attributes(dataset)
    assert f"{tmp_path}: items/part-00001.parquet: " in str(error.value) and message in str(error.value)


def test_a_part_without_the_column_or_with_another_type_is_refused(tmp_path):
    dataset, _ = small_dataset(tmp_path)
    part = dataset.manifest.user_parts[0]
    table = pq.read_table(tmp_path / part.path)
    for changed in (
        table.drop_columns("attribute_country"),
        replaced(table.drop_columns("attribute_country").rename_columns({"key": "attribute_country"}), "user_id", list),
    ):
        write_part(dataset, part, changed)
        with pytest.raises(InputError, match="users/part-00000.parquet: it has no column attribute_country of lists"):
            open_attributes(dataset)


def test_a_full_disk_says_where_space_is_needed(tmp_path, monkeypatch):
    dataset, _ = small_dataset(tmp_path)
    monkeypatch.setattr(shared_folder, "IN_MEMORY", 0)
    monkeypatch.setattr(buffers.tempfile, "tempdir", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(InputError, match="attributes cannot be kept in .*TMPDIR"):
            open_attributes(dataset, read_on_node)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(buffers.PREFIX)]


def test_all_attributes_are_read_unless_some_are_named(tmp_path):
    dataset, attributes = small_dataset(tmp_path)

    def used(**choice: Any) -> list[str]:
        return [each.full_name for each in inputs_of(dataset, **choice).attributes]

    assert used() == [each.described.full_name for each in attributes]
    assert used(use=[]) == []
    assert used(use=["item.tags", "brand"]) == ["item.brand", "item.tags"]  # in the dataset's order
    assert used(use=["user.country"]) == ["user.country"]
    weighted = inputs_of(dataset, weights=["brand=2", "user.tags=0.5"], pooling="sum")
    assert [each.weight for each in weighted.attributes] == [2, 1, 1, 0.5]
    assert {each.pooling for each in weighted.attributes} == {"sum"}


def test_ids_are_dropped_only_where_items_have_attributes(tmp_path):
    dataset, _ = small_dataset(tmp_path)
    assert inputs_of(dataset, id_dropout=0.3).id_dropout == 0.3
    assert inputs_of(dataset, id_dropout=0.3, use=["country"]).id_dropout == 0
    assert inputs_of(dataset, id_dropout=0.3, use=[]).to_json() == {}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"use": ["brandt"]}, "--attributes.use names brandt, an attribute that .* does not have; did you mean brand"),
        ({"use": ["zzz"]}, "does not have; it has item.brand, user.country, item.tags, user.tags"),
        ({"use": ["tags"]}, "names tags, which users and items both have; write item.tags or user.tags"),
        ({"use": ["brand", "item.brand"]}, "--attributes.use names the attribute item.brand twice"),
        ({"use": ["brand"], "weights": ["country=2"]}, "weights names country, which is not among those of"),
        ({"weights": ["contry=2"]}, "--attributes.weights names contry.*did you mean country"),
        ({"weights": ["brand=2", "item.brand=2"]}, "--attributes.weights names the attribute item.brand twice"),
    ],
)
def test_names_that_do_not_fit_the_dataset_are_refused(tmp_path, choice, message):
    dataset, _ = small_dataset(tmp_path)
    with pytest.raises(InputError, match=message):
        inputs_of(dataset, **choice)


def test_a_dataset_without_attributes_says_how_to_get_some(tmp_path):
    dataset = write_dataset(tmp_path, walks(3, 5))
    with pytest.raises(InputError, match="it has none; prepare the log with --item_attributes or --user_attributes"):
        inputs_of(dataset, use=["brand"])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"weights": ["brand"]}, "--attributes.weights has 'brand'; write NAME=WEIGHT"),
        ({"weights": ["=2"]}, "write NAME=WEIGHT"),
        ({"weights": ["brand=x"]}, "write NAME=WEIGHT"),
        ({"weights": ["brand=0"]}, "a weight must be more than 0. To leave an attribute out"),
        ({"weights": ["brand=-1"]}, "more than 0"),
        ({"weights": ["brand=nan"]}, "more than 0"),
        ({"weights": ["brand=inf"]}, "more than 0"),
        ({"weights": ["a=1", "a=2"]}, "--attributes.weights names a twice"),
        ({"use": ["a", "a"]}, "--attributes.use names a twice"),
        ({"use": ["all", "a"]}, "all beside other names"),
        ({"id_dropout": 1.1}, "--attributes.id_dropout is 1.1"),
    ],
)
def test_options_that_cannot_be_are_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        AttributeChoice(**choice)


def test_a_name_may_have_an_equals_sign_and_a_dot():
    assert AttributeChoice(weights=["a=b.c=1.5"]).weight_of() == {"a=b.c": 1.5}


def test_a_checkpoint_reads_the_vocabularies_that_it_was_trained_with(tmp_path):
    dataset, _ = small_dataset(tmp_path)
    inputs = inputs_of(dataset)
    check_inputs(inputs, "runs/mine", dataset, "pretrain --initial runs/mine")
    inputs.attributes[0].fingerprint = "another"
    with pytest.raises(InputError, match=r"runs/mine reads the attribute item.brand, and .* has other values for it"):
        check_inputs(inputs, "runs/mine", dataset, "pretrain --initial runs/mine")
    inputs.attributes[0].name = "colour"
    with pytest.raises(InputError, match=r"reads the attribute item.colour, and .* lacks it"):
        check_inputs(inputs, "runs/mine", dataset, "pretrain --initial runs/mine")
