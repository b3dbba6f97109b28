"""Kinds of cases, and the processes that try them."""

import contextlib
import dataclasses
import multiprocessing
import random
import threading

from .mutations import Fault, Late
from .sources import PLAIN, WITH_CERTIFICATES, WITH_SECRET, SourceProcess

_SHOWN = 5  # faults of each kind of case, after which there are no more cases of it
_TRIES = 3  # of a case that is late: what never comes is late each time
_WARM = 0.1  # of the cases, after which memory that is kept for more of them is there


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of cases.

    Attributes:
        what: they are, for people.
        stage: the class that tries them, in the module of that name in lower case.
        source: they are tried on.
        share: of the count, in thousandths.
        threads: that try them, as some of them take their time.
    """

    what: str
    stage: str
    source: str
    share: int
    threads: int = 4


# A request takes 0.6 ms of CPU on both sides, TLS's handshake 3 ms on both.
KINDS = {
    "plain": Kind("requests", "Requests", PLAIN, 700),
    "tls": Kind("requests inside TLS", "Requests", WITH_SECRET, 300),
    "door": Kind("first bytes and handshakes, secret", "Door", WITH_SECRET, 75),
    "certificates": Kind("first bytes and handshakes, certificates", "Door", WITH_CERTIFICATES, 25),
    "answers": Kind("answers to clients", "Answers", PLAIN, 100, threads=1),
    "bodies": Kind("bodies", "Bodies", PLAIN, 200, threads=1),
    "groups": Kind("groups", "Groups", PLAIN, 20, threads=1),
}


@dataclasses.dataclass
class Tally:
    """How cases of one kind went."""

    tried: int = 0
    accepted: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)


def made(seed, name, number):
    """What a case is made from."""
    return random.Random(f"{seed} {name} {number}")


def _tried(stage, seed, name, number):
    """Try a case; returns whether it was accepted, and its fault."""
    fault = ""
    for _ in range(_TRIES):
        try:
            return stage.try_one(made(seed, name, number)), ""
        except Exception as error:  # of a client's, it is one
            fault = f"{type(error).__name__}: {error}"
            if not isinstance(error, (Late, TimeoutError)):
                break
    return False, fault


def work(orders, name, seed, first, count, target):
    """Try cases of one kind; says so when a part of them was tried, and goes on when told to."""
    kind, tally, lock = KINDS[name], Tally(), threading.Lock()
    stage = getattr(__import__(f"tests.fuzz.{kind.stage.lower()}", fromlist=["x"]), kind.stage)

    def some(numbers):
        mine = stage(target)
        for number in numbers:
            if len(tally.faults) >= _SHOWN:
                break
            accepted, fault = _tried(mine, seed, name, number)
            with lock:
                tally.tried += 1
                tally.accepted += accepted
                if fault and len(tally.faults) < _SHOWN:
                    again = f"--seed {seed} --only {name} --first {number} --count 1"
                    tally.faults.append(f"{name} {number}: {fault}\n    again: {again}")
        try:
            mine.close()
        except Fault as fault:
            tally.faults.append(f"{name}: {fault}")

    warm = int(count * _WARM)
    for numbers in (range(first, first + warm), range(first + warm, first + count)):
        threads = [
            threading.Thread(target=some, args=(numbers[at :: kind.threads],))
            for at in range(kind.threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if tally.tried < numbers.stop - first and not tally.faults:
            tally.faults.append(f"{name}: {numbers.stop - first - tally.tried} were not tried")
        orders.send(tally)
        orders.recv()


def fuzz(seed, counts, first, folder):
    """Try cases; returns how each kind went, and what the sources have to say."""
    context = multiprocessing.get_context("spawn")
    faults = []
    with contextlib.ExitStack() as stack:
        sources = {
            kind: stack.enter_context(contextlib.closing(SourceProcess(kind, folder)))
            for kind in {KINDS[name].source for name in counts}
        }
        workers = {}
        for name, count in counts.items():
            orders, theirs = context.Pipe()
            target = sources[KINDS[name].source].target
            arguments = (theirs, name, seed, first, count, target)
            process = context.Process(target=work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.join)
            stack.callback(process.kill)
            workers[name] = orders
        for orders in workers.values():
            orders.recv()
        before = {kind: source.usage() for kind, source in sources.items()}
        for orders in workers.values():
            orders.send("go on")
        tallies = {name: orders.recv() for name, orders in workers.items()}
        for kind, source in sources.items():
            faults += source.faults_since(before[kind])
    return tallies, faults
