import json
import socket
import threading
import time

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader.config import MAX_MODEL_NAME_BYTES
from vllm_ascend.model_loader.netloader.errors import ProtocolError
from vllm_ascend.model_loader.netloader.identity import ModelIdentity, Revision
from vllm_ascend.model_loader.netloader.interaction.protocol import (
    DRAFT_GROUP,
    MAX_JOIN_BYTES,
    MAX_MESSAGE_BYTES,
    Abort,
    Done,
    Fetch,
    Join,
    JoinAck,
    JoinNack,
    Missing,
    Sending,
    Status,
    StatusRequest,
    StoreSet,
    decode_reply,
    decode_request,
    encode,
    shortened,
)

from .support import identity, join_of, tcp_pair

_counts = st.integers(0, 2**53)
_texts = st.text(max_size=30)
_hex = st.text("0123456789abcdef", max_size=128)
_revisions = st.builds(Revision, st.none() | _texts, st.booleans())
_identities = st.builds(
    ModelIdentity,
    **{
        "group": _texts,
        "model": _texts,
        "revision": _revisions,
        "rank": _counts,
        "tp": _counts,
        "pp": _counts,
        "dp": _counts,
        "ep": st.booleans(),
        "dtype": _texts,
        "quantization": st.none() | _texts,
        "quantization_config": _texts,
        "config": _texts,
        "layout": _texts,
        "vllm_version": st.none() | _texts,
    },
)
_chunks = st.lists(_counts, max_size=20)
_requests = st.one_of(
    st.builds(
        Join,
        device_id=_counts,
        model_path=_texts,
        tp=_counts,
        pp=_counts,
        port=st.integers(0, 65535),
        group_name=_texts,
        int8_cache=_texts,
        protocol=st.integers(-(2**63), 2**63 - 1),
        identity=st.text("0123456789abcdef", max_size=64),
        revision=_revisions,
        layouts=st.lists(_texts, max_size=2),
        chunk_bytes=_counts,
        listen=st.none() | _texts,
    ),
    st.builds(StoreSet, _texts, st.binary(max_size=100)),
    st.builds(Fetch, _chunks),
    st.builds(Done, st.booleans(), _hex),
    st.builds(Abort, _texts),
    st.builds(StatusRequest),
)
_manifests = st.sampled_from(
    [b"{}", b'{"layout":"raw","tensors":[["a","b",[1]]]}', b"[1, 2]", b'""']
)
_replies = st.one_of(
    st.builds(
        JoinAck,
        chunk_bytes=st.integers(1, 64 << 20),
        digest_algorithm=_texts,
        model_digest=_hex,
        manifest=_manifests.map(msgspec.Raw),
        revision=_revisions,
    ),
    st.builds(JoinNack, _texts, st.none() | _identities),
    st.builds(StoreSet, _texts, st.binary(max_size=100)),
    st.builds(Sending, _chunks, st.lists(_hex, max_size=20), _chunks),
    st.builds(Missing, _chunks, _texts),
    st.builds(Abort, _texts),
    st.builds(Status, st.lists(_identities, max_size=2), _counts, _counts, _counts),
)
_ACK = JoinAck(1, "xxh3_128", "", msgspec.Raw(b"{}"))


def comparable(message):
    """A message as something that compares by value, which `Raw` does not."""
    return type(message), msgspec.json.encode(message)


# Messages


@given(_requests)
def test_a_request_reads_back_from_its_line(message):
    line = encode(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert comparable(decode_request(line)) == comparable(message)


@given(_replies)
def test_a_reply_reads_back_from_its_line(message):
    line = encode(message)
    assert line.count(b"\n") == 1
    assert comparable(decode_reply(line)) == comparable(message)


def _decoded(line):
    for decode in (decode_request, decode_reply):
        try:
            message = decode(line)
        except ProtocolError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 3000
        else:
            # Whatever gets past the border is a whole message of the protocol.
            assert comparable(decode(encode(message))) == comparable(message)


@given(st.binary(max_size=200))
@example(b"")
@example(b"\xff")
@example(b"[" * 100_000)
@example(b'{"label":"ABORT","content":' + b"[" * 100_000)
@example(b'{"label":"ABORT","content":{"reason":"\\ud800"}}')
@example(b'{"label":"ABORT","content":{"reason":"\xff"}}')
@example(b'{"label":"\\ud800","content":{}}')
@example(b'{"label":"FETCH","content":{"chunks":[1e400]}}')
@example(b'{"label":"FETCH","content":{"chunks":[' + b"9" * 5000 + b"]}}")
@example(b'{"label":"JOIN_NACK","content":"\xff"}')
@example(b'{"label":"JOIN_NACK","content":""}')
@example(b'{"label":"' + b"x" * 100_000 + b'"}')
def test_any_bytes_are_a_message_or_a_protocol_error(line):
    _decoded(line)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(_texts, values, max_size=4),
    max_leaves=8,
)
_labels = st.sampled_from(
    ["JOIN", "JOIN_ACK", "JOIN_NACK", "FETCH", "SENDING", "MISSING", "DONE", "ABORT", "STATUS", "?"]
)


@given(_labels, _json)
def test_any_json_under_any_label_is_a_message_or_a_protocol_error(label, content):
    _decoded(json.dumps({"label": label, "content": content}).encode())


@given(_requests | _replies, st.data())
def test_a_damaged_message_is_a_message_or_a_protocol_error(message, data):
    line = bytearray(encode(message))
    position = data.draw(st.integers(0, len(line) - 1))
    line[position] = data.draw(st.integers(0, 255))
    _decoded(line)


@given(_requests | _replies, st.data())
def test_a_field_of_another_kind_is_a_message_or_a_protocol_error(message, data):
    envelope = json.loads(encode(message))
    if envelope["content"]:
        field = data.draw(st.sampled_from(sorted(envelope["content"])))
        envelope["content"][field] = data.draw(_json)
    _decoded(json.dumps(envelope).encode())


@pytest.mark.parametrize(
    "line",
    [
        b'{"label":"FETCH","content":{"chunks":[-1]}}',
        b'{"label":"FETCH","content":{"chunks":[1.5]}}',
        b'{"label":"FETCH","content":{"chunks":["1"]}}',
        b'{"label":"FETCH","content":{}}',
        b'{"label":"FETCH"}',
        b'{"label":"fetch","content":{"chunks":[]}}',
        b'{"label":"SENDING","content":{"chunks":[],"digests":[]}}',  # only a source says this
        b'{"label":"JOIN","content":{"device_id":0,"model_path":"m","tp":1}}',
        b'{"label":"JOIN","content":{"device_id":0,"model_path":"m","tp":1,"pp":1,"port":65536}}',
        b'{"label":"DONE","content":{"complete":true,"model_digest":"ABC"}}',
        b'{"content":{}}',
        b'"JOIN"',
    ],
)
def test_a_request_that_is_not_whole_is_refused(line):
    with pytest.raises(ProtocolError):
        decode_request(line)


def test_a_label_of_the_wrong_direction_is_refused():
    with pytest.raises(ProtocolError, match="FETCH"):
        decode_reply(encode(Fetch([1])))
    with pytest.raises(ProtocolError, match="JOIN_NACK"):
        decode_request(encode(JoinNack("no")))


def test_unknown_fields_are_ignored_so_that_later_versions_can_add_some():
    line = b'{"label":"FETCH","content":{"chunks":[1],"priority":3},"more":0}'
    assert decode_request(line) == Fetch([1])


# What the NetLoader of vLLM Ascend sends

LEGACY_JOIN = json.dumps(
    {
        "label": "JOIN",
        "content": {
            "device_id": 1,
            "model_path": "/models/m",
            "tp": 2,
            "pp": 1,
            "port": 4711,
            "group_name": "netloader",
            "int8_cache": "no",
        },
    }
).encode()


def test_a_legacy_join_is_understood_and_told_apart():
    join = decode_request(LEGACY_JOIN)
    assert (join.device_id, join.model_path, join.tp, join.port) == (1, "/models/m", 2, 4711)
    assert join.protocol == 1


def test_an_older_join_without_group_and_int8_cache_is_understood():
    join = decode_request(
        b'{"label":"JOIN","content":{"device_id":0,"model_path":"m","tp":1,"pp":1,"port":1}}'
    )
    assert (join.group_name, join.int8_cache, join.protocol) == ("netloader", "no", 1)


def test_a_join_has_the_legacy_label_and_fields():
    envelope = json.loads(encode(join_of()))
    assert envelope["label"] == "JOIN"
    assert json.loads(LEGACY_JOIN)["content"].keys() <= envelope["content"].keys()


def test_a_refusal_may_be_a_plain_string():
    assert decode_reply(b'{"label":"JOIN_NACK","content":"a \\"reason\\""}') == JoinNack(
        'a "reason"'
    )


# Limits


@pytest.mark.parametrize("name", ["x" * MAX_MODEL_NAME_BYTES, '"' * (MAX_MODEL_NAME_BYTES // 2)])
def test_the_longest_join_fits_in_the_read_of_a_legacy_server(name):
    who = identity(model=name, rank=65535, tp=65536, pp=65536, group=DRAFT_GROUP)
    join = join_of(who, int8_cache="dram", layouts=["processed"], chunk_bytes=64 << 20, port=65535)
    assert len(encode(join)) <= MAX_JOIN_BYTES == 1024


def test_a_message_that_no_receiver_takes_is_not_sent():
    with pytest.raises(ProtocolError, match="JOIN"):
        encode(join_of(identity(model="x" * 1024)))
    with pytest.raises(ProtocolError, match="MISSING"):
        encode(Missing([], "x" * MAX_MESSAGE_BYTES))


def test_a_line_at_the_limit_is_taken_and_one_over_it_refused():
    line = encode(Abort("x" * 900))
    with tcp_pair() as (connection, peer):
        peer.sendall(line * 3)
        assert connection.receive_request(5) == Abort("x" * 900)  # and has read the others as well
        assert connection.receive_request(5, len(line) - 1) == Abort("x" * 900)
        with pytest.raises(ProtocolError, match=f"over {len(line) - 2} bytes"):
            connection.receive_request(5, len(line) - 2)


def test_an_endless_line_is_refused_without_buffering_it():
    with tcp_pair() as (connection, peer):
        sender = threading.Thread(target=_send_until_closed, args=(peer, b"x" * (1 << 20)))
        sender.start()
        with pytest.raises(ProtocolError, match="over 1000 bytes"):
            connection.receive_request(5, 1000)
        assert len(connection._buffer) <= 2 * 1000 + 2
        connection.close()
        sender.join()


def _send_until_closed(sock, data):
    try:
        while True:
            sock.sendall(data)
    except OSError:
        pass


# Framing

CONVERSATION = [join_of(), Fetch([0, 1, 2]), Fetch([]), Done(True, "0123abcd")]


def test_messages_that_arrive_together_are_told_apart():
    with tcp_pair() as (connection, peer):
        peer.sendall(b"".join(map(encode, CONVERSATION)))
        assert [connection.receive_request(5) for _ in CONVERSATION] == CONVERSATION


def _receive_in_two_parts(connection, peer, line, cut, first):
    peer.sendall(line[:cut])
    try:
        message = connection.receive_request(0.003, first=first)
    except TimeoutError:
        peer.sendall(line[cut:])
        return connection.receive_request(5, first=first)
    peer.sendall(line[cut:])  # the newline, after a message that was complete without it
    return message


def test_a_message_may_be_split_at_any_byte():
    join, fetch = encode(join_of()), encode(Fetch([7, 8]))
    with tcp_pair() as (connection, peer):
        for cut in range(1, len(fetch)):
            assert _receive_in_two_parts(connection, peer, fetch, cut, False) == Fetch([7, 8])
    for cut in range(1, len(join)):
        with tcp_pair() as (connection, peer):
            assert _receive_in_two_parts(connection, peer, join, cut, True) == join_of()
            peer.sendall(fetch)
            assert connection.receive_request(5) == Fetch([7, 8])


@pytest.mark.parametrize("end", [b"", b" ", b"\n", b"\r\n"])
def test_a_first_message_needs_no_newline(end):
    with tcp_pair() as (connection, peer):
        peer.sendall(LEGACY_JOIN + end)
        assert connection.receive_request(5, MAX_JOIN_BYTES, first=True).model_path == "/models/m"


def test_any_later_message_needs_its_newline():
    with tcp_pair() as (connection, peer):
        peer.sendall(encode(Fetch([1])).rstrip())
        with pytest.raises(TimeoutError):
            connection.receive_request(0.1)
        peer.sendall(b"\n")
        assert connection.receive_request(5) == Fetch([1])


def test_a_line_that_is_no_message_does_not_spoil_the_next_one():
    with tcp_pair() as (connection, peer):
        peer.sendall(b"GET / HTTP/1.1\r\n" + encode(Fetch([1])))
        with pytest.raises(ProtocolError):
            connection.receive_request(5)
        assert connection.receive_request(5) == Fetch([1])


# Deadlines


def test_a_peer_that_sends_one_byte_at_a_time_does_not_move_the_deadline():
    with tcp_pair() as (connection, peer):
        stop = threading.Event()

        def trickle():
            while not stop.wait(0.02):
                peer.sendall(b" ")

        trickler = threading.Thread(target=trickle)
        trickler.start()
        started = time.monotonic()
        with pytest.raises(TimeoutError, match=r"within 0.3 s"):
            connection.receive_request(0.3, first=True)
        assert time.monotonic() - started < 3
        stop.set()
        trickler.join()


def test_a_silent_peer_meets_the_deadline():
    with tcp_pair() as (connection, _), pytest.raises(TimeoutError, match=r"within 0.1 s"):
        connection.receive_reply(0.1)


def test_a_peer_that_never_reads_meets_the_deadline():
    with tcp_pair() as (connection, peer):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            connection.send(Missing([], "x" * (MAX_MESSAGE_BYTES // 2)), 0.3)
        assert time.monotonic() - started < 3


def test_a_peer_that_closes_is_noticed_at_once():
    with tcp_pair() as (connection, peer):
        peer.sendall(b'{"label":')
        peer.close()
        with pytest.raises(ConnectionResetError):
            connection.receive_request(60)


def test_cutting_wakes_a_thread_that_waits_for_a_message():
    with tcp_pair() as (connection, _):
        outcome = []

        def wait():
            try:
                connection.receive_request(60)
            except OSError as error:
                outcome.append(error)

        waiter = threading.Thread(target=wait)
        waiter.start()
        time.sleep(0.1)  # it waits by now, or is told all the sooner
        connection.cut()
        waiter.join(10)
        assert outcome


# Text for logs


@given(st.text())
@example("a\x1b[31m\r\nb\u2028c\u202e")
def test_a_peers_text_is_one_printable_line_of_bounded_length(text):
    shown = shortened(text, 20)
    assert shown.isprintable()
    assert len(shown) <= 23
    if text.isprintable() and len(text) <= 20:
        assert shown == text


def test_the_ack_carries_its_manifest_unread():
    line = encode(_ACK).replace(b'"manifest":{}', b'"manifest":{"odd": [1, {}]}')
    assert bytes(decode_reply(line).manifest) == b'{"odd": [1, {}]}'
