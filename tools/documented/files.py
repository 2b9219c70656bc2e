"""The small files that the pages read: a log of 100 users and 60 items over three days, in the forms that they name."""

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd

DAY = 86_400
START = 1_714_348_800
"""29 April 2024, so that --test_from 2024-05-01 of docs/logs.md has rows on both sides."""
NAMED = {0: "shoe", 1: "hat", 2: "glove", 3: "scarf"}
"""Items that the pages name; the others are numbers."""


def make_log(users: int = 100, items: int = 60, length: int = 18) -> pd.DataFrame:
    """A log in which most items are followed by the next one, so that there is something to learn."""
    random = np.random.default_rng(0)
    rows = []
    for user in range(users):
        item = int(random.integers(items))
        for place in range(length):
            time = START + place * 3 * DAY // length + user
            rows.append((user, item, time))
            item = (item + 1) % items if random.random() < 0.8 else int(random.integers(items))
    log = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]).sort_values("timestamp", kind="stable")
    numbers = np.arange(len(log))
    log["user_id"] = log["user_id"].map(lambda user: "ann" if user == 0 else f"user {user}")
    log["item_id"] = log["item_id"].map(lambda item: NAMED.get(item, f"{item}"))
    log["event"] = random.choice(["view", "view", "cart", "buy"], len(log))
    log["clicked"] = (random.random(len(log)) < 0.8).astype(int)
    log["label"] = random.choice(["click", "click", "click", "shown", "dislike"], len(log))
    log["price"] = numbers % 7
    return log


def write_files(folder: Path) -> None:
    """Write all of them into a folder."""
    log = make_log()
    day = (log["timestamp"] - START) // DAY
    days = [log[day == number] for number in range(3)]
    for name in ("log.csv", "events.csv", "impressions.csv"):
        log.to_csv(folder / name, index=False)
    for number, rows in enumerate(days, 1):
        rows.to_csv(folder / f"day{number}.csv", index=False)
        part = folder / "events" / f"dt=2024-05-{number:02}"
        part.mkdir(parents=True)
        rows.drop(columns="timestamp").to_parquet(part / "part.parquet")
    days[1].head(40).to_csv(folder / "hour1.csv", index=False)
    days[0].to_csv(folder / "monday.csv", index=False)
    days[1].to_csv(folder / "tuesday.csv", index=False)
    write_given_parts(folder, log)
    write_histories(folder, log)
    write_tables(folder, log)
    write_published_forms(folder, log)


def write_given_parts(folder: Path, log: pd.DataFrame) -> None:
    """train.csv, valid.csv and test.csv: the last row of each user, the one before it, and the rest."""
    back = log.groupby("user_id").cumcount(ascending=False)
    for name, rows in (("test", back == 0), ("valid", back == 1), ("train", back > 1)):
        log[rows].to_csv(folder / f"{name}.csv", index=False)


def write_histories(folder: Path, log: pd.DataFrame) -> None:
    """histories.parquet, a row per user, and visitors.jsonl."""
    lists = log.groupby("user_id").agg(items=("item_id", list), times=("timestamp", list)).reset_index()
    lists.to_parquet(folder / "histories.parquet")
    visitors = [{"items": ["shoe", "hat"], "user": "ann", "exclude": ["glove"]}, {"items": ["7", "8"]}]
    (folder / "visitors.jsonl").write_text("".join(json.dumps(visitor) + "\n" for visitor in visitors))


def write_tables(folder: Path, log: pd.DataFrame) -> None:
    """Tables of items and users, and keys of items."""
    keys = sorted(log["item_id"].unique())
    numbers = np.arange(len(keys))
    items = pd.DataFrame(
        {
            "item_id": keys,
            "title": [f"Item {key}" for key in keys],
            "category": [("shoes", "hats", "gloves")[number % 3] for number in numbers],
            "brand": [f"brand {number % 5}" for number in numbers],
            "tags": [[f"tag {number % 4}", f"tag {number % 6}"] for number in numbers],
            "price": numbers.astype(float),
        }
    )
    items.to_parquet(folder / "items.parquet")
    items.to_parquet(folder / "shop.parquet")
    new = items.head(1).assign(item_id="new shoe", title="A new shoe")
    pd.concat([items, new]).to_parquet(folder / "catalogue.parquet")
    (folder / "sold_out.txt").write_text("hat\n")
    users = sorted(log["user_id"].unique())
    table = pd.DataFrame({"user_id": users, "country": "de", "age": np.arange(len(users)) % 50 + 18})
    table.to_csv(folder / "users.csv", index=False)
    table.to_parquet(folder / "users.parquet")


def write_published_forms(folder: Path, log: pd.DataFrame) -> None:
    """The log in the forms of MovieLens, Amazon and Taobao."""
    numbered = log.assign(
        user_id=log["user_id"].factorize()[0] + 1,
        item_id=log["item_id"].factorize()[0] + 1,
        rating=log["price"] % 5 + 1,
    )
    taobao = numbered[["user_id", "item_id", "price", "event", "timestamp"]]
    taobao.to_csv(folder / "UserBehavior.csv", index=False, header=False)
    lines = numbered[["user_id", "item_id", "rating", "timestamp"]].astype(str)
    (folder / "ratings.dat").write_text("".join("::".join(row) + "\n" for row in lines.itertuples(index=False)))
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    (folder / "ml-100k.inter").write_text(
        header + "".join("\t".join(row) + "\n" for row in lines.itertuples(index=False))
    )
    items, users = sorted(numbered["item_id"].unique()), sorted(numbered["user_id"].unique())
    genres = ["Drama", "Comedy", "Action"]
    (folder / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        + "".join(f"{item}\tFilm {item}\t{1980 + item % 10}\t{genres[item % 3]} Thriller\n" for item in items)
    )
    (folder / "ml-100k.user").write_text(
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        + "".join(f"{user}\t{20 + user % 40}\t{'MF'[user % 2]}\tstudent\t{user:05}\n" for user in users)
    )
    (folder / "movies.dat").write_text(
        "".join(f"{item}::Film {item} ({1980 + item % 10})::{genres[item % 3]}|Thriller\n" for item in items)
    )
    (folder / "users.dat").write_text(
        "".join(f"{user}::{'MF'[user % 2]}::{20 + user % 40}::{user % 9}::{user:05}\n" for user in users)
    )
    reviews = [
        {"reviewerID": user, "asin": item, "unixReviewTime": int(time)}
        for user, item, time in zip(log["user_id"], log["item_id"], log["timestamp"], strict=True)
    ]
    with gzip.open(folder / "reviews.json.gz", "wt") as file:
        file.writelines(json.dumps(review) + "\n" for review in reviews)
