"""A source or a client as a process of its own, for tests that kill or stop one; see `support`."""

import os
import sys
import threading

from support import (  # this file is run as a script
    HOST,
    blank_like,
    load,
    rows,
    source,
    tapped,
)

from vllm_ascend.model_loader.netloader.utils import Address


def serve(seed, after, number):
    def tap(index, count):
        if count == after:
            os.kill(os.getpid(), number)

    with source(tapped(rows(seed=seed), tap)) as running:
        print(running.address.port, flush=True)
        threading.Event().wait()


def pull(port):
    load([Address(HOST, port)], blank_like(rows()))


if __name__ == "__main__":
    if sys.argv[1] == "source":
        serve(*map(int, sys.argv[2:]))
    else:
        pull(int(sys.argv[2]))
