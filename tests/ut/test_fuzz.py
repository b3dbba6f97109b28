"""What `make fuzz` takes for a fault, and what not."""

import contextlib
import socket
import threading

import msgspec
import pytest

from tests.fuzz import cases
from tests.fuzz.groups import Groups
from tests.fuzz.mutations import Fault, Late
from tests.fuzz.requests import Requests
from tests.fuzz.sources import HOST, PLAIN, Target
from vllm_ascend.model_loader.netloader.executor import elastic_load, scheduler
from vllm_ascend.model_loader.netloader.executor.devices import streams
from vllm_ascend.model_loader.netloader.executor.store import BlockStore
from vllm_ascend.model_loader.netloader.interaction import api

from .model_loader.netloader.test_netloader_api import DIGEST
from .model_loader.netloader.test_netloader_http import running


def post(path, struct, *headers):
    body = msgspec.json.encode(struct)
    head = [f"POST {path} HTTP/1.1", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(head).encode() + body


SEND = post(api.SEND.format(id=0), api.SendRuns([(0, 3)]), *2 * ["Connection: close"])


@contextlib.contextmanager
def asking(port):
    requests = Requests(Target(PLAIN, port, DIGEST, ""))
    with contextlib.closing(requests):
        yield lambda said: requests._ask("POST", said)


def test_a_source_may_answer_twice_where_its_group_fails():
    with running() as source, asking(source.port) as ask:
        assert ask(post(api.GROUPS, api.OpenGroup(DIGEST)))
        failure = api.Refusal(api.Code.TRANSFER_FAILED, "no process group")
        source.service.groups[0].failure = failure
        assert ask(SEND)


OK = b"HTTP/1.1 200 OK\r\nServer: NetLoader\r\nContent-Type: application/json\r\n"
CLOSED = OK + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}"


@pytest.mark.parametrize(
    ("said", "second", "why"),
    [
        (SEND, CLOSED, "a second answer that is not a last one"),
        (SEND, b"HTTP", "the answer begins with"),
        (post(api.DONE, api.Done(True)), CLOSED, "something came after the last answer"),
    ],
)
def test_another_answer_after_the_last_one_is_a_fault(said, second, why):
    def answer():
        sock, _ = listener.accept()
        with sock:
            sock.recv(1 << 16)
            sock.sendall(CLOSED + second)
            sock.shutdown(socket.SHUT_WR)
            sock.recv(1)

    with socket.create_server((HOST, 0)) as listener, asking(listener.getsockname()[1]) as ask:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(Fault, match=why):
            ask(said)
        thread.join(20)


@pytest.mark.parametrize(
    ("errors", "fault"),
    [
        ([], ""),
        ([Late("a"), TimeoutError("b")], ""),
        ([Late("a"), Late("b"), Late("c")], "Late: c"),
        ([Fault("a")], "Fault: a"),
        ([Late("a"), KeyError("b")], "KeyError: 'b'"),
    ],
)
def test_only_what_is_late_each_time_is_a_fault(errors, fault):
    class Stage:
        def try_one(self, chance):
            if errors:
                raise errors.pop(0)
            return True

    assert cases._tried(Stage(), 0, "plain", 1) == (not fault, fault)


@pytest.fixture
def groups(monkeypatch):
    """Tries cases of groups; returns how many were accepted, and the faults."""
    for module, names in (
        (streams, ["_DRAIN"]),
        (scheduler, ["_ASK_AGAIN", "STARVED"]),
        (elastic_load, ["STARVED", "_TRY_ANOTHER"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))
    stage = Groups(None)
    return lambda: [cases._tried(stage, 0, "groups", number) for number in range(200)]


def test_what_peers_say_in_groups_is_taken_or_refused(groups):
    tried = groups()
    assert not [fault for _, fault in tried if fault]
    assert 20 < sum(accepted for accepted, _ in tried) < 180


def test_wrong_bytes_that_a_group_brings_are_a_fault_where_nobody_looks(groups, monkeypatch):
    monkeypatch.setattr(BlockStore, "wrong", lambda store, run, parts: [])
    assert [fault for _, fault in groups() if "a load ended" in fault]
