"""Damaged files: mutations of bytes, and of what JSON, YAML, CSV and safetensors files say. A generator decides all."""

import json
import struct
from copy import deepcopy
from random import Random
from typing import Any

import yaml

ODD = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3.5,
        2**31,
        2**63,
        10**30,
        10**400,
        1e308,
        float("nan"),
        float("inf"),
        -float("inf"),
    ),
    *("", "x", "no", "../../../etc/passwd", "/dev/zero", "a\x00b", "\u202e", "9" * 5000, "1e999", "x" * 20_000),
    *([], {}, [[]], [-1], [None], ["x"], {"a": {"b": []}}, [10**12, 10**12], {"": ""}),
]
YAML_TRICKS = [
    "!!python/object/apply:os.system ['touch executed']",
    "!!python/name:os.system",
    "!!timestamp x",
    "!!int x",
    "!!float x",
    "!!binary x",
    "!!set [a]",
    "2001-13-45",
    "0x" + "f" * 5000,
    "1:" * 3000 + "1",
    "*nothing",
    "&a [*a]",
    "{? [a, b] : c}",
    "[" * 5000,
    "{a: " * 3000,
    "'",
    "\t- a",
    "a: b: c",
    "\x07",
    "<<: 5",
]
# nine times nine times nine ...
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


def _odd(random: Random) -> Any:
    return deepcopy(random.choice(ODD))


def damage_bytes(data: bytes, random: Random, end: int = 0) -> bytes:
    """One accident of a disk, a transfer or an editor, before byte `end` if that is given."""
    end = end or max(1, len(data))
    at, length = random.randrange(end), random.choice([1, 2, 8, 100, 5000])
    noise = random.randbytes(length)
    return random.choice(
        [
            lambda: (
                data[:at] + bytes([(data[at] if at < len(data) else 0) ^ 1 << random.randrange(8)]) + data[at + 1 :]
            ),
            lambda: data[:at],
            lambda: b"",
            lambda: data[:at] + noise + data[at:],
            lambda: data[:at] + noise + data[at + length :],
            lambda: data[:at] + data[at + length :],
            lambda: data[:at] + bytes(length) + data[at + length :],
            lambda: data[:at] + data[at : at + length] * 2 + data[at + length :],
            lambda: data[:at] + b"\xff\xfe\xc3" + data[at:],
            lambda: data + noise,
            lambda: b"\xef\xbb\xbf" + data,
            lambda: data.replace(b"\n", b"\r"),
        ]
    )()


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in `tree`."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in items for place in ((tree, key), *_places(value))]


def damage_tree(tree: Any, random: Random) -> Any:
    """`tree`, in place, with a value that is odd, missing, of another key or deeply nested."""
    places = _places(tree)
    if not places or random.random() < 0.02:
        return _odd(random)
    container, key = random.choice(places)
    (other, other_key), value = random.choice(places), container[key]
    how = random.randrange(6)
    if how == 0:
        del container[key]
    elif how == 1 and isinstance(container, dict):
        container[random.choice(["", f"{key}s", str(key).upper(), "file", "__class__"])] = container.pop(key)
    elif how == 2:
        container[key] = json.loads(json.dumps(other[other_key]))
    elif how == 3 and type(value) in (int, float):
        container[key] = random.choice([-value, value + 1, value * 10**9, value * 10**18, str(value), [value]])
    elif how == 4 and random.random() < 0.2:
        nested: Any = value
        for _ in range(random.choice([5, 150])):
            nested = [nested]
        container[key] = nested
    else:
        container[key] = _odd(random)
    return tree


def damage_json(data: bytes, random: Random) -> bytes:
    tree = json.loads(data)
    how = random.random()
    if how < 0.1:  # a key twice
        _, _, rest = json.dumps(tree).partition("{")
        key = random.choice(list(tree))
        return f"{{{json.dumps(key)}: {json.dumps(_odd(random))}, {rest}".encode()
    if how < 0.13:
        return random.choice([b"[" * 100_000, b'{"a":' * 100_000, b"null", b"[]", b'"x"', b"1" * 10_000])
    for _ in range(random.choice([1, 1, 1, 3])):
        if isinstance(tree, dict):
            tree = damage_tree(tree, random)
    return _dump(tree)


def _dump(tree: Any) -> bytes:
    try:
        return json.dumps(tree).encode()
    except ValueError:  # Python does not print integers of so many digits
        return json.dumps(str(tree.keys()) if isinstance(tree, dict) else "").encode()


def damage_yaml(data: bytes, random: Random) -> bytes:
    how = random.random()
    if how < 0.05:
        return LAUGHS.encode() + data.replace(b": ", b": *a11 #", 1)
    lines = data.decode().splitlines()
    starts = [i for i, line in enumerate(lines) if ": " in line and not line.startswith(" ")]
    if how < 0.4 and starts:
        i = random.choice(starts)
        key = lines[i].partition(": ")[0]
        lines[i] = f"{key}: {random.choice(YAML_TRICKS)}"
    elif how < 0.5:
        lines.insert(random.randrange(len(lines) + 1), random.choice([*lines, *YAML_TRICKS, "---", "...", "%YAML 9.9"]))
    else:
        tree = damage_tree(yaml.safe_load(data), random)
        try:
            return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode(errors="replace")
        except (ValueError, yaml.YAMLError):
            return LAUGHS.encode()
    return "\n".join(lines).encode(errors="replace")


def damage_csv(data: bytes, random: Random) -> bytes:
    rows = [line.split(",") for line in data.decode().splitlines()]
    row = random.choice(rows)
    at = random.randrange(len(row))
    odd = ["", "x", "nan", "inf", "1e999", "-", '"', '"a\nb"', "\x00", "1_0", " ", "9" * 400, "9" * 200_000, "=1+1"]
    how = random.randrange(8)
    if how == 0:
        del row[at]
    elif how == 1:
        row.insert(at, random.choice(["0", *odd]))
    elif how == 2:
        rows.remove(row)
    elif how == 3:
        rows[0][random.randrange(len(rows[0]))] = random.choice([*rows[0], *odd])
    elif how == 4:
        return data.replace(b",", random.choice([b";", b"\t", b",,"]))
    elif how == 5:
        rows.insert(random.randrange(len(rows)), [])
    else:
        row[at] = random.choice(odd)
    return "\n".join(map(",".join, rows)).encode()


def header_end(data: bytes) -> int:
    """Where the tensors of a safetensors file begin."""
    return 8 + struct.unpack("<Q", data[:8])[0]


def damage_safetensors(data: bytes, random: Random) -> bytes:
    end = header_end(data)
    header, tensors = json.loads(data[8:end]), data[end:]
    how = random.random()
    if how < 0.15:
        size = random.choice([0, 1, end, end - 9, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1, random.getrandbits(64)])
        return struct.pack("<Q", size) + data[8:]
    if how < 0.4:
        return damage_bytes(data, random, end)
    names = [name for name in header if name != "__metadata__"]
    entry, other = (header[name] for name in random.sample(names, 2))
    if how < 0.75:
        huge = random.choice([-1, 1, 4, 2**31, 2**63, 2**64 - 1, 10**30])
        random.choice(
            [
                lambda: entry.update(data_offsets=other["data_offsets"]),
                lambda: entry.update(data_offsets=entry["data_offsets"][::-1]),
                lambda: entry["data_offsets"].__setitem__(random.randrange(2), huge),
                lambda: entry["data_offsets"].__setitem__(1, entry["data_offsets"][1] + huge),
                lambda: entry.update(shape=[*entry["shape"], huge]),
                lambda: entry.update(shape=[huge] * random.choice([1, 2, 65])),
                lambda: entry.update(shape=other["shape"]),
                lambda: entry.update(dtype=random.choice(["F64", "I32", "U8", "BF16", "F8_E4M3", "C64", "X", "BOOL"])),
                lambda: header.pop(random.choice(names)),
                lambda: header.update({random.choice(names) + "s": dict(entry)}),
                lambda: header.update(__metadata__=random.choice([{"a": "b"}, {"a": 1}, [], None])),
            ]
        )()
    else:
        header = damage_tree(header, random)
    text = _dump(header)
    if how > 0.95 and isinstance(header, dict):  # a tensor twice
        name = random.choice(names)
        text = f'{{"{name}": {json.dumps(other)}, '.encode() + text[1:]
    return struct.pack("<Q", len(text)) + text + tensors


DAMAGE = {
    ".safetensors": damage_safetensors,
    ".json": damage_json,
    ".yaml": damage_yaml,
    ".csv": damage_csv,
}


def damage(name: str, data: bytes, random: Random) -> bytes:
    """`data` of a file called `name`, damaged: a third of the time as bytes, else in what it says."""
    special = DAMAGE.get(name[name.rfind(".") :])
    if special is None or random.random() < 1 / 3:
        end = header_end(data) if special is damage_safetensors and random.random() < 0.7 else 0
        return damage_bytes(data, random, end)
    return special(data, random)
