"""Sources that may serve later are asked again, as long as SOURCE_WAIT says."""

import contextlib
import socket
import threading

import pytest

from vllm_ascend.model_loader.netloader.interaction.discovery import Own
from vllm_ascend.model_loader.netloader.utils import parse_name

from .faults import closed_port, tapped
from .models import COUNT, rows
from .sides import HOST, Address, fresh, identity, load, loading, log_lines, source, store_of, until
from .ways import Way


@contextlib.contextmanager
def busy(way, over, **config):
    """A source all of whose places are taken until `over` is set."""

    def hold(index, count):
        begun.set()
        over.wait(30)

    begun = threading.Event()
    with (
        source(way, tapped(way, rows, hold), max_sessions=1, **config) as running,
        loading(way, [running], progress_timeout=30.0) as first,
    ):
        assert begun.wait(20)
        yield running
        over.set()
        first().check()


def test_a_busy_source_is_asked_again(way, over):
    with (
        busy(way, over) as running,
        log_lines() as lines,
        loading(way, [running], source_wait=60.0) as second,
    ):
        until(lambda: any("answered busy" in line for line in lines))
        over.set()
        outcome = second().check()
    assert outcome.said(f"source {running.address}: busy: 1 of 1 sessions are open; asking again")


def test_without_source_wait_busy_is_a_failure_at_once(way, over):
    with busy(way, over) as running:
        outcome = load(way, [running]).check_failed(f"{running.address}: busy: ")
        assert outcome.seconds < 5
        assert running.sessions == 1


def test_busy_is_a_failure_once_source_wait_is_over(way, over):
    with busy(way, over) as running:
        outcome = load(way, [running], source_wait=1.2).check_failed(f"{running.address}: busy: ")
    assert outcome.seconds >= 0.6


def test_others_are_asked_while_a_source_is_busy(way, over):
    with busy(way, over) as running, source(way) as idle:
        outcome = load(way, [running, idle], source_wait=60.0, max_sources=1).check()
    assert outcome.gave == str(idle.address)


def test_a_source_that_is_loading_is_asked_again(way):
    store = fresh(store_of(way, rows))
    with source(way, who=identity(way, group="netloader_draft")) as running:
        running.server.expect("netloader")
        with log_lines() as lines, loading(way, [running], source_wait=60.0) as result:
            until(lambda: any("answered loading" in line for line in lines))
            running.offer(way, store)
            assert result().check().gave == str(running.address)


def test_a_client_may_start_before_its_source(way):
    # A bound socket keeps the port free, and refuses connections as long as it does not listen.
    with socket.socket() as reserved:
        reserved.bind((HOST, 0))
        port = reserved.getsockname()[1]
        with loading(way, [Address(HOST, port)], source_wait=60.0) as result:
            until(lambda: _refused(port))
            reserved.close()
            with source(way, port=port):
                result().check()


def _refused(port):
    with socket.socket() as sock:
        return sock.connect_ex((HOST, port)) != 0


@pytest.mark.ways(Way.HTTP, Way.STREAM)  # where its log is in this process
def test_names_are_looked_up_again_until_somebody_is_found(way, tmp_path):
    name = parse_name(f"file+{tmp_path}/any-")
    with log_lines() as lines, loading(way, [name], source_wait=60.0) as result:
        until(
            lambda: any(f"source {name}: there are no such files; asking" in one for one in lines)
        )
        with source(way, output_prefix=f"{tmp_path}/any-one-") as running:
            assert result().check().gave == str(running.address)
    assert sum("there are no such files" in one for one in lines) == 1


def test_a_name_without_instances_is_a_failure_once_source_wait_is_over(way, tmp_path):
    name = parse_name(f"file+{tmp_path}/any-")
    load(way, [name], source_wait=0.6).check_failed("there are no such files")


def test_a_name_of_this_instance_alone_is_not_waited_for(way):
    with source(way) as running:
        name = parse_name(str(running.address))
        load(way, [name], own=Own(running.server.process)).check_failed("there are no sources")
        load(way, [name], own=Own(ports=[running.address.port])).check_failed("no sources")
        load(way, [name]).check()


def test_what_cannot_be_reached_is_not_waited_for_where_another_has_failed(way):
    with source(way, who=identity(way, model="other")) as other:
        outcome = load(way, [closed_port(), other], source_wait=60.0).check_failed("other_model")
    assert outcome.seconds < 20


def test_eight_clients_that_start_together_all_get_the_weights(way):
    with source(way, max_sessions=2) as running, contextlib.ExitStack() as stack:
        results = [
            stack.enter_context(loading(way, [running], source_wait=60.0, progress_timeout=10.0))
            for _ in range(8)
        ]
        for result in results:
            result(60.0).check()
        until(lambda: running.sessions == 0)
        assert running.status.bytes_sent == 8 * running.store.blocks.nbytes
    assert len(running.store.tensors) == COUNT


@pytest.mark.ways(Way.HTTP)
def test_a_source_whose_bytes_trickle_is_left_in_time(way, over):
    def trickle(served, run):
        while not over.wait(0.2):
            yield [memoryview(b"x")]

    with source(way) as running:
        running.server._pieces = trickle
        outcome = load(way, [running], progress_timeout=0.5, chunk_mib=1)
        outcome.check_failed(f"{running.address}: no blocks for 1.5 s")
