"""What a load does with one source, where the cases of conformance cannot bring it about."""

import threading
from types import SimpleNamespace

import msgspec
import pytest
import torch

from vllm_ascend.model_loader.netloader.errors import SourceLost, TransferCorrupt
from vllm_ascend.model_loader.netloader.executor.devices.cpu import CpuDevice
from vllm_ascend.model_loader.netloader.executor.scheduler import Peer
from vllm_ascend.model_loader.netloader.interaction.api import Joined
from vllm_ascend.model_loader.netloader.loading.sessions import Sessions
from vllm_ascend.model_loader.netloader.loading.target import Target
from vllm_ascend.model_loader.netloader.utils import Address

from .support import HOST, IDENTITY, PATIENCE, settings, store_of

ADDRESS = Address(HOST, 1)


class Client:
    """A connection that ends when it is asked for news."""

    def __init__(self):
        self.cut_by_us = threading.Event()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def cut(self):
        self.cut_by_us.set()

    def have(self, weights, since, wait):
        raise SourceLost("closed")


@pytest.mark.parametrize("hearsay", [True, False])
def test_one_that_only_others_have_named_is_not_asked_why_its_bytes_were_wrong(
    monkeypatch, hearsay
):
    queue, asked = SimpleNamespace(is_hearsay=lambda address: hearsay), []
    sessions = Sessions(queue, SimpleNamespace(), None, settings(), None, 0, None, None)

    def connect(address):
        asked.append(address)
        raise SourceLost("closed")

    monkeypatch.setattr(sessions, "_connect", connect)
    error = TransferCorrupt("wrong bytes in blocks 3-3")
    error.block = 3
    sessions._report(ADDRESS, SimpleNamespace(), error)
    assert asked == ([] if hearsay else [ADDRESS])


def test_a_session_that_is_over_does_not_wait_for_its_news_to_be_dialled(monkeypatch):
    target = SimpleNamespace()
    sessions = Sessions(None, target, None, settings(), None, 0, None, None)
    clients, dials, go_on, lost = [Client(), Client()], threading.Event(), threading.Event(), []
    left = iter(clients)

    def connect(address):
        if threading.current_thread() is not threading.main_thread():
            dials.set()
            go_on.wait(PATIENCE)
        return next(left)

    monkeypatch.setattr(sessions, "_connect", connect)
    store = SimpleNamespace(digests=SimpleNamespace(weights="w"))
    scheduler = SimpleNamespace(lost=lambda peer, error: lost.append(error))
    before = {*threading.enumerate()}
    with sessions._news_of(ADDRESS, store, scheduler, Peer(complete=False)):
        assert dials.wait(PATIENCE)
        (news,) = (one for one in threading.enumerate() if one not in before)
    assert news.is_alive()
    go_on.set()
    news.join(PATIENCE)
    assert clients[1].cut_by_us.is_set()
    assert len(lost) == 1


class Formatted(CpuDevice):
    """Memory that is replaced while it is filled."""

    def __init__(self):
        self.replaced, self.restored = [], []

    def writable(self, tensors):
        self.replaced.append([*tensors])
        return lambda: self.restored.append([*tensors])


def test_what_later_weights_have_more_is_made_ready_to_be_filled_and_restored_as_well():
    device, mine = Formatted(), {"a": torch.zeros(4), "b": torch.zeros(4)}
    nothing = {}, None, None, None, None, lambda attributes: None
    target = Target(mine, ["a"], IDENTITY, settings(), device, *nothing)
    for there in ({"a": torch.ones(4)}, {"a": torch.zeros(4), "b": torch.ones(4)}):
        store = store_of(there)
        joined = Joined(
            store.digests.weights,
            1,
            "0" * 32,
            manifest=msgspec.Raw(store.encoded_manifest),
            blocks=store.digests.blocks,
        )
        with target.agreed(ADDRESS, joined) as (filled, scheduler):
            for run in scheduler.take(Peer(), 9):
                for into, data in zip(filled.memory(run), store.memory(run), strict=True):
                    memoryview(into).cast("B")[:] = memoryview(data).cast("B")
                filled.add(run)
    assert target.complete() is not None
    assert [len(tensors) for tensors in device.replaced] == [1, 2]
    assert device.restored == device.replaced
    assert mine["b"].tolist() == [1.0] * 4
