import enum
import os
import signal
import stat
import string
import threading

import psutil
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader import utils
from vllm_ascend.model_loader.netloader.errors import (
    LayoutUnsupported,
    ProtocolError,
    SourceError,
    SourceRefused,
    TransferCorrupt,
)
from vllm_ascend.model_loader.netloader.executor.model.raw import apply_attributes
from vllm_ascend.model_loader.netloader.port_file import PortFile, write_atomically
from vllm_ascend.model_loader.netloader.utils import (
    Address,
    Patience,
    one_line,
    parse_address,
    plain,
    rate,
    shortened,
    size,
    unmapped,
    within,
)

from .support import PATIENCE, Clock, end, python, until

_label = st.text(string.ascii_letters + string.digits, min_size=1, max_size=20)
_host_names = st.lists(_label, min_size=1, max_size=4).map(".".join)
_hosts = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
    st.ip_addresses(v=6).map(lambda address: f"{address}%eth0.1"),
    # a name of digits and dots alone would have to be an IPv4 address
    _host_names.filter(lambda name: not set(name) <= set("0123456789.")),
)


# Addresses


@given(_hosts, st.integers(1, 65535))
def test_an_address_reads_back_from_its_text(host, port):
    address = Address(host, port)
    assert parse_address(str(address)) == address
    assert parse_address(f"  {address}\n") == address


@given(st.text(max_size=40) | st.text("0123456789.:[]%a-", max_size=30))
@example("host:00001999999")
@example("[fe80::1%]:80")
@example("host:²")
@example("\ud800:80")
def test_any_text_is_an_address_or_is_refused_with_the_text_in_the_message(text):
    try:
        address = parse_address(text)
    except ValueError as error:
        assert repr(text) in str(error)
    else:
        assert 1 <= address.port <= 65535
        assert address.host
        assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    ("text", "why"),
    [
        *[(text, "no port") for text in ("", "host", "10.0.0.1", "[::1]", "[fe80::1%eth0]")],
        (":80", "neither an IP address nor a host name"),
        *[
            (f"host:{port}", f"port {port!r} is not a number from 1 to 65535")
            # int() takes the Arabic digit
            for port in ("", "0", "65536", "99999", "-1", "+1", " 80", "8_0", "٣", "1e3", "80/")
        ],
        *[
            (text, "brackets")
            for text in ("::1", "::1:80", "fe80::1:28000", "fe80::1%eth0", "2001:db8::a", "[::1:80")
        ],
        *[
            (f"{scheme}{rest}", f"or host:port without {scheme}")
            for scheme in ("tcp://", "http://", "grpc+TLS://")
            for rest in ("10.0.0.1:4000", "host:80/", "[::1]:80", "host")
        ],
        ("[1.2.3.4]:80", "not an IPv6 address"),
        ("[::1%]:80", "network interface"),
        ("[::1%a b]:80", "network interface"),
        *[(f"{host}:80", "not an IPv4 address") for host in ("1.2.3", "1.2.3.4.5", "256.1.1.1")],
        *[
            (f"{host}:80", "host name")
            # the last one has 255 characters
            for host in ("-host", "host-", "ho st", "a..b", "a" * 64, "a." * 127 + "a")
        ],
    ],
)
def test_a_malformed_address_is_refused_and_the_message_says_why(text, why):
    with pytest.raises(ValueError) as error:
        parse_address(text)
    assert str(error.value).startswith(f"{text!r}: ")
    assert why in str(error.value)


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7%eth0", "192.0.2.7"),
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8::1", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("some.host", "some.host"),
        ("", ""),
    ],
)
def test_a_mapped_ipv4_address_is_shown_as_ipv4_and_anything_else_as_it_is(host, shown):
    assert unmapped(host) == shown


# Lines of text


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [
        (0, "0.0 MB"),
        (49_999, "0.0 MB"),
        (2_500_000, "2.5 MB"),
        (999_000_000, "999.0 MB"),
        (1_000_000_000, "1.00 GB"),
        (14_483_000_000, "14.48 GB"),
    ],
)
def test_a_size_is_in_the_unit_that_suits_it(nbytes, shown):
    assert size(nbytes) == shown


def test_a_rate_is_in_the_unit_that_suits_it():
    assert rate(3_000_000_000, 2.0) == "1.50 GB/s"
    assert rate(30_000_000, 2.0) == "15.0 MB/s"


def test_a_rate_over_no_time_is_not_an_error():
    assert rate(0, 0.0) == "0.0 MB/s"
    assert rate(1, 0.0).endswith("/s")


def test_a_text_is_shown_on_one_line():
    assert one_line(ValueError("a\n  b\tc\r\n")) == "a b c"


@given(st.text(max_size=300), st.integers(1, 100))
@example("\x1b[31mred\x1b[0m\n" * 9, 60)
@example("\u202eright to left", 100)
def test_what_a_peer_says_is_shown_printable_and_bounded(text, limit):
    shown = shortened(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit + 3
    assert shown.endswith("...") or len(text) <= limit
    if text.isprintable() and len(text) <= limit:
        assert shown == text


# Plain values


class Text(str):
    pass


class Whole(int):
    pass


class Choice(enum.Enum):
    ONE, OTHER = "one", object()


@pytest.mark.parametrize(
    ("value", "made"),
    [
        (None, None),
        (True, True),
        (7, 7),
        (2.5, 2.5),
        ("x", "x"),
        (Text("x"), "x"),
        (Whole(7), 7),
        (Choice.ONE, "one"),
    ],
)
def test_a_value_becomes_a_type_that_messages_carry(value, made):
    found = plain("name", value)
    assert found == made
    assert type(found) is type(made)


@pytest.mark.parametrize("value", [object(), [1], b"x", 1j, "\ud800", Choice.OTHER])
def test_a_value_that_no_message_can_carry_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"field is .*; allowed: "):
        plain("field", value)


# Deadlines


def test_patience_ends_with_its_time(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(utils, "time", clock)
    patience = Patience(5.0, lambda: False, 1.0)
    clock.sleep(4.9)
    assert not patience.over()
    clock.sleep(0.2)
    assert patience.over()
    assert not patience.hung_up


@pytest.mark.parametrize(("when", "until"), [(1.0, 1.5), (4.8, 5.0)])
def test_a_peer_that_has_hung_up_gets_a_moment_within_the_deadline(when, until, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(utils, "time", clock)
    patience = Patience(5.0, lambda: clock.passed >= when, 0.5)
    while not patience.over():
        clock.sleep(0.01)
    assert patience.hung_up
    assert until < clock.passed < until + 0.05


def never():
    return False


def test_a_call_within_its_time_gives_its_result_or_its_error():
    assert within(Patience(PATIENCE, never, 0.0), lambda: 7, print) == 7
    with pytest.raises(ZeroDivisionError):
        within(Patience(PATIENCE, never, 0.0), lambda: 1 / 0, print)


def test_a_result_that_comes_too_late_is_undone():
    late, undone = threading.Event(), threading.Event()

    def call():
        assert late.wait(PATIENCE)
        return undone

    with pytest.raises(TimeoutError):
        within(Patience(0.01, never, 0.0), call, threading.Event.set)
    assert not undone.is_set()
    late.set()
    assert undone.wait(PATIENCE)


# Port files

ADDRESS = Address("192.0.2.7", 4711)


def _watchers(path):
    """Processes that watch over a port file."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if str(path) in (process.info["cmdline"] or []):
            found.append(process)
    return found


@pytest.fixture
def prefix(tmp_path):
    return str(tmp_path / "rank_")


def test_a_port_file_has_the_address_and_is_alone_in_its_folder(prefix, tmp_path):
    port_file = PortFile(prefix, 3, ADDRESS)
    port_file.publish()
    assert os.listdir(tmp_path) == ["rank_3.txt"]
    assert parse_address((tmp_path / "rank_3.txt").read_text()) == ADDRESS
    assert stat.S_IMODE((tmp_path / "rank_3.txt").stat().st_mode) == 0o644
    port_file.remove()
    assert os.listdir(tmp_path) == []


def test_a_port_file_that_nobody_watches_does_not_stay(prefix, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(OSError):
        PortFile(prefix, 0, ADDRESS).publish()
    assert os.listdir(tmp_path) == []


def test_a_port_file_replaces_what_an_earlier_instance_left(prefix, tmp_path):
    (tmp_path / "rank_0.txt").write_text("192.0.2.7:1111")
    port_file = PortFile(prefix, 0, ADDRESS)
    port_file.publish()
    assert (tmp_path / "rank_0.txt").read_text() == str(ADDRESS)
    port_file.remove()


def test_a_removed_port_file_has_no_watcher_left(prefix):
    port_file = PortFile(prefix, 0, ADDRESS)
    port_file.publish()
    assert _watchers(port_file.path)
    port_file.remove()
    assert until(lambda: not _watchers(port_file.path))


@pytest.mark.parametrize("content", [b"192.0.2.8:1111", b"\xff"])
def test_a_port_file_that_another_instance_has_overwritten_stays(prefix, content):
    port_file = PortFile(prefix, 0, ADDRESS)
    port_file.publish()
    port_file.path.write_bytes(content)
    port_file.remove()
    assert until(lambda: not _watchers(port_file.path))
    assert port_file.path.read_bytes() == content


def test_removing_twice_or_what_was_never_published_is_harmless(prefix, tmp_path):
    PortFile(prefix, 0, ADDRESS).remove()
    port_file = PortFile(prefix, 0, ADDRESS)
    port_file.publish()
    port_file.remove()
    port_file.remove()
    assert os.listdir(tmp_path) == []


def test_the_same_address_can_be_published_again_at_once(prefix):
    # The watcher of the first file must not take the second one away.
    first, second = PortFile(prefix, 0, ADDRESS), PortFile(prefix, 0, ADDRESS)
    first.publish()
    stopped = _watchers(first.path)
    for watcher in stopped:
        watcher.suspend()  # a busy machine may run it as late as this
    first.remove()
    second.publish()
    for watcher in stopped:
        watcher.resume()
    psutil.wait_procs(stopped, 20)
    assert second.path.read_text() == str(ADDRESS)
    second.remove()


def test_a_folder_that_does_not_exist_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        PortFile(str(tmp_path / "no" / "rank_"), 0, ADDRESS).publish()


def test_an_atomic_write_that_fails_leaves_nothing_behind(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "taken", "text")
    assert os.listdir(tmp_path) == ["taken"]


def test_a_reader_sees_all_of_a_file_or_the_one_before(tmp_path):
    path = tmp_path / "file"
    texts = ["a" * 100_000, "b" * 100_000]
    write_atomically(path, texts[0])
    seen, done = set(), threading.Event()

    def read():
        while not done.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(200):
        write_atomically(path, texts[turn % 2])
    done.set()
    reader.join()
    assert seen <= set(texts)


_PUBLISH = """
import sys, time
from vllm_ascend.model_loader.netloader.port_file import PortFile
from vllm_ascend.model_loader.netloader.utils import Address
port_file = PortFile(sys.argv[1], 0, Address("192.0.2.7", 4711))
port_file.publish()
print("published", flush=True)
time.sleep(600)
"""


@pytest.fixture
def publisher(prefix):
    process = python("-c", _PUBLISH, prefix, start_new_session=True)
    assert process.stdout.readline() == "published\n"
    yield process
    end(process)


def test_the_port_file_of_a_killed_process_goes_away(publisher, tmp_path):
    assert (tmp_path / "rank_0.txt").exists()
    os.kill(publisher.pid, signal.SIGKILL)
    assert until(lambda: not (tmp_path / "rank_0.txt").exists())
    assert until(lambda: not _watchers(tmp_path / "rank_0.txt"))


def test_the_port_file_stays_if_its_process_is_killed_after_another_has_overwritten_it(
    publisher, tmp_path
):
    (tmp_path / "rank_0.txt").write_text("192.0.2.8:1111")
    os.kill(publisher.pid, signal.SIGKILL)
    assert until(lambda: not _watchers(tmp_path / "rank_0.txt"))
    assert (tmp_path / "rank_0.txt").read_text() == "192.0.2.8:1111"


def test_the_watcher_outlives_a_signal_to_the_whole_process_group(publisher, tmp_path):
    # A terminal's Ctrl-C, or a supervisor that ends a service, reaches every process of a group.
    os.killpg(publisher.pid, signal.SIGKILL)
    assert until(lambda: not (tmp_path / "rank_0.txt").exists())


@pytest.mark.parametrize("name", ["with space_", "quote'_", "$(touch x)_", "-rf_", "ünïcode_"])
def test_any_prefix_is_only_ever_a_file_name(name, tmp_path):
    port_file = PortFile(str(tmp_path / name), 0, ADDRESS)
    port_file.publish()
    assert os.listdir(tmp_path) == [f"{name}0.txt"]
    assert port_file._watch is not None
    port_file._watch.stdin.close()  # as the death of this process would
    assert until(lambda: os.listdir(tmp_path) == [])


ESCAPES = "\x1b[2J" * 100_000


@pytest.mark.parametrize(
    "error", [SourceError, ProtocolError, SourceRefused, TransferCorrupt, LayoutUnsupported]
)
def test_an_error_with_names_of_a_source_is_printable_and_bounded(error):
    shown = str(error(f"tensors differ: {ESCAPES} is only there"))
    assert shown.isprintable() and len(shown) < 5100
    assert shown.startswith("tensors differ: ")


def test_an_attribute_that_a_source_invents_is_named_in_a_bounded_line():
    with pytest.raises(LayoutUnsupported) as refused:
        apply_attributes(torch.nn.Linear(2, 2), {f"{ESCAPES}.a": 1})
    assert str(refused.value).isprintable() and len(str(refused.value)) < 5100
