"""What can go wrong in NetLoader, one exception type for each meaning."""


class NetLoaderError(Exception):
    """Anything NetLoader reports; the message says where, which rank and why."""


class ConfigError(NetLoaderError, ValueError):
    """A configuration value is wrong; the message names the key, the value and what is allowed."""


class ProtocolError(NetLoaderError):
    """A peer sent something that is not a message of the protocol, or not one for this moment."""


class SourceError(NetLoaderError):
    """One source could not be used; another one may."""


class SourceRefused(SourceError):
    """The source, or this client on seeing what it offers, declined before any transfer."""


class ChunksRefused(SourceRefused):
    """The source has the model, but not in chunks of the size that this load has begun with."""


class SourceLost(SourceError):
    """The source could not be reached, or went away, stalled or failed on the way."""


class TransferCorrupt(SourceError):
    """A source sent bytes that differ from their digest more often than chance explains."""


class LayoutUnsupported(NetLoaderError):
    """This model's tensors cannot be sent or received in the layout at hand."""


class LoadFailed(NetLoaderError):
    """No source gave the whole model; the message has every source's reason."""
