"""What a hostile peer may say where a group forms, and send through it, on both sides."""

import contextlib
import types
from collections import deque

import msgspec
import torch
from torch.distributed import PrefixStore

from tests.ut.model_loader.netloader.support import (
    HOST,
    LinkDevice,
    blank_like,
    bytes_of,
    differing,
    incomplete,
    random_tensor,
    settings,
    store_of,
)
from vllm_ascend.model_loader.netloader.errors import ProtocolError, SourceError, SourceLost
from vllm_ascend.model_loader.netloader.executor import elastic_load, scheduler
from vllm_ascend.model_loader.netloader.executor.chunks.blocks import Run
from vllm_ascend.model_loader.netloader.executor.devices import streams
from vllm_ascend.model_loader.netloader.executor.elastic_load import P2PLoad
from vllm_ascend.model_loader.netloader.executor.model.match import match
from vllm_ascend.model_loader.netloader.executor.rate_limiter import RateLimiter
from vllm_ascend.model_loader.netloader.executor.scheduler import Scheduler
from vllm_ascend.model_loader.netloader.executor.transport.group import (
    CLIENT,
    SOURCE,
    GroupReceiver,
    TransferGroup,
    form_group,
)
from vllm_ascend.model_loader.netloader.executor.transport.rendezvous import _MOST_VALUES, Mailbox
from vllm_ascend.model_loader.netloader.interaction import api
from vllm_ascend.model_loader.netloader.interaction.elastic import GroupControl
from vllm_ascend.model_loader.netloader.served import Served, ServedGroup
from vllm_ascend.model_loader.netloader.utils import Address

from .mutations import Fault, body

MIB = 1 << 20
_MOST_SAID = 4000  # characters of what a peer is told
_SIZES = [0, 1, 7, 300, 300, 5000, 64, 2000]
_CHUNK = 600  # bytes of a run, as far as blocks are smaller
_AT_ONCE = 0.001  # seconds, where nothing that is to come would come later
_STALLED = 0.005
_ADDRESS = Address(HOST, 1)


class Groups:
    """Forms a group with a peer, receives from one, or sends to one."""

    def __init__(self, target):
        # What a backend, or a source that has others, is waited for otherwise.
        streams._DRAIN = scheduler._ASK_AGAIN = scheduler.STARVED = _AT_ONCE
        elastic_load.STARVED = elastic_load._TRY_ANOTHER = _AT_ONCE
        tensors = {f"t{i}": random_tensor(i, torch.uint8, n) for i, n in enumerate(_SIZES)}
        self._device = _Device()
        self._tensors, self._store = tensors, store_of(tensors, self._device)
        self._kinds = [self._client_forms, self._source_forms, self._receive, self._send]

    def close(self):
        pass

    def try_one(self, chance):
        """Have one group; returns whether all went as it does among friends."""
        self._device.chance = chance
        return chance.choice(self._kinds)(chance)

    # Values

    def _said(self, chance, kind, rank):
        """Bodies with what a peer of this rank sets, more or less."""
        values = [
            (f"{rank} is here", b""),
            (f"group/id of {rank}", b"an address"),
            (f"group/attempt/vote of {rank}", chance.choice([b"good"] * 5 + [b"bad"])),
            (f"{rank} has the group", b""),
        ]
        if chance.random() < 0.05:
            values[:0] = [(str(i), b"") for i in range(chance.choice([50, 70, 200]))]
        cut = chance.randrange(len(values) + 1)
        parts = [part for part in (values[:cut], values[cut:]) if part]
        return deque(body(chance, msgspec.to_builtins(kind(part)), 0.7) for part in parts)

    def _client_forms(self, chance):
        left = self._said(chance, api.StoreValues, SOURCE)

        def exchange(group, values):
            if left:
                return _decoded(left.popleft(), api.StoreValues).values
            raise SourceLost(f"{_ADDRESS}: the connection ended")

        client = types.SimpleNamespace(exchange=exchange)
        control = GroupControl(client, api.GroupOpened("0", MIB))
        # Only to hear, or what is set here would have to come in step.
        return self._forms(lambda key, value: None, control.hear, CLIENT)

    def _source_forms(self, chance):
        mailbox, kept = Mailbox(), 0
        for said in self._said(chance, api.StoreSet, CLIENT):
            try:
                values = api.decode(said, api.StoreSet).set
                mailbox.exchange(values, 0)
                kept += len(values)
            except api.Refusal as refusal:
                _is_short(refusal)
                return False
            except ProtocolError as error:
                _is_short(error)
                return False
        if kept > _MOST_VALUES:
            raise Fault(f"a source keeps {kept} values")
        return self._forms(mailbox.tell, lambda _: mailbox.hear(_AT_ONCE), SOURCE)

    def _forms(self, tell, hear, rank):
        device = self._device
        device.open, device.messages = 0, _Messages(None)
        try:
            group = form_group(
                *(device, tell, hear, rank, HOST),
                **{"handshake": 5.0, "progress": _STALLED, "gone": lambda: False},
            )
        except (RuntimeError, SourceError) as error:
            _is_short(error)
            formed = False
        else:
            group.close()
            formed = True
        if device.open:
            raise Fault(f"{device.open} groups of rank {rank} were not left")
        return formed

    # Bytes

    def _receive(self, chance):
        """Load from a source that announces and sends what it wants to."""
        blanks = blank_like(self._tensors)
        matched = match(self._store.manifest, blanks, blanks.keys(), {})
        here = incomplete(self._store, matched, self._device)
        control = _Announces(chance, self._store, honest=chance.random() < 0.3)
        with self._group(CLIENT, _Messages(control.message)) as group:
            receiver = GroupReceiver(control, group, here, self._device, MIB)
            runs = Scheduler(self._store.blocks, self._store.blocks.cut(_CHUNK, large_alone=True))
            try:
                P2PLoad(receiver, here, runs, verify=True, keep_alive=_AT_ONCE).run()
                came = True
            except (RuntimeError, SourceError) as error:
                _is_short(error)
                came = False
        streams._abandoned.clear()  # here no backend writes to them later
        if came != here.complete or (came and differing(self._tensors, blanks)):
            raise Fault(f"a load ended ({came}) with {differing(self._tensors, blanks)} wrong")
        for run in here.came(0, 0):
            if here.wrong(run):
                raise Fault(f"blocks {run} count as here, and are wrong")
        return came

    def _send(self, chance):
        """Send what a client asks for, which may go away."""
        sent = []
        session = types.SimpleNamespace(peer=_ADDRESS, local_host=HOST, gone=lambda: False)
        served, limiter = Served(session, self._store, RateLimiter(None)), RateLimiter(None)
        declines = chance.choice([0, 0.2])
        group = ServedGroup(
            *(session, served, self._device, settings(), limiter),
            lambda served, run: chance.random() >= declines,
        )
        fails = chance.choice([0, 0, 0.1])
        with self._group(SOURCE, _Messages(lambda _: fails > chance.random(), sent)) as own:
            group._formed.set_result(own)
            asked, right = self._asked(chance, group)
            group.settle_last()
            group.close()
        if sent != asked[: len(sent)] or (right and not fails and sent != asked):
            sizes = [[*map(len, messages)] for messages in (sent, asked)]
            raise Fault(f"messages of {sizes[0]} bytes where {sizes[1]} were asked for")
        return right

    def _asked(self, chance, group):
        """Ask a source; returns what it has announced, and whether it has refused nothing."""
        last, announced, right = len(_SIZES) - 1, [], True
        for _ in range(chance.choice([1, 2, 4])):
            runs = []
            for _ in range(chance.choice([0, 1, 3, 9])):
                first = chance.randrange(last + 1)
                runs.append((first, min(last, first + chance.choice([0, 0, 1, 5]))))
                if chance.random() < 0.05:
                    runs.append((chance.choice([0, last + 1, 2**40]), chance.choice([0, last + 1])))
            said = body(chance, msgspec.to_builtins(api.SendRuns(runs)), 0.6)
            try:
                runs = api.decode(said, api.SendRuns).runs
                sizes = group.sizes(runs)
                taken = [run for run, size in zip(runs, sizes, strict=True) if size is not None]
                announced += [data for run in taken if (data := self._content(Run(*run)))]
                group.send(taken)
            except api.Refusal as refusal:
                _is_short(refusal)
                right = False
                if refusal.code is api.Code.TRANSFER_FAILED:
                    break  # and the connection ends
        return announced, right

    def _content(self, run):
        return b"".join(bytes(bytes_of(part).tolist()) for part in self._store.parts(run))

    @contextlib.contextmanager
    def _group(self, rank, messages):
        with TransferGroup(messages, None, rank, self._device, _STALLED, lambda: False) as group:
            yield group


class _Device(LinkDevice):
    """Backends set what says where they are, and vote; HCCL's does so more than once."""

    messages = None
    open = 0

    def create_group(self, store, rank, local_host, timeout, gone):
        store.set(f"id of {rank}", b"an address")
        if store.get(f"id of {1 - rank}") != b"an address":
            raise RuntimeError("the backend takes no such address")
        votes = PrefixStore("attempt", store)
        votes.set(f"vote of {rank}", b"good")
        if votes.get(f"vote of {1 - rank}") != b"good":
            raise RuntimeError("no stream is free on both sides")
        self.open += 1
        return self.exchange(self.messages, rank, timeout, gone)

    def close(self, group, unfinished):
        self.open -= 1
        super().close(group, unfinished)


class _Work:
    def __init__(self, completed, success):
        self.is_completed, self.is_success = (lambda: completed), (lambda: success)


class _Messages:
    """In the place of a process group.

    `next(nbytes)` returns what a message has, or what becomes of it: of one that is sent, whether
    it fails; of another, True: it fails; False: it does not come; None: it has what was there.
    `sent` gets what was sent.
    """

    def __init__(self, next, sent=None):
        self._next, self._sent = next, sent

    def send(self, messages, peer, tag):
        fails = self._next is not None and self._next(messages[0].numel())
        if self._sent is not None:
            self._sent.append(bytes(messages[0].view(torch.uint8).tolist()))
        return _Work(True, not fails)

    def recv(self, messages, peer, tag):
        content = self._next(messages[0].numel()) if self._next is not None else None
        if isinstance(content, bool):
            return _Work(content, False)
        if content:
            messages[0].view(torch.uint8).copy_(torch.frombuffer(content, dtype=torch.uint8))
        return _Work(True, True)

    def abort(self):
        pass


class _Announces:
    """The control connection of a source that is hostile, unless it is honest."""

    answered = True

    def __init__(self, chance, store, honest):
        self._chance, self._store, self._honest = chance, store, honest
        self._asked, self._coming = deque(), deque()

    def ask(self, runs):
        self._asked.append(runs)

    def answer(self):
        chance, runs = self._chance, self._asked.popleft()
        sizes = [self._store.blocks.size_of(run) for run in runs]
        if not self._honest:
            sizes = [None if chance.random() < 0.02 else size for size in sizes]
        said = body(chance, msgspec.to_builtins(api.Sizes(sizes)), 1 if self._honest else 0.9)
        sizes = _decoded(said, api.Sizes).sizes
        self._coming += [each for each in zip(runs, sizes, strict=False) if each[1]]
        return sizes

    def message(self, nbytes):
        (run, size), chance = self._coming.popleft(), self._chance
        if size != nbytes:  # which ends a process, with some backends
            raise Fault(f"room for {nbytes} bytes where {size} are announced")
        content = bytearray()
        for part in self._store.parts(run):
            content += bytes(bytes_of(part).tolist())
        kind = 0 if self._honest else chance.randrange(60)
        if kind == 1:
            return chance.random() < 0.8
        if kind == 2:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        elif kind == 3:
            content[:] = chance.randbytes(len(content))
        elif kind == 4:
            return None  # it is said to have come, and has not
        return content


def _decoded(said, kind):
    """What a client makes of an answer."""
    try:
        return api.decode(said, kind)
    except api.Refusal as invalid:
        raise ProtocolError(f"{_ADDRESS}: {invalid}") from None


def _is_short(error):
    if len(str(error)) > _MOST_SAID:
        raise Fault(f"{len(str(error))} characters: {str(error)[:300]!r}") from None
