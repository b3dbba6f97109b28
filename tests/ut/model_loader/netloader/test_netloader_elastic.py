import contextlib
import dataclasses
import gc
import json
import os
import signal
import socket
import threading
import time

import psutil
import pytest
import torch

from vllm_ascend.model_loader.netloader.errors import LoadFailed, SourceLost, SourceRefused
from vllm_ascend.model_loader.netloader.executor.process_group import CLIENT, form_group
from vllm_ascend.model_loader.netloader.interaction.elastic import MAX_HANDSHAKES, ElasticClient
from vllm_ascend.model_loader.netloader.interaction.protocol import (
    MAX_JOIN_BYTES,
    PROTOCOL,
    Abort,
    Done,
    Fetch,
    Join,
    Missing,
    Sending,
    StatusRequest,
    StoreSet,
    decode_reply,
    encode,
)
from vllm_ascend.model_loader.netloader.serve import Offer, WeightServer
from vllm_ascend.model_loader.netloader.utils import Address, parse_address

from .support import (
    DEVICE,
    HOST,
    MIB,
    ROW,
    Proxy,
    blank_like,
    changing,
    client_process,
    closed_port,
    dial,
    identity,
    join_of,
    load,
    loads_right_bytes,
    rows,
    settings,
    source,
    tapped,
    tcp_pair,
    until,
    weights_of,
)

MODEL = rows(3)
# Deadlines that pass soon, for tests in which they have to pass.
HASTY = settings(handshake_timeout=0.3)
IMPATIENT = settings(progress_timeout=0.3)


@pytest.fixture(scope="module")
def weights():
    return weights_of(MODEL)


@pytest.fixture
def running(weights):
    """A source, which has to serve the right bytes after whatever a test has done to it."""
    with source(weights) as running:
        yield running
        assert loads_right_bytes(running, MODEL)


@pytest.fixture
def impatient(weights):
    """The same, with a short deadline for progress."""
    with source(weights, config=IMPATIENT) as running:
        yield running
        assert until(lambda: running.sessions == 0)
        assert loads_right_bytes(running, MODEL)


@pytest.fixture
def hasty(weights):
    """A source with a short deadline for everything before the transfer."""
    with source(weights, config=HASTY) as running:
        yield running
        assert until(lambda: running.sessions == 0)
        with client_of(running) as client:
            assert client.status().sessions == 0


def client_of(source, **deadlines):
    address = source if isinstance(source, Address) else source.address
    return ElasticClient.connect(
        address, **{"connect": 2.0, "handshake": 5.0, "progress": 5.0} | deadlines
    )


def answer(sock):
    """The one reply that comes before the source closes."""
    with sock.makefile("rb") as lines:
        return decode_reply(lines.readline())


def until_closed(sock):
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(1 << 16):
            pass


@contextlib.contextmanager
def group_of(client):
    """The client's end of a session's process group, once it has taken the offer."""
    client.request([])
    deadlines = {"handshake": 5.0, "progress": 5.0, "gone": client.hung_up}
    with form_group(DEVICE, client.tell, client.hear, CLIENT, HOST, **deadlines) as group:
        assert client.sending().chunks == []
        yield group


@contextlib.contextmanager
def session(source):
    """A client that has joined, and its group."""
    with client_of(source) as client:
        client.join(join_of(), identity())
        with group_of(client) as group:
            yield client, group


def server_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("netloader-")]


def session_threads():
    return [thread for thread in server_threads() if thread.name == "netloader-session"]


# What may come in the place of a JOIN


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe\xfd\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n",  # TLS
        b"\n",
        b"{}\n",
        b"[]\n",
        b'"JOIN"\n',
        b'{"label":"JOIN","content":{}}\n',
        b'{"label":"JOIN","content":"x"}',
        encode(Abort("bored")),
        encode(Done(True)),
    ],
)
def test_what_is_no_join_is_answered_with_a_reason(running, line):
    with dial(running.address) as sock:
        sock.sendall(line)
        assert answer(sock).reason
        assert sock.recv(1) == b""


def test_a_fetch_before_a_join_is_refused_by_name(running):
    with dial(running.address) as sock:
        sock.sendall(encode(Fetch([0])))
        assert answer(sock).reason == "a Fetch came before a JOIN"


def test_a_huge_line_is_cut_off(running):
    with dial(running.address) as sock, pytest.raises(OSError):
        for _ in range(1000):
            sock.sendall(b"x" * MIB)


def test_a_line_over_the_limit_of_a_join_is_refused(running):
    with dial(running.address) as sock:
        sock.sendall(b"x" * (MAX_JOIN_BYTES + 1))
        assert answer(sock).reason == f"a message of over {MAX_JOIN_BYTES} bytes"


@pytest.mark.parametrize("start", [b"", b"\xff", b'{"label":"JOIN",', b" " * 1000])
def test_half_a_line_and_then_silence_is_cut_off(hasty, start):
    with dial(hasty.address) as sock:
        sock.sendall(start)
        assert sock.recv(1) == b""


def test_one_byte_at_a_time_is_cut_off(hasty):
    with dial(hasty.address) as sock, pytest.raises(OSError):
        for _ in range(1000):
            sock.sendall(b" ")
            time.sleep(0.02)


def test_connecting_and_closing_is_harmless(running):
    for _ in range(50):
        dial(running.address).close()


def test_a_reset_is_harmless(running):
    for _ in range(50):
        sock = dial(running.address)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        sock.close()


def test_a_hundred_idle_connections_keep_nobody_out(weights):
    with source(weights, config=settings(handshake_timeout=60.0)) as running:
        idle = [dial(running.address) for _ in range(100)]
        assert loads_right_bytes(running, MODEL)
        assert idle[0].recv(1) == b""  # those that have waited longest had to go
        assert until(lambda: len(session_threads()) <= MAX_HANDSHAKES)
        for sock in idle:
            sock.close()


def test_connections_that_have_not_joined_are_bounded_however_fast_they_come(weights):
    with source(weights, config=settings(handshake_timeout=60.0)) as running:
        server = running.server._server
        forget, noticed = server._forget, threading.Event()

        def forget_late(connection):
            noticed.wait(20)  # as on a machine that has better things to do
            forget(connection)

        server._forget = forget_late
        idle = [dial(running.address) for _ in range(MAX_HANDSHAKES + 20)]
        with client_of(running) as client:
            client.status()
        assert len(server._handshakes) <= MAX_HANDSHAKES
        assert all(sock.recv(1) == b"" for sock in idle[:20])
        noticed.set()
        for sock in idle:
            sock.close()


def test_a_legacy_join_is_declined_at_once(running):
    with dial(running.address) as sock:
        sock.sendall(json.dumps({"label": "JOIN", "content": LEGACY}).encode())
        assert "protocol 1" in answer(sock).reason


LEGACY = {"device_id": 0, "model_path": "m", "tp": 1, "pp": 1, "port": 4711}


# Refusals


def refusal(source, join=None, who=None):
    who = who or identity()
    with client_of(source) as client, pytest.raises(SourceRefused) as error:
        client.join(join or join_of(who), who)
    assert str(error.value).startswith(f"{client.address}: refused: ")
    return str(error.value).removeprefix(f"{client.address}: refused: ")


def test_another_identity_is_refused_with_both_values_of_what_differs(running):
    reason = refusal(running, who=identity(rank=3, dtype="torch.float16"))
    assert reason == (
        "the models differ: rank is 3 here and 0 there; "
        "dtype is 'torch.float16' here and 'torch.bfloat16' there"
    )


def test_another_group_is_refused_by_name(running):
    reason = refusal(running, who=identity(group="netloader_draft"))
    assert reason == "there is no model of group 'netloader_draft' here"


def test_another_protocol_is_refused(running):
    reason = refusal(running, join_of(protocol=PROTOCOL + 1))
    assert reason == f"protocol {PROTOCOL + 1} is not spoken here, only {PROTOCOL}"


@pytest.mark.parametrize("chunk_bytes", [MIB - 1, 65 * MIB, 2**53])
def test_chunks_of_an_odd_size_are_refused(running, chunk_bytes):
    reason = refusal(running, join_of(chunk_bytes=chunk_bytes))
    assert reason == (
        f"chunks of {chunk_bytes} bytes are not made here, only multiples of 1048576 up to 67108864"
    )


@pytest.mark.parametrize("chunk_bytes", [0, MIB, 2 * MIB, 64 * MIB])
def test_chunks_of_the_size_asked_for_are_announced(running, chunk_bytes):
    with client_of(running) as client:
        ack = client.join(join_of(chunk_bytes=chunk_bytes), identity())
        assert ack.chunk_bytes == (chunk_bytes or MIB)
        assert ack.model_digest == running.offer.chunking(chunk_bytes).digests.model
        with group_of(client):
            client.finish(Abort("only asking"))


def test_a_model_that_cannot_be_sent_is_refused_with_the_reason():
    with source(None, reason="a.weight was made by loading") as running:
        assert refusal(running) == "a.weight was made by loading"


def test_a_withdrawn_model_is_refused(weights):
    with source(weights) as running:
        running.server.withdraw("netloader")
        assert refusal(running) == "there is no model of group 'netloader' here"
        running.server.offer(Offer(identity(), weights, DEVICE))
        assert loads_right_bytes(running, MODEL)


def test_target_and_draft_are_served_on_one_port(running):
    draft, who = rows(2, seed=9), identity(group="netloader_draft", model="draft")
    running.server.offer(Offer(who, weights_of(draft), DEVICE))
    assert loads_right_bytes(running, draft, who=who)
    assert loads_right_bytes(running, MODEL)


def test_a_busy_source_says_so_and_has_room_again_afterwards(weights):
    with source(weights, config=settings(max_sessions=1)) as running:
        with client_of(running) as first:
            first.join(join_of(), identity())
            assert refusal(running) == "busy: 1 of 1 sessions are open"
            with group_of(first):
                first.finish(Done(False))
        assert until(lambda: running.sessions == 0)
        assert loads_right_bytes(running, MODEL)


def test_a_refused_client_holds_no_place(weights):
    with source(weights, config=settings(max_sessions=1)) as running:
        with client_of(running) as client, pytest.raises(SourceRefused):
            client.join(join_of(identity(rank=1)), identity(rank=1))
        assert until(lambda: running.sessions == 0)
        assert loads_right_bytes(running, MODEL)


# STATUS


def test_anybody_may_ask_for_the_status(running):
    with client_of(running) as client:
        status = client.status()
    assert status.identities == [identity()]
    assert (status.sessions, status.max_sessions, status.bytes_sent) == (0, 4, 0)
    assert loads_right_bytes(running, MODEL)
    assert until(lambda: running.sessions == 0)
    with client_of(running) as client:
        assert client.status().bytes_sent == 3 * ROW


def test_the_status_is_had_while_all_sessions_are_taken(weights):
    with source(weights, config=settings(max_sessions=1)) as running:
        with session(running) as (first, _), client_of(running) as second:
            assert second.status().sessions == 1
            first.finish(Done(False))
        assert until(lambda: running.sessions == 0)


def test_the_status_needs_no_newline(running):
    with dial(running.address) as sock:
        sock.sendall(encode(StatusRequest()).rstrip())
        assert answer(sock).max_sessions == 4


# What may go wrong in a session


def test_a_chunk_that_does_not_exist_ends_the_session(running, log):
    with session(running) as (client, _):
        client.request([0, 3])
        with pytest.raises(SourceLost):
            client.sending()
    assert until(lambda: running.sessions == 0)
    assert "chunks [0, 3] asked for; there are 3" in log[-1]


@pytest.mark.parametrize("message", [join_of(), StatusRequest()])
def test_a_message_that_does_not_belong_in_a_session_ends_it(running, message, log):
    with session(running) as (client, _):
        client._connection.send(message, 5)
        with pytest.raises(SourceLost):
            client.sending()
    assert until(lambda: running.sessions == 0)
    assert "does not belong in a session" in log[-1]


def test_garbage_in_a_session_ends_it(running):
    with session(running) as (client, _):
        client._connection._sock.sendall(b"\xff\n")
        with pytest.raises(SourceLost):
            client.sending()
    assert until(lambda: running.sessions == 0)


def test_a_client_that_joins_and_is_never_heard_of_again_loses_its_place(hasty):
    with client_of(hasty) as client:
        client.join(join_of(), identity())
        assert hasty.sessions == 1
        assert until(lambda: hasty.sessions == 0)


def test_a_client_that_declines_the_offer_frees_its_place_at_once(weights):
    with source(weights, config=settings(max_sessions=1)) as running, client_of(running) as client:
        client.join(join_of(), identity())
        client.finish(Abort("too small"))
        assert until(lambda: running.sessions == 0, 1.5)


def test_a_client_that_takes_the_offer_and_is_never_heard_of_again_loses_its_place(hasty):
    with client_of(hasty) as client:
        client.join(join_of(), identity())
        client.request([])
        assert until(lambda: hasty.sessions == 0)


def test_a_client_that_forms_the_group_and_then_is_silent_loses_its_place(impatient):
    with session(impatient):
        assert impatient.sessions == 1
        assert until(lambda: impatient.sessions == 0)


def test_a_client_that_goes_away_after_the_join_frees_its_place_at_once(weights):
    with source(weights, config=settings(max_sessions=1)) as running:
        with client_of(running) as client:
            client.join(join_of(), identity())
        assert until(lambda: running.sessions == 0, 1.5)


def test_a_client_that_asks_and_never_receives_loses_its_place(impatient):
    with session(impatient) as (client, _):
        client.request([0, 1, 2] * 10)
        assert loads_right_bytes(impatient, MODEL)
        assert until(lambda: impatient.sessions == 0)


def test_a_client_that_keeps_saying_it_is_there_keeps_its_place(impatient):
    with session(impatient) as (client, _):
        for _ in range(6):
            time.sleep(IMPATIENT.progress_timeout / 2)
            client.request([])
            assert client.sending().chunks == []
        client.finish(Done(False))


def test_a_slow_reader_gets_everything(impatient):
    asked = [0, 1, 2] * 3
    with session(impatient) as (client, group):
        client.request(asked)
        assert client.sending().chunks == asked
        # Longer in all than the deadline, and never without progress for as long as that.
        for chunk in asked:
            time.sleep(IMPATIENT.progress_timeout / 2)
            received = torch.empty(ROW, dtype=torch.uint8)
            group.receive(received)
            group.wait()
            assert torch.equal(received, MODEL[f"row.{chunk}"])
        client.finish(Done(False))


def test_a_client_that_is_killed_in_mid_transfer_leaves_the_source_well(log):
    model = rows()
    killed = threading.Event()

    def tap(index, count):
        if count == 3:
            os.kill(client.pid, signal.SIGKILL)
            client.wait()
            killed.set()

    with source(tapped(model, tap)) as running:
        with client_process(running.address) as client:
            assert killed.wait(60)
            assert until(lambda: running.sessions == 0)
        assert loads_right_bytes(running, model)
    assert not [line for line in log if "complete" in line][1:]


def test_a_client_that_is_stopped_in_mid_transfer_loses_its_place():
    model = rows()
    stopped = threading.Event()

    def tap(index, count):
        if count == 3:
            os.kill(client.pid, signal.SIGSTOP)
            stopped.set()

    config = settings(progress_timeout=0.5)
    with (
        source(tapped(model, tap), config=config) as running,
        client_process(running.address) as client,
    ):
        assert stopped.wait(60)
        assert loads_right_bytes(running, model)
        assert until(lambda: running.sessions == 0)


def test_an_error_of_its_own_ends_a_session_and_not_the_source(running, log):
    def break_it(*_):
        raise KeyError("a bug")

    server = running.server._server
    handle, server._handle_session = server._handle_session, break_it
    with client_of(running) as client, pytest.raises(SourceLost):
        client.join(join_of(), identity())
    server._handle_session = handle
    assert any("the session failed" in line for line in log)
    assert until(lambda: running.sessions == 0)


def test_each_session_is_one_line_in_the_log_with_its_outcome(weights, log):
    def lines():
        return [line for line in log if "NetLoader rank 0: sent" in line]

    with source(weights) as running:
        assert loads_right_bytes(running, MODEL)
        assert until(lambda: len(lines()) == 1)
        assert lines()[0].endswith("complete")
        with session(running) as (client, _):
            client.finish(Abort("had\nenough\x1b[31m"))
            assert until(lambda: len(lines()) == 2)
        assert "the client gave up: had enough" in lines()[1]
        assert "\n" not in lines()[1]


# The client's side of a misbehaving source


def _scripted(reply, times=1):
    """A socket that answers the first message with some bytes and closes."""

    def serve(listener):
        sock, _ = listener.accept()
        with sock, contextlib.suppress(OSError):
            sock.recv(4096)
            if reply is None:
                sock.recv(4096)  # until the client has had enough
            for _ in range(times if reply else 0):
                sock.sendall(reply)

    listener = socket.create_server((HOST, 0))
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
    return listener, Address(HOST, listener.getsockname()[1])


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (b"", "the peer closed the connection"),
        (b"\xff\n", "not a valid message"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "not a valid message"),
        (b'{"label":"JOIN_ACK","content":{"name":"192.0.2.1:5"}}\n', "not a valid message"),
        (
            b'{"label":"SENDING","content":{"chunks":[],"digests":[],"sizes":[]}}\n',
            "does not belong here",
        ),
        (b'{"label":"STATUS"}\n', "not a valid message"),
        (None, "within 0.3 s"),
    ],
)
def test_a_join_that_is_not_answered_properly_is_a_lost_source(reply, why):
    listener, address = _scripted(reply)
    with listener, client_of(address, handshake=0.3) as client, pytest.raises(SourceLost) as error:
        client.join(join_of(), identity())
    assert str(error.value).startswith(f"{address}: ")
    assert why in str(error.value)
    assert "\n" not in str(error.value)


def test_a_refusal_of_the_legacy_kind_is_readable():
    listener, address = _scripted(b'{"label":"JOIN_NACK","content":"tp differs"}\n')
    with listener:
        assert refusal(address) == "tp differs"


def test_a_refusal_cannot_write_to_the_log_what_it_likes():
    line = json.dumps({"label": "JOIN_NACK", "content": "x\n\x1b[2J" + "y" * 10_000}) + "\n"
    listener, address = _scripted(line.encode())
    with listener:
        reason = refusal(address)
    assert reason.isprintable()
    assert len(reason) < 3000


def test_last_words_are_heard_after_what_was_said_before_them():
    said = encode(Sending([1], ["00"], [5])) * 3 + encode(Missing([2], "had to\ngo")) + b"\xff\n"
    listener, address = _scripted(said)
    with listener, client_of(address) as client:
        client.request([1])
        assert client.last_words() == "had to go"


@pytest.mark.parametrize("said", [b"", b"\xff\n", encode(Sending([1], ["00"], [5])), None])
def test_a_source_may_have_no_last_words(said):
    listener, address = _scripted(said)
    with listener, client_of(address) as client:
        client.request([1])
        assert client.last_words() == ""


def test_a_source_that_does_not_stop_talking_is_not_listened_to_for_long():
    listener, address = _scripted(encode(Sending([1], ["00"], [5])) * 100, times=10**9)
    with listener, client_of(address) as client:
        client.request([1])
        started = time.monotonic()
        assert client.last_words() == ""
        assert time.monotonic() - started < 5


def test_nobody_listening_is_a_lost_source():
    address = closed_port()
    with pytest.raises(SourceLost, match=f"{address}: cannot connect: Connection refused"):
        client_of(address)


def test_an_unknown_host_is_a_lost_source():
    with pytest.raises(SourceLost, match=r"no-such-host.invalid:80: cannot connect"):
        client_of(Address("no-such-host.invalid", 80))


def test_a_host_that_is_no_name_at_all_is_a_lost_source():
    with pytest.raises(SourceLost, match="cannot connect"):
        client_of(Address("a" * 70 + ".invalid", 80))


@pytest.mark.parametrize(
    ("lie", "why"),
    [
        ({"chunks": lambda chunks: [chunk + 1 for chunk in chunks]}, "announced"),
        ({"chunks": lambda chunks: [*chunks, 0]}, "does not belong here"),
        ({"chunks": lambda _: []}, "does not belong here"),
        ({"digests": lambda _: []}, "does not belong here"),
        ({"sizes": lambda sizes: [size - 1 for size in sizes]}, "bytes here and"),
        ({"sizes": lambda sizes: [*sizes, 5]}, "does not belong here"),
        ({"sizes": lambda _: []}, "does not belong here"),
    ],
)
def test_other_chunks_than_those_asked_for_are_a_lost_source(running, lie, why):
    def change(content):
        if content["chunks"]:
            content.update({name: of(content[name]) for name, of in lie.items()})

    proxy = Proxy(running.address, changing("SENDING", change))
    with proxy, pytest.raises(LoadFailed, match=why):
        load([proxy.address], blank_like(MODEL))


# Starting and stopping


def test_stopping_leaves_no_thread_no_port_and_no_file(weights, tmp_path):
    config = settings(output_prefix=f"{tmp_path}/rank_", handshake_timeout=30.0)
    before = set(server_threads())
    with source(weights, config=config) as running:
        assert parse_address((tmp_path / "rank_0.txt").read_text()) == running.address
        idle = dial(running.address)
        with session(running) as (client, _):
            assert running.sessions == 1
            started = time.monotonic()
            running.server.stop()
            assert time.monotonic() - started < 4
            assert set(server_threads()) <= before
            with pytest.raises(SourceLost):
                client.request([0])
                client.sending()
        assert idle.recv(1) == b""
        idle.close()
    assert os.listdir(tmp_path) == []
    with pytest.raises(OSError):
        dial(running.address, 1)


def test_stopping_twice_or_before_starting_is_harmless(weights):
    WeightServer(settings(), 0, HOST).stop()
    with source(weights) as running:
        running.server.stop()


def test_a_port_that_is_taken_is_an_os_error(weights, tmp_path):
    with source(weights) as running:
        another = WeightServer(settings(output_prefix=f"{tmp_path}/rank_"), 0, HOST)
        with pytest.raises(OSError):
            another.start(running.address.port)
        another.stop()
    assert os.listdir(tmp_path) == []


def test_a_port_file_that_cannot_be_written_leaves_nothing_open(tmp_path):
    (tmp_path / "rank_0.txt").mkdir()
    before = set(server_threads())
    server = WeightServer(settings(output_prefix=f"{tmp_path}/rank_"), 0, HOST)
    with pytest.raises(OSError):
        server.start(0)
    assert set(server_threads()) <= before


def test_a_host_that_is_not_this_machine_is_an_os_error():
    with pytest.raises(OSError):
        WeightServer(settings(listen_host="192.0.2.1"), 0, HOST).start(0)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 on this machine")
@pytest.mark.parametrize("host", [HOST, "::1", "localhost"])
def test_without_a_host_a_source_is_reached_by_ipv4_and_ipv6(weights, host):
    with source(weights, config=settings(listen_host=None)) as running:
        reached = dataclasses.replace(running, address=Address(host, running.address.port))
        assert loads_right_bytes(reached, MODEL)


def test_the_ends_of_a_dual_stack_socket_are_shown_as_ipv4(weights):
    with source(weights, config=settings(listen_host=None)) as running, client_of(running) as one:
        assert one.local_host == HOST


def test_a_connection_knows_both_its_ends():
    with tcp_pair() as (connection, far):
        assert connection.local_host == HOST
        assert (connection.peer_host, connection.peer_port) == far.getsockname()


@pytest.fixture
def no_collector():
    """Nothing may wait for Python's garbage collector, which runs late where much is allocated."""
    gc.disable()
    yield
    gc.enable()


def test_failed_sessions_leave_no_threads_and_no_descriptors(weights, no_collector):
    process = psutil.Process()
    config = settings(max_sessions=256, handshake_timeout=1.0)
    to_the_group = [join_of(), Fetch([]), StoreSet("0 is here", b"")]
    bad_address = StoreSet("group/0/0", b"no address")

    def fail(number):
        firsts = [b"\xff\n", encode(join_of(identity(rank=1))), encode(Fetch([0])), b""]
        with dial(running.address) as sock:
            if number % 8 == 0:
                sock.sendall(encode(join_of()))
                answer(sock)
            elif number % 8 == 1:
                sock.sendall(b"".join(map(encode, [*to_the_group, bad_address])))
                until_closed(sock)
            elif number % 8 == 3:
                sock.sendall(b"".join(map(encode, to_the_group)))
                answer(sock)
            else:
                sock.sendall(firsts[number % 4])

    def settled(threads, descriptors):
        return process.num_threads() <= threads and process.num_fds() <= descriptors

    with source(weights, config=config) as running:
        for number in range(8):  # what is made once stays
            fail(number)
        assert loads_right_bytes(running, MODEL)
        assert until(lambda: running.sessions == 0)
        threads, descriptors = process.num_threads(), process.num_fds()
        for number in range(200):
            fail(number)
        assert until(lambda: settled(threads, descriptors))
        assert loads_right_bytes(running, MODEL)


def test_a_join_is_understood_whatever_order_its_fields_come_in(running):
    content = json.loads(encode(join_of(identity(rank=5))))["content"]
    line = json.dumps({"content": dict(reversed(content.items())), "label": "JOIN"})
    with dial(running.address) as sock:
        sock.sendall(line.encode() + b"\n")
        assert answer(sock).reason == "the models differ"


def test_a_join_with_every_limit_reached_is_answered(running):
    join = Join(2**53, "m", 2**53, 2**53, protocol=2**63 - 1, chunk_bytes=2**53)
    with dial(running.address) as sock:
        sock.sendall(encode(join))
        assert "is not spoken here" in answer(sock).reason
