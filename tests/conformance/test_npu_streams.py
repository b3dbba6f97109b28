"""The streams on which torch_npu launches at once, which sessions of one process share out."""

import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Client, Listener

import pytest

from vllm_ascend.model_loader.netloader.executor.transport.group import CLIENT, SOURCE, form_group
from vllm_ascend.model_loader.netloader.executor.transport.rendezvous import PeerStore

from .sides import HOST, PATIENCE
from .ways import Way

WAY = Way.HCCL
pytestmark = pytest.mark.ways(WAY)

STREAMS = 4  # that torch_npu has for launching at once
_listeners, _groups, _waiting = {}, [], []


def listen(count):
    listeners = [Listener((HOST, 0)) for _ in range(count)]
    addresses = [listener.address for listener in listeners]
    _listeners.update(zip(addresses, listeners, strict=True))
    return addresses


class Messages:
    """What a session has to meet its peer with."""

    def __init__(self, connection):
        self._connection = connection

    def tell(self, key, value):
        self._connection.send((key, value))

    def hear(self, timeout):
        if not self._connection.poll(timeout):
            raise TimeoutError
        return self._connection.recv()


def connect_all(addresses, rank, handshake=PATIENCE):
    """Makes groups at the same time.

    Returns:
        How many streams they and those there are have, and why the others were not made.
    """

    device = WAY.device()  # of this thread, too

    def connect(address):
        end = Client(address) if rank == CLIENT else _listeners[address].accept()
        messages = Messages(end)
        try:
            return form_group(
                device,
                messages.tell,
                messages.hear,
                rank,
                HOST,
                handshake=handshake,
                progress=PATIENCE,
                gone=lambda: False,
            )
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(len(addresses)) as threads:
        outcomes = list(threads.map(connect, addresses))
    reasons = [one for one in outcomes if isinstance(one, str)]
    _groups.extend(one for one in outcomes if one not in reasons)
    streams = {group._group._get_stream_id(False) for group in _groups}
    return len(streams), reasons


def let_wait(address):
    """Lets a client begin to connect, and does not come."""
    messages = Messages(_listeners[address].accept())
    _waiting.append(messages)
    PeerStore(messages.tell, messages.hear, PATIENCE).meet(SOURCE, "is here")
    messages.hear(PATIENCE)


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
        assert connect(STREAMS - 1) == ((STREAMS, []), (STREAMS, [])), turn
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
    assert source.result() == (STREAMS, [])
    assert [client.result() for client in clients] == [(each, []), (each, [])]
    source.start(close_last, len(addresses))
    for client in clients:
        client.call(close_last, each)
    source.result()


def let_only(limit):
    """Leaves a session only this limit to its waiting for others."""
    for other in {"_TURN", "_LONGEST_WAIT"} - {limit}:
        setattr(sys.modules[type(WAY.device()).__module__], other, PATIENCE)


@pytest.mark.parametrize("limit", ["_TURN", "_LONGEST_WAIT"])
def test_a_peer_that_does_not_come_holds_no_other_up_for_long(way, started, limit):
    source, client = started(0), started(1)
    client.call(let_only, limit)
    late, *addresses = source.call(listen, STREAMS - 1)
    client.start(connect_all, [late, *addresses], CLIENT, PATIENCE / 3)
    source.call(let_wait, late)
    source.start(connect_all, addresses, SOURCE)
    assert source.result() == (STREAMS - 2, [])
    assert client.result() == (STREAMS - 2, ["not connected within 10.0 s"])
