"""The streams on which torch_npu launches at once, which sessions of one process share out."""

from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Client, Listener

import pytest

from vllm_ascend.model_loader.netloader.executor.transport.group import CLIENT, SOURCE, form_group

from .sides import HOST, PATIENCE
from .ways import Way

WAY = Way.HCCL
pytestmark = pytest.mark.ways(WAY)

STREAMS = 4  # that torch_npu has for launching at once
_listeners, _groups = [], []


def listen(count):
    _listeners[:] = [Listener((HOST, 0)) for _ in range(count)]
    return [listener.address for listener in _listeners]


def connect_all(addresses, rank):
    """Makes groups at the same time; returns how many streams they and those there are have."""

    device = WAY.device()  # of this thread, too

    def connect(number):
        end = Client(addresses[number]) if rank == CLIENT else _listeners[number].accept()

        def hear(timeout):
            if not end.poll(timeout):
                raise TimeoutError
            return end.recv()

        return form_group(
            device,
            lambda key, value: end.send((key, value)),
            hear,
            rank,
            HOST,
            handshake=PATIENCE,
            progress=PATIENCE,
            gone=lambda: False,
        )

    with ThreadPoolExecutor(len(addresses)) as threads:
        _groups.extend(threads.map(connect, range(len(addresses))))
    return len({group._group._get_stream_id(False) for group in _groups})


def close_last(count):
    for group in _groups[-count:]:
        group.close()
    del _groups[-count:]


def test_sessions_that_connect_at_once_get_streams_of_their_own(way, started):
    source, client = started(0), started(1)

    def connect(count):
        addresses = source.call(listen, count)
        source.start(connect_all, addresses, SOURCE)
        return client.call(connect_all, addresses, CLIENT), source.result()

    connect(1)
    for turn in range(12):
        assert connect(STREAMS - 1) == (STREAMS, STREAMS), turn
        source.start(close_last, STREAMS - 1)
        client.call(close_last, STREAMS - 1)
        source.result()


def test_more_sessions_than_streams_share_them(way, started):
    # Of several clients: sessions that share streams at both ends can wait for each other.
    source, *clients = started(0), started(1), started(2)
    each = STREAMS - 1
    addresses = source.call(listen, each * len(clients))
    source.start(connect_all, addresses, SOURCE)
    for i, client in enumerate(clients):
        client.start(connect_all, addresses[i * each : (i + 1) * each], CLIENT)
    assert source.result() == STREAMS
    assert [client.result() for client in clients] == [each, each]
    source.start(close_last, len(addresses))
    for client in clients:
        client.call(close_last, each)
    source.result()
