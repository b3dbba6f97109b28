"""What a closed port lets in, and what both ends say when it does not."""

import base64
import contextlib
import itertools
import json
import socket
import ssl
import threading
import time

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from tests.certificates import OTHER_SECRET, SECRET, Authority, forged, secret_file
from vllm_ascend.model_loader.netloader.credentials import Credentials, Files, derived_from
from vllm_ascend.model_loader.netloader.errors import (
    SourceError,
    SourceLost,
    SourceRefused,
    SourceSilent,
)
from vllm_ascend.model_loader.netloader.interaction import server, tls
from vllm_ascend.model_loader.netloader.interaction.api import Done, Join
from vllm_ascend.model_loader.netloader.interaction.elastic import ElasticClient
from vllm_ascend.model_loader.netloader.utils import Address

from .test_netloader_api import DIGEST, IDENTITY
from .test_netloader_http import (
    AT_ONCE,
    BLOCK,
    CONTENT,
    HOST,
    JOIN,
    PATIENCE,
    answer_on,
    connected_pair,
    read,
    running,
    stalling,
    until,
)

PEER_PATHS = [
    ("POST", f"/netloader/v1/models/{IDENTITY.group}/join"),
    ("GET", f"/netloader/v1/weights/{DIGEST}/blocks/0-1"),
    ("POST", f"/netloader/v1/weights/{DIGEST}/blocks/0-1/check"),
    ("GET", f"/netloader/v1/weights/{DIGEST}/have?since=0&wait=0"),
    ("GET", f"/netloader/v1/weights/{DIGEST}/peers"),
    ("GET", f"/netloader/v1/weights/{DIGEST}/records"),
    ("POST", f"/netloader/v1/weights/{DIGEST}/regions"),
    ("POST", "/netloader/v1/groups"),
    ("POST", "/netloader/v1/groups/0/store"),
    ("POST", "/netloader/v1/groups/0/send"),
    ("POST", "/netloader/v1/done"),
    ("GET", f"/netloader/v1/models/{IDENTITY.group}/files"),
    ("GET", f"/netloader/v1/models/{IDENTITY.group}/files/config.json"),
]


@pytest.fixture
def secret(tmp_path):
    return Credentials(Files(secret_file=secret_file(tmp_path, SECRET)))


@pytest.fixture
def closed(secret, log):
    """A server with a secret, which goes on serving whatever a test has done to it."""
    with running(credentials=secret) as closed:
        yield closed
        assert until(lambda: closed.server.sessions == 0)
        with dial(closed, secret) as client:
            client.join(Join(IDENTITY))
            assert read(client, 3, 5) == CONTENT[3 * BLOCK : 6 * BLOCK]
    assert not [line for line in log if line.endswith("failed")]


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


def of_secrets(folder, *secrets):
    folder.mkdir(exist_ok=True)
    return Credentials(Files(secret_file=secret_file(folder, *secrets)))


def dial(source, credentials, **deadlines):
    usual = dict(connect=PATIENCE, handshake=PATIENCE, progress=PATIENCE)
    return ElasticClient.connect(source.address, credentials=credentials, **{**usual, **deadlines})


def refusal(source, credentials):
    """What a client is told that is not let in."""
    with pytest.raises(SourceError) as caught, dial(source, credentials) as client:
        client.join(Join(IDENTITY))
    assert str(caught.value).isprintable()
    assert SECRET not in str(caught.value)
    return caught.value


def stranger(**settings):
    """TLS by a client without a certificate, as curl, Prometheus and probes have it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for name, value in settings.items():
        setattr(context, name, value)
    return context


def ask(source, method, path, context=None, body=b"", **headers):
    """Ask without a certificate, and return the answer: status, headers, body."""
    sock = (context or stranger()).wrap_socket(source.dial())
    with sock:
        head = [f"{method} {path} HTTP/1.1", "Host: h", f"Content-Length: {len(body)}"]
        head += [f"{name}: {value}" for name, value in headers.items()]
        sock.sendall("\r\n".join([*head, "", ""]).encode("latin-1") + body)
        return answer_on(sock, method)


def lines_about(log, words):
    return [line for line in log if "refused the connection of" in line and words in line]


# Who is let in


def test_a_peer_with_the_secret_is_served(closed, secret):
    with dial(closed, secret) as client:
        assert client.join(Join(IDENTITY)).weights == DIGEST
        assert read(client, 0, 4999) == CONTENT
        assert client.have(DIGEST, 0, 3).runs == [(0, 3)]
        assert client.peers(DIGEST) == []
        assert client.status().instance == "instance"
        group = client.open_group(DIGEST)
        group.tell("key", b"value")
        assert group.hear(1.0) == ("key", b"value")
        client.done(Done(complete=True))
    assert until(lambda: closed.service.ends)
    assert not closed.server.door.counts


def test_bytes_are_not_readable_on_the_way(secret):
    with running(credentials=secret) as closed, Tap(closed) as tap:
        with dial(tap, secret) as client:
            client.join(Join(IDENTITY))
            read(client, 0, 9)
        seen = b"".join(tap.seen)
        assert len(seen) > 10 * BLOCK
        assert CONTENT[:BLOCK] not in seen
        assert b"netloader/v1" not in seen


def test_with_two_secrets_the_first_is_presented_and_both_are_accepted(tmp_path):
    both = of_secrets(tmp_path / "both", SECRET, OTHER_SECRET)
    first, second = of_secrets(tmp_path / "1", SECRET), of_secrets(tmp_path / "2", OTHER_SECRET)
    swapped = of_secrets(tmp_path / "swapped", OTHER_SECRET, SECRET)
    with running(credentials=both) as closed:
        for known in (first, both, swapped):
            with dial(closed, known) as client:
                client.join(Join(IDENTITY))
        assert isinstance(refusal(closed, second), SourceRefused)


def test_a_secret_is_exchanged_without_a_restart(tmp_path, log):
    one, other = tmp_path / "one", tmp_path / "other"
    source, client = of_secrets(one, SECRET), of_secrets(other, SECRET)
    with running(credentials=source) as closed, dial(closed, client) as old:
        old.join(Join(IDENTITY))
        secret_file(one, SECRET, OTHER_SECRET)
        with dial(closed, client) as between:
            between.join(Join(IDENTITY))
        secret_file(other, OTHER_SECRET, SECRET)
        with dial(closed, client) as between:
            between.join(Join(IDENTITY))
        secret_file(one, OTHER_SECRET)
        with dial(closed, client) as new:
            new.join(Join(IDENTITY))
        assert read(old, 0, 1) == CONTENT[: 2 * BLOCK]  # what is open stays open
        refusal(closed, of_secrets(tmp_path / "late", SECRET))


def test_a_peer_with_a_certificate_of_the_authority_is_served(authority):
    source = Credentials(Files(**authority.files(who="source")))
    client = Credentials(Files(**authority.files("client.test", who="client")))
    with running(credentials=source) as closed, dial(closed, client) as one:
        one.join(Join(IDENTITY))
        assert read(one, 0, 9) == CONTENT[: 10 * BLOCK]


def test_the_name_in_a_certificate_is_the_one_that_the_operator_says(authority, log):
    files = authority.files("model.test")
    with running(credentials=Credentials(Files(**files))) as closed:
        said = Credentials(Files(**files, tls_server_name="model.test"))
        with dial(closed, said) as client:
            client.join(Join(IDENTITY))
        why = str(refusal(closed, Credentials(Files(**files))))
        assert "its certificate is for another name; set TLS_SERVER_NAME to the one it has" in why
        other = Credentials(Files(**files, tls_server_name="other.test"))
        assert "another name" in str(refusal(closed, other))
        assert until(lambda: lines_about(log, "it does not accept this instance's certificate"))
        assert until(lambda: closed.server.door.counts == {"declined": 2})


# Who is not, and what both ends say


def test_another_secret(closed, tmp_path, log):
    error = refusal(closed, of_secrets(tmp_path / "other", OTHER_SECRET))
    assert isinstance(error, SourceRefused)
    why = "its certificate does not belong to a secret in SECRET_FILE here"
    assert str(error) == f"{closed.address}: {why}"
    assert until(lambda: lines_about(log, "it does not accept this instance's secret"))
    assert closed.server.door.counts == {"declined": 1}


def test_another_secret_that_only_the_source_finds_wrong(tmp_path, log):
    trusting = of_secrets(tmp_path / "both", OTHER_SECRET, SECRET)
    with running(credentials=of_secrets(tmp_path / "one", SECRET)) as closed:
        error = refusal(closed, trusting)
        assert isinstance(error, SourceRefused)
        assert "it does not accept this instance's secret" in str(error)
        why = "its certificate does not belong to a secret in SECRET_FILE here"
        assert until(lambda: lines_about(log, why))
        assert closed.server.door.counts == {"certificate": 1}


def test_a_foreign_key_under_the_same_name(closed, tmp_path, log):
    path = tmp_path / "foreign.pem"
    path.write_bytes(forged(derived_from(SECRET).certificate))
    context = stranger()
    context.load_cert_chain(path)
    with pytest.raises(OSError):
        ask(closed, "GET", "/healthz", context)
    assert until(lambda: closed.server.door.counts == {"certificate": 1})


def test_another_authority(tmp_path, authority, log):
    other = Authority(tmp_path, "other")
    source = Credentials(Files(**authority.files(who="source")))
    stray = other.files(who="stray") | {"tls_ca": authority.ca}
    with running(credentials=source) as closed:
        assert "it does not accept this instance's certificate" in str(
            refusal(closed, Credentials(Files(**stray)))
        )
        assert until(lambda: lines_about(log, "its certificate is not accepted by TLS_CA here"))
        foreign = Credentials(Files(**other.files(who="foreign")))
        assert "its certificate is not accepted by TLS_CA here" in str(refusal(closed, foreign))


def test_a_certificate_that_has_expired(authority, log):
    good = Credentials(Files(**authority.files(who="good")))
    expired = Credentials(Files(**authority.files(who="expired", days=-1)))
    with running(credentials=good) as closed:
        assert "certificate expired" in str(refusal(closed, expired))
        assert until(lambda: lines_about(log, "its certificate has expired"))
    with running(credentials=expired) as closed:
        assert str(refusal(closed, good)).endswith(": its certificate has expired")
        assert until(lambda: lines_about(log, "this instance's certificate (sslv3 alert cert"))
        assert closed.server.door.counts == {"declined": 1}


def test_no_tls_at_a_port_with_it(closed, log):
    error = refusal(closed, None)
    assert isinstance(error, SourceRefused)
    assert str(error) == (
        f"{closed.address}: it uses TLS, and this instance has none (SECRET_FILE or TLS_CERT)"
    )
    assert until(lambda: lines_about(log, "it does not use TLS, and this instance does"))
    assert closed.server.door.counts == {"no_tls": 1}


def test_tls_at_a_port_without_it(secret, log):
    with running() as source:
        error = refusal(source, secret)
        assert isinstance(error, SourceRefused)
        assert str(error) == f"{source.address}: it does not use TLS, and this instance does"
        assert until(lambda: lines_about(log, "it uses TLS, and this instance has none"))
        assert source.server.door.counts == {"tls": 1}
        assert source.serves()


@pytest.mark.parametrize(
    "said",
    [b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n", b'{"label":"JOIN"}', bytes(100), b"\r\n\r\n\r\n"],
)
def test_whoever_does_not_use_tls_gets_nothing_but_its_alert(closed, said):
    with closed.dial() as sock:
        sock.sendall(said)
        assert sock.recv(1 << 16) in (b"\x15\x03\x03\x00\x02\x02\x0a", b"")


def test_whoever_is_refused_and_goes_on_sending_hears_why(closed, monkeypatch):
    monkeypatch.setattr(server, "_LINGER", PATIENCE)
    with closed.dial() as sock:
        sock.sendall(b"GET " + bytes(200_000))
        assert b"".join(iter(lambda: sock.recv(4096), b"")) == b"\x15\x03\x03\x00\x02\x02\x0a"
        for _ in range(20):  # the system tells a little later that nobody is there any more
            sock.sendall(b" ")
            time.sleep(0.005)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_older_tls(closed, log):
    with pytest.raises(OSError):
        ask(closed, "GET", "/healthz", stranger(maximum_version=ssl.TLSVersion.TLSv1_2))
    assert until(lambda: lines_about(log, "it has no TLS 1.3, which is needed"))
    assert closed.server.door.counts == {"version": 1}


@pytest.mark.parametrize(("method", "path"), PEER_PATHS)
def test_without_a_certificate_no_peers_path_is_answered(closed, method, path, secret, log):
    token = derived_from(SECRET).token
    for headers in ({}, {"Authorization": f"Bearer {token}"}):
        status, fields, body = ask(closed, method, path, body=JOIN, **headers)
        assert status == 401
        assert fields.get_all("WWW-Authenticate") == ['Basic realm="NetLoader"', "Bearer"]
        assert json.loads(body)["code"] == "unauthorized"
    assert not closed.service.ended
    assert not closed.service.groups
    assert closed.server.door.counts == {"no_certificate": 2}
    assert lines_about(log, "it has no certificate, and asks for /netloader/v1/")


def test_without_a_certificate_no_large_body_is_read(closed):
    path = f"/netloader/v1/weights/{DIGEST}/regions"
    with stranger().wrap_socket(closed.dial()) as sock:
        length = f"Content-Length: {server.api.MAX_BODY + 1}"
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\n{length}\r\n\r\n".encode())
        assert answer_on(sock, "POST")[0] == 413


def test_these_are_all_paths_of_peers():
    routes = {server.api.route(path)[0] for _, path in PEER_PATHS}
    open_to_more = server.api.FOR_ALL | server.api.WITH_TOKEN
    assert routes | open_to_more == server.api.METHODS.keys()
    assert not routes & open_to_more


def test_whether_the_instance_is_there_is_told_to_everybody(closed):
    assert ask(closed, "GET", "/healthz")[2] == b"ok\n"
    assert not closed.server.door.counts


def test_the_status_is_for_those_with_the_token(closed, log):
    token = derived_from(SECRET).token
    status, _, body = ask(closed, "GET", "/status", Authorization=f"Bearer {token}")
    assert (status, json.loads(body)["instance"]) == (200, "instance")
    assert ask(closed, "GET", "/status", Authorization=f"bearer  {token} ")[0] == 200
    assert not closed.server.door.counts
    for wrong in ("Bearer", f"Bearer {token[:-1]}", f"Bearer {token}0", "Bearer \xe9", "Bearer "):
        assert ask(closed, "GET", "/status", Authorization=wrong)[0] == 401
    assert ask(closed, "GET", "/status", Authorization=f"Basic {token}")[0] == 401
    assert ask(closed, "GET", "/status")[0] == 401
    assert sum(closed.server.door.counts.values()) == 7
    assert lines_about(log, "its token is not the one of this instance")
    assert not [line for line in log if token[:-1] in line]


def test_a_token_is_the_password_of_any_user(closed):
    token = derived_from(SECRET).token
    for user, password, status in (("", token, 200), ("me", token, 200), (token, "", 401)):
        given = base64.b64encode(f"{user}:{password}".encode()).decode()
        assert ask(closed, "GET", "/metrics", Authorization=f"Basic {given}")[0] == status
    for malformed in ("Basic", "Basic =", "Basic /w==", "Basic \xe9"):
        assert ask(closed, "GET", "/metrics", Authorization=malformed)[0] == 401
    assert closed.server.door.counts == {"token": 5}


def test_a_token_is_good_for_one_request(closed):
    token = derived_from(SECRET).token
    plain = b"GET /status HTTP/1.1\r\nHost: h\r\n"
    with stranger().wrap_socket(closed.dial()) as sock:
        sock.sendall(plain + f"Authorization: Bearer {token}\r\n\r\n".encode())
        assert answer_on(sock)[0] == 200
        sock.sendall(plain + b"\r\n")
        assert answer_on(sock)[0] == 401
        assert sock.recv(1) == b""


def test_what_fails_often_is_counted_and_logged_now_and_then(secret, log, monkeypatch):
    now = [100.0]
    door = tls.Doorkeeper()
    monkeypatch.setattr(tls.time, "monotonic", lambda: now[0])
    peer = Address("10.0.0.1", 7)
    for _ in range(1000):
        door.note(peer, tls.NotAdmitted("certificate", "unknown"))
    door.note(peer, tls.NotAdmitted("token", "wrong"))
    now[0] += 10.0
    refused = "NetLoader: refused the connection of 10.0.0.1:7"
    door.note(peer, tls.NotAdmitted("certificate", "unknown"))
    assert log == [
        f"{refused}: unknown",
        f"{refused}: wrong",
        f"{refused}: unknown (999 more since the last line like this)",
    ]
    assert door.counts == {"certificate": 1001, "token": 1}


# Those that stall, and those that go


def test_a_handshake_that_stalls_ends_in_time(secret, log):
    with running(credentials=secret, handshake_timeout=0.3) as closed:
        with closed.dial() as silent, closed.dial() as half:
            half.sendall(b"\x16\x03\x01\x02\x00\x01")
            for sock in (silent, half):
                began = time.monotonic()
                assert sock.recv(100) == b""
                assert time.monotonic() - began < AT_ONCE
        assert until(lambda: not closed.server._waiting)
        assert not closed.server.door.counts  # a probe is no attack


def test_silent_connections_hold_no_more_threads_than_others_and_keep_nobody_out(closed, secret):
    silent = [closed.dial() for _ in range(200)]
    try:
        with dial(closed, secret) as client:
            client.join(Join(IDENTITY))
        sessions = [t for t in threading.enumerate() if t.name == "netloader-session"]
        assert len(sessions) <= server.MAX_CONNECTIONS + 10  # some are about to end
    finally:
        for sock in silent:
            sock.close()


def test_a_source_that_stalls_in_the_handshake_is_given_up_in_time(secret):
    with socket.create_server((HOST, 0)) as listener:
        stalled = type("Stalled", (), {"address": Address(*listener.getsockname())})
        began = time.monotonic()
        with pytest.raises(SourceSilent, match=r"no complete TLS handshake in 0\.3 s"):
            dial(stalled, secret, handshake=0.3)
        assert time.monotonic() - began < AT_ONCE


def derived(secret, label, nbytes):
    """What TLS 1.3 derives from a secret; see RFC 8446, 7.1."""
    info = nbytes.to_bytes(2, "big") + bytes([6 + len(label)]) + b"tls13 " + label + b"\0"
    return HKDFExpand(SHA384(), nbytes, info).derive(secret)


def key_updates(secret):
    """The records of a peer that changes its key without end, and says nothing else."""
    head = b"\x17\x03\x03\x00\x16"
    while True:
        key, nonce = derived(secret, b"key", 32), derived(secret, b"iv", 12)
        yield head + AESGCM(key).encrypt(nonce, b"\x18\x00\x00\x01\x01\x16", head)
        secret = derived(secret, b"traffic upd", 48)


@pytest.fixture
def changes_its_key(secret, tmp_path):
    """A wire, and the socket and the records of such a peer."""
    near, far = connected_pair()
    wire, raw = tls.TlsWire(near, 0.3, secret), far.dup()
    context = stranger(keylog_filename=str(tmp_path / "keys"))
    connecting = threading.Thread(target=lambda: context.wrap_socket(far).detach())
    connecting.start()
    wire.handshake(PATIENCE)
    connecting.join()
    keys = dict(line.rsplit(" ", 1) for line in (tmp_path / "keys").read_text().splitlines())
    key = next(keys[name] for name in keys if name.startswith("CLIENT_TRAFFIC_SECRET_0"))
    yield wire, raw, key_updates(bytes.fromhex(key))
    wire.close()
    raw.close()


def test_what_tls_answers_by_itself_is_sent_and_not_kept(changes_its_key):
    wire, raw, records = changes_its_key
    raw.sendall(b"".join(itertools.islice(records, 1000)))
    wire.allow(0.3, 100)
    with pytest.raises(TimeoutError):
        wire.read(bytearray(100))
    assert not wire._outgoing.pending


def read_one(wire):
    wire.allow(0.3, 100)
    wire.read(bytearray(1))


def receive_one(wire):
    wire.receive([memoryview(bytearray(1))])


@pytest.mark.parametrize("wait", [read_one, receive_one])
def test_records_that_carry_no_data_take_no_longer_than_is_allowed(changes_its_key, wait):
    wire, raw, records = changes_its_key
    over = threading.Event()

    def change():
        deadline = time.monotonic() + PATIENCE
        with contextlib.suppress(OSError):
            while not over.is_set() and time.monotonic() < deadline:
                raw.sendall(next(records))
            raw.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=change)
    thread.start()
    with pytest.raises(TimeoutError):
        wait(wire)
    over.set()
    thread.join()


def test_a_server_stops_while_handshakes_stall(secret):
    with running(credentials=secret) as closed, closed.dial() as silent:
        assert until(lambda: closed.server._waiting)
        began = time.monotonic()
        closed.server.stop()
        assert time.monotonic() - began < AT_ONCE
        assert silent.recv(100) == b""


def test_a_client_that_stalls_in_the_middle_of_blocks_ends_in_time(secret):
    with (
        running(credentials=secret, progress_timeout=0.3) as closed,
        dial(closed, secret) as client,
    ):
        client.join(Join(IDENTITY))
        for _ in range(40):
            client.ask_blocks(DIGEST, 0, 4999)
        assert until(lambda: closed.server.sessions == 0)


def test_a_source_that_stalls_in_the_middle_of_blocks_is_given_up_in_time(secret):
    go_on = threading.Event()
    with running(credentials=secret) as closed:

        def chunks(data):
            yield [data[:BLOCK]]
            go_on.wait(PATIENCE)

        closed.service.chunks = chunks
        with dial(closed, secret, progress=0.3) as client:
            client.join(Join(IDENTITY))
            with pytest.raises(SourceLost, match=r"no data received for 0\.3 s"):
                read(client, 0, 1)
        go_on.set()


def test_a_client_whose_request_stalls_hears_why(secret):
    with running(credentials=secret) as closed, dial(closed, secret) as client:
        assert client.status()
        stalling(closed, client)
        with pytest.raises(SourceLost, match="timeout: the request was not complete"):
            client.join(Join(IDENTITY))


def test_any_thread_ends_a_connection_that_another_one_waits_in(closed, secret):
    entered = threading.Event()
    closed.service.wait = lambda session: (entered.set(), until(session.gone))
    with dial(closed, secret) as client:
        threading.Thread(target=lambda: (entered.wait(PATIENCE), client.cut())).start()
        with pytest.raises(SourceLost, match="ended on this side"):
            client.join(Join(IDENTITY))
    closed.service.wait = None


def test_a_connection_that_was_idle_for_too_long_is_made_again(secret):
    with running(credentials=secret, idle_timeout=0.2) as closed, dial(closed, secret) as client:
        client.join(Join(IDENTITY))
        assert until(client.hung_up)
        assert read(client, 0, 0) == CONTENT[:BLOCK]


def test_before_anything_was_asked_there_is_no_answer(closed, secret):
    # Whatever TLS says after a handshake would look like one to those that wait for a group's.
    with dial(closed, secret) as client:
        assert until(lambda: [w for w in closed.server._waiting if w._tls and w._tls.version()])
        assert not client.has_answer
        group = client.open_group(DIGEST)
        assert not group.answered
        group.ask([(0, 1)])
        assert until(lambda: group.answered)
        assert group.answer() == [2 * BLOCK]


def test_many_small_tensors_arrive_as_they_are(closed, secret):
    cuts = [0, 1, 2, 100, 70_000, 70_001, 400_000, 1_500_000, 5_000_000]

    def chunks(data):
        yield [data[a:b] for a, b in itertools.pairwise(cuts)]

    closed.service.chunks = chunks
    with dial(closed, secret) as client:
        client.join(Join(IDENTITY))
        got = [bytearray(b - a) for a, b in itertools.pairwise(cuts)]
        client.ask_blocks(DIGEST, 0, 4999)
        client.receive_blocks(cuts[-1], [[memoryview(each) for each in got]])
        assert b"".join(got) == CONTENT


# A man in the middle


def as_it_is(number, record):
    return [record]


class Tap:
    """A proxy that sees everything, and may change what the source or the client sends."""

    def __init__(self, closed, source=as_it_is, client=as_it_is):
        self._closed, self._of_source, self._of_client = closed, source, client
        self.seen = []
        self._listener = socket.create_server((HOST, 0))
        self.address = Address(*self._listener.getsockname())
        self._threads = []
        self._sockets = [self._listener]

    def __enter__(self):
        self._run(self._accept)
        return self

    def __exit__(self, *_):
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
        for sock in self._sockets:
            sock.close()

    def _run(self, target, *arguments):
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = self._closed.dial()
            self._sockets += near, far
            self._run(self._pump, near, far, self._of_client)
            self._run(self._pump, far, near, self._of_source)

    def _pump(self, source, target, change):
        """Pass TLS's records on, one by one."""
        stream = source.makefile("rb")
        with contextlib.suppress(OSError):
            for number in itertools.count():
                if len(head := stream.read(5)) < 5:
                    break
                record = head + stream.read(int.from_bytes(head[3:], "big"))
                self.seen.append(record)
                for changed in change(number, record):
                    target.sendall(changed)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def _flip(data, at):
    changed = bytearray(data)
    changed[at % len(data)] ^= 0x20
    return bytes(changed)


# What else he says where he holds something back, or the other side would wait for the rest.
OTHER = b"\x17\x03\x03\x40\x00" + bytes(1 << 14)
CHANGES = {
    "flips a byte": lambda record: [_flip(record, 100)],
    "flips the last byte": lambda record: [_flip(record, -1)],
    "flips a byte of the length": lambda record: [_flip(record, 4), OTHER],
    "replays": lambda record: [record, record],
    "leaves out": lambda record: [OTHER],
    "cuts short": lambda record: [record[:-9], OTHER],
    "invents": lambda record: [b"\x17\x03\x03\x00\x20" + bytes(32), record],
    "says the end": lambda record: [b"\x15\x03\x03\x00\x02\x01\x00", record],
}


@pytest.mark.parametrize("whose", ["source", "client"])
@pytest.mark.parametrize("at", [0, 4, 7])
@pytest.mark.parametrize("how", CHANGES)
def test_whatever_a_man_in_the_middle_changes_is_noticed(secret, how, at, whose):
    changed = []

    def change(number, record):
        if number != at:
            return [record]
        changed.append(record)
        return CHANGES[how](record)

    with running(credentials=secret) as closed, Tap(closed, **{whose: change}) as tap:
        try:
            with dial(tap, secret) as client:
                client.join(Join(IDENTITY))
                for block in range(4):
                    assert read(client, block, block) == CONTENT[:BLOCK]
        except SourceError:
            pass
        else:  # it has asked once more, over another connection
            assert until(lambda: closed.server.door.counts["broken"])
        assert changed


@pytest.mark.parametrize("late", [True, False])
def test_records_in_another_order_or_left_out_are_noticed(secret, late):
    kept = []

    def change(number, record):
        kept.append(record)
        large = [each for each in kept if len(each) > 10_000]  # of blocks
        if record not in large[:2]:
            return [record]
        return [] if len(large) == 1 else [record, *large[:late]]

    with running(credentials=secret) as closed, Tap(closed, source=change) as tap:
        with dial(tap, secret) as client:
            client.join(Join(IDENTITY))
            assert read(client, 0, 199) == CONTENT[: 200 * BLOCK]  # over another connection
        assert until(lambda: closed.server.door.counts["broken"])
    assert [record for record in kept if len(record) > 10_000][1:]


def test_strangers_do_not_cut_a_peer_that_waits(secret, monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
    with (
        running(credentials=secret) as closed,
        dial(closed, secret) as peer,
        contextlib.ExitStack() as open_now,
    ):
        peer.status()
        strangers = [open_now.enter_context(closed.dial()) for _ in range(4)]
        assert strangers[0].recv(1) == b""
        assert not peer.hung_up()


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x03\x00\x05\x02\x00\x00\x01\x00"])
def test_a_source_that_breaks_off_the_handshake_is_there(secret, said):
    with socket.create_server((HOST, 0)) as listener:
        there = type("There", (), {"address": Address(*listener.getsockname())})

        def break_off():
            with listener.accept()[0] as sock:
                sock.recv(100)
                sock.sendall(said)

        thread = threading.Thread(target=break_off)
        thread.start()
        with pytest.raises(SourceSilent):
            dial(there, secret)
        thread.join()


def test_bytes_that_trickle_in_are_given_up_in_time(secret):
    over = threading.Event()

    def trickle(sock):
        wire = tls.TlsWire(sock, PATIENCE, secret)
        wire.handshake(PATIENCE)
        with contextlib.suppress(OSError), sock:
            while not over.wait(0.02):
                wire.send([b"x"])

    with socket.create_server((HOST, 0)) as listener:
        dialled = socket.create_connection(listener.getsockname())
        thread = threading.Thread(target=trickle, args=listener.accept()[:1])
        thread.start()
    wire = tls.TlsWire(dialled, PATIENCE, secret, HOST)
    wire.handshake(PATIENCE)
    began = time.monotonic()
    wire.ends = began + 0.3
    with pytest.raises(TimeoutError):
        wire.receive([memoryview(bytearray(1 << 16))])
    assert time.monotonic() - began < PATIENCE / 2
    over.set()
    thread.join()
    wire.close()
