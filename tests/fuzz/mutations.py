"""Random damage to JSON and to bytes, all of it by a `random.Random`."""

import json

NUMBERS = [-1, 0, 1, 7, 2**31, 2**53, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308]
TEXTS = [
    "",
    "x",
    "\x00",
    "\x1b[1m\r\n",
    "../../etc/passwd",
    "\u0661",
    "\ud800",
    "\U0001f600" * 20,
    "1" * 5000,
    "a" * 4097,
    "xxh3_128:" + "0" * 32,
    "[::1]:28000",
    "10.0.0.1:0",
    "%s%n",
]


class Fault(Exception):
    """Something that must not be."""


class Late(Fault):
    """Something that has not come in time, which may be due to a machine that is busy."""


def value(chance, depth=0):
    """Any JSON value."""
    kind = chance.randrange(10 if depth < 3 else 7)
    if kind < 2:
        return chance.choice(NUMBERS)
    if kind < 4:
        return chance.choice(TEXTS)
    if kind == 4:
        return chance.choice([None, True, False])
    if kind == 5:
        return chance.randrange(-5, 5000)
    if kind == 6:
        return chance.choice([{}, [], [[]], {"": None}])
    if kind == 7:
        return [value(chance, depth + 1) for _ in range(chance.randrange(5))]
    if kind == 8:
        return {chance.choice(TEXTS): value(chance, depth + 1) for _ in range(chance.randrange(4))}
    return [value(chance, 3)] * chance.choice([2, 50, 300])


def damaged(chance, tree):
    """A JSON value with one part of it changed, added, repeated or left out."""
    if not isinstance(tree, (dict, list)) or not tree or chance.random() < 0.1:
        return value(chance)
    changed = tree.copy()
    keys = [*changed] if isinstance(changed, dict) else range(len(changed))
    key = chance.choice(keys)
    kind = chance.randrange(8)
    if kind == 0:
        del changed[key]
    elif kind == 1:
        changed[key] = value(chance)
    elif kind == 2 and isinstance(changed, dict):
        changed[chance.choice(TEXTS)] = value(chance)
    elif kind == 2:
        changed.insert(key, changed[key])
    elif kind == 3:
        changed[key] = changed[chance.choice(keys)]
    elif kind == 4 and isinstance(changed, list) and len(changed) < 100:
        changed *= chance.choice([2, 40])
    else:
        changed[key] = damaged(chance, changed[key])
    return changed


def body(chance, tree, least=0.3):
    """The bytes of a JSON value: as it is in `least` of the cases, else damaged."""
    if chance.random() < least:
        return as_json(tree)
    if chance.random() < 0.03:
        return b"[" * chance.choice([10, 1000, 30_000])
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        tree = damaged(chance, tree)
    data = as_json(tree)
    return damaged_bytes(chance, data) if chance.random() < 0.15 else data


def as_json(tree):
    return json.dumps(tree, separators=(",", ":")).encode("utf-8", "surrogatepass")


def damaged_bytes(chance, data):
    """Bytes of which some are flipped, left out, repeated or put in."""
    data = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 5])):
        at = chance.randrange(len(data) + 1)
        end = at + chance.choice([1, 1, 4, 30])
        kind = chance.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at:end]
        elif kind == 2:
            data[at:at] = data[at:end] * chance.choice([1, 1, 9])
        elif kind == 3:
            data[at:at] = chance.randbytes(chance.choice([1, 1, 4, 30]))
        elif kind == 4:
            data[at:at] = chance.choice([b"\r\n", b"\n", b"\r\n\r\n", b"\x00", b" ", b":", b"\xff"])
        else:
            del data[at:]
    return bytes(data)
