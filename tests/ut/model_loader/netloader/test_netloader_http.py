import contextlib
import errno
import hashlib
import http.client
import json
import random
import select
import shutil
import socket
import subprocess
import threading
import time

import msgspec
import psutil
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoints import read_regions
from vllm_ascend.model_loader.netloader.errors import (
    BlocksNotHere,
    OtherPlacement,
    ProtocolError,
    SourceBusy,
    SourceError,
    SourceLost,
    SourceRefused,
    SourceUnreachable,
    TransferCorrupt,
)
from vllm_ascend.model_loader.netloader.interaction import api, server
from vllm_ascend.model_loader.netloader.interaction.api import (
    Bytes,
    Code,
    Done,
    Join,
    Joined,
    Refusal,
)
from vllm_ascend.model_loader.netloader.interaction.elastic import ElasticClient, ElasticServer
from vllm_ascend.model_loader.netloader.interaction.wire import Wire
from vllm_ascend.model_loader.netloader.utils import Address

from .test_netloader_api import DIGEST, IDENTITY

HOST = "127.0.0.1"
BLOCK = 1000
BLOCKS = 5000
CONTENT = bytes(i * 7 % 251 for i in range(BLOCK)) * BLOCKS
MANIFEST = {"tensors": ["weight"]}
PEER = api.Peer("10.0.0.7:28000", "another process")
JOIN = msgspec.json.encode(Join(IDENTITY))
PATIENCE = 20
AT_ONCE = 5  # a second is promised, to a machine that is not busy; every deadline is later


def until(condition, seconds=PATIENCE):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


FILE_CONTENT = b"{}\n"
FILE = api.ModelFile("config.json", 3, hashlib.sha256(FILE_CONTENT).hexdigest())


class Group:
    """Says back what it is told, and sends nothing."""

    max_bytes = 1 << 20
    forming = False

    def __init__(self):
        self.sent = []
        self.unsettled = None
        self.failure = None

    def exchange(self, values):
        return values[::-1]

    def sizes(self, runs):
        return [(last - first + 1) * BLOCK for first, last in runs]

    def send(self, runs):
        if self.failure is not None:
            raise self.failure
        self.sent.append(runs)

    def settle(self):
        if self.unsettled is not None:
            raise self.unsettled


class Service:
    """Serves CONTENT in blocks of 1,000 bytes."""

    def __init__(self):
        self.refusal = None  # what a join raises
        self.wait = None  # called with the session in a join
        self.peers = []
        self.ended = []
        self.ends = []
        self.groups = []
        self.chunks = lambda data: [[data]]
        self.nbytes = None
        self.checked = []

    def join(self, session, join):
        session.on_close(lambda: self.ended.append(session.peer))
        if self.wait is not None:
            self.wait(session)
        if self.refusal is not None:
            raise self.refusal
        if join.weights == DIGEST:
            return Joined(DIGEST, 1, "instance", peers=self.peers)
        manifest = msgspec.Raw(msgspec.json.encode(MANIFEST))
        return Joined(DIGEST, 1, "instance", peers=self.peers, manifest=manifest, blocks=bytes(32))

    def blocks(self, session, digest, first, last):
        if digest != DIGEST:
            raise Refusal(Code.CHANGED, "other weights by now")
        if last >= BLOCKS:
            raise Refusal(Code.OUT_OF_RANGE, f"there are {BLOCKS} blocks")
        data = memoryview(CONTENT)[first * BLOCK : (last + 1) * BLOCK]
        return Bytes(len(data) if self.nbytes is None else self.nbytes, self.made(data))

    def made(self, data):
        yield from self.chunks(data)

    def check(self, session, digest, first, last):
        if digest != DIGEST:
            raise Refusal(Code.CHANGED, "other weights by now")
        self.checked.append((first, last))

    def others(self, join):
        return DIGEST, self.peers

    def have(self, session, weights, since, wait):
        if weights != DIGEST:
            raise Refusal(Code.CHANGED, "other weights by now")
        return api.Have(since + 1, [(since, since + wait)], False)

    def peers_of(self, weights):
        return self.peers

    def records(self, session, weights):
        return CONTENT[: 1 << 20]

    def regions(self, session, weights, regions):
        self.regions_asked = regions
        data = b"".join(CONTENT[one.offset : one.offset + one.size[0]] for one in regions)
        digest = xxhash.xxh3_128_digest(data)
        return Bytes(len(data) + len(digest), self.made(data + digest))

    def open_group(self, session, weights):
        self.groups.append(Group())
        session.on_close(lambda: self.ended.append(session.peer))
        return self.groups[-1]

    def done(self, session, done):
        self.ends.append(done)

    def status(self, sessions):
        return api.Status("0.1.0", "instance", 0, [], [], 4, sessions, 0)

    def files(self, group):
        return [FILE]

    def file(self, group, name):
        return Bytes(len(FILE_CONTENT), self.made(memoryview(FILE_CONTENT)))

    def metrics(self):
        return b"some_total 1.0\n"


def read_blocks(client, digest, first, last, into):
    client.ask_blocks(digest, first, last)
    client.receive_blocks(sum(map(len, into)), [into])


def send(client, group, runs):
    client.ask_runs(group, runs)
    return client.hear_sizes()


class Running:
    """A server, and ways to talk to it."""

    def __init__(self, **settings):
        self.service = Service()
        defaults = dict(
            max_sessions=4, handshake_timeout=PATIENCE, progress_timeout=PATIENCE, idle_timeout=60
        )
        self.server = ElasticServer(self.service, **{**defaults, **settings})
        self.port = self.server.start(HOST, 0)
        self.address = Address(HOST, self.port)

    def dial(self):
        return socket.create_connection((HOST, self.port), timeout=PATIENCE)

    def client(self, **deadlines):
        return connect(self.address, **deadlines)

    def ask(self, raw, method="GET"):
        """Send bytes and return the answer: status, headers, body."""
        with self.dial() as sock:
            sock.sendall(raw)
            return answer_on(sock, method)

    def serves(self):
        """Whether the next client gets the right bytes."""
        with self.client() as client:
            client.join(Join(IDENTITY))
            return read(client, 3, 5) == CONTENT[3 * BLOCK : 6 * BLOCK]


def connect(address, *, connect=PATIENCE, handshake=PATIENCE, progress=PATIENCE):
    return ElasticClient.connect(address, connect=connect, handshake=handshake, progress=progress)


def connected_pair():
    with socket.create_server((HOST, 0)) as listener:
        far = socket.create_connection(listener.getsockname(), timeout=PATIENCE)
        return listener.accept()[0], far


def answer_on(sock, method="GET"):
    answer = http.client.HTTPResponse(sock, method=method)
    answer.begin()
    return answer.status, answer.headers, answer.read()


def read(client, first, last):
    data = bytearray((last - first + 1) * BLOCK)
    read_blocks(client, DIGEST, first, last, [memoryview(data)])
    return data


@contextlib.contextmanager
def running(**settings):
    running = Running(**settings)
    try:
        yield running
    finally:
        running.server.stop()


@pytest.fixture
def source(log):
    """A server that goes on serving, without a traceback, whatever a test has done to it."""
    with running() as source:
        yield source
        assert until(lambda: source.server.sessions == 0)
        source.service.__init__()
        assert source.serves()
    assert not [line for line in log if line.endswith("failed")]


@pytest.fixture
def hasty():
    """The same, with deadlines that pass soon."""
    with running(handshake_timeout=0.3, progress_timeout=0.3, idle_timeout=0.3) as hasty:
        yield hasty


def post(path, body, *headers):
    lines = [f"POST {path} HTTP/1.1", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def get(target, *headers):
    return "\r\n".join([f"GET {target} HTTP/1.1", *headers, "", ""]).encode("utf-8")


JOIN_PATH = api.JOIN.format(group=api.TARGET_GROUP)
RUN = f"/netloader/v1/weights/{DIGEST}/blocks/"


def with_length(*lines):
    head = "\r\n".join([f"POST {JOIN_PATH} HTTP/1.1", *lines, "", ""])
    return head.encode("latin-1") + JOIN


# What is asked, and how it is answered


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (get("/status"), 200, None),
        (get("/healthz"), 200, None),
        (get(f"http://{HOST}/status"), 200, None),
        (b"GET /status HTTP/1.0\r\n\r\n", 200, None),
        (b"GET /status HTTP/1.1\n\n", 200, None),
        (get("/status", "Content-Length: 2") + b"{}", 200, None),
        (get(RUN + "0-0"), 200, None),
        (post(JOIN_PATH, JOIN), 200, None),
        (get("/x"), 404, "not_found"),
        (get("/"), 200, None),
        (get("/metrics"), 200, None),
        (get("/status?x=1"), 404, "not_found"),
        (get("/%73tatus"), 404, "not_found"),
        (get(RUN + "0"), 404, "not_found"),
        (get(RUN + "-1-2"), 404, "not_found"),
        (get(RUN + "0-%31"), 404, "not_found"),
        (get(RUN + "\u0661-\u0662"), 400, "bad_request"),
        (get(RUN + "3-2"), 416, "out_of_range"),
        (get(RUN + f"0-{BLOCKS}"), 416, "out_of_range"),
        (get(RUN + f"0-{10**19}"), 416, "out_of_range"),
        (get(RUN.replace("9", "8") + "0-0"), 410, "changed"),
        (post("/status", b""), 405, "method_not_allowed"),
        (get(JOIN_PATH), 405, "method_not_allowed"),
        (b"DELETE /status HTTP/1.1\r\n\r\n", 405, "method_not_allowed"),
        (b"get /status HTTP/1.1\r\n\r\n", 405, "method_not_allowed"),
        (b"GET /status\r\n", 400, "bad_request"),
        (b"GET /status HTTP/0.9\r\n", 400, "bad_request"),
        (b"GET /status HTTP/2.0\r\n\r\n", 400, "bad_request"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "bad_request"),
        (b"GET  /status HTTP/1.1\r\n\r\n", 400, "bad_request"),
        (b"\r\n", 400, "bad_request"),
        (b"\x16\x03\x01\x02\x00\x01\n", 400, "bad_request"),
        (b"\x00" * 100 + b"\n", 400, "bad_request"),
        (get("/" + "a" * 8000), 414, "uri_too_long"),
        (b"GET /" + b"a" * 100_000, 414, "uri_too_long"),
        (get("/status", *["A: b"] * 200), 431, "headers"),
        (get("/status", "A: " + "b" * 100_000), 431, "headers"),
        (get("/status", *["A: " + "b" * 1000] * 90), 431, "headers"),
        (get("/status", "nothing"), 400, "bad_request"),
        (get("/status", ": nothing"), 400, "bad_request"),
        (with_length(), 411, "length_required"),
        (with_length("Transfer-Encoding: chunked"), 411, "length_required"),
        (with_length("Transfer-Encoding: chunked", "Content-Length: 2"), 411, "length_required"),
        (with_length(f"Content-Length : {len(JOIN)}"), 400, "bad_request"),
        (with_length(*[f"Content-Length: {len(JOIN)}"] * 2), 400, "bad_request"),
        (with_length("Content-Length: 2, 2"), 400, "bad_request"),
        (with_length("Content-Length: -2"), 400, "bad_request"),
        (with_length("Content-Length: +2"), 400, "bad_request"),
        (with_length("Content-Length: 0x2"), 400, "bad_request"),
        (with_length("Content-Length: \xb2"), 400, "bad_request"),
        (with_length("Content-Length: "), 400, "bad_request"),
        (with_length(f"Content-Length: {api.MAX_BODY + 1}"), 413, "too_large"),
        (with_length(f"Content-Length: {10**19}"), 413, "too_large"),
        (with_length("Content-Length: " + "9" * 5000), 400, "bad_request"),
        (post(JOIN_PATH, b" " * 200_000), 413, "too_large"),
        (post(JOIN_PATH, b""), 400, "bad_request"),
        (post(JOIN_PATH, b"\xff"), 400, "bad_request"),
        (post(JOIN_PATH, b"[" * 60_000), 400, "bad_request"),
        (post("/netloader/v1/models/netloader_draft/join", JOIN), 400, "bad_request"),
        (post("/netloader/v1/groups/0/store", b'{"set":[]}'), 404, "not_found"),
        (post("/netloader/v1/groups/0/send", b'{"runs":[[0,1]]}'), 404, "not_found"),
    ],
    ids=lambda value: repr(value[:60]) if isinstance(value, bytes) else None,
)
def test_a_request_gets_a_status_and_a_code(source, raw, status, code):
    got, headers, body = source.ask(raw)
    assert got == status
    assert headers["Server"] == "NetLoader"
    if code is not None:
        assert json.loads(body)["code"] == code
        assert len(body) < 2000


@pytest.mark.parametrize(
    "target",
    ["/healthz", RUN + "1-2", RUN + "3-2", "/nowhere", JOIN_PATH, "/%73tatus", "/" + "a" * 8000],
)
def test_a_request_in_the_form_of_our_own_clients_is_answered_as_any_other(source, target):
    own, others = get(target, "Host: a:1"), get(target, "Host: a:1", "Accept: */*")
    answers = [source.ask(raw) for raw in (own, others)]
    said = [(status, headers.items(), body) for status, headers, body in answers]
    assert said[0] == said[1]


def test_our_own_clients_requests_may_come_in_parts_and_before_their_turn(source):
    whole = get(RUN + "1-2", "Host: a:1") + get("/healthz", "Host: a:1")
    for cut in (1, 4, 30, len(whole) - 1):
        with source.dial() as sock:
            sock.sendall(whole[:cut])
            time.sleep(0.02)
            sock.sendall(whole[cut:])
            stream = sock.makefile("rb")
            for end in (b"", b"ok\n"):
                assert int(stream.readline().split()[1]) == 200
                headers = http.client.parse_headers(stream)
                assert stream.read(int(headers["Content-Length"])).endswith(end)


def test_the_method_that_is_allowed_is_named(source):
    status, headers, _ = source.ask(post("/status", b""))
    assert (status, headers["Allow"]) == (405, "GET")


def test_the_answer_to_head_has_no_body(source):
    with source.dial() as sock:
        sock.sendall(b"HEAD /status HTTP/1.1\r\n\r\n")
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += sock.recv(1)
        assert b" 405 " in head and b"Content-Length: 0" not in head
        sock.sendall(get("/healthz"))
        assert answer_on(sock)[2] == b"ok\n"


def test_requests_may_come_before_their_turn(source):
    with source.dial() as sock:
        sock.sendall(get("/healthz") + get(RUN + "1-2") + post(JOIN_PATH, JOIN) + get("/nowhere"))
        stream = sock.makefile("rb")
        for status in (200, 200, 200, 404):
            assert int(stream.readline().split()[1]) == status
            headers = http.client.parse_headers(stream)
            assert len(stream.read(int(headers["Content-Length"]))) > 0


@pytest.mark.parametrize(("version", "wish"), [("1.0", "keep-alive"), ("1.1", "close")])
def test_the_connection_ends_where_the_client_wants_it_to(source, version, wish):
    with source.dial() as sock:
        sock.sendall(f"GET /healthz HTTP/{version}\r\nConnection: {wish}\r\n\r\n".encode())
        answer = b"".join(iter(lambda: sock.recv(4096), b""))
    assert b"Connection: close" in answer and answer.endswith(b"ok\n")


def test_a_client_that_waits_to_be_told_is_told_to_go_on(source):
    head, body = post(JOIN_PATH, JOIN, "Expect: 100-continue").split(b"\r\n\r\n")
    with source.dial() as sock:
        sock.sendall(head + b"\r\n\r\n")
        told = b"HTTP/1.1 100 Continue\r\n\r\n"
        assert sock.recv(len(told), socket.MSG_WAITALL) == told
        sock.sendall(body)
        assert answer_on(sock)[0] == 200


def test_a_client_that_waits_to_be_told_is_refused_first(source):
    expects = with_length(f"Content-Length: {api.MAX_BODY + 1}", "Expect: 100-continue")
    assert source.ask(expects.removesuffix(JOIN))[0] == 413


def test_a_refused_client_that_goes_on_sending_hears_why(source, monkeypatch):
    monkeypatch.setattr(server, "_LINGER", PATIENCE)
    with source.dial() as sock:
        sock.sendall(post(JOIN_PATH, b" " * 100_000))
        assert b"too_large" in b"".join(iter(lambda: sock.recv(4096), b""))
        for _ in range(20):  # the system tells a little later that nobody is there any more
            sock.sendall(b" ")
            time.sleep(0.005)


def test_the_netloader_of_vllm_ascend_is_declined_at_once(source, log):
    with source.dial() as sock:
        sock.sendall(b'{"label":"JOIN","content":{"device_id":0}}')
        answer = json.loads(sock.recv(1024))
        assert answer["label"] == "JOIN_NACK" and "HTTP" in answer["content"]
        assert sock.recv(1) == b""
    assert [line for line in log if "runs the NetLoader shipped in vLLM Ascend" in line]


raw_requests = st.one_of(
    st.binary(max_size=300),
    st.lists(
        st.one_of(
            st.sampled_from([get("/status"), get(RUN + "0-1"), post(JOIN_PATH, JOIN), b"{", b"\n"]),
            st.binary(max_size=20),
        ),
        max_size=6,
    ).map(b"".join),
    st.tuples(st.integers(0, 600), st.binary(max_size=5)).map(
        lambda where: post(JOIN_PATH, JOIN)[: where[0]] + where[1] + JOIN[where[0] :]
    ),
)


@pytest.fixture(scope="module")
def module_source():
    with running() as source:
        yield source


@given(raw=raw_requests)
def test_any_bytes_are_answered_or_end_the_connection(module_source, raw):
    with module_source.dial() as sock:
        sock.sendall(raw)
        sock.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    assert answer == b"" or answer.startswith((b"HTTP/1.1 ", b'{"label":"JOIN_NACK"'))
    assert b" 500 " not in answer
    assert module_source.ask(get("/healthz"))[2] == b"ok\n"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=10,
)
joins = st.fixed_dictionaries(
    {"identity": st.just(msgspec.to_builtins(IDENTITY)) | json_values},
    optional={"weights": json_values, "peer": json_values, "view": json_values},
)


@given(
    body=(json_values | joins).map(lambda value: json.dumps(value).encode()),
    path=st.sampled_from(
        [
            JOIN_PATH,
            api.GROUPS,
            api.STORE.format(id="0"),
            api.SEND.format(id="0"),
            api.REGIONS.format(digest=DIGEST),
        ]
    ),
)
def test_any_json_is_answered(module_source, body, path):
    status, _, answer = module_source.ask(post(path, body))
    assert status in (200, 400, 404)
    assert (status == 200) == ("code" not in json.loads(answer))


# Through both ends


def test_a_client_hears_of_new_blocks_and_of_others_without_a_place(source):
    source.service.peers = [PEER]
    with source.client() as client:
        assert client.have(DIGEST, 5, 9) == api.Have(6, [(5, 14)], False)
        assert client.peers(DIGEST) == [PEER]
        assert client.status().places_taken == 0
        with pytest.raises(SourceError) as refused:
            client.have("xxh3_128:0123456789abcdee", 0, 0)
        assert refused.value.code == "changed"


def test_a_source_waits_for_new_blocks_no_longer_than_it_allows(source):
    with source.client() as client:
        assert client.have(DIGEST, 0, 9999).runs == [(0, api.MAX_WAIT_SECONDS)]


@pytest.mark.parametrize("code", [Code.BUSY, Code.LOADING, Code.OTHER_MODEL])
def test_who_is_refused_for_now_hears_of_others(source, code):
    source.service.peers, source.service.refusal = [PEER], Refusal(code, "because")
    with source.client() as client, pytest.raises(SourceError) as refused:
        client.join(Join(IDENTITY))
    assert len(refused.value.peers) == (code.status == 503)
    assert refused.value.weights == (DIGEST if code.status == 503 else None)


def test_a_client_joins_and_reads(source):
    source.service.peers = [PEER]
    with source.client() as client:
        joined = client.join(Join(IDENTITY))
        assert (joined.weights, joined.epoch, joined.instance) == (DIGEST, 1, "instance")
        assert joined.peers == [PEER]
        assert json.loads(bytes(joined.manifest)) == MANIFEST and joined.blocks == bytes(32)
        assert client.join(Join(IDENTITY, DIGEST)).manifest is msgspec.UNSET
        assert read(client, 0, BLOCKS - 1) == CONTENT
        assert client.status().places_taken == 1
        assert client.local_host == HOST


def cut_into(data, sizes):
    """Return views of these sizes, over and over, until all of the data is in one."""
    views, start = [], 0
    while start < len(data):
        for size in sizes:
            views.append(data[start : start + size])
            start += size
    return views


sizes = st.lists(
    st.sampled_from([0, 1, 7, 100, 1024, 8191, 70_000, 3_000_000]), min_size=1, max_size=6
).filter(lambda sizes: max(sizes) >= 100)


@given(taken=sizes, filled=sizes, run=st.tuples(st.integers(0, 4000), st.integers(0, 999)))
def test_bytes_arrive_as_they_were(module_source, taken, filled, run):
    first, last = run[0], run[0] + run[1]
    wanted = CONTENT[first * BLOCK : (last + 1) * BLOCK]

    def chunks(data):
        views = cut_into(data, taken)
        yield from (views[i : i + 2000] for i in range(0, len(views), 2000))

    module_source.service.chunks = chunks
    got = bytearray(len(wanted))
    with module_source.client() as client:
        read_blocks(client, DIGEST, first, last, cut_into(memoryview(got), filled))
    assert got == wanted


def test_a_run_without_bytes_is_read(source):
    source.service.chunks = lambda data: []
    source.service.nbytes = 0
    with source.client() as client:
        read_blocks(client, DIGEST, 0, 0, [])
        assert client.status().places_taken == 1


@pytest.mark.parametrize("code", Code, ids=lambda code: code.text)
def test_a_code_becomes_its_error(source, code):
    differ = [api.Difference("tp", "1", "2")]
    source.service.refusal = Refusal(code, "because", differences=differ, retry_after=7)
    source.service.refusal.name(DIGEST, [PEER])
    with source.client() as client, pytest.raises(SourceError) as caught:
        client.join(Join(IDENTITY))
    error = caught.value
    kind = OtherPlacement if code is Code.OTHER_MODEL else code.error
    assert type(error) is kind and error.code == code.text
    assert str(error) == f"{source.address}: {code.text}: because: tp is 1 here and 2 there"
    assert error.peers == ((PEER.address, PEER.instance),)
    assert error.retry_after == (7 if code.status == 503 else 0)


def test_a_model_that_differs_in_more_than_its_placement_is_another_one(source):
    differ = [api.Difference("tp", "1", "2"), api.Difference("config.a", "1", "2")]
    source.service.refusal = Refusal(Code.OTHER_MODEL, "because", differences=differ)
    with source.client() as client, pytest.raises(SourceRefused) as caught:
        client.join(Join(IDENTITY))
    assert type(caught.value) is SourceRefused


def test_a_refusal_before_the_first_byte_has_a_code(source):
    def chunks(data):
        raise Refusal(Code.NOT_HERE, "block 0 has not come yet")
        yield

    source.service.chunks = chunks
    with source.client() as client:
        with pytest.raises(BlocksNotHere, match="not_here: block 0"):
            read(client, 0, 0)
        assert client.status().places_taken == 0


@pytest.mark.parametrize("failure", [Refusal(Code.CHANGED, "changed"), ValueError("broken")])
def test_a_failure_within_the_bytes_ends_the_connection(failure):
    def chunks(data):
        yield [data[:500]]
        raise failure

    with running() as source:
        source.service.chunks = chunks
        with source.client() as client, pytest.raises(SourceLost, match="500 bytes too early"):
            read(client, 0, 0)
        source.service.__init__()
        assert source.serves()


@pytest.mark.parametrize("parts", [[400], [400, 601], [1001], [1000, 1]])
def test_a_run_of_another_size_than_said_ends_the_connection(parts):
    with running() as source:
        source.service.chunks = lambda data: [[memoryview(CONTENT)[:part]] for part in parts]
        with source.dial() as sock:
            sock.sendall(get(RUN + "0-0"))
            answer = b"".join(iter(lambda: sock.recv(65536), b""))
        assert len(answer.partition(b"\r\n\r\n")[2]) <= BLOCK
        source.service.__init__()
        assert source.serves()


def test_an_unexpected_error_is_logged_once_and_told_as_internal(log):
    def wait(session):
        raise ValueError("the reason")

    with running() as source:
        source.service.wait = wait
        with source.client() as client:
            with pytest.raises(SourceLost, match="internal: the source failed") as caught:
                client.join(Join(IDENTITY))
            assert "the reason" not in str(caught.value)
            assert client.status().places_taken == 0
        source.service.wait = None
        assert source.serves()
    assert len([line for line in log if line.endswith("failed")]) == 1


# Groups


def test_values_travel_both_ways_and_sizes_come_before_the_bytes(source):
    with source.client() as client:
        group = client.open_group(DIGEST)
        values = [("a", b"\x00\xff"), ("b", b"")]
        assert client.exchange(group._id, values) == values[::-1]
        assert send(client, group._id, [(0, 1), (7, 7)]) == [2 * BLOCK, BLOCK]
        assert send(client, group._id, []) == []
        assert until(lambda: source.service.groups[0].sent == [[(0, 1), (7, 7)], []])
    assert until(lambda: source.service.ended)


def test_a_client_may_ask_whether_blocks_are_what_their_digests_say(source):
    with source.client() as client:
        client.check(DIGEST, 1, 2)
        assert source.service.checked == [(1, 2)]
        with pytest.raises(SourceBusy, match="changed: other weights by now") as changed:
            client.check(DIGEST.replace("0", "1"), 1, 2)
        assert changed.value.code == "changed"
        with pytest.raises(SourceRefused, match="out_of_range: block 2 comes after block 1"):
            client.check(DIGEST, 2, 1)


def some_regions(count=3):
    return [api.Region(0, 100 * number, [90], [1]) for number in range(count)]


def test_records_and_the_elements_of_regions_come_as_they_were(source):
    into = bytearray(270)
    with source.client() as client:
        joined = client.join(Join(IDENTITY, view=True))
        assert client.records(joined.weights) == CONTENT[: 1 << 20]
        read_regions(client, joined.weights, some_regions(), memoryview(into))
        assert source.server.sessions == 1
    assert into == b"".join(CONTENT[at : at + 90] for at in (0, 100, 200))
    assert source.service.regions_asked == some_regions()


def test_regions_that_came_wrong_are_noticed_and_the_connection_goes_on(source):
    into = memoryview(bytearray(270))
    with source.client() as client:
        source.service.chunks = lambda data: [[b"\xff" + data[1:]]]
        with pytest.raises(TransferCorrupt, match="regions came with wrong bytes"):
            read_regions(client, DIGEST, some_regions(), into)
        source.service.chunks = lambda data: [[data]]
        read_regions(client, DIGEST, some_regions(), into)


def test_regions_of_another_size_than_wanted_are_refused_before_anything_is_read(source):
    into = bytearray(271)
    with source.client() as client, pytest.raises(ProtocolError, match="sends 286 bytes where"):
        read_regions(client, DIGEST, some_regions(), memoryview(into))
    assert into == bytes(271)


def test_as_many_regions_may_be_asked_for_as_is_allowed_and_no_more(source):
    large = [api.Region(2**20, 2**50, [2**20] * 9, [2**50] * 9)] * api.MAX_REGIONS
    too_large = pytest.raises(SourceRefused, match="too_large: the body has over 1048576 bytes")
    with source.client() as client, too_large:
        read_regions(client, DIGEST, large, memoryview(bytearray(1)))
    with source.client() as client:
        into = memoryview(bytearray(90 * api.MAX_REGIONS))
        read_regions(client, DIGEST, some_regions(1) * api.MAX_REGIONS, into)
        for regions in (some_regions(1) * (api.MAX_REGIONS + 1), []):
            with pytest.raises(SourceRefused, match="the body is not a valid Regions"):
                read_regions(client, DIGEST, regions, into)


def test_records_over_the_limit_are_not_read(source, monkeypatch):
    monkeypatch.setattr(api, "MAX_RECORDS", (1 << 20) - 1)
    with source.client() as client, pytest.raises(ProtocolError, match="records of 1048576 bytes"):
        client.records(DIGEST)


def test_a_run_that_others_are_to_be_asked_for_is_not_sent(source):
    with source.client() as client:
        group = client.open_group(DIGEST)
        there = source.service.groups[0]
        there.sizes = lambda runs: [None, 5]
        assert send(client, group._id, [(0, 1), (2, 2)]) == [None, 5]
        assert until(lambda: there.sent)
        assert there.sent == [[(2, 2)]]


def test_a_group_is_its_connections_own(source):
    with source.client() as client, source.client() as other:
        group = client.open_group(DIGEST)
        with pytest.raises(SourceRefused, match="this connection has no group 0"):
            send(other, group._id, [])


def test_a_connection_has_a_bounded_number_of_groups(source):
    with source.client() as client:
        for _ in range(api.MAX_GROUPS):
            client.open_group(DIGEST)
        with pytest.raises(SourceRefused, match="4 groups at most"):
            client.open_group(DIGEST)


@pytest.mark.parametrize("heard", [True, False], ids=["sizes heard", "sizes not heard"])
def test_a_source_says_why_it_stops_sending_through_a_group(source, heard):
    with source.client() as client:
        group = client.open_group(DIGEST)
        source.service.groups[0].failure = Refusal(Code.CHANGED, "new weights")
        client.ask_runs(group._id, [(0, 1)])
        if heard:
            client.hear_sizes()
        assert until(client.hung_up)
        why = client.last_words()
    assert type(why) is SourceBusy and "changed: new weights" in str(why)


@pytest.mark.parametrize("known", [False, True], ids=["silently", "known to the system"])
def test_what_ended_a_group_is_the_answer_to_the_next_question(source, known):
    with source.client() as client:
        group = client.open_group(DIGEST)
        source.service.groups[0].failure = Refusal(Code.ASLEEP, "sleeping")
        send(client, group._id, [(0, 1)])
        assert until(client.hung_up)
        if known:  # that nobody reads what is sent
            client._wire._sock.shutdown(socket.SHUT_WR)
        with pytest.raises(SourceBusy, match="asleep: sleeping"):
            send(client, group._id, [])


def test_a_silent_client_is_told_that_what_was_sent_does_not_arrive(hasty, log):
    with hasty.client() as client:
        client.open_group(DIGEST)
        hasty.service.groups[0].unsettled = Refusal(Code.TRANSFER_FAILED, "no progress for 1 s")
        assert until(client.hung_up)
        assert "transfer_failed: no progress for 1 s" in str(client.last_words())
    assert until(lambda: hasty.server.sessions == 0)
    assert not [line for line in log if line.endswith("failed")]


def test_whoever_waits_in_vain_for_last_words_can_still_say_why(source):
    with source.client() as client:
        client.open_group(DIGEST)
        assert client.last_words() is None
        client.done(Done(complete=False, reason="no device"))
    assert until(lambda: source.service.ends == [Done(complete=False, reason="no device")])


def test_there_are_no_last_words_where_nothing_was_said(source):
    with source.client() as client:
        client.open_group(DIGEST)
        client.cut()
        assert client.last_words() is None


# Places, and who is gone


def test_places_are_bounded_and_status_needs_none():
    with running(max_sessions=2) as source, contextlib.ExitStack() as clients:
        first, second, third = (clients.enter_context(source.client()) for _ in range(3))
        first.join(Join(IDENTITY))
        read(second, 0, 0)
        for ask in (
            lambda: third.join(Join(IDENTITY)),
            lambda: read(third, 0, 0),
            lambda: third.open_group(DIGEST),
        ):
            with pytest.raises(SourceBusy, match="busy: 2 of 2 sessions are open") as busy:
                ask()
            assert busy.value.retry_after == 1
        assert third.status().places_taken == 2
        second.join(Join(IDENTITY))
        first.close()
        assert until(lambda: source.server.sessions == 1, AT_ONCE)
        third.join(Join(IDENTITY))


def test_a_refused_client_takes_no_place():
    with running(max_sessions=1) as source, source.client() as first, source.client() as second:
        source.service.refusal = Refusal(Code.OTHER_MODEL, "the models differ")
        with pytest.raises(SourceRefused, match="the models differ"):
            first.join(Join(IDENTITY))
        source.service.refusal = None
        second.join(Join(IDENTITY))
        with pytest.raises(SourceBusy):
            first.join(Join(IDENTITY))


def idle(source):
    with source.client() as client:
        client.join(Join(IDENTITY))
        assert source.server.sessions == 1


def waiting_in_the_service(source):
    asked = threading.Event()

    def wait(session):
        asked.set()
        until(session.gone)
        raise RuntimeError("the client is gone")

    source.service.wait = wait
    with source.dial() as sock:
        sock.sendall(post(JOIN_PATH, JOIN))
        assert asked.wait(PATIENCE)
        assert source.server.sessions == 1


def not_reading(source):
    with source.dial() as sock:
        sock.sendall(post(JOIN_PATH, JOIN) + get(RUN + f"0-{BLOCKS - 1}") * 20)
        assert until(lambda: source.server.sessions == 1)
        sock.recv(1)


def within_a_request(source):
    with source.dial() as sock:
        sock.sendall(post(JOIN_PATH, JOIN) + b"GET /stat")
        assert answer_on(sock)[0] == 200
        assert source.server.sessions == 1


@pytest.mark.parametrize("doing", [idle, waiting_in_the_service, not_reading, within_a_request])
def test_a_client_that_is_gone_is_noticed_at_once(source, doing):
    doing(source)
    assert until(lambda: source.server.sessions == 0, AT_ONCE)
    assert len(source.service.ended) == 1


def test_what_ends_with_a_session_ends_in_turn_and_failures_do_not_matter():
    ended, sessions = [], []

    def wait(session):
        session.on_close(lambda: ended.append("first"))
        session.on_close(lambda: [][0])
        session.on_close(lambda: ended.append("last"))
        sessions.append(session)

    with running() as source:
        source.service.wait = wait
        with source.client() as client:
            client.join(Join(IDENTITY))
            assert not sessions[0].gone()
        assert until(lambda: ended == ["last", "first"])
        assert until(lambda: source.server.sessions == 0)
    sessions[0].on_close(lambda: ended.append("late"))
    assert ended[-1] == "late" and sessions[0].gone()


# Slow, silent and many


def test_a_silent_connection_is_ended(hasty):
    with hasty.dial() as sock:
        assert sock.recv(1) == b""


def refused_as_late(sock):
    """Whether a server says that the request came too late, and ends the connection."""
    said = b"".join(iter(lambda: sock.recv(4096), b""))
    head, _, body = said.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
    late = {"code": "timeout", "message": "the request was not complete within 0.3 s"}
    assert not body or json.loads(body) == late
    return head.startswith(b"HTTP/1.1 408 ") and head.endswith(b"\r\nConnection: close"), body


@contextlib.contextmanager
def hurried(source):
    """A connection on which a request has to come soon, and nothing else."""
    with source.dial() as sock:
        sock.sendall(get("/healthz"))
        assert answer_on(sock)[0] == 200
        source.server.handshake_timeout = 0.3
        yield sock
        source.server.handshake_timeout = PATIENCE


@pytest.mark.parametrize(
    "begin",
    [
        b"G",
        b"GET /sta",
        get("/status").removesuffix(b"\r\n"),
        get("/healthz", "Host: a:1").removesuffix(b"\r\n"),
        with_length(f"Content-Length: {len(JOIN)}").removesuffix(JOIN),
        with_length("Content-Length: 60000"),
        with_length("Content-Length: 60000", "Expect: 100-continue"),
        b"HEAD /status HTTP/1.1\r\n",
    ],
)
def test_a_request_that_stalls_is_refused(source, begin):
    with hurried(source) as sock:
        sock.sendall(begin)
        refused, body = refused_as_late(sock)
        assert refused and (body == b"") == begin.startswith(b"HEAD")


@pytest.mark.parametrize(
    "begin", [b"G", b"GET /status HTTP/1.1\r\nA: ", with_length("Content-Length: 60000")]
)
def test_a_request_that_trickles_in_is_refused(source, begin, monkeypatch):
    monkeypatch.setattr(server, "_LINGER", PATIENCE)  # or its own bytes may break the connection
    with hurried(source) as sock:
        sock.sendall(begin)
        started = time.monotonic()
        while not select.select([sock], [], [], 0.02)[0]:
            sock.sendall(b"a")
        assert refused_as_late(sock)[0]
        assert time.monotonic() - started < PATIENCE


def stalling(source, client):
    """Hold the last byte of all that a client says back, at a server that does not wait long."""
    source.server.handshake_timeout = 0.3
    send = client._wire.send
    client._wire.send = lambda views: send([b"".join(views)[:-1]])


def test_a_client_whose_request_stalls_hears_why():
    with running() as source, source.client() as client:
        assert client.status()
        stalling(source, client)
        with pytest.raises(SourceLost, match=r"timeout: the request was not .* 0\.3 s") as late:
            client.join(Join(IDENTITY))
        assert late.value.code == "timeout"


def test_an_idle_connection_is_ended_and_gives_its_place_back(hasty):
    with hasty.client() as client:
        client.join(Join(IDENTITY))
        assert until(client.hung_up)
        assert until(lambda: hasty.server.sessions == 0)


def test_a_client_that_reads_nothing_loses_its_session(hasty):
    with hasty.dial() as sock:
        sock.sendall(post(JOIN_PATH, JOIN) + get(RUN + f"0-{BLOCKS - 1}") * 20)
        assert until(lambda: hasty.service.ended)


def test_a_client_that_reads_slowly_keeps_its_session():
    with running(progress_timeout=1.5) as source, socket.socket() as sock:
        source.service.chunks = lambda data: ([view] for view in cut_into(data, [10_000]))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        sock.settimeout(PATIENCE)
        sock.connect((HOST, source.port))
        sock.sendall(get(RUN + f"0-{BLOCKS - 1}") * 20)
        started = time.monotonic()
        while time.monotonic() - started < 2:  # longer than the deadline
            assert sock.recv(1 << 13)
            time.sleep(0.04)
        assert source.server.sessions == 1


def test_over_the_bound_the_oldest_without_a_place_is_cut(monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
    with running() as source, source.client() as placed, contextlib.ExitStack() as open_now:
        placed.join(Join(IDENTITY))
        silent = [open_now.enter_context(source.dial()) for _ in range(4)]
        assert silent[0].recv(1) == b""
        silent[1].sendall(get("/healthz"))
        assert answer_on(silent[1])[0] == 200
        assert read(placed, 0, 0) == CONTENT[:BLOCK]


def test_running_out_of_descriptors_or_threads_does_not_end_the_server(monkeypatch, log):
    failures = [OSError(errno.EMFILE, "Too many open files")] * 2
    accept, start = socket.socket.accept, threading.Thread.start

    def failing_accept(listener):
        if failures and isinstance(failures[0], OSError):
            raise failures.pop(0)
        return accept(listener)

    def failing_start(thread):
        if failures and thread.name.startswith("netloader-session"):
            raise failures.pop(0)
        start(thread)

    monkeypatch.setattr(socket.socket, "accept", failing_accept)
    monkeypatch.setattr(threading.Thread, "start", failing_start)
    with running() as source:
        assert until(lambda: not failures)
        failures.append(RuntimeError("can't start new thread"))
        with source.dial() as sock:
            assert sock.recv(1) == b""
        assert source.serves()
    assert len([line for line in log if "cannot accept connections" in line]) == 1
    assert len([line for line in log if "cannot serve a connection: can't start" in line]) == 1


def test_without_a_thread_to_accept_in_there_is_an_error_and_no_port(monkeypatch):
    def failing_start(thread):
        raise RuntimeError("can't start new thread")

    server = ElasticServer(
        Service(), max_sessions=1, handshake_timeout=1, progress_timeout=1, idle_timeout=1
    )
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", failing_start)
        with pytest.raises(OSError, match="can't start new thread"):
            server.start(HOST, port)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, port))
    server.stop()


def test_nothing_is_left_of_200_failed_sessions(source):
    def failed_session(number):
        with source.dial() as sock:
            kind = number % 5
            sock.sendall(
                (b"", b"\x00\n", post(JOIN_PATH, JOIN), get(RUN + "0-4999"), b"GET /st")[kind]
            )
            if kind == 2:
                sock.recv(10)

    me = psutil.Process()
    failed_session(0)
    assert until(lambda: not source.server._waiting)
    threads, descriptors = threading.active_count(), me.num_fds()
    for number in range(200):
        failed_session(number)
    assert until(lambda: not source.server._waiting and source.server.sessions == 0)
    assert until(lambda: threading.active_count() <= threads and me.num_fds() <= descriptors)


# Start and stop


def test_a_taken_port_is_an_error(source):
    with pytest.raises(OSError):
        ElasticServer(
            Service(), max_sessions=1, handshake_timeout=1, progress_timeout=1, idle_timeout=1
        ).start(HOST, source.port)


def test_without_a_host_it_listens_on_both_families():
    with running() as like:
        server = ElasticServer(
            like.service, max_sessions=1, handshake_timeout=9, progress_timeout=9, idle_timeout=9
        )
        port = server.start(None, 0)
        try:
            for host in ("127.0.0.1", "::1") if socket.has_dualstack_ipv6() else ("127.0.0.1",):
                with connect(Address(host, port)) as client:
                    client.status()
                    assert client.local_host == host
            assert until(lambda: server.sessions == 0)
        finally:
            server.stop()


def test_stopping_ends_sessions_after_a_moment_and_leaves_no_thread():
    saying = threading.Event()

    def wait(session):
        saying.set()
        source.server._stopping.wait(PATIENCE)
        raise Refusal(Code.CANNOT_SERVE, "shutting down")

    with running() as source:
        idle = source.dial()
        source.service.wait = wait
        talking = source.dial()
        talking.sendall(post(JOIN_PATH, JOIN))
        assert saying.wait(PATIENCE)
        source.server.stop()
        assert b"shutting down" in answer_on(talking)[2]
        assert idle.recv(1) == b""
        idle.close(), talking.close()
        assert not source.server._waiting and source.server.sessions == 0
        with pytest.raises(SourceUnreachable, match="cannot connect: Connection refused"):
            source.client()


# A client and sources that are none, or lie


@contextlib.contextmanager
def scripted(*answers):
    """A port that answers one request of each connection with bytes, or by a function.

    Yields the address and the requests that came.
    """
    requests = []
    listener = socket.create_server((HOST, 0))
    over = threading.Event()

    def serve():
        for answer in answers:
            with contextlib.suppress(OSError):
                sock, _ = listener.accept()
                with sock:
                    requests.append(sock.recv(65536))
                    answer(sock, over) if callable(answer) else sock.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield Address(*listener.getsockname()), requests
    finally:
        over.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def said(status, body, *headers):
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


OURS = "Server: NetLoader"
STATUS = msgspec.json.encode(api.Status("0.1.0", "instance", 0, [], [], 4, 0, 0))
NOT_OURS = "this is not a NetLoader port"


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (said(404, b'{"detail":"Not Found"}', "Server: uvicorn"), SourceRefused, "from uvicorn"),
        (said(404, b'{"detail":"Not Found"}'), SourceRefused, f"{NOT_OURS} (HTTP 404)"),
        (said(400, b'{"code":"x","message":""}'), SourceRefused, f"{NOT_OURS} (HTTP 400)"),
        (said(200, b"<html>", "Server: nginx"), SourceRefused, f"{NOT_OURS} (HTTP 200 from nginx)"),
        (said(302, b"", "Server: a\x1b[31m" + "b" * 9000), SourceRefused, "from a [31mbbb"),
        (b"HTTP/1.1 200 X\r\n\r\n{}", SourceRefused, NOT_OURS),
        (b"SSH-2.0-OpenSSH_9.6\r\n", SourceRefused, f"{NOT_OURS} (no HTTP)"),
        (b"HTTP/1.1 2000000 X\r\n\r\n", SourceRefused, NOT_OURS),
        (b"A" * 100_000, SourceRefused, NOT_OURS),
        (b"HTTP/1.1 200 X\r\n" + b"A: b\r\n" * 200, SourceRefused, NOT_OURS),
        (b"HTTP/1.1 200 X\r\nA: " + b"b" * 200_000, SourceRefused, NOT_OURS),
        (b"HTTP/1.1 100 X\r\n\r\n" * 9000, SourceRefused, NOT_OURS),
        (b"", SourceLost, "without an answer, as the NetLoader shipped in vLLM Ascend does"),
        (b"HTTP/1.1 200 X\r\nContent-Length: 9\r\n\r\n{", SourceLost, "within the answer"),
        (said(200, b"{}", OURS), ProtocolError, "is not a valid Joined"),
        (
            said(200, b'{"weights":"a:0123456789abcdef","epoch":1,"instance":""}', OURS),
            ProtocolError,
            "no manifest",
        ),
        (
            b"HTTP/1.1 200 X\r\nServer: NetLoader\r\nContent-Length: 99999999\r\n\r\n",
            ProtocolError,
            "over the limit",
        ),
        (said(418, b'{"code":"teapot","message":"no"}', OURS), SourceRefused, "teapot: no"),
        (said(503, b'{"code":"new","message":"no"}', OURS), SourceBusy, "new: no"),
        (
            said(409, b'{"code":"other_model","message":"a\\u001bb\\nc' + b"x" * 50_000 + b'"}'),
            SourceRefused,
            "a b cxx",
        ),
    ],
    ids=lambda value: repr(value[:50]) if isinstance(value, bytes) else None,
)
def test_what_is_no_answer_is_said_in_one_printable_line(answer, kind, message):
    with scripted(answer) as (address, _), connect(address) as client:
        with pytest.raises(SourceError) as caught:
            client.join(Join(IDENTITY))
        text = str(caught.value)
        assert type(caught.value) is kind and message in text
        assert text.startswith(f"{address}: ") and text.isprintable() and len(text) < 2500


@pytest.mark.parametrize("length", ["Content-Length: 999", "Content-Length: 1001", "A: b"])
def test_another_length_than_the_blocks_have_is_refused_before_anything_is_read(length):
    answer = f"HTTP/1.1 200 X\r\n{length}\r\n\r\n".encode() + b"x" * 1001
    data = bytearray(BLOCK)
    with (
        scripted(answer) as (address, _),
        connect(address) as client,
        pytest.raises(ProtocolError, match="where blocks have 1000"),
    ):
        read_blocks(client, DIGEST, 0, 0, [memoryview(data)])
    assert data == bytes(BLOCK)


PLAIN = ["HTTP/1.1 200 OK", OURS, "Content-Type: application/octet-stream", "Content-Length: 1000"]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("lines", [PLAIN, PLAIN[:1] + PLAIN[:0:-1], [*PLAIN, "Connection: close"]])
def test_blocks_come_after_a_head_in_whatever_form(lines, parts):
    data = random.Random(0).randbytes(BLOCK)

    def answer(sock, over):
        whole = "\r\n".join([*lines, "", ""]).encode() + data
        for part in (whole,) if parts == 1 else (whole[:40], whole[40:]):
            sock.sendall(part)
            time.sleep(0.02)

    got = bytearray(BLOCK)
    with scripted(answer) as (address, _), connect(address) as client:
        read_blocks(client, DIGEST, 0, 0, [memoryview(got)])
    assert got == data


def test_within_a_machine_the_kernel_sends_ahead_as_far_as_there_is_room():
    def chosen(sock):
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")

    with socket.create_server(("127.0.0.2", 0)) as listener:
        port = listener.getsockname()[1]
        for own, expected in (("127.0.0.2", b"reno"), ("127.0.0.1", None)):
            sock = socket.create_connection(("127.0.0.2", port), source_address=(own, 0))
            before = chosen(sock)
            wire = Wire(sock, PATIENCE)
            assert chosen(sock) == (expected or before)
            wire.close()


def test_a_deadline_that_has_passed_ends_reading_though_bytes_are_there():
    near, far = connected_pair()
    with far:
        wire = Wire(near, PATIENCE)
        far.sendall(b"there")
        assert until(lambda: wire.has_data)
        wire.allow(0.0, 100)
        with pytest.raises(TimeoutError):
            wire.read(bytearray(5))
        wire.allow(PATIENCE, 100)
        assert wire.read(bytearray(5)) == 5
        wire.close()


def trickle(sock, over):
    while not over.wait(0.02):
        sock.sendall(b"H")


def silent(sock, over):
    over.wait(PATIENCE)


def trickle_a_body(sock, over):
    sock.sendall(b"HTTP/1.1 200 X\r\nServer: NetLoader\r\nContent-Length: 60000\r\n\r\n")
    trickle(sock, over)


def stall_in_the_bytes(sock, over):
    sock.sendall(b"HTTP/1.1 200 X\r\nContent-Length: 1000\r\n\r\nabc")
    silent(sock, over)


@pytest.mark.parametrize("answer", [silent, trickle, trickle_a_body])
def test_an_answer_has_to_be_complete_in_time(answer):
    with (
        scripted(answer) as (address, _),
        connect(address, handshake=0.3) as client,
        pytest.raises(SourceLost, match=r"no complete message within 0\.3 s"),
    ):
        client.join(Join(IDENTITY))


@pytest.mark.parametrize("answer", [silent, stall_in_the_bytes])
def test_bytes_have_to_go_on_coming(answer):
    with (
        scripted(answer) as (address, _),
        connect(address, progress=0.3) as client,
        pytest.raises(SourceLost, match=r"0\.3 s"),
    ):
        read(client, 0, 0)


def test_bytes_may_come_slowly():
    def slowly(sock, over):
        sock.sendall(said(200, CONTENT[:BLOCK], OURS)[:-900])
        for part in range(9):
            over.wait(0.1)
            sock.sendall(CONTENT[100 * (part + 1) : 100 * (part + 2)])

    with scripted(slowly) as (address, _), connect(address, progress=0.4) as client:
        assert read(client, 0, 0) == CONTENT[:BLOCK]


def test_a_closed_client_stays_closed():
    answer = said(200, STATUS, OURS)
    with scripted(answer, answer) as (address, requests):
        client = connect(address)
        client.status()
        client.close()
        with pytest.raises(SourceLost, match="ended on this side"):
            client.status()
        assert len(requests) == 1


def test_what_has_nothing_to_lose_is_asked_again_after_an_idle_close():
    answer = said(200, STATUS, OURS)
    last = said(200, CONTENT[:BLOCK], OURS)
    with scripted(answer, answer, last) as (address, requests), connect(address) as client:
        client.status()
        assert until(client.hung_up)
        client.status()
        assert until(client.hung_up)
        assert read(client, 0, 0) == CONTENT[:BLOCK]
    assert len(requests) == 3


def test_all_that_has_no_answer_yet_is_asked_again_in_order():
    parts = [CONTENT[:BLOCK], CONTENT[BLOCK : 2 * BLOCK]]
    both = b"".join(said(200, part, OURS) for part in parts)
    with scripted(said(200, STATUS, OURS), both) as (address, requests), connect(address) as client:
        client.status()
        assert until(client.hung_up)
        for number in range(2):
            client.ask_blocks(DIGEST, number, number)
        for part in parts:
            data = bytearray(BLOCK)
            client.receive_blocks(BLOCK, [[memoryview(data)]])
            assert data == part
    assert [requests[1].find(f"/blocks/{n}-{n} ".encode()) > 0 for n in range(2)] == [True, True]


def test_it_is_asked_again_once_only():
    with scripted(said(200, STATUS, OURS), b"", b"") as (address, requests):
        with connect(address) as client:
            client.status()
            assert until(client.hung_up)
            with pytest.raises(SourceLost, match="closed the connection without an answer"):
                client.status()
        assert len(requests) == 2
        with connect(address) as client, pytest.raises(SourceLost):
            client.status()


def test_a_join_is_not_asked_again_and_a_group_ends_with_its_connection():
    opened = said(200, b'{"id":"0","max_bytes":1048576}', OURS)
    with scripted(said(200, STATUS, OURS), opened, b"") as (address, requests):
        with connect(address) as client:
            client.status()
            assert until(client.hung_up)
            with pytest.raises(SourceLost):
                client.join(Join(IDENTITY))
        with connect(address) as client:
            client.open_group(DIGEST)
            assert until(client.hung_up)
            with pytest.raises(SourceLost):
                client.status()
        assert len(requests) == 2
        connect(address).close()


def test_another_thread_can_end_a_wait():
    waits = threading.Event()

    def answer(sock, over):
        waits.set()
        over.wait(PATIENCE)

    with scripted(answer) as (address, _), connect(address) as client:
        cutting = threading.Thread(target=lambda: waits.wait(PATIENCE) and client.cut())
        cutting.start()
        with pytest.raises(SourceLost, match="ended on this side"):
            client.join(Join(IDENTITY))
        cutting.join()
        with pytest.raises(SourceLost, match="ended on this side"):
            client.status()


def test_a_name_that_is_not_found_in_time_is_unreachable(monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(PATIENCE) and [])
    with pytest.raises(SourceUnreachable, match=r"no connection within 0\.2 s"):
        connect(Address("name.invalid", 28000), connect=0.2)
    over.set()


def test_a_connection_to_itself_is_none(monkeypatch):
    with socket.create_server((HOST, 0)) as listener:
        itself = socket.create_connection(listener.getsockname())
        monkeypatch.setattr(type(itself), "getpeername", lambda sock: sock.getsockname())
        with pytest.raises(SourceUnreachable, match="Connection refused"):
            connect(Address(*listener.getsockname()))
        itself.close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl_looks_at_a_source_and_fetches_a_block(source):
    def curl(path):
        command = ["curl", "--noproxy", "*", "-fsS", f"http://{source.address}{path}"]
        return subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE).stdout

    assert json.loads(curl("/status"))["version"] == "0.1.0"
    assert curl(RUN + "7-8") == CONTENT[7 * BLOCK : 9 * BLOCK]


def test_over_the_bound_who_has_asked_last_is_kept(monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 2)
    with running() as source, source.dial() as asks, source.dial() as silent:
        assert until(lambda: len(source.server._waiting) == 2)
        asks.sendall(get("/healthz"))
        assert answer_on(asks)[0] == 200
        with source.dial():
            assert silent.recv(1) == b""
        asks.sendall(get("/healthz"))
        assert answer_on(asks)[0] == 200


def test_files_and_records_are_read_by_few_at_once_and_without_a_place(monkeypatch):
    monkeypatch.setattr(server, "_TURN", 0.01)
    go_on, entered = threading.Event(), threading.Semaphore(0)

    def files(group):
        entered.release()
        go_on.wait(PATIENCE)
        return [FILE]

    with running(max_sessions=1) as source, contextlib.ExitStack() as clients:
        source.service.files = files
        three = [clients.enter_context(source.client()) for _ in range(3)]
        reading = [threading.Thread(target=one.files, args=("netloader",)) for one in three[:2]]
        for thread in reading:
            thread.start()
            assert entered.acquire(timeout=PATIENCE)
        for ask in (lambda one: one.files("netloader"), lambda one: one.records(DIGEST)):
            with pytest.raises(SourceBusy, match="2 clients are reading files or records"):
                ask(three[2])
        assert source.server.sessions == 0
        assert source.serves()
        go_on.set()
        for thread in reading:
            thread.join()
        assert three[2].files("netloader") == [FILE]


def test_clients_that_read_a_file_slowly_keep_no_others_from_files_and_little_in_memory():
    made, mib = [], memoryview(bytes(1 << 20))

    def chunks(_):
        for number in range(64):
            made.append(number)
            yield [mib]

    with running() as source, contextlib.ExitStack() as clients:
        source.service.file = lambda group, name: Bytes(64 << 20, chunks(name))
        for _ in range(3):
            client = clients.enter_context(source.dial())
            client.sendall(get(api.FILE.format(group="netloader", name=FILE.name)))
            assert client.recv(1) == b"H"
        assert len(made) < 3 * 64
        source.service.file = lambda group, name: Service().file(group, name)
        with source.client() as client:
            assert client.file("netloader", FILE) == FILE_CONTENT


def test_the_netloader_of_vllm_ascend_does_not_fill_the_log(source, log):
    for _ in range(20):
        with source.dial() as sock:
            sock.sendall(b"{")
            assert b"JOIN_NACK" in sock.recv(1024)
    assert len([line for line in log if "shipped in vLLM Ascend" in line]) == 1
