"""What comes in bodies, damaged and read as its receiver reads it."""

import types
import zlib

import msgspec
import torch

from tests.identity import IDENTITY
from tests.ut.model_loader.netloader.test_netloader_api import SAID
from vllm_ascend.model_loader.netloader.copies import describe
from vllm_ascend.model_loader.netloader.errors import (
    LayoutUnsupported,
    ProtocolError,
)
from vllm_ascend.model_loader.netloader.executor.chunks.manifest import RAW, Manifest, TensorEntry
from vllm_ascend.model_loader.netloader.executor.model.match import match
from vllm_ascend.model_loader.netloader.executor.view import records
from vllm_ascend.model_loader.netloader.interaction import api
from vllm_ascend.model_loader.netloader.utils import Address

from .mutations import Fault, body, damaged, damaged_bytes

_TENSORS = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16)}
_MANIFEST = Manifest(
    RAW,
    [
        TensorEntry("a", "torch.float32", (3, 5)),
        TensorEntry("tied", "torch.float32", (3, 5), "a"),
        TensorEntry("b", "torch.bfloat16", (7,), None, (1,), "ND"),
    ],
    {"scale": 1.5, "name": "x", "flag": True},
    {"experts": "0,1"},
    {"table": [0.5, "nan"], "all": "00ff"},
)
_RECORDS = records.Records(
    (
        records.Seen("a", "float32", (4, 6), (records.Copy((0, 0), (2, 6), 0, 0, (6, 1)),)),
        records.Seen(
            *("b", "bfloat16", (7,), (records.Copy((1,), (3,), 1, 2, (1,), ("bfloat16",)),)),
            (records.Kept((0,), (2,), bytes(4)), records.Kept((0,), (7,))),
        ),
    ),
    (
        records.Parameter("p", "float32", (12,), (1,)),
        records.Parameter("q", "bfloat16", (9,), (1,)),
    ),
    (records.Fill(1, 0, (2,), (1,), 0.0),),
    {"r": "aten.mul"},
)


class Bodies:
    """Reads one body a case; returns whether it was taken."""

    def __init__(self, target):
        self._kinds = [self._struct] * 4 + [self._manifest, self._records]

    def close(self):
        pass

    def try_one(self, chance):
        """Read one, which is taken or refused in bounded words."""
        return chance.choice(self._kinds)(chance)

    def _struct(self, chance):
        said = chance.choice(SAID)
        data = body(chance, msgspec.json.decode(msgspec.json.encode(said)), 0.1)
        try:
            read = api.decode(data, type(said))
        except api.Refusal as refusal:
            if len(str(refusal)) > 1000:
                raise Fault(f"{len(str(refusal))} characters about {data[:300]!r}") from None
            return False
        if api.decode(msgspec.json.encode(read), type(said)) != read:
            raise Fault(f"{type(said).__name__} is not what it was after {data[:300]!r}")
        return True

    def _manifest(self, chance):
        data = body(chance, msgspec.to_builtins(_MANIFEST), 0.1)
        weights = "xxh3_128:" + "0" * 32
        joined = api.Joined(
            weights, 1, "", manifest=msgspec.Raw(data), blocks=bytes(16 * chance.choice([0, 2, 2]))
        )
        client = types.SimpleNamespace(address=Address("h", 1), join=lambda join: joined)
        try:
            describe(client, IDENTITY)
        except ProtocolError as error:
            if len(str(error)) > 8000 or not str(error).isprintable():
                raise Fault(f"{str(error)[:500]!r} about {data[:300]!r}") from None
        try:
            manifest = msgspec.json.decode(data, type=Manifest)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return False
        try:
            match(manifest, _TENSORS, {"a", "b"}, {}, {"experts": "0,1"}, {"table": [0.5, "nan"]})
        except LayoutUnsupported as error:
            if len(str(error)) > 8000:
                raise Fault(f"{len(str(error))} characters about {data[:300]!r}") from None
            return False
        return True

    def _records(self, chance):
        tree = msgspec.msgpack.decode(msgspec.msgpack.encode(_RECORDS))
        for _ in range(chance.choice([0, 1, 1, 1, 2, 4])):
            tree = damaged(chance, tree)
        plain = _packed(tree)
        if chance.random() < 0.1:
            plain = damaged_bytes(chance, plain)
        if chance.random() < 0.02:
            plain = b"\x91" * 100_000
        data = bytes([records.VERSION]) + zlib.compress(plain)
        if chance.random() < 0.1:
            data = damaged_bytes(chance, data)
        try:
            read = records.decode(data)
        except ProtocolError as error:
            if len(str(error)) > 20_000:
                raise Fault(f"{len(str(error))} characters about records") from None
            return False
        if records.decode(records.encode(read)) != read:
            raise Fault(f"records are not what they were: {read}")
        return True


def _packed(tree):
    """MessagePack, with 0 in the place of what that cannot say."""

    def possible(node):
        if isinstance(node, int) and not -(2**63) <= node < 2**64:
            return 0
        if isinstance(node, str):
            return node.encode("utf-8", "replace").decode()
        if isinstance(node, dict):
            return {possible(key): possible(each) for key, each in node.items()}
        return [possible(each) for each in node] if isinstance(node, (list, tuple)) else node

    return msgspec.msgpack.encode(possible(tree))
