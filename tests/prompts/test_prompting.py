"""Algorithm 1, against a plain loop that recomputes everything from scratch for each generated item."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.config import Loss, Model, Prompts
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.inputs.features import compute_features
from recgpt_torchrec.data.inputs.spec import Feature, Inputs
from recgpt_torchrec.data.inputs.times import VALUES
from recgpt_torchrec.data.ragged import Ragged
from recgpt_torchrec.data.segments import EXPOSED, GENERATED
from recgpt_torchrec.model.attention import DenseAttention
from recgpt_torchrec.model.dense import Dense
from recgpt_torchrec.prompts.intervals import Intervals, intervals_of, known_intervals, table_of
from recgpt_torchrec.prompts.prompting import Prompter
from recgpt_torchrec.prompts.sampling import draw_items

DIM, MAX_LEN, ITEMS = 8, 6, 15


@pytest.fixture(scope="module")
def dense() -> Dense:
    torch.manual_seed(0)
    made = Dense(Model(dim=DIM, heads=2, layers=2, max_len=MAX_LEN), Loss())
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made.eval()


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue.of_vectors(torch.randn(ITEMS, DIM, generator=torch.Generator().manual_seed(1)))


def random_user_vectors(users: int) -> torch.Tensor:
    return torch.randn(users, DIM, generator=torch.Generator().manual_seed(2))


def random_rows(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.permutation(ITEMS)[:n].tolist() for n in lengths]


def rows_of(rows: list[list[int]], segments: list[list[int]] | None = None) -> pa.Table:
    columns = {"user_id": pa.array(range(len(rows)), pa.int64()), "item_ids": pa.array(rows, pa.list_(pa.int64()))}
    times = [[10 * t for t in range(len(row))] for row in rows]
    columns["timestamps"] = pa.array(times, pa.list_(pa.int64()))
    if segments is not None:
        columns["segment_ids"] = pa.array(segments, pa.list_(pa.int8()))
    return pa.table(columns)


INPUTS = Inputs(
    features=[Feature(name=name, values=values) for name, values in {"event": 4, "asked_event": 4, **VALUES}.items()],
    events=["view", "cart", "buy"],
)


@pytest.fixture(scope="module")
def reading() -> Dense:
    """A model that reads event types and times."""
    torch.manual_seed(3)
    made = Dense(Model(dim=DIM, heads=2, layers=2, max_len=MAX_LEN), Loss(), inputs=INPUTS)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    for parameter in made.decoder.features.parameters():
        torch.nn.init.normal_(parameter, std=2.0)  # so that they decide
    for module in made.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.reset_parameters()
    torch.nn.init.constant_(made.decoder.mean_out, 0.1)
    return made.eval()


def add_columns(table: pa.Table, seed: int = 0, shift: int = 0) -> pa.Table:
    """The table with event types and times of its entries, gaps from none to a year."""
    rng = np.random.default_rng(seed)
    lengths = [len(row) for row in table["item_ids"].to_pylist()]
    times = [(1_700_000_000 + shift + rng.choice([0, 60, 10**4, 10**6, 10**7], n).cumsum()).tolist() for n in lengths]
    events = [rng.integers(0, 4, n).tolist() for n in lengths]
    table = table.drop(["timestamps"]).append_column("timestamps", pa.array(times, pa.list_(pa.int64())))
    return table.append_column("event_ids", pa.array(events, pa.list_(pa.int16())))


def features_of(table: pa.Table) -> list[np.ndarray]:
    """[features, entries] of each row of a prompt dataset, as packing computes them."""
    items = Ragged.from_arrow(table["item_ids"])
    histories = Histories(
        users=table["user_id"].to_numpy(),
        items=items.values,
        offsets=items.offsets,
        segments=Ragged.from_arrow(table["segment_ids"]).values,
        times=Ragged.from_arrow(table["timestamps"]).values,
        events=Ragged.from_arrow(table["event_ids"]).values,
    )
    features = compute_features(INPUTS, histories, np.arange(items.values.size))
    assert features is not None
    return [features[:, a:b] for a, b in zip(items.offsets[:-1], items.offsets[1:], strict=True)]


@torch.no_grad()
def outputs_of(dense: Dense, catalogue: Catalogue, user: torch.Tensor, items, positions, segments, features):
    """[entries, dim] outputs of one history by the decoder's whole forward pass."""
    n = len(items)
    zeros = torch.zeros(1, n, dtype=torch.int64)
    vectors = catalogue.vectors_of(torch.tensor(items))[None]
    return dense.decoder(
        vectors,
        user.expand(1, n, -1),
        torch.tensor([positions]),
        torch.tensor([segments]),
        DenseAttention(zeros),
        torch.from_numpy(features)[:, None],
    )[0]


@pytest.mark.parametrize("source", ["generated", "both"])
def test_a_model_that_reads_times_generates_what_one_pass_over_the_packed_history_ranks_first(
    reading, catalogue, source
):
    """Every generated item, of fresh and of reused prompts, is the best of the full pass over the dataset's rows."""
    rows = random_rows([4, 0, 6, 1, 2, 5, 3])
    segments = [[0] * len(row) for row in rows]
    rows[0], segments[0] = [1, 9, 3, 2, 4], [0, 2, 0, 0, 0]
    table, kept = add_columns(rows_of(rows, segments)), (EXPOSED,) if source == "both" else ()
    prompts = Prompts(k=2, source=source)
    made = fill(reading, catalogue, intervals_of(table, 2, MAX_LEN, kept), prompts)
    known = np.array([1, 0, 3, 0, 0, 2, 2])
    again = intervals_of(made, 2, MAX_LEN, (GENERATED, EXPOSED))
    for row, count in enumerate(known):  # forget those after the known ones
        unknown = slice(again.row(row).start + count, again.row(row).stop)
        forgotten = again.segments[unknown] == GENERATED
        again.prompts[unknown][forgotten], again.segments[unknown][forgotten] = -1, 0
    assert fill(reading, catalogue, again, prompts, known).drop(["timestamps"]).equals(made.drop(["timestamps"]))
    users, generated = random_user_vectors(len(rows)), 0
    for u, features in enumerate(features_of(made)):
        items, kinds = made["item_ids"][u].as_py(), made["segment_ids"][u].as_py()
        at = [place for place, kind in enumerate(kinds) if kind == 0]
        positions = []
        for place in range(len(items)):
            own = max(each for each in at if each <= place)
            positions.append(min(at.index(own) + place - own, MAX_LEN - 1))
        if not items:
            continue
        outputs = outputs_of(reading, catalogue, users[u], items, positions, kinds, features)
        for place, kind in enumerate(kinds):
            if kind != GENERATED:
                continue
            scores = catalogue.vectors_of(torch.arange(ITEMS)) @ outputs[place - 1]
            own = max(each for each in at if each < place)
            scores[[items[each] for each in at if each < place] + items[own:place]] = -torch.inf
            assert int(scores.argmax()) == items[place]
            generated += 1
    assert generated > 20
    assert made["event_ids"][4].as_py()[1:3] == [0, 0]  # generated prompts have no event type


def test_other_times_give_other_prompts_and_none_of_the_earlier_ones_are_reused(reading, catalogue):
    rows = random_rows([5, 6, 4])
    table = add_columns(rows_of(rows))
    old = fill(reading, catalogue, intervals_of(table, 2, MAX_LEN, ()), Prompts(k=2))
    moved = add_columns(rows_of(rows), shift=50_000_000)  # the same gaps at other hours
    new = fill(reading, catalogue, intervals_of(moved, 2, MAX_LEN, ()), Prompts(k=2))
    assert not new["item_ids"].equals(old["item_ids"])
    earlier = intervals_of(old, 2, MAX_LEN, (GENERATED, EXPOSED))

    def known(table: pa.Table, columns: list[str]) -> list[int]:
        return known_intervals(intervals_of(table, 2, MAX_LEN, ()), earlier, MAX_LEN, columns).tolist()

    assert known(table, ["times", "events"]) == [4, 5, 3]
    assert known(moved, ["times", "events"]) == [0, 0, 0] and known(moved, []) == [4, 5, 3]
    assert known(table.drop(["event_ids"]), ["events"]) == [0, 0, 0]


def fill(dense, catalogue, histories: Intervals, prompts: Prompts, known=None, batch_users: int = 3) -> pa.Table:
    prompter = Prompter(dense, catalogue, prompts, MAX_LEN, batch_users)
    prompter.fill(histories, random_user_vectors(histories.users.size), known)
    return table_of(histories)


@torch.no_grad()
def score(dense: Dense, catalogue: Catalogue, user: torch.Tensor, items: list[int], positions: list[int]):
    """[items] scores of what follows: the decoder's whole forward pass, nothing remembered."""
    n = len(items)
    zeros = torch.zeros(1, n, dtype=torch.int64)
    out = dense.decoder(
        catalogue.vectors_of(torch.tensor(items))[None],
        user.expand(1, n, -1),
        torch.tensor([positions]),
        zeros,
        DenseAttention(zeros),
    )
    return catalogue.vectors_of(torch.arange(ITEMS)) @ out[0, -1]


def from_scratch(dense, catalogue, user, row, k, exclude_seen, shown=None, pick=None):
    """One row by Algorithm 1 said again in plain Python: (items, segments)."""
    older, kept = row[: max(0, len(row) - MAX_LEN)], row[max(0, len(row) - MAX_LEN) :]
    items, segments, fed, positions = list(older), [0] * len(older), [], []
    for p, item in enumerate(kept):
        interval: list[int] = []
        items += [item]
        segments += [0]
        fed += [item]
        positions += [p]
        if p == len(kept) - 1:
            break
        for n in range(k):
            now = (shown or {}).get(p, [])[-k:]
            if n < len(now):
                answer, segment = now[n], EXPOSED
            else:
                scores = score(dense, catalogue, user, fed, positions)
                if exclude_seen:
                    scores[older + kept[: p + 1] + interval] = -torch.inf
                place = len(older) + p
                answer, segment = int(scores.argmax() if pick is None else pick(scores, place, n)), GENERATED
            interval.append(answer)
            items += [answer]
            segments += [segment]
            fed += [answer]
            positions.append(min(p + n + 1, MAX_LEN - 1))
    return items, segments


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_prompts_with_the_cache_are_those_of_recomputing_everything(dense, catalogue, k, exclude_seen):
    rows = random_rows([4, 0, 6, 1, 9, 2, 5, 3, 12])  # none, one, and more than max_len
    made = fill(dense, catalogue, intervals_of(rows_of(rows), k, MAX_LEN, ()), Prompts(k=k, exclude_seen=exclude_seen))
    users = random_user_vectors(len(rows))
    for u, row in enumerate(rows):
        items, segments = from_scratch(dense, catalogue, users[u], row, k, exclude_seen)
        assert made["item_ids"][u].as_py() == items
        assert made["segment_ids"][u].as_py() == segments


@pytest.mark.parametrize("top_k", [3, 50])
def test_drawn_prompts_are_those_of_recomputing_everything(dense, catalogue, top_k):
    """Each from its user, place and slot alone: whoever is decoded beside, and however much of it was known before."""
    rows = random_rows([4, 0, 6, 1, 9, 2, 5, 3, 12])
    prompts = Prompts(k=2, temperature=2.0, top_k=top_k, seed=3)
    made = fill(dense, catalogue, intervals_of(rows_of(rows), 2, MAX_LEN, ()), prompts)
    users, best = random_user_vectors(len(rows)), Prompts(k=2)
    for u, row in enumerate(rows):

        def pick(scores: torch.Tensor, place: int, slot: int, user: int = u) -> int:
            kept = min(top_k, int(scores.isfinite().sum()))
            found = scores.topk(kept)
            owner, number = np.array([user]), np.array([place])
            return int(draw_items(found.indices[None], found.values[None], prompts, owner, number, slot))

        items, segments = from_scratch(dense, catalogue, users[u], row, 2, True, pick=pick)
        assert made["item_ids"][u].as_py() == items
        assert made["segment_ids"][u].as_py() == segments
    assert not made.equals(fill(dense, catalogue, intervals_of(rows_of(rows), 2, MAX_LEN, ()), best))
    for batch_users in (1, 100):
        again = fill(dense, catalogue, intervals_of(rows_of(rows), 2, MAX_LEN, ()), prompts, batch_users=batch_users)
        assert again.equals(made)
    earlier = intervals_of(made, 2, MAX_LEN, (GENERATED,))
    grown = [row + [next(i for i in range(ITEMS) if i not in row)] if len(row) < MAX_LEN else row for row in rows]
    known = known_intervals(intervals_of(rows_of(grown), 2, MAX_LEN, ()), earlier, MAX_LEN)
    assert known.max() > 2
    histories = intervals_of(rows_of(grown), 2, MAX_LEN, ())
    known_intervals(histories, earlier, MAX_LEN)
    reused = fill(dense, catalogue, histories, prompts, known)
    assert reused.equals(fill(dense, catalogue, intervals_of(rows_of(grown), 2, MAX_LEN, ()), prompts))


@pytest.mark.parametrize("source", ["generated", "both"])
def test_the_answers_kept_are_the_best_after_each_interacted_item(dense, catalogue, source):
    items, segments = [[3, 7, 8, 1, 2, 5], [4, 6], [9]], [[0, 2, 2, 0, 0, 0], [0, 0], [0]]
    kept = (EXPOSED,) if source == "both" else ()
    histories = intervals_of(rows_of(items, segments), 1, MAX_LEN, kept, answers=4)
    made = fill(dense, catalogue, histories, Prompts(k=1, source=source, answers=4))
    users = random_user_vectors(len(items))
    for u, row in enumerate([[3, 1, 2, 5], [4, 6], [9]]):
        entries, kinds = made["item_ids"][u].as_py(), made["segment_ids"][u].as_py()
        answers = np.array(made["answer_ids"][u].as_py()).reshape(-1, 4)
        scores = np.array(made["answer_scores"][u].as_py()).reshape(-1, 4)
        places = [place for place, kind in enumerate(kinds) if kind == 0]
        for i, place in enumerate(places):
            if i == len(row) - 1:  # no interval follows
                assert answers[i].tolist() == [-1] * 4
                continue
            positions = [sum(kind == 0 for kind in kinds[:q]) for q in range(place + 1)]
            reference = score(dense, catalogue, users[u], entries[: place + 1], positions)
            reference[row[: i + 1]] = -torch.inf
            best = reference.topk(4)
            assert answers[i].tolist() == best.indices.tolist()
            assert scores[i].tolist() == pytest.approx(best.values.tolist(), rel=1e-4, abs=1e-5)
            if kinds[place + 1] == GENERATED:
                assert entries[place + 1] == answers[i, 0]


def test_shown_items_stand_first_and_generated_ones_fill_up(dense, catalogue):
    rows = [[3, 7, 8, 9, 1, 2], [4, 5, 6, 10]]
    # row 0: shown before the first item, three after item 3, one after 1, one after the last
    items = [[14, 3, 7, 8, 9, 1, 11, 2, 13], [4, 5, 6, 10]]
    segments = [[2, 0, 2, 2, 2, 0, 2, 0, 2], [0, 0, 0, 0]]
    histories = intervals_of(rows_of(items, segments), 2, MAX_LEN, (EXPOSED,))
    assert histories.items.tolist() == [3, 1, 2, 4, 5, 6, 10]
    assert histories.prompts.tolist()[:3] == [[8, 9], [11, -1], [-1, -1]]
    made = fill(dense, catalogue, histories, Prompts(k=2, source="both"))
    users = random_user_vectors(2)
    for u, (row, shown) in enumerate([([3, 1, 2], {0: [7, 8, 9], 1: [11]}), (rows[1], {})]):
        expected = from_scratch(dense, catalogue, users[u], row, 2, True, shown)
        assert (made["item_ids"][u].as_py(), made["segment_ids"][u].as_py()) == expected


def test_shown_items_only_are_the_newest_of_each_interval_and_need_no_model():
    items, segments = [[0, 5, 6, 7, 1, 8], [2, 3]], [[0, 2, 2, 2, 0, 2], [0, 0]]
    made = table_of(intervals_of(rows_of(items, segments), 2, MAX_LEN, (EXPOSED,)))
    assert made["item_ids"].to_pylist() == [[0, 6, 7, 1], [2, 3]]
    assert made["segment_ids"].to_pylist() == [[0, 2, 2, 0], [0, 0]]
    assert made["timestamps"].to_pylist() == [[0, 0, 0, 40], [0, 10]]


def test_a_generated_entry_takes_the_time_of_the_item_it_follows(dense, catalogue):
    made = fill(dense, catalogue, intervals_of(rows_of([[1, 2, 3]]), 2, MAX_LEN, ()), Prompts(k=2))
    assert made["timestamps"].to_pylist() == [[0, 0, 0, 10, 10, 10, 20]]


def test_without_prompts_the_rows_come_back():
    rows = random_rows([4, 0, 9, 1])
    table = rows_of(rows)
    made = table_of(intervals_of(table, 0, MAX_LEN, ()))
    assert made.select(["user_id", "item_ids", "timestamps"]).equals(table)
    assert made["segment_ids"].to_pylist() == [[0] * len(row) for row in rows]


def test_change_the_future_and_the_past_prompts_stay(dense, catalogue):
    rows = random_rows([6, 6])
    before = fill(dense, catalogue, intervals_of(rows_of(rows), 2, MAX_LEN, ()), Prompts(k=2))
    for changed in range(1, 6):
        other = [list(rows[0]), rows[1]]
        other[0][changed:] = [i for i in range(ITEMS) if i not in rows[0]][: 6 - changed]
        after = fill(dense, catalogue, intervals_of(rows_of(other), 2, MAX_LEN, ()), Prompts(k=2))
        same = 3 * changed
        assert after["item_ids"][0].as_py()[:same] == before["item_ids"][0].as_py()[:same]
        assert after["item_ids"][1] == before["item_ids"][1]


def test_two_items_worked_by_hand_through_algorithm_1():
    """A decoder that only averages: its output is the mean of the item vectors so far, all of equal weight.

    Items a = (1, 0) and b = (-.5, 1), history a b a, k = 2, user vector 0.
    after a:      mean (1, 0):         a 1,    b -.5   -> a
    after a a:    the same             a                    -> a
    fed a a a b:  mean (2.5, 1)/4:     a .625, b -.0625     -> a
    then a:       mean (3.5, 1)/5:     a .7,   b -.15       -> a
    With items already there excluded: after a only b is left, then none; after a b b nothing is left at all.
    """
    model = Model(dim=2, heads=1, layers=1, max_len=4, history_in=False)
    dense = Dense(model, Loss()).eval()
    for parameter in dense.decoder.parameters():
        torch.nn.init.zeros_(parameter)  # forgetting 0: equal weights; norms of weight 0 silence the block
    torch.nn.init.ones_(dense.decoder.mean_out)
    catalogue = Catalogue.of_vectors(torch.tensor([[1.0, 0.0], [-0.5, 1.0]]))
    prompter = Prompter(dense, catalogue, Prompts(k=2, exclude_seen=False), 4, 8)
    histories = intervals_of(rows_of([[0, 1, 0]]), 2, 4, ())
    prompter.fill(histories, torch.zeros(1, 2))
    assert table_of(histories)["item_ids"].to_pylist() == [[0, 0, 0, 1, 0, 0, 0]]

    prompter = Prompter(dense, catalogue, Prompts(k=2), 4, 8)
    histories = intervals_of(rows_of([[0, 1, 0]]), 2, 4, ())
    prompter.fill(histories, torch.zeros(1, 2))
    assert table_of(histories)["item_ids"].to_pylist() == [[0, 1, 1, 0]]
    assert table_of(histories)["segment_ids"].to_pylist() == [[0, 1, 0, 0]]

    # Answers kept beside: after a only b is left, with its score; after a b b nothing, and places stay empty.
    prompter = Prompter(dense, catalogue, Prompts(k=2, answers=2), 4, 8)
    histories = intervals_of(rows_of([[0, 1, 0]]), 2, 4, (), answers=2)
    prompter.fill(histories, torch.zeros(1, 2))
    assert histories.answers.tolist() == [[1, -1], [-1, -1], [-1, -1]]
    assert histories.answer_scores.tolist() == [[-0.5, 0], [0, 0], [0, 0]]

    # The user module counts: the same decoder with a block that passes the user vector on answers b for another user.
    for module in dense.decoder.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.ones_(module.weight)
    # a + user (-9, 0) is (-8, 0), normed (-1, 1); mean (1, 0) makes it (0, 1): b 1, a 0.
    histories = intervals_of(rows_of([[0, 0]]), 1, 4, ())
    Prompter(dense, catalogue, Prompts(k=1, exclude_seen=False), 4, 8).fill(histories, torch.tensor([[-9.0, 0.0]]))
    assert histories.prompts.tolist() == [[1], [-1]]


@pytest.mark.parametrize("source", ["generated", "both"])
def test_histories_that_grew_have_their_new_prompts_generated_as_if_from_scratch(dense, catalogue, source):
    prompts = Prompts(k=2, source=source, answers=3)
    kept = (EXPOSED,) if source == "both" else ()
    rows = random_rows([2, 4, 5, 1, 0, 6, 8, 3, 5, 4])
    segments = [[0] * len(row) for row in rows]
    rows[1], segments[1] = [0, 9, 1, 2, 3, 4], [0, 2, 0, 0, 2, 0]
    more = random_rows([2, 1, 0, 3, 2, 2, 0, 0, 1, 1], seed=5)  # 5 grows beyond max_len, 6 stays there
    extended_rows = [row + new for row, new in zip(rows, more, strict=True)]
    extended_segments = [s + [0] * len(new) for s, new in zip(segments, more, strict=True)]
    extended_rows[9][0] = next(i for i in range(ITEMS) if i not in extended_rows[9])  # not what it was
    old = fill(dense, catalogue, intervals_of(rows_of(rows, segments), 2, MAX_LEN, kept, 3), prompts)
    scratch = fill(
        dense, catalogue, intervals_of(rows_of(extended_rows, extended_segments), 2, MAX_LEN, kept, 3), prompts
    )

    histories = intervals_of(rows_of(extended_rows, extended_segments), 2, MAX_LEN, kept, 3)
    known = known_intervals(histories, intervals_of(old, 2, MAX_LEN, (GENERATED, EXPOSED), 3), MAX_LEN)
    assert known.tolist() == [1, 3, 4, 0, 0, 0, 5, 2, 4, 0]
    made = fill(dense, catalogue, histories, prompts, known)
    assert made.drop(["answer_scores"]).equals(scratch.drop(["answer_scores"]))
    for mine, theirs in zip(made["answer_scores"].to_pylist(), scratch["answer_scores"].to_pylist(), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_the_answer_does_not_depend_on_who_is_decoded_beside(dense, catalogue):
    rows = random_rows([4, 6, 2, 9, 3])
    made = [
        fill(dense, catalogue, intervals_of(rows_of(rows), 2, MAX_LEN, ()), Prompts(k=2), batch_users=n).to_pydict()
        for n in (1, 2, 100)
    ]
    assert made[0] == made[1] == made[2]
