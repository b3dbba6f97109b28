"""Clients on NPUs pass on what has come: each in a process, as HCCL takes one rank of a group."""

import os
import re
import signal

import pytest
import torch

from vllm_ascend.model_loader.netloader.utils import parse_address

from .fleet import PATIENT, load_and_relay
from .models import MIB, many_rows
from .sides import here, serve, until
from .test_relays import dial
from .ways import Way

pytestmark = pytest.mark.ways(Way.HCCL, Way.NPU_HTTP)


def _rest():
    from .npus import wait_until_hccl_rests

    wait_until_hccl_rests()


CLIENTS = 3


def many_rows_and_nz(make):
    """Some of it changes its format when all has come."""
    nz = {f"nz.{i}": make.nz(make(torch.bfloat16, 512, 640)) for i in range(8)}
    return many_rows(make) | nz


@pytest.fixture
def fleet(way, started, tmp_path):
    """A seed, clients that have begun to load from it, and what returns their addresses."""
    seed, *clients = (started(index) for index in range(1 + CLIENTS))
    config = {"max_send_rate": 8 * MIB, **PATIENT}
    address = seed.call(serve, way, many_rows_and_nz, **config)
    for number, client in enumerate(clients):
        prefix = f"{tmp_path}/{number}-"
        client.start(load_and_relay, way, [address], many_rows_and_nz, output_prefix=prefix)

    def address_of(number):
        path = f"{tmp_path}/{number}-0.txt"
        until(lambda: os.path.exists(path))
        with open(path) as file:
            return parse_address(file.read())

    return seed, address, clients, address_of


def sent():
    return here["source"].status.bytes_sent, here["source"].store.blocks.nbytes


def check(outcomes, seed, address):
    """Each has the right weights, and much of it from others than the seed."""
    sent_by_seed, nbytes = seed.call(sent)
    assert any(re.findall(r"(?<![\d.])[\d.]+:\d+", gave) != [str(address)] for gave, _ in outcomes)
    assert sum(passed_on for _, passed_on in outcomes) > nbytes // 2
    assert sent_by_seed < 2 * nbytes


def test_three_clients_pass_on_what_has_come(way, fleet):
    seed, address, clients, _ = fleet
    check([client.result(90) for client in clients], seed, address)
    for process in [seed, *clients]:
        process.call(_rest)


def test_a_relay_that_is_killed_costs_what_was_on_its_way(way, fleet):
    _, _, clients, address_of = fleet

    def relaying():
        for number, client in enumerate(clients):
            with dial(address_of(number)) as connection:
                if connection.status().bytes_sent > MIB:
                    return client
        return None

    until(relaying)
    killed = relaying()
    killed.signal(signal.SIGKILL)
    for client in clients:
        if client is not killed:
            client.result(90)
