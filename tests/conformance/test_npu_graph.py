"""Graphs keep addresses: what is loaded after a capture is what they use."""

import pytest
import torch

from .sides import expected, load_here, make, serve
from .ways import Way

WAY = Way.HCCL
pytestmark = pytest.mark.ways(WAY)


def layers(make):
    # Exact in float32, whatever the order of the sums.
    return {f"layer.{i}": (make(torch.int8, 512, 512).float() / 128).contiguous() for i in range(2)}


def load_after_capture(address):
    """Captures a graph of other weights, loads, and replays it."""
    tensors = make(WAY, layers, 1000)
    addresses = [tensor.data_ptr() for tensor in tensors.values()]
    x = torch.ones(1, 512, device="npu")

    def infer(weights):
        return x @ weights["layer.0"] + x @ weights["layer.1"]

    infer(tensors)
    torch.npu.synchronize()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        y = infer(tensors)
    graph.replay()
    torch.npu.synchronize()
    with_others = y.cpu()
    load_here(WAY, [address], layers, into=lambda make: tensors).check()
    assert [tensor.data_ptr() for tensor in tensors.values()] == addresses
    assert torch.equal(y.cpu(), with_others)  # nothing has run yet
    graph.replay()
    torch.npu.synchronize()
    right = infer(expected(WAY, layers, 0)).cpu()
    assert torch.equal(y.cpu(), right)
    assert not torch.equal(right, with_others)


def test_a_captured_graph_uses_what_was_loaded_after_the_capture(way, started):
    source, client = started(0), started(1)
    client.call(load_after_capture, source.call(serve, WAY, layers))
