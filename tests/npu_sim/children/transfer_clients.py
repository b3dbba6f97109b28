"""Several clients, several sources and several groups at once, and collectives beside them."""

import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from npusim_vllm import counts
from transfer_support import (
    COUNT,
    HOST,
    IN_THE_TRANSFER,
    MIB,
    PATIENCE,
    Process,
    call_all,
    case,
    check_inference,
    end_inference,
    here,
    inferring,
    load,
    load_often,
    rows,
    sent_bytes,
    serve,
    sessions,
    signal_self_at,
    until,
    used,
    wait_for_no_sessions,
    wait_until_hccl_rests,
)

from vllm_ascend.model_loader.netloader.executor.process_group import CLIENT, SOURCE, form_group
from vllm_ascend.model_loader.netloader.interaction.protocol import Connection, StoreSet


@case
def three_clients_at_once_while_the_source_infers():
    source, mate = inferring(0, 3)
    address = source.call(serve, rows)
    clients = [Process(index) for index in (1, 2, 3)]
    for client in clients:
        client.start(load, [address], rows)
    source.call(check_inference)
    for client in clients:
        client.result().check()
    for process in (source, mate):
        process.call(check_inference)
    for process in (source, mate):
        process.start(end_inference)
    assert source.result() == mate.result()
    source.call(wait_for_no_sessions)
    assert source.call(sent_bytes) == 3 * COUNT * MIB


@case
def one_client_after_the_other_while_it_infers_itself():
    source = Process(0)
    address = source.call(serve, rows)
    client, mate = inferring(1, 3)
    for outcome in client.call(load_often, 5, [address], rows):
        outcome.check()
    for process in (client, mate):
        process.call(check_inference)
    for process in (client, mate):
        process.start(end_inference)
    assert client.result() == mate.result()


@case
def one_client_pulls_from_three_sources_at_once():
    sources = [Process(index) for index in (0, 2, 3)]
    addresses = [source.call(serve, rows, max_send_rate=64 * MIB) for source in sources]
    client = Process(1)
    client.call(watch_communicators)
    client.call(load, addresses, rows, max_sources=3).check()
    assert client.call(most_communicators) == 3
    for source in sources:
        source.call(wait_for_no_sessions)
    sent = [source.call(sent_bytes) for source in sources]
    assert all(sent) and sum(sent) == COUNT * MIB, sent


def watch_communicators():
    here.most = 0

    def watch():
        while True:
            here.most = max(here.most, counts()["communicators"])
            time.sleep(0.001)

    threading.Thread(target=watch, daemon=True).start()


def most_communicators():
    return here.most


def wait_for_sessions(count):
    until(lambda: here.server._server.sessions == count)


@case
def a_process_loads_and_serves_at_once():
    first, middle, last = Process(0), Process(1), Process(2)
    address = first.call(serve, rows)
    middle_address = middle.call(serve, rows)
    last.start(load_often, 4, [middle_address], rows)
    for outcome in middle.call(load_often, 4, [address], rows):
        outcome.check()
    for outcome in last.result():
        outcome.check()


@case
def a_stopped_client_does_not_disturb_the_others():
    source = Process(0)
    address = source.call(serve, rows)
    clients = [Process(index) for index in (1, 2, 3)]
    clients[0].call(signal_self_at, IN_THE_TRANSFER, signal.SIGSTOP)
    clients[0].start(load, [address], rows)
    clients[0].wait_until_gone(signal.SIGSTOP)
    for client in clients[1:]:
        client.start(load_often, 3, [address], rows)
    for client in clients[1:]:
        for outcome in client.result():
            outcome.check()
    source.call(wait_for_no_sessions)
    source.call(wait_until_hccl_rests)


def listen(count):
    here.listeners = [socket.create_server((HOST, 0)) for _ in range(count)]
    return [listener.getsockname()[1] for listener in here.listeners]


class Channel:
    """One end of a connection for building a group."""

    def __init__(self, sock):
        self._connection = Connection(sock)

    def tell(self, key, value):
        self._connection.send(StoreSet(key, value), PATIENCE)

    def hear(self, timeout):
        message = self._connection.receive_reply(timeout)
        return message.key, message.value


def connect_all(ports):
    """Makes groups at the same time; returns how many streams they and those there are have."""

    def connect(port, listener):
        sock = listener.accept()[0] if listener else socket.create_connection((HOST, port))
        channel = Channel(sock)
        rank = SOURCE if listener else CLIENT
        return form_group(
            here.device,
            channel.tell,
            channel.hear,
            rank,
            HOST,
            handshake=PATIENCE,
            progress=PATIENCE,
            gone=lambda: False,
        )

    listeners = here.listeners if here.index == 0 else [None] * len(ports)
    with ThreadPoolExecutor(len(ports)) as threads:
        here.kept += threads.map(connect, ports, listeners)
    return len({group._group._get_stream_id(False) for group in here.kept})


def close_last(count):
    for group in here.kept[-count:]:
        group.close()
    del here.kept[-count:]


STREAMS = 4  # that torch_npu has for launching at once


@case
def sessions_that_connect_at_once_get_streams_of_their_own():
    both = source, _ = Process(0), Process(1)
    call_all(both, connect_all, source.call(listen, 1))
    for turn in range(12):
        ports = source.call(listen, STREAMS - 1)
        assert call_all(both, connect_all, ports) == [STREAMS, STREAMS], turn
        call_all(both, close_last, len(ports))


@case
def more_sessions_than_streams_share_them():
    # Of several clients: sessions that share streams at both ends can wait for each other.
    source, *clients = Process(0), Process(1), Process(2)
    each = STREAMS - 1
    ports = source.call(listen, each * len(clients))
    source.start(connect_all, ports)
    for i, client in enumerate(clients):
        client.start(connect_all, ports[i * each : (i + 1) * each])
    assert source.result() == STREAMS
    assert [client.result() for client in clients] == [each, each]
    source.start(close_last, len(ports))
    call_all(clients, close_last, each)
    source.result()


@case
def more_clients_than_a_source_takes_are_refused_and_not_held_up():
    source = Process(0)
    address = source.call(serve, rows, max_sessions=1, max_send_rate=4 * MIB)
    first, second = Process(1), Process(2)
    second.call(used)  # it is there, and has its device
    first.start(load, [address], rows)
    source.call(wait_for_sessions, 1)
    second.call(load, [address], rows).check_failed()
    assert source.call(sessions) == 1
    first.result().check()
    second.call(load, [address], rows).check()
