"""Damage for files: random changes of bytes, and chosen content that has broken readers of such formats before.

A mutation takes the bytes of a file and a random generator, and returns other bytes. Those of `CHOSEN` are by format.
"""

import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Mutation = Callable[[bytes, np.random.Generator], bytes]

# ----------------------------------------------------------------------------------------------------- random bytes


def flip_bits(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip 1 to 8 bits."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 9)) if data else 0):
        changed[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def change_byte(data: bytes, rng: np.random.Generator) -> bytes:
    """Set one byte to another value."""
    at = int(rng.integers(max(len(data), 1)))
    return data[:at] + rng.bytes(1) + data[at + 1 :]


def change_digit(data: bytes, rng: np.random.Generator) -> bytes:
    """Set one ASCII digit to another one; a byte, where there is none."""
    places = [match.start() for match in re.finditer(rb"[0-9]", data)]
    if not places:
        return change_byte(data, rng)
    at = places[rng.integers(len(places))]
    return data[:at] + b"%d" % ((data[at] - 48 + int(rng.integers(1, 10))) % 10) + data[at + 1 :]


def insert(data: bytes, rng: np.random.Generator) -> bytes:
    """Insert 1 to 16 random bytes."""
    at = int(rng.integers(len(data) + 1))
    return data[:at] + rng.bytes(int(rng.integers(1, 17))) + data[at:]


def delete(data: bytes, rng: np.random.Generator) -> bytes:
    """Delete 1 to 16 bytes."""
    at = int(rng.integers(len(data) + 1))
    return data[:at] + data[at + int(rng.integers(1, 17)) :]


def _block(data: bytes, rng: np.random.Generator) -> tuple[int, int]:
    first = int(rng.integers(len(data) + 1))
    return first, min(len(data), first + int(rng.integers(1, max(2, len(data) // 4))))


def duplicate(data: bytes, rng: np.random.Generator) -> bytes:
    """Write a block twice."""
    first, last = _block(data, rng)
    return data[:last] + data[first:]


def zero(data: bytes, rng: np.random.Generator) -> bytes:
    """Zero a block."""
    first, last = _block(data, rng)
    return data[:first] + bytes(last - first) + data[last:]


def swap(data: bytes, rng: np.random.Generator) -> bytes:
    """Swap two neighbouring blocks."""
    first, last = _block(data, rng)
    middle = int(rng.integers(first, last + 1))
    return data[:first] + data[middle:last] + data[first:middle] + data[last:]


def truncate(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut the file off."""
    return data[: int(rng.integers(len(data) + 1))]


RANDOM: list[Mutation] = [flip_bits, change_byte, change_digit, insert, delete, duplicate, zero, swap, truncate]

# ------------------------------------------------------------------------------------------------------------- text


def replace_by(content: bytes) -> Mutation:
    """The mutation after which a file holds `content`."""
    return lambda data, rng: content


TEXT: dict[str, Mutation] = {
    "empty": replace_by(b""),
    "byte order mark": lambda data, rng: b"\xef\xbb\xbf" + data,
    "UTF-16": lambda data, rng: data.decode(errors="replace").encode("utf-16"),
    "invalid UTF-8": lambda data, rng: data[: len(data) // 2] + b"\xff\xc0\xaf" + data[len(data) // 2 :],
    "NUL bytes": lambda data, rng: data + b"\0" * 64,
    "one line of a million bytes": lambda data, rng: data + b"x" * 10**6,
    "a ZIP archive": replace_by(b"PK\x05\x06" + bytes(18)),
}

# ------------------------------------------------------------------------------------------------------------- JSON

VALUES: list[Any] = [
    True,
    None,
    -1,
    2**60,
    2**53,
    0,
    1.5,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "x",
    "../x",
    "/etc/passwd",
]
VALUES += ["s3://x/y", "a\\b", "\0", "\ud800", "x" * 10**5, [], [1], {}, {"x": 1}, [[[[[]]]]]]


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in JSON, lists and objects included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield (*path, key)
        yield from _leaves(each, (*path, key))


def _parse(data: bytes) -> tuple[list[Any], int]:
    """The JSON values of a file, one or one a line, and how many there are."""
    try:
        return [json.loads(data)], 1
    except ValueError:
        values = [json.loads(line) for line in data.splitlines()]
        return values, len(values)


def change_value(data: bytes, rng: np.random.Generator) -> bytes:
    """Replace one value by one of another type or out of range, drop it, or give it twice; the checksum is dropped."""
    values, lines = _parse(data)
    at = int(rng.integers(lines))
    value = values[at]
    if isinstance(value, dict):
        value.pop("checksum", None)
    paths = list(_leaves(value))
    *path, key = paths[rng.integers(len(paths))]
    inner = value
    for each in path:
        inner = inner[each]
    choice = int(rng.integers(len(VALUES) + 2))
    if choice < len(VALUES):
        inner[key] = VALUES[choice]
    elif choice == len(VALUES):
        del inner[key]
    elif isinstance(inner, dict):
        inner[f"{key}?"] = inner[key]
    else:
        inner += inner
    text = [json.dumps(each, indent=1 if lines == 1 else None) for each in values]
    return "\n".join([*text, ""]).encode()


def _in_place_of_a_number(text: str) -> Mutation:
    def change(data: bytes, rng: np.random.Generator) -> bytes:
        data = re.sub(rb',\s*"checksum": "[0-9a-f]*"(?=\s*}\s*$)', b"", data)
        places = [match.span() for match in re.finditer(rb"(?<=: )-?[0-9.]+(e[-+]?[0-9]+)?(?=[,\n}])", data)]
        first, last = places[rng.integers(len(places))] if places else (0, 0)
        return data[:first] + text.encode() + data[last:]

    return change


JSON: dict[str, Mutation] = {
    **{f"value {number}": change_value for number in range(40)},
    "a number of 100,000 digits": _in_place_of_a_number("9" * 100_000),
    "1e999": _in_place_of_a_number("1e999"),
    "2^60": _in_place_of_a_number(str(2**60)),
    "2^60 again": _in_place_of_a_number(str(2**60)),
    "2^60 as a float": _in_place_of_a_number("1.152921504606847e18"),
    "true": _in_place_of_a_number("true"),
    "a negative number": _in_place_of_a_number("-5"),
    "NaN": _in_place_of_a_number("NaN"),
    "nested lists": _in_place_of_a_number("[" * 100_000 + "]" * 100_000),
    "nested objects": _in_place_of_a_number('{"a":' * 5000 + "1" + "}" * 5000),
    "nested 500 deep": _in_place_of_a_number("[" * 500 + "]" * 500),
    "a name twice": lambda data, rng: re.sub(rb"^(\{\s*)(\"[^\"]+\": [^,{\[]+,)", rb"\1\2\2", data),
    "a list": replace_by(b"[]"),
    "a string": replace_by(b'"x"'),
    "only {}": replace_by(b"{}"),
    "all twice": lambda data, rng: data + data,
}

# ----------------------------------------------------------------------------------------------------------- pickle


class _Command:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        import os

        return os.system, (self.command,)


def hostile_pickles(canary: str) -> dict[str, bytes]:
    """Pickles that make a file named `canary` when they are read, or exhaust what reads them.

    Args:
        canary: path without blanks.
    """
    command = f"touch {canary}".encode()
    call = b"cposix\nsystem\n"
    text = b"X" + len(command).to_bytes(4, "little") + command
    size = b"ctorch\nSize\n"
    index = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
    nested = b"\x80\x04)\x94" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(60))
    return {
        **{f"reduce, protocol {protocol}": pickle.dumps(_Command(command.decode()), protocol) for protocol in range(6)},
        "global": b"\x80\x02" + call + text + b"\x85R.",
        "stack global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + text + b"\x85R.",
        "inst": b"(S'" + command + b"'\niposix\nsystem\n.",
        "obj": b"\x80\x02(" + call + text + b"o.",
        "newobj": b"\x80\x02csubprocess\nPopen\n]" + b"(" + text.replace(b" ", b"\x00") + b"e\x85\x81.",
        "eval": b'c__builtin__\neval\n(S\'__import__("os").system("' + command + b"\")'\ntR.",
        "dotted name": b"\x80\x04\x8c\x05torch\x8c\x0dserialization.os.system\x93" + text + b"\x85R.",
        "build of a class": b"\x80\x02" + index + b"N}X\x06\x00\x00\x00__eq__" + call + b"s\x86b.",
        "setstate of a class": b"\x80\x02" + index + b"}X\x0c\x00\x00\x00__setstate__" + call + b"sb" + text + b"b.",
        "persistent id": b"\x80\x02" + text + b"Q.",
        "extension code": b"\x80\x02\x82\x01.",
        "memo of gigabytes": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "text of gigabytes": b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"x.",
        "bytes of gigabytes": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"x.",
        "size of 10^6 dimensions": b"\x80\x02" + size + b"(" + b"K\x01" * 10**6 + b"t\x85R.",
        "size of texts": b"\x80\x02" + size + b"(" + text + b"t\x85R.",
        "tuples nested 60 times as a key": nested + b"}" + b"h\x3cNs.",
        "tuples nested 60 times in an index": nested + index + b")\x81}X\x03\x00\x00\x00fqnh\x3csb.",
        "100,000 lists in each other": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "no opcode": b"\x80\x04\xff.",
        "nothing": b"\x80\x04.",
        "an empty dict": pickle.dumps({}),
        "cut off": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    }


def _deflate(data: bytes, size: int) -> bytes:
    """A ZIP archive of zeros that unpacks to `size` bytes, padded to the length of `data` where it is shorter."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(size))
    return target.getvalue().ljust(len(data), b"\0")


RECORDS: dict[str, Mutation] = {
    "empty": replace_by(b""),
    "a deflate bomb": lambda data, rng: _deflate(data, 2**26),
    "zeros": lambda data, rng: bytes(len(data)),
    "noise": lambda data, rng: rng.bytes(len(data)),
}

# ---------------------------------------------------------------------------------------------------------- Parquet


def rewrite_parquet(change: Callable[[pa.Table, np.random.Generator], pa.Table]) -> Mutation:
    """Read a Parquet file, change the table, and write it with the same row groups."""

    def rewrite(data: bytes, rng: np.random.Generator) -> bytes:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            rows = file.metadata.row_group(0).num_rows
            table = change(file.read(use_threads=False), rng)
        target = io.BytesIO()
        pq.write_table(table, target, compression="zstd", row_group_size=max(rows, 1))
        return target.getvalue()

    return rewrite


def _pick(table: pa.Table, rng: np.random.Generator) -> tuple[int, pa.Field]:
    at = int(rng.integers(table.num_columns))
    return at, table.schema.field(at)


def _rename(table: pa.Table, rng: np.random.Generator) -> pa.Table:
    at, _ = _pick(table, rng)
    return table.rename_columns([f"{name}?" if place == at else name for place, name in enumerate(table.column_names)])


def _twice(table: pa.Table, rng: np.random.Generator) -> pa.Table:
    at, field = _pick(table, rng)
    return table.append_column(field, table.column(at))


def _null(table: pa.Table, rng: np.random.Generator) -> pa.Table:
    at, field = _pick(table, rng)
    return table.set_column(at, pa.field(field.name, field.type), pa.nulls(table.num_rows, field.type))


def _one_null(table: pa.Table, rng: np.random.Generator) -> pa.Table:
    at, field = _pick(table, rng)
    values = table.column(at).to_pylist()
    values[int(rng.integers(len(values)))] = None
    return table.set_column(at, pa.field(field.name, field.type), pa.array(values, field.type))


def _retype(table: pa.Table, rng: np.random.Generator) -> pa.Table:
    at, field = _pick(table, rng)
    types = [pa.string(), pa.float64(), pa.int8(), pa.bool_(), pa.list_(pa.list_(pa.int64())), pa.null()]
    kind = types[int(rng.integers(len(types)))]
    return table.set_column(at, pa.field(field.name, kind), pa.nulls(table.num_rows, kind))


def _extreme(table: pa.Table, rng: np.random.Generator) -> pa.Table:
    at, field = _pick(table, rng)
    values = table.column(at).to_pylist()
    row = int(rng.integers(len(values)))
    extreme: Any = [2**62, -1, -(2**63), 2**31][int(rng.integers(4))]
    kind = field.type
    while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    if pa.types.is_int8(kind):
        extreme = [-128, 127, 3][int(rng.integers(3))]
    elif pa.types.is_floating(kind):
        extreme = [float("nan"), float("inf"), 1e38][int(rng.integers(3))]
    elif not pa.types.is_integer(kind):
        extreme = "\x00" * 3

    def put(value: Any) -> Any:
        if not isinstance(value, list):
            return extreme
        return [put(value[0]), *value[1:]] if value else value

    values[row] = put(values[row])
    return table.set_column(at, pa.field(field.name, field.type), pa.array(values, field.type))


def promise_rows(data: bytes, rng: np.random.Generator) -> bytes:
    """Replace one byte of the footer by a whole number near 2^60, as Thrift writes it; fits the footer's length."""
    length = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - length : -8]
    at = int(rng.integers(len(footer)))
    value, varint = 2 * 2**60, b""  # zigzag
    while value:
        varint += bytes([value & 127 | (128 if value > 127 else 0)])
        value >>= 7
    footer = footer[:at] + varint + footer[at + 1 :]
    return data[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def damage_footer(data: bytes, rng: np.random.Generator) -> bytes:
    """Change one byte of the footer."""
    length = int.from_bytes(data[-8:-4], "little")
    at = len(data) - 8 - int(rng.integers(1, length + 1))
    return data[:at] + rng.bytes(1) + data[at + 1 :]


DAMAGED_FOOTERS: dict[str, Mutation] = {
    **{f"2^60 in the footer {number}": promise_rows for number in range(40)},
    **{f"a byte of the footer {number}": damage_footer for number in range(20)},
}
"""Footers that can end the process that parses them: pyarrow calls constructors that throw, unguarded."""
PARQUET: dict[str, Mutation] = {
    "empty": replace_by(b""),
    "magic bytes only": replace_by(b"PAR1PAR1"),
    "a footer of gigabytes": lambda data, rng: data[:-8] + b"\xff\xff\xff\x7fPAR1",
    **DAMAGED_FOOTERS,
    **{f"renamed column {number}": rewrite_parquet(_rename) for number in range(3)},
    **{f"column twice {number}": rewrite_parquet(_twice) for number in range(3)},
    **{f"null column {number}": rewrite_parquet(_null) for number in range(3)},
    **{f"null value {number}": rewrite_parquet(_one_null) for number in range(4)},
    **{f"column of another type {number}": rewrite_parquet(_retype) for number in range(8)},
    **{f"extreme value {number}": rewrite_parquet(_extreme) for number in range(8)},
    "no rows": rewrite_parquet(lambda table, rng: table.slice(0, 0)),
    "a row twice": rewrite_parquet(lambda table, rng: pa.concat_tables([table.slice(0, 1), table])),
    "rows reversed": rewrite_parquet(lambda table, rng: table.take(pa.array(range(table.num_rows))[::-1])),
}

# ------------------------------------------------------------------------------------------------------------- YAML


def hostile_yaml(canary: str) -> dict[str, bytes]:
    """YAML that would make a file named `canary`, by tags or by classes that are named, and bombs."""
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    merges = "".join(f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    texts = {
        "apply": f"seed: !!python/object/apply:os.system ['touch {canary}']\n",
        "new": f"!!python/object/new:subprocess.Popen [['touch', '{canary}']]\n",
        "module": "seed: !!python/module:antigravity\n",
        "name": "seed: !!python/name:os.system\n",
        "class_path": f"model: {{class_path: subprocess.Popen, init_args: {{args: [touch, {canary}]}}}}\n",
        "class_path of the file": f"class_path: subprocess.Popen\ninit_args: {{args: [touch, {canary}]}}\n",
        "class_path in a value": f"initial: {{class_path: subprocess.Popen, init_args: {{args: [touch, {canary}]}}}}\n",
        "class name": "model: subprocess.Popen\n",
        "dotted": "model.class_path: subprocess.Popen\n",
        "aliases": "a0: &a0 [x]\n" + levels,
        "merges": "a0: &a0 {x: 1}\n" + merges,
        "cycle": "model: &m {dim: *m}\n",
        "nested lists": "a: " + "[" * 20_000,
        "nested groups": "a: " + "{a: " * 20_000,
        "a number of 100,000 digits": "seed: " + "9" * 100_000,
        "a seed of 2^400": f"seed: {2**400}\n",
        "no date": "seed: 2001-99-99\n",
        "1e999": "seed: 1e999\n",
        "not a number": "optimizer: {lr: .nan}\n",
        "a set": "seed: !!set {a, b}\n",
        "a list as a name": "? [1, 2]\n: 3\n",
        "no name": "~: 2\n",
        "twice": "seed: 1\nseed: 2\n",
        "itself": "config: config.yaml\n",
        "a file outside": "config: ../../../../../../etc/passwd\n",
        "a list of files": "config: [a, b]\n",
        "half a character": 'initial: "\\ud800"\n',
        "a NUL in a path": 'initial: "a\\0b"\n',
    }
    return {name: text.encode() for name, text in texts.items()}
