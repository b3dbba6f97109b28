"""What is said between a client and a source, damaged, held, cut, or not true.

Each time the load brings right bytes or says in one line why not, within its deadlines; another
source after this one is enough; and this one serves the next client.
"""

import contextlib
import random
import time

import pytest

from .faults import Last, Proxy, as_it_is, cut_at, on
from .models import MIB
from .sides import load, loading, source, until
from .ways import Way

# Seconds. Where many processes share few cores, groups take some.


def handshake(way):
    return 6.0 if way.on_npu else 2.0


def soon(way):
    return 4.0 if way.on_npu else 0.8


def quick(way):
    return {
        "max_sources": 1,
        "connect_timeout": handshake(way),
        "handshake_timeout": handshake(way),
        "progress_timeout": soon(way),
    }


def per_source(way):
    """For reaching one, its answer, its group, and a message that does not come."""
    return 3 * handshake(way) + 4 * soon(way)


def survived(way, ways, over):
    """Return the outcome of a load through a `Proxy` alone, after all else has been seen right."""
    with (
        source(way, handshake_timeout=handshake(way), progress_timeout=soon(way)) as running,
        source(way) as good,
        Proxy(running.address, *ways()) as alone,
        Proxy(running.address, *ways()) as followed,
        loading(way, [alone], **quick(way)) as result,
    ):
        load(way, [followed, good], **quick(way)).check()
        outcome = result(per_source(way)).check_right_or_failed()
        # While something is still held back.
        until(lambda: running.sessions == 0, per_source(way))
        load(way, [running]).check()
        over.set()
        until(lambda: running.sessions == good.sessions == 0, per_source(way))
    if outcome.reasons:
        assert outcome.reasons.startswith(f"{alone.address}: ")
    return outcome


def part(share):
    """The connection is cut within the message."""

    def fault(said):
        data = bytes(said)
        return Last(data[: int(share * len(data))])

    return fault


def torn(said):
    """Half of the body, as if that were all."""
    said.body = said.body[: len(said.body) // 2]
    return said


def delayed(said):
    time.sleep(0.08)  # well within every deadline
    return said


def held(over):
    def fault(said):
        over.wait(30)
        return said

    return fault


DAMAGE = {
    "cut in the head": lambda over: part(0.01),
    "cut in the middle": lambda over: part(0.5),
    "cut before the last byte": lambda over: part(0.9999),
    "cut after": lambda over: part(1),
    "torn": lambda over: torn,
    "late": lambda over: delayed,
    "held": held,
    "repeated": lambda over: lambda said: bytes(said) * 2,
    "garbage before": lambda over: lambda said: b"\x00\xff{[\r\n" + bytes(said),
}
STEPS = {"join": 0, "blocks": 2, "done": 0, "groups": 0, "store": 1, "send": 1}


def has(way, step):
    return step in ("join", "done") or (step == "blocks") != way.in_groups


def applicable(steps):
    """Each name with the ways that have its step."""
    return [
        pytest.param(way, name, id=f"{way.value}-{name}")
        for way in Way
        for name, step in steps.items()
        if has(way, step)
    ]


@pytest.mark.parametrize("fault", DAMAGE)
@pytest.mark.parametrize("side", ["request", "answer"])
@pytest.mark.parametrize(("way", "step"), applicable({step: step for step in STEPS}))
def test_damage_is_survived(way, over, step, side, fault):
    def ways():
        damaged = on(step, STEPS[step], DAMAGE[fault](over))
        return (as_it_is, damaged) if side == "request" else (damaged, as_it_is)

    outcome = survived(way, ways, over)
    if step == "done" or fault == "late":
        # A client is done before it says so.
        outcome.check()
    elif step == "join" and fault not in ("cut after", "repeated", "cut before the last byte"):
        outcome.check_failed()


@pytest.mark.parametrize("side", ["request", "answer"])
@pytest.mark.parametrize("count", [1, 150, 700, 1500, 3000])
def test_a_connection_that_is_cut_after_any_byte_is_survived(way, over, side, count):
    def ways():
        return (as_it_is, cut_at(count)) if side == "request" else (cut_at(count), as_it_is)

    survived(way, ways, over)


# Lies


def putting(**fields):
    return lambda said: said.put(**fields)


def manifest(change):
    """A change of the list of tensors, each of which is [name, dtype, shape, alias]."""

    def changed(was):
        change(was["tensors"])
        return was

    return lambda said: said.put(manifest=changed)


def saying(status, body):
    def fault(said):
        said.line, said.body = f"HTTP/1.1 {status} x", body.encode()
        return said

    return fault


def asking(change):
    def fault(said):
        method, path, version = said.line.split()
        said.line = f"{method} {change(path)} {version}"
        return said

    return fault


def swap_first_two(tensors):
    tensors[0][0], tensors[1][0] = tensors[1][0], tensors[0][0]


NOISE = "\x1b[1m\n" * 100_000
NO_MANIFESTS = [
    {},
    [],
    {"layout": "raw"},
    "x",
    {"layout": "raw", "tensors": [["a", "b"]], "attributes": {}},
]
# name: (lie, part of the reason; "": right bytes; None: either), by (of, number, of the answer?)
_LIES = [
    (
        ("join", 0, True),
        {
            **{
                f"no manifest: {lie}": (putting(manifest=lie), "not a valid manifest")
                for lie in NO_MANIFESTS
            },
            "no manifest at all": (lambda s: s.put(manifest=None), "not a valid manifest"),
            "other weights": (putting(weights=lambda w: w[:-32] + "0" * 32), "and the source says"),
            "no weights": (putting(weights=""), "not a valid Joined"),
            "a digest less": (putting(blocks=lambda b: b[64:]), "bytes of digests came"),
            "digests that are none": (putting(blocks="?"), "not a valid Joined"),
            "another algorithm": (
                putting(weights=lambda w: "md5:" + w[-32:]),
                "here and md5 there",
            ),
            "a tensor less": (manifest(list.pop), "tensors differ: row.23 is only here"),
            "no tensors": (manifest(list.clear), "row.0 is only here"),
            "a tensor twice": (manifest(lambda t: t.append(t[0])), "a name is there twi"),
            "tensors swapped": (manifest(swap_first_two), "tensors differ"),
            "another name": (manifest(lambda t: t[3].__setitem__(0, "x")), "x is only there"),
            "more than would fit": (
                manifest(lambda t: t.extend([["", "", []]] * 100_000)),
                "values; allowed: up to 262",
            ),
            "a long name": (manifest(lambda t: t[3].__setitem__(0, NOISE)), "tensors differ"),
            "another dtype": (
                manifest(lambda t: t[3].__setitem__(1, "torch.int8")),
                "row.3 is uint8",
            ),
            "another shape": (manifest(lambda t: t[3].__setitem__(2, [7])), "uint8[7] there"),
            "a tie": (
                manifest(lambda t: t[3].__setitem__(3, "row.2")),
                "row.3 shares the memory",
            ),
            "a refusal": (
                saying(409, '{"code": "cannot_serve", "message": "no\\n\\u001b[1m"}'),
                "cannot_serve: no",
            ),
            "an unknown code": (saying(410, '{"code": "x", "message": "y"}'), "x: y"),
            "noise": (
                saying(409, '{"code": "%s", "message": "%s"}' % (("\\u001b[1m" * 3000,) * 2)),
                "[1m",
            ),
            "another server": (saying(404, "<html>"), "not a NetLoader port"),
        },
    ),
    (
        ("join", 0, False),
        {
            "asked for another model": (
                putting(identity=lambda i: i | {"model": "x"}),
                "the models differ",
            ),
            "asked for another group": (
                putting(identity=lambda i: i | {"group": "x"}),
                "bad_request",
            ),
            "asked for nothing": (lambda s: s.put(identity=None), "bad_request"),
            "asked for other weights": (putting(weights="xxh3_128:" + "0" * 32), None),
        },
    ),
    (
        ("blocks", 2, False),
        {
            "other blocks": (asking(lambda path: path.rpartition("/")[0] + "/9-9"), ""),
            "blocks that are not there": (
                asking(lambda path: path.rpartition("/")[0] + "/99-99"),
                "out_of_range",
            ),
            "blocks of other weights": (
                asking(lambda path: path.replace(path.split("/")[4], "xxh3_128:" + "0" * 32)),
                "changed",
            ),
        },
    ),
    (
        ("blocks", 2, True),
        {
            "no blocks": (saying(200, ""), "sends 0 bytes where blocks have"),
            "blocks too long": (
                saying(200, "x" * (MIB + 1)),
                f"sends {MIB + 1} bytes where blocks have",
            ),
            "it is busy": (saying(503, '{"code": "busy", "message": "b"}'), "busy: b"),
            "it fails": (saying(500, '{"code": "internal", "message": "b"}'), "l: b"),
        },
    ),
    (
        ("groups", 0, True),
        {
            "small messages": (putting(max_bytes=1), "not a valid GroupOpened"),
            "a group that is none": (putting(id="x"), "not a valid GroupOpened"),
        },
    ),
    (
        ("groups", 0, False),
        {"a group of other weights": (putting(weights="xxh3_128:" + "0" * 32), "")},
    ),
    (
        ("store", 1, True),
        {"values that are none": (putting(values=[["x", "?"]]), "not a valid Store")},
    ),
    (
        ("store", 0, True),
        {
            "more values than any backend sets": (
                putting(values=[[f"x{i}", ""] for i in range(200)]),
                "more than 64 values",
            ),
        },
    ),
    (
        ("store", 1, True),
        {
            "a value under another name": (
                putting(values=lambda values: [["x", value] for _, value in values]),
                None,
            ),
        },
    ),
    (
        ("send", 1, False),
        {
            "other runs": (putting(runs=lambda runs: [[a - 1, b - 1] for a, b in runs]), ""),
            "runs that are not there": (putting(runs=[[99, 99]]), "out_of_range"),
            "another group": (
                asking(lambda path: path.replace("groups/0", "groups/7")),
                "not_found",
            ),
        },
    ),
    (
        ("send", 1, True),
        {
            "other sizes": (
                putting(sizes=lambda sizes: [size + 1 for size in sizes]),
                "bytes here and",
            ),
            "a size less": (putting(sizes=lambda sizes: sizes[1:]), "bytes here and"),
            "a negative size": (putting(sizes=[-1]), "not a valid Sizes"),
            "it gives up": (
                saying(500, '{"code": "transfer_failed", "message": "tired"}'),
                "transfer_failed: tired",
            ),
        },
    ),
]
LIES = {name: (*of, *lie) for of, lies in _LIES for name, lie in lies.items()}


@pytest.mark.parametrize(("way", "name"), applicable({name: lie[0] for name, lie in LIES.items()}))
def test_a_lie_is_survived(way, over, name):
    step, number, of_answer, lie, expected = LIES[name]

    def ways():
        lying = on(step, number, lie)
        return (lying, as_it_is) if of_answer else (as_it_is, lying)

    outcome = survived(way, ways, over)
    if expected:
        outcome.check_failed(expected)
        assert len(outcome.reasons) < 5000
    elif expected == "":
        outcome.check()


# All of it at random, the same every time

QUIET = [name for name in DAMAGE if name != "held"]


def random_ways(chance, way, over):
    kind = chance.choice(["damage", "lie", "cut"])
    if kind == "cut":
        wrong, of_answer = cut_at(chance.randrange(4000)), chance.random() < 0.5
    elif kind == "lie":
        name = chance.choice([name for name in LIES if has(way, LIES[name][0])])
        step, number, of_answer, lie, _ = LIES[name]
        wrong = on(step, number, lie)
    else:
        step = chance.choice([step for step in STEPS if has(way, step)])
        fault = DAMAGE[chance.choice(QUIET if chance.random() < 0.9 else ["held"])](over)
        wrong, of_answer = on(step, chance.randrange(4), fault), chance.random() < 0.5
    return (wrong, as_it_is) if of_answer else (as_it_is, wrong)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_goes_wrong_the_bytes_are_right_or_there_are_reasons(way, seed, over):
    chance = random.Random(seed)
    honest = chance.random() < 0.7
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(source(way, progress_timeout=soon(way)))
            for _ in range(chance.randrange(1, 5))
        ]
        sources = [
            stack.enter_context(Proxy(one.address, *random_ways(chance, way, over)))
            for one in running
        ]
        if honest:
            running.append(stack.enter_context(source(way)))
            sources.insert(chance.randrange(len(sources)), running[-1])
        stack.callback(over.set)
        sources_at_once = chance.choice([1, 2, 4])
        outcome = load(way, sources, **quick(way) | {"max_sources": sources_at_once})
        over.set()
        for one in running:
            load(way, [one]).check()
            until(lambda one=one: one.sessions == 0, per_source(way))
    if honest:
        outcome.check()
    outcome.check_right_or_failed()


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_in_what_is_said_are_survived(way, seed, over):
    chance = random.Random(seed)

    def damage(said):
        data = bytearray(bytes(said))
        if chance.random() < 0.15:
            # Its length stays, or what comes next would be waited for.
            at = data.index(b"\r\n\r\n") + 4
            if at < len(data):
                data[chance.randrange(at, len(data))] ^= 1 << chance.randrange(8)
        return bytes(data)

    survived(way, lambda: (damage, damage), over)
