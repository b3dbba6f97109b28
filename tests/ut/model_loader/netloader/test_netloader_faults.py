"""Faults on either plane: right bytes or a readable failure, in time, and a source that goes on."""

import base64
import contextlib
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vllm_ascend.model_loader.netloader.errors import LoadFailed
from vllm_ascend.model_loader.netloader.executor.devices.cpu import CpuDevice

from .support import (
    MIB,
    PATIENCE,
    FaultyDevice,
    Last,
    Proxy,
    assorted,
    blank_like,
    cut_at,
    differing,
    flipped,
    line_of,
    load,
    loads_right_bytes,
    random_tensor,
    rows,
    settings,
    source,
    tapped,
    until,
    weights_of,
)

COUNT = 24
MODEL = rows(COUNT)
# (The handshake's not shorter: the DNS may take a second, see conftest.)
HANDSHAKE, SOON = 2.0, 0.8
QUICK = settings(
    max_sources=1, connect_timeout=HANDSHAKE, handshake_timeout=HANDSHAKE, progress_timeout=SOON
)
# Reaching a source, its answer, its group, and a message that does not come.
PER_SOURCE = 3 * HANDSHAKE + 2 * SOON


RIGHT, LOST, WRONG = "right bytes", "a lost source", "wrong bytes twice"


@pytest.fixture(scope="module")
def weights():
    return weights_of(MODEL)


@pytest.fixture(scope="module")
def varied():
    return weights_of(VARIED)


VARIED = assorted()


@pytest.fixture
def over():
    """Set when whatever stalls may go on: after the load, and before anything is stopped."""
    event = threading.Event()
    yield event
    event.set()


def outcome(sources, tensors=MODEL, **options):
    """Load in time; return "" if every byte is right, or the reasons, which are one line."""
    blanks = blank_like(tensors)
    ended = []

    def try_it():
        try:
            load(sources, blanks, **{"config": QUICK} | options)
            ended.append("")
        except LoadFailed as error:
            ended.append(str(error) or "no reason")

    # A load that never ends must not hold the test up.
    thread = threading.Thread(target=try_it, daemon=True)
    thread.start()
    thread.join(PER_SOURCE * len(sources))
    assert ended, "the load goes on after its deadlines"
    reasons = ended[0]
    assert reasons.isprintable()
    assert reasons != "no reason"
    if not reasons:
        assert differing(blanks, tensors) == []
    return reasons


def end_of(reasons):
    if not reasons:
        return RIGHT
    return WRONG if "wrong bytes twice in chunk" in reasons else LOST


def serves_on(running, tensors=MODEL):
    """Whether a source gives another client right bytes, and all its sessions end in time."""
    right = loads_right_bytes(running, tensors)
    return right and until(lambda: running.sessions == 0, PER_SOURCE)


def alone_and_before_a_good_one(alone, followed, good):
    """Load from a source with a fault alone, and from another one like it and then a good one."""
    with ThreadPoolExecutor(2) as pool:
        reasons = pool.submit(outcome, [alone])
        assert outcome([followed, good]) == ""
        return reasons.result()


# The messages of the data plane. None is ever longer than the client expects: gloo ends the process
# that receives such a one.


def at(number, fault):
    """One message of a session has the fault."""
    return lambda message: fault(message) if message.number == number else message.go()


def since(number, fault):
    """All messages of a session from one on have the fault."""
    return lambda message: fault(message) if message.number >= number else message.go()


def late(message):
    time.sleep(SOON / 50)
    return message.go()


def stalls(over):
    def fault(message):
        over.wait(PATIENCE)
        return message.go()

    return fault


def cut(message):
    raise RuntimeError("injected failure")


def cut_within(message):
    halved(message)
    return cut(message)


def flip(message):
    return message.go(flipped(message.memory))


def halved(message):
    return message.go(message.memory[: len(message.memory) // 2])


def emptied(message):
    return message.go(message.memory[:0])


def zeroed(message):
    return message.go(torch.zeros_like(message.memory))


def repeated(message):
    # There is none before the first.
    other = message.memory if message.before is None else message.before
    return message.go(other[: len(message.memory)])


class Nothing:
    """What a message that was never started looks like to those who wait for it."""

    def wait(self, timeout):
        pass


def dropped(message):
    return Nothing()


def sent_twice(message):
    work = message.go()
    message.go_too()
    return work


class Swap:
    """A message and the one after it travel in each other's place."""

    def __init__(self, number):
        self._number = number
        self._held = None

    def __call__(self, message):
        if message.number == self._number:
            self._held = message, threading.Event()
            return self
        if message.number != self._number + 1 or self._held is None:
            return message.go()
        first, gone = self._held
        self._held = None, gone
        size = min(len(first.memory), len(message.memory))
        self._work = first.go(message.memory[:size])
        gone.set()
        return message.go(first.memory[:size])

    def wait(self, timeout):
        if not self._held[1].wait(timeout.total_seconds()):
            raise RuntimeError("the message after this one never came")
        self._work.wait(timeout)


# name: (makes the fault of the `n`th message or all since, what such a source alone ends with)
SENT = {
    "late": (lambda over, n: at(n, late), RIGHT),
    "all late": (lambda over, n: since(n, late), RIGHT),
    "stalls": (lambda over, n: at(n, stalls(over)), LOST),
    "cut": (lambda over, n: at(n, cut), LOST),
    "cut within": (lambda over, n: at(n, cut_within), LOST),
    "flipped": (lambda over, n: at(n, flip), RIGHT),
    "all flipped": (lambda over, n: since(n, flip), WRONG),
    "halved": (lambda over, n: at(n, halved), RIGHT),
    "all halved": (lambda over, n: since(n, halved), WRONG),
    "emptied": (lambda over, n: at(n, emptied), RIGHT),
    "all emptied": (lambda over, n: since(n, emptied), WRONG),
    "zeroed": (lambda over, n: at(n, zeroed), RIGHT),
    "all zeroed": (lambda over, n: since(n, zeroed), WRONG),
    "repeated": (lambda over, n: at(n, repeated), RIGHT),
    "all repeated": (lambda over, n: since(n, repeated), WRONG),
    "swapped": (lambda over, n: Swap(n), RIGHT),
    "dropped": (lambda over, n: at(n, dropped), LOST),
    "all dropped": (lambda over, n: since(n, dropped), LOST),
    "sent twice": (lambda over, n: at(n, sent_twice), RIGHT),
}


@pytest.mark.parametrize("fault", SENT)
def test_a_fault_in_what_a_source_sends_is_survived(weights, over, fault):
    make, expected = SENT[fault]
    devices = [FaultyDevice(make(over, 9)) for _ in range(2)]
    with contextlib.ExitStack() as stack:
        alone, followed, good = (
            stack.enter_context(source(weights, config=QUICK, device=device))
            for device in (*devices, CpuDevice())
        )
        stack.callback(over.set)
        reasons = alone_and_before_a_good_one(alone, followed, good)
        for running, device in zip((alone, followed), devices, strict=True):
            device.fault = None
            assert loads_right_bytes(running, MODEL)
        over.set()
        assert all(serves_on(running) for running in (alone, followed, good))
    assert end_of(reasons) == expected
    assert reasons.startswith(f"{alone.address}: " if reasons else "")


# A client of its own that has something wrong


class After:
    """A message with which something happens once it has arrived."""

    def __init__(self, message, happens):
        self._work = message.go()
        self._memory = message.memory
        self._happens = happens

    def wait(self, timeout):
        self._work.wait(timeout)
        self._happens(self._memory)


def flipped_on_arrival(message):
    return After(message, lambda memory: memory[-1:].bitwise_xor_(1))


def zeroed_on_arrival(message):
    return After(message, torch.Tensor.zero_)


RECEIVED = {
    "late": (at(5, late), RIGHT),
    "cut": (at(5, cut), LOST),
    "flipped": (at(5, flipped_on_arrival), RIGHT),
    "all flipped": (since(5, flipped_on_arrival), WRONG),
    "zeroed": (at(5, zeroed_on_arrival), RIGHT),
    "all zeroed": (since(5, zeroed_on_arrival), WRONG),
    "dropped": (at(5, dropped), LOST),
}


@pytest.mark.parametrize("fault", RECEIVED)
def test_a_fault_in_what_a_client_receives_leaves_the_source_well(weights, fault):
    wrong, expected = RECEIVED[fault]
    with source(weights, config=QUICK) as running:
        reasons = outcome([running], device=FaultyDevice(wrong))
        assert serves_on(running)
    assert end_of(reasons) == expected


def test_a_client_that_stalls_loses_its_place_and_then_loads_from_the_next(weights):
    def stall(message):
        if message.number == 5 and not stalled:
            stalled.append(message.number)
            # By its own deadline the source gives a client up that takes nothing more.
            assert until(lambda: first.sessions == 0)
            assert loads_right_bytes(first, MODEL)
        return message.go()

    stalled = []
    with source(weights, config=QUICK) as first, source(weights, config=QUICK) as second:
        assert outcome([first, second], device=FaultyDevice(stall)) == ""
        assert stalled
        assert serves_on(first)
        assert serves_on(second)


# The lines of the control plane


def as_it_is(message):
    return message


def on(label, number, fault):
    """For a `Proxy`: a fault in the `number`th line of a label."""
    seen = 0
    label = label.removesuffix(" back")

    def way(message):
        nonlocal seen
        if message["label"] != label:
            return message
        seen += 1
        return fault(message) if seen == number + 1 else message

    return way


def part(share):
    """The connection is cut within the line."""

    def fault(message):
        line = line_of(message)
        return Last(line[: int(share * len(line))])

    return fault


def torn(message):
    line = line_of(message)
    return line[: len(line) // 2] + b"\n"


def delayed(message):
    time.sleep(SOON / 10)
    return message


def held(over):
    def fault(message):
        over.wait(PATIENCE)
        return message

    return fault


LINES = {
    "cut in the middle": lambda over: part(0.5),
    "cut before the newline": lambda over: part(0.9999),
    "cut after": lambda over: part(1),
    "torn": lambda over: torn,
    "late": lambda over: delayed,
    "held": held,
    "dropped": lambda over: lambda message: b"",
    "repeated": lambda over: lambda message: line_of(message) * 2,
    "garbage before": lambda over: lambda message: b"\x00\xff{[\n" + line_of(message),
}
# Both sides send STORE_SET: this is the source's.
STORE_SET_BACK = "STORE_SET back"
FROM_SOURCE = ["JOIN_ACK", STORE_SET_BACK, "SENDING"]


def survived_on_the_control_plane(weights, ways, over):
    """Return the reasons of a load through a `Proxy` alone, after all else has been seen right."""
    with (
        source(weights, config=QUICK) as running,
        source(weights, config=QUICK) as good,
        Proxy(running.address, *ways()) as alone,
        Proxy(running.address, *ways()) as followed,
    ):
        reasons = alone_and_before_a_good_one(alone.address, followed.address, good)
        # While a line is still held back.
        assert until(lambda: running.sessions == 0, PER_SOURCE)
        assert loads_right_bytes(running, MODEL)
        over.set()
        assert serves_on(running)
        assert serves_on(good)
    if reasons:
        assert reasons.startswith(f"{alone.address}: ")
    return reasons


NUMBERS = {
    "JOIN": 0,
    "JOIN_ACK": 0,
    "STORE_SET": 1,
    STORE_SET_BACK: 1,
    "FETCH": 2,
    "SENDING": 2,
    "DONE": 0,
}
# Not those that only cost a deadline once more: in a handshake a line that is dropped is like one
# that is held, and a JOIN that comes twice like a source that is gone after its answer.
DAMAGED = [
    (label, number, fault)
    for label, number in NUMBERS.items()
    for fault in LINES
    if fault != "dropped" or label in ("FETCH", "SENDING")
    if (label, fault) != ("JOIN", "repeated")
]


@pytest.mark.parametrize(("label", "number", "fault"), DAMAGED)
def test_a_damaged_line_is_survived(weights, over, label, number, fault):
    def ways():
        way = on(label, number, LINES[fault](over))
        return (way,) if label in FROM_SOURCE else (as_it_is, way)

    reasons = survived_on_the_control_plane(weights, ways, over)
    # A client is done before it says so, a value can be set again, and a JOIN needs no newline.
    harmless = label == "DONE" or fault == "late"
    harmless |= label in ("STORE_SET", STORE_SET_BACK) and fault == "repeated"
    if (label, fault) != ("JOIN", "cut before the newline"):
        assert (reasons == "") == harmless


@pytest.mark.parametrize("way", ["to the client", "to the source"])
@pytest.mark.parametrize("count", [1, 150, 1500, 2300, 3000])
def test_a_connection_that_is_cut_after_any_byte_is_survived(weights, over, way, count):
    def ways():
        return (cut_at(count),) if way == "to the client" else (as_it_is, cut_at(count))

    survived_on_the_control_plane(weights, ways, over)


# Lies


def putting(**fields):
    """Fields of a message set to other values; a function is called with the right one."""

    def fault(message):
        content = message["content"]
        for name, value in fields.items():
            content[name] = value(content[name]) if callable(value) else value
        return message

    return fault


def manifest(change):
    """A change of the list of tensors, each of which is [name, dtype, shape, alias]."""

    def fault(message):
        change(message["content"]["manifest"]["tensors"])
        return message

    return fault


def saying(label, **content):
    return lambda message: {"label": label, "content": content}


def bits(change, start, end=None):
    """A change of a part of a gloo address, which begins with the length and the host's name.

    The positions are those for a name of two letters.
    """

    def changed(value):
        address = bytearray(base64.b64decode(value))
        name = int.from_bytes(address[:8], "little") - 2
        part = slice(*(at + name if at and at > 8 else at for at in (start, end)))
        address[part] = change(address[part])
        return base64.b64encode(address).decode()

    return changed


def zeros(data):
    return bytes(len(data))


def ones(data):
    return b"\xff" * len(data)


NO_ADDRESS = "is not what a process group sets"


def first_two_swapped(values):
    return [values[1], values[0], *values[2:]]


def swap_first_two(tensors):
    tensors[0][0], tensors[1][0] = tensors[1][0], tensors[0][0]


NEXT = {"chunks": lambda chunks: [chunk + 1 for chunk in chunks]}
# name: (label, number, lie, part of the reason; None: it makes no difference)
LIES = {
    "no bytes": (STORE_SET_BACK, 1, putting(value="?"), "not a valid message"),
    "a huge value": (STORE_SET_BACK, 1, putting(value="A" * 40000), "not a valid message"),
    "a short address": (STORE_SET_BACK, 1, putting(value=lambda v: v[:8]), NO_ADDRESS),
    "no address": (STORE_SET_BACK, 1, putting(value=""), NO_ADDRESS),
    "zeros for it": (STORE_SET_BACK, 1, putting(value=bits(zeros, 0)), NO_ADDRESS),
    "ones for it": (STORE_SET_BACK, 1, putting(value=bits(ones, 0)), NO_ADDRESS),
    "zeros in it": (STORE_SET_BACK, 1, putting(value=bits(zeros, 18)), LOST),
    "ones in it": (STORE_SET_BACK, 1, putting(value=bits(ones, 18)), LOST),
    "a port of nobody": (STORE_SET_BACK, 1, putting(value=bits(zeros, 20, 22)), LOST),
    "other numbers at its end": (STORE_SET_BACK, 1, putting(value=bits(zeros, -16)), None),
    "an address under another name": (STORE_SET_BACK, 1, putting(key="group/0/2"), LOST),
    "chunks instead of an address": (
        STORE_SET_BACK,
        1,
        saying("SENDING", chunks=[], digests=[], sizes=[]),
        "does not belong here",
    ),
    "it gives up early": (STORE_SET_BACK, 1, saying("ABORT", reason="tired"), "gave up: tired"),
    "no address of the client": ("STORE_SET", 1, putting(value=""), LOST),
    "zeros for the client's": ("STORE_SET", 1, putting(value=bits(zeros, 0)), LOST),
    "ones for the client's": ("STORE_SET", 1, putting(value=bits(ones, 0)), LOST),
    "zeros in the client's": ("STORE_SET", 1, putting(value=bits(zeros, 18)), LOST),
    "ones in the client's": ("STORE_SET", 1, putting(value=bits(ones, 18)), LOST),
    "asked before there is a group": ("STORE_SET", 1, saying("FETCH", chunks=[]), LOST),
    "larger chunks": ("JOIN_ACK", 0, putting(chunk_bytes=2 * MIB), "bytes here and"),
    "smaller chunks": ("JOIN_ACK", 0, putting(chunk_bytes=MIB // 16), LOST),
    "no chunks": ("JOIN_ACK", 0, putting(chunk_bytes=0), "not a valid message"),
    "huge chunks": ("JOIN_ACK", 0, putting(chunk_bytes=1 << 40), "not a valid message"),
    "another model": ("JOIN_ACK", 0, putting(model_digest="0" * 32), "was announced as 0000"),
    "no model": ("JOIN_ACK", 0, putting(model_digest=""), "was announced as"),
    "another algorithm": ("JOIN_ACK", 0, putting(digest_algorithm="md5"), "digests are xxh3_128"),
    "a tensor less": ("JOIN_ACK", 0, manifest(list.pop), "tensors differ"),
    "a tensor twice": ("JOIN_ACK", 0, manifest(lambda t: t.append(t[0])), "a name is there twice"),
    "tensors swapped": ("JOIN_ACK", 0, manifest(swap_first_two), "was announced as"),
    "an attribute": (
        "JOIN_ACK",
        0,
        lambda message: message["content"]["manifest"]["attributes"].update(x=1) or message,
        "was announced as",
    ),
    "another name": ("JOIN_ACK", 0, manifest(lambda t: t[3].__setitem__(0, "x")), "tensors differ"),
    "another dtype": (
        "JOIN_ACK",
        0,
        manifest(lambda t: t[3].__setitem__(1, "torch.int8")),
        "row.3 is uint8",
    ),
    "another shape": (
        "JOIN_ACK",
        0,
        manifest(lambda t: t[3].__setitem__(2, [7])),
        "uint8[7] there",
    ),
    "a tie": (
        "JOIN_ACK",
        0,
        manifest(lambda t: t[3].__setitem__(3, "row.2")),
        "row.3 shares the memory",
    ),
    "a refusal": ("JOIN_ACK", 0, saying("JOIN_NACK", reason="no\n\x1b[1m"), "refused: no"),
    "a status": (
        "JOIN_ACK",
        0,
        saying("STATUS", identities=[], sessions=0, max_sessions=0, bytes_sent=0),
        "a Status does not belong here",
    ),
    "other chunks": ("SENDING", 2, putting(**NEXT), "were asked for"),
    "chunks in another order": ("SENDING", 2, putting(chunks=first_two_swapped), "were asked for"),
    "a chunk less": (
        "SENDING",
        2,
        putting(chunks=lambda c: c[1:], digests=lambda d: d[1:], sizes=lambda s: s[1:]),
        "were asked for",
    ),
    "a chunk more": (
        "SENDING",
        2,
        putting(chunks=lambda c: [*c, 0], digests=lambda d: [*d, d[0]], sizes=lambda s: [*s, s[0]]),
        "were asked for",
    ),
    "nothing": ("SENDING", 2, putting(chunks=[], digests=[], sizes=[]), "were asked for"),
    "other sizes": ("SENDING", 2, putting(sizes=lambda s: [x + 1 for x in s]), "bytes here and"),
    "a negative chunk": ("SENDING", 2, putting(chunks=[-1]), "not a valid message"),
    "a digest less": ("SENDING", 2, putting(digests=lambda d: d[1:]), "does not belong here"),
    "digests of each other": ("SENDING", 2, putting(digests=first_two_swapped), None),
    "digests that are none": ("SENDING", 2, putting(digests=["x"]), "not a valid message"),
    "it gives up": ("SENDING", 2, saying("ABORT", reason="a\r\nb" * 5000), "gave up: a"),
    "it has none": ("SENDING", 2, saying("MISSING", chunks=[0], reason=""), "gave up"),
    "it joins": ("SENDING", 2, saying("JOIN_NACK", reason="no"), "does not belong here"),
    "asked for others": ("FETCH", 2, putting(**NEXT), "were asked for"),
    "asked for nothing": ("FETCH", 2, putting(chunks=[]), "were asked for"),
    "asked for what is not": ("FETCH", 2, putting(chunks=[COUNT]), LOST),
    "done too early": ("FETCH", 2, saying("DONE", complete=True), LOST),
    "asked for larger chunks": ("JOIN", 0, putting(chunk_bytes=2 * MIB), None),
    "asked for another model": ("JOIN", 0, putting(identity="0" * 16), "the models differ"),
    "asked for another group": ("JOIN", 0, putting(group_name="x"), "no model of group"),
    "spoken otherwise": ("JOIN", 0, putting(protocol=3), "protocol 3 is not spoken"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_on_the_control_plane_is_survived(weights, over, name):
    label, number, lie, expected = LIES[name]

    def ways():
        way = on(label, number, lie)
        return (way,) if label in FROM_SOURCE else (as_it_is, way)

    reasons = survived_on_the_control_plane(weights, ways, over)
    if expected is None:
        assert reasons == ""
    elif expected == LOST:
        assert end_of(reasons) == LOST
    else:
        assert expected in reasons


def test_chunks_that_change_places_on_both_planes_are_noticed(weights, over):
    # Each chunk agrees with its digest, and is not where it belongs.
    def swapped(message):
        if message["label"] in ("FETCH", "SENDING"):
            places = {3: 5, 5: 3}
            chunks = message["content"]["chunks"]
            message["content"]["chunks"] = [places.get(chunk, chunk) for chunk in chunks]
        return message

    reasons = survived_on_the_control_plane(weights, lambda: (swapped, swapped), over)
    assert "the model's digest is" in reasons


# Damage anywhere


@pytest.mark.parametrize("seed", range(12))
def test_any_flipped_bit_is_noticed(varied, seed):
    chance = random.Random(seed)

    def flip_any(message):
        copy = message.memory.clone()
        copy[chance.randrange(len(copy))] ^= 1 << chance.randrange(8)
        return message.go(copy)

    device = FaultyDevice(at(chance.randrange(len(varied.plan.chunks)), flip_any))
    with source(varied, config=QUICK, device=device) as running:
        assert outcome([running], VARIED) == ""
        assert until(lambda: running.sessions == 0)
        # The chunk came twice.
        assert running.server._status(0).bytes_sent > varied.plan.nbytes


SMALL = {f"t{i}": random_tensor(i, torch.float32, 10 + i) for i in range(9)}


class Misplacing(CpuDevice):
    """Puts the bytes of small tensors where they do not belong, the first `times` times."""

    def __init__(self, misplace, times):
        self._misplace = misplace
        self._times = times

    def unpack(self, message, tensors):
        super().unpack(message, tensors)
        if self._times:
            self._times -= 1
            self._misplace(tensors)


def one_element_late(tensors):
    data = tensors[4].view(-1)
    data.copy_(data.roll(1))


def over_the_next(tensors):
    tensors[5][: len(tensors[4])] = tensors[4]


def left_out(tensors):
    tensors[4].fill_(7)


@pytest.mark.parametrize("misplace", [one_element_late, over_the_next, left_out])
def test_a_tensor_in_the_wrong_place_is_noticed(misplace):
    with source(SMALL) as running:
        assert outcome([running], SMALL, device=Misplacing(misplace, 1)) == ""
        reasons = outcome([running], SMALL, device=Misplacing(misplace, 99))
    assert "wrong bytes twice in chunk 0" in reasons


@pytest.mark.parametrize("change", [torch.Tensor.zero_, lambda t: t[-1:].bitwise_xor_(1)])
def test_weights_that_change_while_they_are_sent_are_not_loaded(weights, change):
    changing = weights_of({name: tensor.clone() for name, tensor in MODEL.items()})

    def tap(index, count):
        if count == 9:
            for tensor in changing.tensors[9:]:
                change(tensor)

    with (
        source(tapped(changing, tap), config=QUICK) as one,
        source(weights, config=QUICK) as good,
    ):
        assert outcome([one, good]) == ""
        reasons = outcome([one])
    assert end_of(reasons) == WRONG


# All of it at random, the same every time

QUIET = [name for name in SENT if SENT[name][1] != LOST or name.startswith("cut")]
SLOW = [name for name in SENT if name not in QUIET]
SLOW_LINES = ["held", "dropped"]
SLOW_LIES = ["a port of nobody", "an address under another name", "zeros in it", "ones in it"]


class Chance(random.Random):
    def one_of(self, usual, rare):
        """Mostly of what costs no deadline, so that the tests do not take long."""
        return self.choice(rare if self.random() < 0.08 else usual)

    def fault_in_messages(self, over, count):
        if self.random() < 0.4:
            return None
        make, _ = SENT[self.one_of(QUIET, SLOW)]
        return make(over, 1 + self.randrange(count))

    def fault_in_lines(self, over):
        """One `Proxy`'s ways."""
        there = back = as_it_is
        kind = self.choice(["line", "lie", "byte"])
        if kind == "line":
            label = self.choice(["JOIN", "JOIN_ACK", "FETCH", "SENDING"])
            fault = self.one_of([name for name in LINES if name not in SLOW_LINES], SLOW_LINES)
            if label == "JOIN" and fault == "repeated":
                fault = "torn"  # the other costs a deadline
            way = on(label, self.randrange(5), LINES[fault](over))
        elif kind == "lie":
            lie = self.one_of([name for name in LIES if name not in SLOW_LIES], SLOW_LIES)
            label, number, change, _ = LIES[lie]
            way = on(label, number, change)
        else:
            label = self.choice(["JOIN", "SENDING"])
            way = cut_at(self.randrange(4000))
        return (way, back) if label in FROM_SOURCE else (there, way)


def random_source(stack, chance, weights, over):
    """A source with faults on one plane or both; returns it and the address for clients."""
    device = FaultyDevice(chance.fault_in_messages(over, len(weights.plan.chunks)))
    running = stack.enter_context(source(weights, config=QUICK, device=device))
    if chance.random() < 0.5:
        return running, running.address
    ways = chance.fault_in_lines(over)
    return running, stack.enter_context(Proxy(running.address, *ways)).address


@pytest.mark.parametrize("seed", range(24))
def test_whatever_goes_wrong_the_bytes_are_right_or_there_are_reasons(weights, varied, over, seed):
    chance = Chance(seed)
    there, tensors = (varied, VARIED) if chance.random() < 0.3 else (weights, MODEL)
    honest = chance.random() < 0.7
    here = FaultyDevice()
    if chance.random() < 0.3:
        here.fault = at(chance.randrange(20), chance.choice([late, flipped_on_arrival]))
    config = settings(
        max_sources=chance.choice([1, 2, 4]),
        connect_timeout=HANDSHAKE,
        handshake_timeout=HANDSHAKE,
        progress_timeout=SOON,
    )
    with contextlib.ExitStack() as stack:
        made = [random_source(stack, chance, there, over) for _ in range(chance.randrange(1, 5))]
        addresses = [address for _, address in made]
        if honest:
            good = stack.enter_context(source(there, config=QUICK))
            made.append((good, good.address))
            addresses.insert(chance.randrange(len(made)), good.address)
        stack.callback(over.set)
        reasons = outcome(addresses, tensors, config=config, device=here)
        over.set()
        for running, _ in made:
            running.offer.device = CpuDevice()
            assert serves_on(running, tensors)
    if honest:
        assert reasons == ""
    elif reasons:
        assert reasons.startswith(tuple(f"{address}: " for address in addresses))
