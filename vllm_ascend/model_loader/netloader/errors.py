"""What can go wrong in NetLoader, one exception type for each meaning."""

from collections.abc import Mapping, Sequence

from .utils import shortened

# Characters of an error about one source, which goes to logs: the source chooses names and values
# in it.
_MOST = 5000


class NetLoaderError(Exception):
    """Anything NetLoader reports; the message says where, which rank and why."""


class ConfigError(NetLoaderError, ValueError):
    """A configuration value is wrong; the message names the key, the value and what is allowed."""


class CannotListen(NetLoaderError, OSError):
    """A port cannot be opened; the message names the key that is to be changed, and its value."""


class SourceError(NetLoaderError):
    """One source could not be used; another one may.

    Attributes:
        code: what the source answered with (`interaction.api.Code`), empty if it did not.
        retry_after: seconds after which the source wants to be asked again.
        peers: others that have or get the same weights: address and name of the process.
        weights: digest of these weights, as far as the source has said.
        instance: names the source's process, as far as it has said.
        ranks: weights digests of the ranks of an instance that has `weights`, as far as known.
    """

    def __init__(
        self,
        message: str,
        code: str = "",
        retry_after: float = 0.0,
        peers: tuple[tuple[str, str], ...] = (),
        weights: str | None = None,
        instance: str = "",
        ranks: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__(shortened(message, _MOST))
        self.code = code
        self.retry_after = retry_after
        self.peers = peers
        self.weights = weights
        self.instance = instance
        self.ranks = ranks or {}


class ProtocolError(SourceError):
    """A peer sent something that is not a message of the protocol, or not one for this moment."""


class SourceRefused(SourceError):
    """The source, or this client on seeing what it offers, declined before any transfer."""


class OtherPlacement(SourceRefused):
    """The source has the same weights, and its ranks have other parts of them than those here."""


class SourceBusy(SourceError):
    """The source may serve this client later: ask again, and meanwhile others."""


class MakesRoom(SourceBusy):
    """This client leaves the source for another one, which may bring more."""


class BlocksNotHere(SourceError):
    """The source serves, but does not have these blocks (yet)."""


class AskOthers(SourceError):
    """The source has sent these blocks to others: ask those, and this one for other blocks."""


class SourceLost(SourceError):
    """The source could not be reached, or went away, stalled or failed on the way."""


class SourceUnreachable(SourceLost):
    """No connection to the source came about: it may not have started yet."""


class SourceSilent(SourceUnreachable):
    """Nothing has answered in time at the source's address: nobody knows whether it is there."""


class TransferCorrupt(SourceError):
    """A source sent bytes that differ from their digest more often than chance explains.

    Attributes:
        block: number of the first one that did, if it was one of a transfer.
    """

    block: int | None = None


class Withdrawn(NetLoaderError):
    """Weights that were offered are not any more, as their memory changes or goes away."""


class Preparing(Withdrawn):
    """Weights that have come from elsewhere are being made ready for inference."""


class Gone(Withdrawn):
    """Weights that were offered go away for good, with their model or their process."""


class NotHere(NetLoaderError):
    """A block that was asked for has not come to this instance yet."""


class LayoutUnsupported(NetLoaderError):
    """This model's tensors cannot be sent or received in the layout at hand."""

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message, _MOST))


class LoadFailed(NetLoaderError):
    """No source gave the whole model; the message has every source's reason.

    Attributes:
        others: addresses of sources that refused as their ranks have other parts of the weights.
        known: addresses of all sources, also of those that a name stands for.
    """

    def __init__(self, message: str, others: Sequence[str] = (), known: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.others = others
        self.known = known


class ChosenToRead(LoadFailed):
    """No instance has the weights, and this one reads them from disk for all."""
