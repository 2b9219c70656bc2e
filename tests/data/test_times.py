"""Features of time against a plain loop with datetime; what a token must not know of its target."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from math import floor, log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.inputs.features import compute_features
from recgpt_torchrec.data.inputs.spec import TIMES, UNITS, Feature, Inputs
from recgpt_torchrec.data.inputs.time_units import to_units
from recgpt_torchrec.data.inputs.times import VALUES, bucket_gaps, guess_unit
from recgpt_torchrec.data.packed import Capacity, pack_histories
from recgpt_torchrec.data.ragged import Ragged

ALL = [Feature(name=name, values=VALUES[name]) for name in TIMES]


def bucket(seconds: float) -> int:
    """Independent of the package's: 1 below a second, then two per octave, up to 2^28 seconds."""
    return 1 if seconds < 1 else 2 + min(floor(2 * log2(seconds) + 1e-9), 56)


def in_words(times: list[int], segments: list[int], token: int, request: int | None, unit: str, offset: float):
    """past_gap, next_gap, hour and weekday of a token of one history, by a plain loop."""
    scale = {"s": 1, "ms": 1000, "us": 10**6, "ns": 10**9}[unit]
    before = [times[e] for e in range(token) if segments[e] == 0]
    after = [times[e] for e in range(token + 1, len(times)) if segments[e] == 0]
    asked = after[0] if after else request
    past = bucket(max(times[token] - before[-1], 0) / scale) if before else 0
    if asked is None:
        return [past, 0, 0, 0]
    local = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=asked // scale, hours=offset)
    return [past, bucket(max(asked - times[token], 0) / scale), local.hour + 1, local.weekday() + 1]


@st.composite
def cases(draw):
    unit = draw(st.sampled_from(["s", "ms", "us", "ns"]))
    scale = round(1 / UNITS[unit])
    rows = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    times, segments = [], []
    for length in rows:
        gaps = [draw(st.sampled_from([0, 1, 59, 3599, 3600, 86_400, 10**6, 10**8])) for _ in range(length)]
        start = draw(st.integers(631_152_000, 1_700_000_000))
        times.append([(start + sum(gaps[:n])) * scale + draw(st.integers(0, 1)) * (unit != "s") for n in range(length)])
        times[-1].sort()
        segments.append([draw(st.sampled_from([0, 0, 1, 2])) for _ in range(length)])
    requests = [row[-1] + draw(st.integers(0, 10**6)) * scale for row in times]
    return unit, times, segments, draw(st.sampled_from([None, requests])), draw(st.sampled_from([0.0, 8.0, -3.5]))


def histories_of(times, segments, requests) -> Histories:
    lists = Ragged.from_lists(times)
    return Histories(
        users=np.arange(len(times)),
        items=np.arange(lists.values.size),
        offsets=lists.offsets,
        segments=Ragged.from_lists(segments).values.astype(np.int8),
        times=lists.values,
        request_times=None if requests is None else np.array(requests),
    )


def compute(inputs: Inputs, histories: Histories) -> np.ndarray:
    """[features, entries] of all entries."""
    features = compute_features(inputs, histories, np.arange(histories.items.size))
    assert features is not None
    return features


@given(cases())
def test_features_are_those_of_a_plain_loop_over_each_history(case):
    unit, times, segments, requests, offset = case
    inputs = Inputs(features=ALL, time_unit=UNITS[unit], utc_offset_hours=offset)
    histories = histories_of(times, segments, requests)
    features = compute(inputs, histories)
    expected = [
        in_words(row, kinds, token, None if requests is None else requests[number], unit, offset)
        for number, (row, kinds) in enumerate(zip(times, segments, strict=True))
        for token in range(len(row))
    ]
    assert features.T.tolist() == expected
    assert all(0 <= values.min() and values.max() < each.values for values, each in zip(features, ALL, strict=True))
    plain = all(kind == 0 for row in segments for kind in row)
    if plain:  # as where there are no segments
        assert np.array_equal(compute(inputs, replace(histories, segments=None)), features)


@given(cases(), st.randoms(use_true_random=False))
def test_a_token_knows_the_time_of_its_request_and_nothing_else_of_what_follows(case, random):
    unit, times, segments, requests, offset = case
    inputs = Inputs(features=ALL, time_unit=UNITS[unit], utc_offset_hours=offset)
    before = histories_of(times, segments, requests)
    features = compute(inputs, before)
    other_items = replace(before, items=np.array(random.sample(range(1000), before.items.size)), users=before.users + 9)
    assert np.array_equal(compute(inputs, other_items), features)
    for row, kinds in enumerate(segments):
        interacted = [entry for entry, kind in enumerate(kinds) if kind == 0]
        for token in range(len(kinds)):
            later = [entry for entry in interacted if entry > token]
            if len(later) < 2:
                continue
            changed = [list(each) for each in times]
            for entry in range(later[0] + 1, len(kinds)):  # everything after the request
                changed[row][entry] += 12_345 * round(1 / UNITS[unit])
            place = int(before.offsets[row]) + token
            moved = compute(inputs, histories_of(changed, segments, requests))
            assert moved[:, place].tolist() == features[:, place].tolist()


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_gaps_have_two_buckets_per_octave_with_exact_edges(unit):
    scale = round(1 / UNITS[unit])
    gaps = np.array([-5, 0, 1, 2, 4, 8, 2**28, 2**33]) * scale
    assert bucket_gaps(gaps, UNITS[unit]).tolist() == [1, 1, 2, 4, 6, 8, 58, 58]
    assert bucket_gaps(gaps[2:7] - 1, UNITS[unit]).tolist() == [1, 2 if unit == "s" else 3, 5, 7, 57]
    assert VALUES["past_gap"] == 59


def test_minutes_and_days_have_weekdays_and_minutes_have_hours():
    moment = datetime(2026, 11, 28, 13, 5, tzinfo=UTC)  # a Saturday
    for unit, expected in (("min", [14, 6]), ("day", [1, 6])):
        request = to_units(Decimal(int(moment.timestamp())), UNITS[unit])
        histories = histories_of([[request - 1]], [[0]], [request])
        inputs = Inputs(features=ALL[2:], time_unit=UNITS[unit])
        assert compute(inputs, histories)[:, 0].tolist() == expected
        # A day has no zone.
        assert compute(replace(inputs, utc_offset_hours=14), histories)[1, 0] == (7 if unit == "min" else 6)


def test_the_unit_is_guessed_where_all_times_are_of_1990_to_2099():
    begin, end = 631_152_000, 4_102_444_800
    for unit, scale in (("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)):
        assert guess_unit(begin * scale, end * scale - 1) == UNITS[unit]
        assert guess_unit(begin * scale - 1, end * scale - 1) is None
        assert guess_unit(begin * scale, end * scale) is None
    assert guess_unit(0, 100) is None and guess_unit(15_000, 20_000) is None


def test_features_lie_in_the_slots_of_their_tokens():
    histories = histories_of([[0, 10, 30], [100, 164]], [[0, 0, 0], [0, 0]], None)
    inputs = Inputs(features=ALL[:2])
    batch, _ = pack_histories(
        histories, row_length=4, capacity=Capacity.of(4, 8), predict=True, inputs=inputs, layout="row"
    )
    assert batch.features is not None
    assert batch.features[:, 0, :3].tolist() == [[0, bucket(10), 0], [bucket(10), bucket(20), bucket(64)]]


def test_a_unit_or_an_offset_that_no_option_gives_is_refused_in_a_checkpoint():
    for unit, offset in ((0.0, 0.0), (float("nan"), 0.0), (1.0, 1e9)):
        with pytest.raises(ValueError, match="inputs\\."):
            Inputs(time_unit=unit, utc_offset_hours=offset)
