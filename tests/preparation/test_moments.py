"""The time of the n-th interaction is found by counting."""

from collections.abc import Iterator

import ibis
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recgpt_torchrec.config.boundaries import Boundary
from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine
from recgpt_torchrec.preparation.moments import find_ends, find_moment

BOUND = 2**63 - 1
WHOLE = st.one_of(st.integers(-3, 3), st.integers(-BOUND, BOUND), st.integers(BOUND - 5, BOUND))
TIMES = st.lists(st.tuples(WHOLE, st.sampled_from([0.0, 0.25, 1 - 2**-53])), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DuckDBEngine]:
    with DuckDBEngine(str(tmp_path_factory.mktemp("engine"))) as engine:
        yield engine


@settings(max_examples=60, deadline=None)
@given(TIMES, st.data())
@example([(-BOUND, 0.0), (BOUND, 0.0), (BOUND - 1, 0.5)], None)
def test_the_moment_at_a_place_is_that_of_the_sorted_times(
    engine: DuckDBEngine, times: list[tuple[int, float]], data: st.DataObject | None
) -> None:
    whole, fraction = zip(*times, strict=True)
    table = pa.table({"whole": pa.array(whole, pa.int64()), "fraction": fraction})
    place = len(times) - 1 if data is None else data.draw(st.integers(0, len(times) - 1))
    try:
        stored = engine.fill("times", [table], table.schema)
        ends, found = find_ends(engine, stored), find_moment(engine, stored, place, ranges=4, few=2)
    finally:
        engine.drop("times")
    ordered = [Boundary(*time) for time in sorted(times)]
    assert ends == (ordered[0], ordered[-1])
    assert found == ordered[place]


def test_one_time_for_all_needs_no_sort(engine: DuckDBEngine) -> None:
    table = ibis.range(100).unnest().name("n").as_table().select(whole=ibis.literal(7), fraction=ibis.literal(0.5))
    assert find_moment(engine, table, 99, few=3) == Boundary(7, 0.5)
