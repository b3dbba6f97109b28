"""A source and a client on two hosts: network namespaces that a cable connects."""

import ctypes
import dataclasses
import os
import socket
import subprocess

import pytest

from .models import COUNT
from .sides import PATIENCE, load_here, serve
from .test_npu import sent_chunks
from .ways import Way

WAY = Way.HCCL
pytestmark = pytest.mark.ways(WAY)

CLONE_NEWNET = 0x40000000
HOSTS = {"left": "10.77.0.1", "right": "10.77.0.2"}
BASE = 50000  # nobody else is in the namespace


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def move_out():
    """Gives this process a network of its own; returns why that is not possible."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        return os.strerror(ctypes.get_errno())
    return ""


def plug_in(name):
    ip("address", "add", f"{HOSTS[name]}/24", "dev", name)
    for one in (name, "lo"):
        ip("link", "set", one, "up")


def set_variables(**values):
    os.environ.update(values)


_taken = []


def take_ports(count):
    while len(_taken) > count:
        _taken.pop().close()
    for port in range(BASE + len(_taken), BASE + count):
        _taken.append(socket.create_server((HOSTS["right"], port)))


@pytest.fixture
def hosts(started):
    """A process on each host."""
    both = {name: started(index) for index, name in enumerate(HOSTS)}
    for process in both.values():
        if reason := process.call(move_out):
            pytest.skip(f"no network namespaces: {reason}")
    left, right = both.values()
    try:
        ip("link", "add", "left", "netns", str(left.pid), "type", "veth",
           "peer", "name", "right", "netns", str(right.pid))  # fmt: skip
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network between namespaces: {error}")
    for name, process in both.items():
        process.call(plug_in, name)
    return left, right


def test_hccl_connects_two_hosts_where_it_is_told_the_addresses_and_has_ports(way, hosts):
    source, client = hosts
    slow = {"handshake_timeout": PATIENCE}
    address = source.call(serve, WAY, listen_host="0.0.0.0", **slow)
    address = dataclasses.replace(address, host=HOSTS["left"])

    def why_not_hccl(**options):
        """Loads; returns what the client said if the weights did not come through a group."""
        before = source.call(sent_chunks)
        outcome = client.call(load_here, WAY, [address], **slow | options).check()
        assert source.call(sent_chunks) - before == COUNT
        return [line for line in outcome.log if "so the weights come over HTTP" in line]

    source.call(set_variables, HCCL_IF_IP=HOSTS["left"])
    client.call(set_variables, HCCL_SOCKET_IFNAME="right", HCCL_IF_BASE_PORT=str(BASE))
    assert not why_not_hccl()
    client.call(take_ports, 16)  # as other groups of the instance may
    assert why_not_hccl()
    client.call(take_ports, 15)
    assert not why_not_hccl()
    # The interface is not looked for where the address is given.
    client.call(set_variables, HCCL_SOCKET_IFNAME="eth9", HCCL_IF_IP=HOSTS["right"])
    assert not why_not_hccl()
    # The source then looks for the client at the source's own address.
    client.call(set_variables, HCCL_IF_IP="127.0.0.1", HCCL_IF_BASE_PORT="")
    assert why_not_hccl(handshake_timeout=2.0)
