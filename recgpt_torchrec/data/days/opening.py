"""Opens a folder of days, or a day in it, as a dataset.

A day holds the sequences of the users who did something in it, with their newest entries of earlier days in front. The
folder holds everyone: each user's row of the newest day that has one; `Dataset.newest` says which that is, and readers
read the others as users without a history, and the row without the items that have lost their slots since.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from recgpt_torchrec import storage
from recgpt_torchrec.data.days.newest import Newest
from recgpt_torchrec.data.days.records import Days, folder_of, path_of
from recgpt_torchrec.data.ids.changes import SlotChanges
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage.folders import MANIFEST
from recgpt_torchrec.texts.commands import command

if TYPE_CHECKING:
    from recgpt_torchrec.data.dataset import Manifest


def find_manifest(path: str) -> "tuple[Manifest, str, Newest | None]":
    """The manifest of a dataset, of a day or of a folder of days; the folder of its parts; and each user's newest day.

    Raises:
        InputError: there is none, or it is damaged.
    """
    from recgpt_torchrec.data.dataset import Manifest

    days = None if storage.exists(f"{path}/{MANIFEST}") else Days.read(path)
    if days is None:
        manifest = Manifest.read(path)
        return manifest, path if manifest.day is None else folder_of(path), None
    manifests = read_days(path, days)
    last = manifests[-1]
    assert last.day is not None
    split = {**last.preparation["split"], "validation_users": last.day.held_out_users}
    split["test_users"] = last.day.held_out_users
    changes = None
    if any(each.ids == "managed" for each in last.id_tables):  # users may have lost their slot, or entries
        split |= {"validation_users": None, "test_users": None}
    if (items := last.id_table("item")) is not None and items.reassigned:
        versions = [0, *(len(each.lineage) for each in manifests)]
        changes = SlotChanges(path, last.item_parts, versions, items.reassigned)
    preparation = {name: value for name, value in last.preparation.items() if name != "extends"} | {"split": split}
    sequences = [part for each in manifests for part in each.sequences]
    whole = replace(last, preparation=preparation, interactions=last.day.total, sequences=sequences)
    return whole, path, Newest(path, last.day.newest, changes)


def read_days(path: str, days: Days) -> "list[Manifest]":
    """The manifests of a folder's days, in order.

    Raises:
        InputError: it has no day, or one is missing or damaged.
    """
    from recgpt_torchrec.data.dataset import Manifest

    if not days.days:
        add = command("prepare", {"append": True, "input": "LOG", "output": path})
        raise InputError(f"{path} holds no day yet; append one: {add}")
    manifests = []
    for number in range(1, len(days.days) + 1):
        day = path_of(path, number)
        if not storage.exists(f"{day}/{MANIFEST}"):
            raise InputError(f"{path}: day {number} of {len(days.days)} is missing ({day}); restore its folder")
        manifest = Manifest.read(day)
        if manifest.day is None or manifest.day.number != number:
            raise InputError(f"{day} is not day {number} of {path}; restore its folder")
        manifests.append(manifest)
    return manifests
