"""Models in use in this process, and the servers that others pull them from.

Reloads come with a loader of their own, so what belongs to a model outlives the loader; a target
and its draft are served on one port.
"""

import contextlib
import gc
import threading
import uuid
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.util import Finalize
from queue import SimpleQueue

import msgspec
from torch import nn

from .agreement import Ranks
from .changes import After, Change, Instance
from .config import NetLoaderConfig
from .errors import LayoutUnsupported, Withdrawn
from .executor.model.raw import viewed_through
from .executor.model.renewal import Renewal
from .executor.store import BlockStore
from .executor.view.boxes import Unmapped
from .executor.view.records import Records, decode
from .executor.view.reread import Reread, Weights
from .identity import ModelIdentity, Revision
from .interaction.api import Code
from .serve import Offer, Relay, WeightServer
from .utils import logger, one_line


@dataclass(frozen=True)
class Member:
    """A rank of an instance, as others get its models from it.

    Attributes:
        config: of its loader.
        host: the address of this machine that others reach.
        to_come: groups of the models that this process loads next.
        worker: number of this process among all workers of the instance, which decides its port.
        instance: see `InUse`.
        ranks: see `InUse`.
    """

    config: NetLoaderConfig
    host: str
    to_come: Collection[str] = ()
    worker: int = 0
    instance: str | None = None
    ranks: Ranks | None = None


@dataclass(frozen=True)
class InUse:
    """A model that inference runs on.

    Attributes:
        server: where others pull it from; None: nowhere.
        identity: who it is.
        path: the `model_config.model` it was loaded for.
        instance: names the instance that it belongs to; None: its weights do not change.
        ranks: those that have the parts of this model.
    """

    server: WeightServer | None
    identity: ModelIdentity
    path: str
    instance: str | None = None
    ranks: Ranks | None = None

    def publish(self, weights: str | None) -> None:
        """Tell the other ranks what this one has; see `Ranks.publish`."""
        if self.ranks is not None:
            self.ranks.publish(weights)


@dataclass(frozen=True)
class _Offered:
    """What was last offered of a model, and how that is done anew.

    Attributes:
        offer: the offer, whatever has changed since.
        renewal: what hashes the weights anew.
        source: where a loader gets other weights from; empty: nobody has said.
        compare: see `loaded_from`.
        records: those of the last view, if there was any; `encode`d.
        seen: what has been seen of how other weights came from a checkpoint.
    """

    offer: Offer
    renewal: Renewal
    source: str = ""
    compare: Callable[[str, Mapping[int, str]], object] | None = None
    records: bytes = b""
    seen: Reread | None = None


_in_use: "weakref.WeakKeyDictionary[nn.Module, InUse]" = weakref.WeakKeyDictionary()
_offered: "weakref.WeakKeyDictionary[nn.Module, _Offered]" = weakref.WeakKeyDictionary()
_pending: "weakref.WeakKeyDictionary[nn.Module, tuple[Offer, Collection[nn.Module]]]"
_pending = weakref.WeakKeyDictionary()
_instances: dict[str, Instance] = {}
_servers: list[WeightServer] = []
# Models that are gone, with what an `Event` there says when those before it are retired. A garbage
# collector may run in a thread that holds any lock, so it takes none of a server.
_gone: "SimpleQueue[tuple[WeightServer, str, str | None] | threading.Event]" = SimpleQueue()
_retiring: threading.Thread | None = None
_comes_or_goes = threading.Lock()  # held while a model does
# The settings of a server; models with the same ones share it.
_OF_SERVER = (
    "listen_host",
    "listen_port",
    "output_prefix",
    "max_sessions",
    "max_send_rate",
    "transport",
    "handshake_timeout",
    "progress_timeout",
    "credentials",
)


def in_use(model: nn.Module) -> InUse | None:
    """Return what is known of a model that inference runs on."""
    return _in_use.get(model)


def process_of(instance: str | None) -> str:
    """Return what names an instance's server to others; a new name if it has none."""
    users = (known for known in _in_use.values() if known.instance == instance)
    servers = (known.server.process for known in users if known.server is not None)
    return next(servers, uuid.uuid4().hex)


def begin_load(member: Member, offer: Offer) -> Relay | None:
    """Listen before a model is there, so that others can get what has come of it.

    Args:
        member: this rank.
        offer: the model, without a store.

    Returns:
        What passes weights on while they come; None: nobody can ask for them.
    """
    if member.config.port_for(member.worker) is None:
        return None
    server = _server_for(member, offer.identity.group)
    server.announce(offer)
    for group in member.to_come:
        server.expect(group)
    if not _open(server, member.instance, final=False):
        if all(known.server is not server for known in _in_use.values()):
            _servers.remove(server)
        return None
    _publish_endpoint(server, member.ranks)
    return Relay(server, offer)


def give_up_load(relay: Relay) -> None:
    """Forget a model that could not be loaded, and close its server if that has no other one."""
    server = relay.server
    server.forget(relay.group)
    if not any(known.server is server for known in _in_use.values()):
        server.stop()
        with contextlib.suppress(ValueError):
            _servers.remove(server)


def put_in_use(
    model: nn.Module,
    path: str,
    member: Member,
    offer: Offer,
    watched: Collection[nn.Module] = (),
) -> None:
    """Take note of a model that was loaded, and let others pull it.

    Args:
        model: ready for inference.
        path: see `InUse`.
        member: this rank.
        offer: what others get.
        watched: the layers of which `processing` is told.
    """
    server, instance = _serve(member, offer), member.instance
    _publish_endpoint(server, member.ranks)
    with _comes_or_goes:
        _in_use[model] = InUse(server, offer.identity, path, instance, member.ranks)
    if server is None:
        return
    _note(model, offer, watched)
    if instance is not None and instance not in _instances:
        _instances[instance] = _new_instance(instance)
    _start_retiring()
    # At exit the server stops by itself, and in a forked child it is not to be stopped.
    gone = weakref.finalize(model, _gone.put, (server, offer.identity.group, instance))
    gone.atexit = False


def offer_again(model: nn.Module, offer: Offer, watched: Collection[nn.Module] = ()) -> None:
    """Let others pull other weights of a model in use, from when its reload has ended.

    Args:
        model: the model, which is no source so far. Without a server it stays so.
        offer: what others get.
        watched: see `put_in_use`.
    """
    known = _in_use[model]
    if known.server is None or known.server not in _servers:
        return
    _pending[model] = offer, watched
    if known.instance not in _instances:
        _offer_pending(model, known.server)


def is_renewable(model: nn.Module) -> bool:
    """Return whether a model in use is offered anew when its weights have changed."""
    known = _in_use.get(model)
    return known is not None and known.instance in _instances and model in _offered


def loaded_from(
    model: nn.Module,
    source: str,
    compare: Callable[[str, Mapping[int, str]], object] | None = None,
) -> None:
    """Say where the weights come from that a model in use gets now.

    Args:
        model: the model.
        source: `disk`, or addresses.
        compare: called with the weights digests of this rank and of all the instance's ranks, as
            far as they are known, when the weights are offered; None: nobody asks.
    """
    if (known := _offered.get(model)) is not None:
        _offered[model] = replace(known, source=source, compare=compare)


def came_with(model: nn.Module, records: Records) -> None:
    """Say how the weights that a model in use has now came from a checkpoint."""
    if (known := _offered.get(model)) is not None:
        _offered[model] = replace(known, seen=Reread(records, all_read=True))


def reading(model: nn.Module, weights: Weights) -> Weights:
    """Return what a model in use is to read, and note how that comes, if it ever had a view."""
    known = _offered.get(model)
    if known is None or not known.records:
        return weights
    try:
        seen = known.seen or Reread(decode(known.records))
    except Exception:  # the reload is worth more than its view
        logger.debug("NetLoader: noting where weights come from failed", exc_info=True)
        return weights
    _offered[model] = replace(known, seen=seen)
    return seen.watch(weights)


@contextlib.contextmanager
def changing(whose: str | nn.Module | None, change: Change) -> Iterator[None]:
    """Change weights of an instance, or of the one of a model in use; see `Instance.changing`."""
    if isinstance(whose, nn.Module):
        known = _in_use.get(whose)
        whose = known.instance if known is not None else None
    instance = _instances.get(whose) if whose is not None else None
    with instance.changing(change) if instance is not None else contextlib.nullcontext():
        yield


def processing(layer: nn.Module) -> None:
    """Keep what a layer is made of that is about to be post-processed, if it was before."""
    for model, known in [*_offered.items()]:
        if known.renewal.concerns(layer):
            with changing(model, Change("post-processing", After.UNKNOWN)):
                known.renewal.refresh(layer)


def wait_for_renewal() -> None:
    """Return when what has changed in this process is offered anew."""
    for instance in [*_instances.values()]:
        instance.wait()


def _publish_endpoint(server: WeightServer | None, ranks: Ranks | None) -> None:
    if ranks is not None and server is not None and server.endpoint is not None:
        ranks.publish_endpoint(server.endpoint)


def _note(model: nn.Module, offer: Offer, watched: Collection[nn.Module]) -> None:
    if offer.store is not None:
        records = offer.view.records if offer.view is not None else b""
        _offered[model] = _Offered(offer, Renewal(model, offer.store, watched), records=records)


def _offer_pending(model: nn.Module, server: WeightServer) -> None:
    offer, watched = _pending.pop(model)
    if offer.store is not None:
        _in_use[model].publish(offer.store.digests.weights)
    server.offer(offer)
    _open(server, _in_use[model].instance)
    _publish_endpoint(server, _in_use[model].ranks)
    _note(model, offer, watched)


def _new_instance(name: str) -> Instance:
    def withdraw(code: Code, reason: str) -> None:
        for _, known, server in _served(name):
            server.withdraw(known.identity.group, code, reason)
            known.publish(None)

    def renew(change: str, directly: bool, unchanged: bool, stop: threading.Event) -> None:
        for model, known, server in _served(name):
            if model in _pending:
                _offer_pending(model, server)
            elif model in _offered:
                _renew(model, known, server, change, directly, unchanged, stop)

    def remember() -> None:
        for model, *_ in _served(name):
            if model in _offered:
                _offered[model].renewal.remember()

    def forget(moved: bool) -> None:
        for model, *_ in _served(name):
            if (known := _offered.get(model)) is not None:
                records = b"" if moved else known.records
                _offered[model] = replace(known, seen=None, records=records)

    return Instance(withdraw, renew, remember, forget)


def _served(instance: str) -> list[tuple[nn.Module, InUse, WeightServer]]:
    return [
        (model, known, known.server)
        for model, known in [*_in_use.items()]
        if known.instance == instance and known.server in _servers and known.server is not None
    ]


def _renew(
    model: nn.Module,
    known: InUse,
    server: WeightServer,
    change: str,
    directly: bool,
    unchanged: bool,
    stop: threading.Event,
) -> None:
    """Offer a model's weights as they are now; see `Instance`."""
    before = _offered[model]
    _offered[model] = replace(before, seen=None)  # which is not that of the next change
    identity, store = before.offer.identity, before.offer.store
    assert store is not None
    try:
        with store.device.attached():
            now = before.renewal.hashed(directly=directly, stop=stop)
        if unchanged and now.digests.weights != store.digests.weights:
            raise LayoutUnsupported(f"the weights are not those of before {change}")
    except Withdrawn:
        return
    except Exception as error:  # whatever it is: else clients would come again for ever
        if not isinstance(error, LayoutUnsupported | RuntimeError):  # torch raises RuntimeErrors
            logger.debug("NetLoader rank %d: hashing failed", server.rank, exc_info=True)
        reason = one_line(error)
        server.withdraw(identity.group, Code.CANNOT_SERVE, reason)
        logger.warning(
            "NetLoader rank %d: no longer a source since %s: %s", server.rank, change, reason
        )
        return
    if stop.is_set():
        return
    source = before.source or before.offer.loaded_from
    if now.digests.weights != store.digests.weights:  # of no revision that is known
        identity = msgspec.structs.replace(identity, revision=Revision())
        source = before.source or change
    offer = replace(before.offer, identity=identity, store=now, loaded_from=source)
    same = now.digests.weights == store.digests.weights and now.tensors is store.tensors
    if not same or before.seen is not None:  # of which values that are kept aside may be others
        offer = _seen_again(offer, now, before.seen, change)
    records = offer.view.records if offer.view is not None else before.records
    _offered[model] = replace(
        before, offer=offer, source="", compare=None, records=records, seen=None
    )
    known.publish(now.digests.weights)
    epoch = server.offer(offer)
    logger.info(
        "NetLoader rank %d: a source of the weights %s since %s, epoch %d",
        server.rank,
        now.digests.weights,
        change,
        epoch,
    )
    if before.compare is not None:
        before.compare(now.digests.weights, offer.instance())


def _seen_again(offer: Offer, store: BlockStore, seen: Reread | None, change: str) -> Offer:
    """Return an offer of other weights with their view, if how they came is known."""
    why = f"the weights are others since {change}"
    if seen is None:
        return replace(offer, view=None, why_no_view=why)
    try:
        records = seen.records()
    except Unmapped as error:
        return replace(offer, view=None, why_no_view=str(error))
    try:
        return replace(offer, view=viewed_through(store, records))
    except Exception as error:  # the weights are worth more than their view
        logger.debug("NetLoader: noting where weights come from failed", exc_info=True)
        return replace(offer, view=None, why_no_view=f"{why}, and {one_line(error)}")


def _changed_without_notice(server: WeightServer, group: str) -> None:
    for known in [*_in_use.values()]:
        if known.server is server and known.identity.group == group:
            known.publish(None)
            instance = _instances.get(known.instance or "")
            if instance is not None:
                instance.changed_without_notice()


def _serve(member: Member, offer: Offer) -> WeightServer | None:
    """Offer a model on a server of this process, which is started if need be.

    With nothing to give it is not started. The offer is kept for its reason: a draft that comes
    later, or a reload, may start the server.
    """
    if member.config.port_for(member.worker) is None:
        logger.info(
            "NetLoader rank %d: this instance is no source, as LISTEN_PORT is %s",
            member.worker,
            member.config.listen_port,
        )
        return None
    server = _server_for(member, offer.identity.group)
    server.offer(offer)  # before anybody can ask for it
    for group in member.to_come:
        server.expect(group)
    if offer.store is None or _open(server, member.instance):
        return server
    server.forget(offer.identity.group)
    _servers.remove(server)
    return None


def _server_for(member: Member, group: str) -> WeightServer:
    """Return the instance's server of the same configuration that has no model of this group."""
    wait_until_retired()
    config = member.config
    for server in _servers:
        same = all(getattr(server.config, name) == getattr(config, name) for name in _OF_SERVER)
        users = [known for known in _in_use.values() if known.server is server]
        free = all(one.instance == member.instance and one.identity.group != group for one in users)
        if same and server.rank == member.worker and free:
            return server
    server = WeightServer(config, member.worker, member.host)
    server.renew = lambda group: _changed_without_notice(server, group)
    _servers.append(server)
    return server


def _open(server: WeightServer, instance: str | None, *, final: bool = True) -> bool:
    """Listen, if the server does not yet; return whether it does.

    Unless this is `final`, it is tried once more before the instance is no source.
    """
    log = logger.error if final else logger.debug
    port = server.config.port_for(server.rank)
    if server.listening or port is None:
        return server.listening
    if _taken(server, instance):
        gc.collect()  # the other instance may be gone but for that
        wait_until_retired()
    if taken := _taken(server, instance):
        log(
            "NetLoader rank %d: this instance is no source, as another one in this process has "
            "%s %s; give each its own",
            server.rank,
            taken,
            getattr(server.config, taken.lower()),
        )
        return False
    try:
        server.start(port)
    except OSError as error:
        log(
            "NetLoader rank %d: cannot listen on port %d, so this instance is no source: %s",
            server.rank,
            port,
            error,
        )
        return False
    # Worker processes do not run atexit handlers; multiprocessing's own are run in all.
    Finalize(None, server.stop, exitpriority=100)
    return True


def _taken(server: WeightServer, instance: str | None) -> str:
    """Return the key of an address that another instance in this process has already, if any.

    Whoever reads that address must not get the weights of the wrong one.
    """
    here = server.config
    others = {known.server for known in _in_use.values() if known.instance != instance}
    for other in [*_servers]:
        if other not in others or not other.listening or other.rank != server.rank:
            continue
        there = other.config
        same_host = here.listen_host == there.listen_host
        if here.listen_port is not None and same_host and here.listen_port == there.listen_port:
            return "LISTEN_PORT"
        if here.output_prefix is not None and here.output_prefix == there.output_prefix:
            return "OUTPUT_PREFIX"
    return ""


def _start_retiring() -> None:
    global _retiring
    if _retiring is None or not _retiring.is_alive():  # a forked child has none
        _retiring = threading.Thread(target=_retire_all, name="netloader-retire", daemon=True)
        _retiring.start()


def _retire_all() -> None:
    while True:
        one = _gone.get()
        if isinstance(one, threading.Event):
            one.set()
            continue
        try:
            _retire(*one)
        except Exception:
            logger.exception("NetLoader: a model that is gone may still be served")
        del one  # which keeps the server


def wait_until_retired() -> None:
    """Return when the servers know of all models that are gone by now."""
    if _retiring is not None and _retiring.is_alive():
        done = threading.Event()
        _gone.put(done)
        done.wait()


def _retire(server: WeightServer, group: str, instance: str | None) -> None:
    """Let a model that is gone be served no more, and close a server that has none left."""
    with _comes_or_goes:
        in_use = [*_in_use.values()]
    if instance in _instances and not any(one.instance == instance for one in in_use):
        _instances.pop(instance).stop()
    left = [known for known in in_use if known.server is server]
    if not left:
        server.stop()
        with contextlib.suppress(ValueError):
            _servers.remove(server)
    elif not any(known.identity.group == group for known in left):
        server.forget(group)
