"""Models in use in this process, and the servers that others pull them from.

Reloads come with a loader of their own, so what belongs to a model outlives the loader; a target
and its draft are served on one port.
"""

import contextlib
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.util import Finalize

from torch import nn

from .config import NetLoaderConfig
from .identity import ModelIdentity
from .serve import Offer, WeightServer
from .utils import logger


@dataclass(frozen=True)
class InUse:
    """A model that inference runs on.

    Attributes:
        server: where others pull it from; None: nowhere.
        identity: who it is.
        path: the `model_config.model` it was loaded for.
    """

    server: WeightServer | None
    identity: ModelIdentity
    path: str


_in_use: "weakref.WeakKeyDictionary[nn.Module, InUse]" = weakref.WeakKeyDictionary()
_servers: list[WeightServer] = []
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
)


def in_use(model: nn.Module) -> InUse | None:
    """Return what is known of a model that inference runs on."""
    return _in_use.get(model)


def put_in_use(
    model: nn.Module,
    path: str,
    config: NetLoaderConfig,
    host: str,
    offer: Offer,
    to_come: Iterable[str],
) -> None:
    """Take note of a model that was loaded, and let others pull it.

    Args:
        model: ready for inference.
        path: see `InUse`.
        config: of its loader.
        host: the address of this machine that others reach.
        offer: what others get.
        to_come: groups of the models that this process loads next.
    """
    server = _serve(config, host, offer, to_come)
    _in_use[model] = InUse(server, offer.identity, path)
    if server is not None:
        # At exit the server stops by itself, and in a forked child it is not to be stopped.
        weakref.finalize(model, _retire, server, offer.identity.group).atexit = False


def offer_again(known: InUse, offer: Offer) -> None:
    """Let others pull a model whose weights were replaced."""
    if known.server in _servers:
        assert known.server is not None
        known.server.offer(offer)
        _open(known.server, offer.identity.rank)


def _serve(
    config: NetLoaderConfig, host: str, offer: Offer, to_come: Iterable[str]
) -> WeightServer | None:
    """Offer a model on a server of this process, which is started if need be.

    With nothing to give it is not started. The offer is kept for its reason: a draft that comes
    later, or a reload, may start the server.
    """
    identity = offer.identity
    if config.port_for(identity.rank) is None:
        logger.info(
            "NetLoader rank %d: this instance is no source, as LISTEN_PORT is %s",
            identity.rank,
            config.listen_port,
        )
        return None
    server = _server_for(config, host, identity)
    server.offer(offer)  # before anybody can ask for it
    for group in to_come:
        server.expect(group)
    if offer.store is None or _open(server, identity.rank):
        return server
    _servers.remove(server)
    return None


def _server_for(config: NetLoaderConfig, host: str, identity: ModelIdentity) -> WeightServer:
    """Return the server of the same configuration that has no other model of this group in use."""
    taken = [known.server for known in _in_use.values() if known.identity.group == identity.group]
    for server in _servers:
        same = all(getattr(server.config, name) == getattr(config, name) for name in _OF_SERVER)
        if same and server.rank == identity.rank and server not in taken:
            return server
    server = WeightServer(config, identity.rank, host)
    _servers.append(server)
    return server


def _open(server: WeightServer, rank: int) -> bool:
    """Listen, if the server does not yet; return whether it does."""
    port = server.config.port_for(rank)
    if server.listening or port is None:
        return server.listening
    try:
        server.start(port)
    except OSError as error:
        logger.error(
            "NetLoader rank %d: cannot listen on port %d, so this instance is no source: %s",
            rank,
            port,
            error,
        )
        return False
    # Worker processes do not run atexit handlers; multiprocessing's own are run in all.
    Finalize(None, server.stop, exitpriority=100)
    return True


def _retire(server: WeightServer, group: str) -> None:
    """Let a model that is gone be served no more, and close a server that has none left."""
    left = [known for known in _in_use.values() if known.server is server]
    if not any(known.identity.group == group for known in left):
        server.withdraw(group)
    if not left:
        server.stop()
        with contextlib.suppress(ValueError):
            _servers.remove(server)
