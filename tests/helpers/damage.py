"""Damage for the fuzzer: of bytes, and of the values in a format, with lengths and checksums corrected afterwards."""

import gzip
import json
import random
import struct
from typing import Any

import zstandard

INTERESTING = [
    b"\x00", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff" * 8, b"NaN", b"1e999", b"[" * 5000, b"-1", b"{}", b'"',
]  # fmt: skip
NUMBERS = [
    -1, 0, 1, 2, 3, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**9, 10**30, 0.5, -0.5,
    1e308, float("nan"), float("inf"), True,
]  # fmt: skip
VALUES = [None, "", "x", "\x00", "\ud800", "..", "/dev/zero", "~nobody", [], {}, [[]], [1, "a"], {"a": {}}, "1" * 400]
BOMB = 2**26  # bytes of zeros
BOMBS = 400  # one of this many inputs is a bomb
NAMES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "U64", "F8_E4M3", "F8_E8M0", "F4", "C64", "nope")


def damage(data: bytes, rng: random.Random) -> bytes:
    """One to four random changes of bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        # headers are where a byte does most
        at = min(at, rng.choice([8, 64, 512, len(changed)]))
        kind = rng.randrange(7)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            del changed[at : at + rng.randint(1, 16)]
        elif kind == 3:
            changed[at:at] = rng.choice(INTERESTING)
        elif kind == 4:
            piece = rng.choice(INTERESTING)
            changed[at : at + len(piece)] = piece
        elif kind == 5:
            changed[at:at] = changed[max(0, at - rng.randint(1, 64)) : at] * rng.randint(1, 8)
        else:
            changed[at : at + 8] = rng.randbytes(8)
    return bytes(changed)


def damage_value(value: Any, rng: random.Random) -> Any:
    """A JSON value with one of its parts changed, taken out, renamed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        value, key = dict(value), rng.choice(list(value))
        kind = rng.randrange(8)
        if kind == 0:
            del value[key]
        elif kind == 1:
            value[rng.choice([key + "x", "", "\ud800", key.upper()])] = value.pop(key)
        else:
            value[key] = damage_value(value[key], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.85:
        value, at = list(value), rng.randrange(len(value))
        kind = rng.randrange(6)
        if kind == 0:
            del value[at]
        elif kind == 1:
            value.insert(at, value[at])
        else:
            value[at] = damage_value(value[at], rng)
        return value
    if isinstance(value, int) and rng.random() < 0.4:
        return value + rng.choice([-1, 1, 8, -8])
    return rng.choice(NUMBERS if rng.random() < 0.6 else VALUES)


def damage_json(data: bytes, rng: random.Random) -> bytes:
    """Bytes, or the values within."""
    if rng.random() < 0.3:
        return damage(data, rng)
    value = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        value = damage_value(value, rng)
    return json.dumps(value).encode()


def damage_lines(data: bytes, rng: random.Random) -> bytes:
    """Bytes, or the values within one line of JSON."""
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    lines[at] = damage_json(lines[at], rng) + b"\n"
    return b"".join(lines)


def damage_tensors(data: bytes, rng: random.Random) -> bytes:
    """Bytes, or the header of a safetensors file or the record in it, encoded again with the right length."""
    if rng.random() < 0.3:
        return damage(data, rng)
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name, kind = rng.choice(names), rng.randrange(6)
    entry, start_end = header[name], header[name]["data_offsets"]
    if kind == 0 and "about" in header.get("__metadata__", {}):
        about = damage_value(json.loads(header["__metadata__"]["about"]), rng)
        header["__metadata__"] = {"about": json.dumps(about)}
    elif kind == 1:
        header[name] = {**entry, "dtype": rng.choice(NAMES)}
    elif kind == 2:  # the same bytes in another shape, or none with a gigantic side
        count = (start_end[1] - start_end[0]) // 4
        header[name] = {**entry, "shape": rng.choice([[count, 1], [1, count], [0, 2**62], [2**62, 0], [2**40, 2**40]])}
    elif kind == 3:
        body = damage(body, rng)[: len(body)].ljust(len(body), b"\0")
    elif kind == 4:
        header[f"{name}2"] = entry
    for _ in range(rng.randint(kind // 5, 2)):
        header = damage_value(header, rng)
    text = json.dumps(header).encode()
    if rng.random() < 0.05 and isinstance(header, dict) and header:  # a name twice
        text = text[:-1] + b", " + text[1:]
    return struct.pack("<Q", len(text)) + text + body


def damage_zstd(data: bytes, rng: random.Random) -> bytes:
    """Damage before or after compression, or a bomb."""
    if rng.randrange(BOMBS) == 0:
        data = data + bytes(BOMB) + data
    return rng.choice(
        [lambda: damage(zstandard.compress(data), rng), lambda: zstandard.compress(damage(data, rng))]
    )()  # fmt: skip


def damage_gzip(data: bytes, rng: random.Random) -> bytes:
    """Damage before or after compression, or a bomb."""
    if rng.randrange(BOMBS) == 0:
        data = data + bytes(BOMB)
    return rng.choice([lambda: damage(gzip.compress(data, 1), rng), lambda: gzip.compress(damage(data, rng), 1)])()


def damage_gguf(data: bytes, rng: random.Random) -> bytes:
    """Bytes, or one of the small numbers, which are lengths, types and counts, made another."""
    if rng.random() < 0.4:
        return damage(data, rng)
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        form = rng.choice(["<I", "<Q"])
        at = rng.choice([8, 16, rng.randrange(len(changed) - 8), min(len(changed) - 8, rng.randrange(24, 900))])
        for _ in range(64):  # to the next number that looks like one
            if struct.unpack_from(form, changed, at)[0] < 2**16 or at + 16 > len(changed):
                break
            at += 1
        number = rng.choice([n for n in NUMBERS if type(n) is int and 0 <= n < 2 ** (8 * struct.calcsize(form))])
        struct.pack_into(form, changed, at, number)
    return bytes(changed)
