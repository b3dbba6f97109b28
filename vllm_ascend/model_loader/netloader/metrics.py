"""What Prometheus can ask of a process: one series of `netloader_*` for all models in it.

The metrics have a registry of their own, so that a rank's `/metrics` has nothing else. With
PROMETHEUS_MULTIPROC_DIR set they are in the files there as well, from which vLLM makes its own
`/metrics`. No label has a peer's address, or anything else that a peer decides.
"""

import contextlib
import functools
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values

from .errors import ChosenToRead
from .utils import logger
from .version import __version__

PEERS, DISK = "peers", "disk"
_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # of the environment

folder = os.environ.get(_FOLDER)
if folder is not None and not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
    # No metric can be made then, and without metrics there is no loader.
    del os.environ[_FOLDER]
    values.ValueClass = values.MutexValue
    logger.warning(
        "NetLoader: PROMETHEUS_MULTIPROC_DIR %r is no folder that can be written to, so the "
        "metrics of this process are in its memory only",
        folder,
    )

registry = CollectorRegistry()

BUILD_INFO = Gauge(
    "netloader_build_info",
    "1, with the version of NetLoader.",
    ["version"],
    registry=registry,
    multiprocess_mode="max",
)
STATE = Gauge(
    "netloader_state",
    "1 for the state that a model is in, 0 for those that it has been in.",
    ["model", "state"],
    registry=registry,
    multiprocess_mode="livesum",
)
WEIGHTS_BYTES = Gauge(
    "netloader_weights_bytes",
    "Bytes of the weights that others can load from this rank.",
    ["model"],
    registry=registry,
    multiprocess_mode="livesum",
)
LOAD_SECONDS = Histogram(
    "netloader_load_seconds",
    "Seconds that loads took, by where the weights came from and whether all of them came.",
    ["source", "outcome"],
    buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000),
    registry=registry,
)
RECEIVED_BYTES = Counter(
    "netloader_received_bytes",
    "Bytes of blocks that came, by whether the source had all of them or was loading itself.",
    ["source"],
    registry=registry,
)
SENT_BYTES = Counter(
    "netloader_sent_bytes",
    "Bytes of blocks that were sent, by whether this rank had all of them or was loading itself.",
    ["state"],
    registry=registry,
)
BLOCKS = Counter(
    "netloader_blocks_received",
    "Blocks that came, by whether they were what their digests say.",
    ["result"],
    registry=registry,
)
SOURCE_ATTEMPTS = Counter(
    "netloader_source_attempts",
    "Attempts to load from a source, by how they ended.",
    ["code"],
    registry=registry,
)
FALLBACKS = Counter(
    "netloader_fallbacks",
    "Loads that went to disk after all, by the reason.",
    ["reason"],
    registry=registry,
)
SESSIONS_STARTED = Counter(
    "netloader_sessions_started", "Sessions of clients that began.", registry=registry
)
SESSIONS_FINISHED = Counter(
    "netloader_sessions_finished",
    "Sessions of clients that are over, by how they ended.",
    ["end"],
    registry=registry,
)
AUTHENTICATION_FAILURES = Counter(
    "netloader_authentication_failures",
    "Connections and requests that were refused as the client was not known, by the reason.",
    ["reason"],
    registry=registry,
)

BUILD_INFO.labels(__version__).set(1)
_lock = threading.Lock()  # while the states of models change
_states: defaultdict[str, set[str]] = defaultdict(set)  # that a model has been in


def exposition() -> bytes:
    """Return all metrics of this process as Prometheus reads them."""
    return generate_latest(registry)


@functools.cache  # several for each chunk
def _child(counter: Counter, labels: tuple[str, ...]) -> Counter:
    return counter.labels(*labels)


def count(counter: Counter, *labels: str, by: float = 1) -> None:
    """Add to a counter; that it cannot be written, in its folder, is no failure of a load."""
    try:  # noqa: SIM105  a context manager takes as long as the count, several times a chunk
        _child(counter, labels).inc(by)
    except OSError:
        pass


def show_model(model: str, state: str | None, nbytes: int) -> None:
    """Show which state a model is in, and how many bytes others can load.

    Args:
        model: the group.
        state: None: it has been unloaded.
        nbytes: 0 if there is nothing to load.
    """
    with _lock:
        if state is not None:
            _states[model].add(state)
        _set(model, state, nbytes)


def _set(model: str, state: str | None, nbytes: int) -> None:
    with contextlib.suppress(OSError):
        for name in _states[model]:
            STATE.labels(model, name).set(name == state)
        WEIGHTS_BYTES.labels(model).set(nbytes)


@contextlib.contextmanager
def load_from(source: str) -> Iterator[None]:
    """Count a load, and the time that it takes."""
    started, outcome = time.monotonic(), "failed"
    try:
        yield
        outcome = "complete"
    except ChosenToRead:  # it counts as a load from disk
        outcome = ""
        raise
    finally:
        with contextlib.suppress(OSError):
            if outcome:
                LOAD_SECONDS.labels(source, outcome).observe(time.monotonic() - started)
