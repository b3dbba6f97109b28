"""What peers say to each other over HTTP/1.1: paths, bodies, codes and limits.

All of it is on one port for each rank. Bodies are JSON; unknown fields are ignored, except in an
identity. A path is compared as it is written, with its query: nothing in it is percent-encoded. A
session is a connection::

    client                                       source
      POST /netloader/v1/models/GROUP/join   ->
                                             <-  weights digest, manifest, block digests, peers
      GET /netloader/v1/weights/DIGEST/blocks/0-3  ->
                                             <-  the bytes of these blocks
      ...
      POST /netloader/v1/weights/DIGEST/blocks/2-2/check  ->  (they came wrong twice)
                                             <-  noted, or `changed`: the source's own are wrong
      POST /netloader/v1/done                ->  (the end of the connection is that of the session)

or, where the bytes go through a two-rank group of HCCL or NCCL::

      POST /netloader/v1/groups              ->
                                             <-  id of the group, which the source begins to form
      POST /netloader/v1/groups/ID/store     <-> values of the group's store, both ways
      POST /netloader/v1/groups/ID/send      ->
                                             <-  sizes of the runs, then the bytes in the group

A client passes on what it has got while it goes on loading. Whoever joins says where it listens, so
that a source can name others, and on a connection of its own a client asks an incomplete source
which blocks have come to it::

      GET /netloader/v1/weights/DIGEST/have?since=0&wait=5  ->
                                             <-  runs of blocks, as soon as there are new ones

When sending through a group fails, the source says why in an answer that nobody has asked for, and
closes the connection. When sending an answer's body fails, it closes the connection in the body.

A client that is cut in another way joins for a view, and gets elements of the source's parameters::

      GET /netloader/v1/weights/DIGEST/records  ->
                                             <-  which box of which checkpoint tensor is where
      POST /netloader/v1/weights/DIGEST/regions  ->
                                             <-  the elements of regions, and a digest of them
"""

import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from types import MappingProxyType
from typing import Annotated, TypeAlias, TypeVar

import msgspec

from ..errors import (
    AskOthers,
    BlocksNotHere,
    NetLoaderError,
    SourceBusy,
    SourceError,
    SourceLost,
    SourceRefused,
)
from ..identity import CHECKPOINT, ModelIdentity, Revision
from ..utils import Buffer, shortened

# Limits, in bytes unless something else is said
MAX_TARGET = 4 << 10  # of a request: path and query
MAX_HEAD = 32 << 10  # of a request or an answer: its first line and its headers
MAX_BODY = 64 << 10  # of a request or an answer, except
MAX_JOINED = 64 << 20  # the answer to a join
MAX_STATUS = 4 << 20  # the answer to a status request
MAX_REGIONS_BODY = 1 << 20  # a request for regions
MAX_RECORDS = 64 << 20  # records as they travel
MAX_GATHERED = 32 << 20  # elements in the answer to a request for regions
MAX_REGIONS = 4096  # in one request
MAX_DIMENSIONS = 16  # of a region
MAX_GROUPS = 4  # of one connection
MAX_DIFFERENCES = 20  # between two identities that an answer names
MAX_EXCHANGE_SECONDS = 1.0  # that the source waits for something new in a group's store
MAX_WAIT_SECONDS = 60  # that a source waits for new blocks
MAX_NEWS = 2048  # runs of new blocks in one answer
MAX_PEERS = 16  # that one answer names
MAX_ADDRESS = 300  # characters of a peer's address
MAX_FILE = 64 << 20  # a file beside the weights
MAX_FILES = 128  # files beside the weights, of one model
MAX_CELLS = 512  # of a map of blocks
MAX_INSTANCE = 64  # characters of what names its process
REGIONS_DIGEST = 16  # bytes of XXH3 after the elements of regions, of all of these
_MOST_RANKS = 512  # in the body of an answer that is not 200

LOOKED = "only looked"  # the reason of a client that wanted no weights
COMPLETE = "complete"  # how a session ends of which its client says so
TARGET_GROUP, DRAFT_GROUP = "netloader", "netloader_draft"

JOIN = "/netloader/v1/models/{group}/join"
BLOCKS = "/netloader/v1/weights/{digest}/blocks/{first}-{last}"
CHECK = "/netloader/v1/weights/{digest}/blocks/{first}-{last}/check"
HAVE = "/netloader/v1/weights/{digest}/have?since={since}&wait={wait}"
PEERS = "/netloader/v1/weights/{digest}/peers"
RECORDS = "/netloader/v1/weights/{digest}/records"
REGIONS = "/netloader/v1/weights/{digest}/regions"
GROUPS = "/netloader/v1/groups"
STORE = "/netloader/v1/groups/{id}/store"
SEND = "/netloader/v1/groups/{id}/send"
DONE = "/netloader/v1/done"
FILES = "/netloader/v1/models/{group}/files"
FILE = "/netloader/v1/models/{group}/files/{name}"
STATUS = "/status"
METRICS = "/metrics"
PAGE = "/"
HEALTHZ = "/healthz"
METHODS = {
    JOIN: "POST",
    BLOCKS: "GET",
    CHECK: "POST",
    HAVE: "GET",
    PEERS: "GET",
    RECORDS: "GET",
    REGIONS: "POST",
    GROUPS: "POST",
    STORE: "POST",
    SEND: "POST",
    DONE: "POST",
    FILES: "GET",
    FILE: "GET",
    STATUS: "GET",
    METRICS: "GET",
    PAGE: "GET",
    HEALTHZ: "GET",
}
# What else than a peer's certificate is enough on a port with TLS.
FOR_ALL = {HEALTHZ}
WITH_TOKEN = {STATUS, METRICS, PAGE}
_DIGEST = "[a-z0-9_]{1,32}:[0-9a-f]{16,128}"
_PARAMETERS = {
    "group": "[A-Za-z0-9_]{1,64}",
    "digest": _DIGEST,
    "first": "[0-9]{1,20}",
    "last": "[0-9]{1,20}",
    "id": "[0-9]{1,20}",
    "name": "[A-Za-z0-9_][A-Za-z0-9._-]{0,127}",
    "since": "[0-9]{1,20}",
    "wait": "[0-9]{1,4}",
}
_ROUTES = {
    path: re.compile(
        path.replace("?", r"\?").format(
            **{name: f"(?P<{name}>{p})" for name, p in _PARAMETERS.items()}
        )
    )
    for path in METHODS
}


class Code(Enum):
    """What an answer that is not 200 means.

    Attributes:
        text: the code as it stands in the answer.
        status: the HTTP status that goes with it.
        error: what it is for the client, which decides whether it waits (`SourceBusy`), goes on
            with other blocks (`BlocksNotHere`), or with other sources for good (`SourceRefused`)
            or for now (`SourceLost`).
        about: when it is the answer.
    """

    BAD_REQUEST = "bad_request", 400, SourceRefused, "the request is not one of this protocol"
    UNAUTHORIZED = "unauthorized", 401, SourceRefused, "the client may not ask this"
    NOT_FOUND = "not_found", 404, SourceRefused, "there is no such path, group of ranks or file"
    NO_MODEL = "no_model", 404, SourceRefused, "this instance has no such model"
    NO_VIEW = "no_view", 404, SourceRefused, "this instance has no records of these weights"
    NOT_HERE = "not_here", 404, BlocksNotHere, "these blocks have not come to this instance yet"
    ASK_OTHERS = "ask_others", 404, AskOthers, "others have got these blocks from here"
    METHOD_NOT_ALLOWED = "method_not_allowed", 405, SourceRefused, "the path has another method"
    TIMEOUT = "timeout", 408, SourceLost, "the request has begun and did not come whole in time"
    OTHER_MODEL = "other_model", 409, SourceRefused, "the identities differ; the answer says where"
    NO_GROUPS = "no_groups", 409, SourceRefused, "this instance sends over HTTP only"
    OTHER_WEIGHTS = "other_weights", 409, SourceRefused, "the weights have another digest"
    CANNOT_SERVE = "cannot_serve", 409, SourceRefused, "this instance cannot be a source"
    CHANGED = "changed", 410, SourceBusy, "the weights have changed since they were offered"
    GONE = "gone", 410, SourceLost, "the source is shutting down, or has unloaded the model"
    LENGTH_REQUIRED = "length_required", 411, SourceRefused, "the body has no Content-Length"
    TOO_LARGE = "too_large", 413, SourceRefused, "the body is too large"
    URI_TOO_LONG = "uri_too_long", 414, SourceRefused, "the path is too long"
    OUT_OF_RANGE = "out_of_range", 416, SourceRefused, "there are no such blocks or regions"
    HEADERS = "headers", 431, SourceRefused, "the headers are too large"
    INTERNAL = "internal", 500, SourceLost, "the source failed, and its log has the error"
    TRANSFER_FAILED = "transfer_failed", 500, SourceLost, "the blocks could not be sent"
    BUSY = "busy", 503, SourceBusy, "all places are taken, of sessions or of those that read files"
    LOADING = "loading", 503, SourceBusy, "the source is still loading its weights"
    PREPARING = "preparing", 503, SourceBusy, "the weights are being made ready for inference"
    ASLEEP = "asleep", 503, SourceBusy, "the source sleeps, and its weights are not in memory"
    CHANGING = "changing", 503, SourceBusy, "the source's weights are being changed"

    def __init__(self, text: str, status: int, error: type[SourceError], about: str) -> None:
        self.text = text
        self.status = HTTPStatus(status)
        self.error = error
        self.about = about


CODES = {code.text: code for code in Code}

Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Positive: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
ShortText: TypeAlias = Annotated[str, msgspec.Meta(max_length=4096)]
PeerAddress: TypeAlias = Annotated[str, msgspec.Meta(max_length=MAX_ADDRESS)]
Instance: TypeAlias = Annotated[str, msgspec.Meta(max_length=MAX_INSTANCE)]
WeightsDigest: TypeAlias = Annotated[str, msgspec.Meta(pattern=rf"\A{_DIGEST}\Z")]
RankWeights: TypeAlias = Annotated[dict[Count, WeightsDigest], msgspec.Meta(max_length=65536)]
NO_RANKS: Mapping[int, str] = MappingProxyType({})
Run: TypeAlias = tuple[Count, Count]
Value: TypeAlias = tuple[ShortText, Annotated[bytes, msgspec.Meta(max_length=16 << 10)]]
Values: TypeAlias = Annotated[list[Value], msgspec.Meta(max_length=256)]


class Peer(msgspec.Struct, frozen=True, omit_defaults=True):
    """Another instance that gets or has the same weights.

    Attributes:
        address: where it listens.
        instance: names the process.
        state: `loading` or `serving`.
        load: to how many it has been named.
    """

    address: PeerAddress
    instance: Instance
    state: ShortText = "loading"
    load: Count = 0


Peers: TypeAlias = Annotated[list[Peer], msgspec.Meta(max_length=4096)]


class Join(msgspec.Struct, frozen=True, omit_defaults=True):
    """A client asks for the weights of a model.

    Attributes:
        identity: what has to be equal on both sides.
        weights: the weights that the client has manifest and block digests of already.
        peer: where the client itself passes on what it gets; None: nowhere.
        view: whether it wants records and regions only, so that it may be cut in another way.
    """

    identity: ModelIdentity
    weights: WeightsDigest | None = None
    peer: Peer | None = None
    view: bool = False


class Joined(msgspec.Struct, frozen=True, omit_defaults=True):
    """The source has the model.

    Attributes:
        weights: digest of its weights, `algorithm:hex`.
        epoch: counts the changes of these weights in this instance.
        instance: names the process, so that another one at the same address is noticed.
        revision: which revision of the model they are.
        peers: others that have or get the same weights.
        complete: whether all blocks are here already.
        manifest: passed on unread; left out where the client named these weights, or joins for a
            view.
        blocks: the digests of all blocks, 16 bytes each, in base64; left out like the manifest.
        ranks: the weights digests of the instance's ranks, by global rank, as far as known.
    """

    weights: WeightsDigest
    epoch: Count
    instance: Instance
    revision: Revision = Revision()
    peers: Peers = []
    complete: bool = True
    manifest: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    blocks: bytes | msgspec.UnsetType = msgspec.UNSET
    ranks: RankWeights = {}


class Region(msgspec.Struct, frozen=True, array_like=True):
    """Elements of a parameter that a source's records name.

    Attributes:
        parameter: its number in the records.
        offset: the first element, counted from the parameter's first one in memory.
        size: number of elements, for each dimension.
        stride: steps in the parameter's memory, in elements, for each dimension.
    """

    parameter: Count
    offset: Count
    size: Annotated[list[Positive], msgspec.Meta(max_length=MAX_DIMENSIONS)]
    stride: Annotated[list[Count], msgspec.Meta(max_length=MAX_DIMENSIONS)]


class Regions(msgspec.Struct, frozen=True):
    """The client wants the elements of regions, one after the other."""

    regions: Annotated[list[Region], msgspec.Meta(min_length=1, max_length=MAX_REGIONS)]


class OpenGroup(msgspec.Struct, frozen=True):
    """A client wants a group of two ranks, itself rank 0, for the blocks of these weights."""

    weights: WeightsDigest


class GroupOpened(msgspec.Struct, frozen=True):
    """The source begins to form the group.

    Attributes:
        id: names the group, on this connection only.
        max_bytes: size of a run that is not to be exceeded.
    """

    id: Annotated[str, msgspec.Meta(pattern=rf"\A{_PARAMETERS['id']}\Z")]
    max_bytes: Annotated[int, msgspec.Meta(ge=1 << 20)]


class StoreSet(msgspec.Struct, frozen=True):
    """What the client has set in the group's store since it last said so: keys and values."""

    set: Values


class StoreValues(msgspec.Struct, frozen=True):
    """What the source has set since it last said so; empty if nothing came in time."""

    values: Values


class SendRuns(msgspec.Struct, frozen=True):
    """The client wants runs of blocks, `[first, last]`; none says that it is still there."""

    runs: Annotated[list[Run], msgspec.Meta(max_length=2048)]


class Sizes(msgspec.Struct, frozen=True):
    """The source sends the runs in the order asked for.

    Attributes:
        sizes: bytes of each run; null: it is not sent, as others have got it from here.
    """

    sizes: list[Count | None]


class Done(msgspec.Struct, frozen=True, omit_defaults=True):
    """The client has got what it wanted from this session, or gives up.

    Attributes:
        complete: whether its weights are complete.
        reason: why it gives up.
    """

    complete: bool
    reason: ShortText = ""


class Check(msgspec.Struct, frozen=True):
    """The client has got blocks that are not what their digests say, twice."""


class Have(msgspec.Struct, frozen=True):
    """Which blocks have come since the client last asked.

    Attributes:
        version: the `since` of the next request.
        runs: `[first, last]` of each run that has come.
        complete: whether all blocks are here.
    """

    version: Count
    runs: Annotated[list[Run], msgspec.Meta(max_length=MAX_NEWS)]
    complete: bool


class Named(msgspec.Struct, frozen=True):
    """Who else gets or has these weights."""

    peers: Peers


class ModelFile(msgspec.Struct, frozen=True):
    """A file beside the weights.

    Attributes:
        name: its name in the model's folder.
        nbytes: its size.
        sha256: its SHA-256, in hexadecimal.
    """

    name: Annotated[str, msgspec.Meta(pattern=rf"\A{_PARAMETERS['name']}\Z")]
    nbytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_FILE)]
    sha256: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class Files(msgspec.Struct, frozen=True):
    """The files beside the weights that a client may need."""

    files: Annotated[list[ModelFile], msgspec.Meta(max_length=MAX_FILES)]


class Noted(msgspec.Struct, frozen=True):
    """The answer to `Done`, and to `Check` if the source has these blocks as their digests say."""


class Endpoint(msgspec.Struct, frozen=True):
    """Where a rank listens.

    Attributes:
        address: as clients reach it.
        instance: names the process.
    """

    address: PeerAddress
    instance: Instance


class Feed(msgspec.Struct, frozen=True):
    """What one source has given of the weights that are being loaded.

    Attributes:
        address: the source's.
        bytes_received: bytes of blocks that came from it.
    """

    address: ShortText
    bytes_received: Count


class ModelStatus(msgspec.Struct, frozen=True):
    """How one model of an instance is.

    Attributes:
        identity: what has to be equal to load from it.
        state: `serving`, or the code that a join is answered with; in the place of `loading` what
            it does while nothing has come: `waiting` for others, `volunteering` to read the disk,
            `reading` it.
        reason: why it is not serving, for people.
        weights: digest of its weights, if known.
        epoch: counts the changes of these weights in this instance.
        loaded_from: `disk`, the addresses the weights came from, or the call that has changed them.
        instance_digest: digest of `ranks`, null while that is empty.
        ranks: the weights digests of the instance's ranks, by global rank, as far as known.
        endpoints: where the instance's ranks listen, by global rank, as far as known.
        can_read: whether it would read its disk for others that have no weights either.
        nbytes: size of the weights; 0: there are none to be had.
        blocks: how many blocks they have.
        blocks_here: how many of these are here.
        map: how much of which blocks is here: a digit for each part of them, from 0 to 9 (all).
        feeds: where the weights come from while they are being loaded.
    """

    identity: ModelIdentity
    state: str
    reason: str
    weights: str | None
    epoch: Count
    loaded_from: str
    instance_digest: str | None
    ranks: dict[int, str]
    endpoints: dict[int, Endpoint]
    can_read: bool = False
    nbytes: Count = 0
    blocks: Count = 0
    blocks_here: Count = 0
    map: ShortText = ""
    feeds: list[Feed] = []


class SessionStatus(msgspec.Struct, frozen=True):
    """How far one session is.

    Attributes:
        peer: the client's address.
        weights: digest of the weights that it gets.
        bytes_sent: bytes of blocks that were sent.
        seconds: since its beginning.
        relay: where the client listens, if it passes on what it gets.
    """

    peer: str
    weights: str
    bytes_sent: Count
    seconds: float
    relay: str | None = None


class Status(msgspec.Struct, frozen=True):
    """How an instance is.

    Attributes:
        version: NetLoader's.
        instance: names the process.
        rank: global rank of the process, counted through all data-parallel replicas.
        models: each model that it serves or loads.
        sessions: those that get blocks.
        places: sessions that can be open at once.
        places_taken: how many are.
        bytes_sent: bytes of blocks that were sent since the start.
    """

    version: str
    instance: Instance
    rank: int
    models: list[ModelStatus]
    sessions: list[SessionStatus]
    places: Count
    places_taken: Count
    bytes_sent: Count


class Difference(msgspec.Struct, frozen=True):
    """A field in which two identities differ, with both values as text."""

    field: str
    client: str
    source: str

    def __str__(self) -> str:
        return f"{self.field} is {self.client} at the client and {self.source} at the source"


class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of every answer that is not 200.

    Attributes:
        code: see `Code`; what it says decides what the client does.
        message: for people.
        differences: with `other_model`.
        peers: whom else to ask.
        weights: digest of the weights that the client would get, with `peers`.
        instance: names the process, in the answer to a join.
        ranks: see `Joined`, with `weights`; left out if it is too long.
    """

    code: str
    message: str
    differences: list[Difference] = []
    peers: Peers = []
    weights: WeightsDigest | None = None
    instance: Instance = ""
    ranks: RankWeights = {}


class Refusal(NetLoaderError):
    """A request gets this code as its answer.

    Args:
        code: see `Code`.
        message: for people.
        differences: with `other_model`.
        retry_after: seconds after which the client may ask again, with status 503.
    """

    def __init__(
        self,
        code: Code,
        message: str,
        *,
        differences: Sequence[Difference] = (),
        retry_after: int = 1,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.problem = Problem(code.text, message, [*differences])
        self.retry_after = retry_after

    def name(
        self, weights: str, peers: Sequence[Peer], ranks: Mapping[int, str] = NO_RANKS
    ) -> None:
        """Say whom else to ask, for which weights, and what the other ranks of these are."""
        self.problem = msgspec.structs.replace(
            self.problem,
            weights=weights,
            peers=[*peers],
            ranks=dict(ranks) if len(ranks) <= _MOST_RANKS else {},
        )


@dataclass(frozen=True)
class Bytes:
    """The bytes of a run of blocks, of regions, or of a file, on their way out.

    Attributes:
        nbytes: how many there are.
        chunks: yields them in order, as lists of views; may wait in between.
    """

    nbytes: int
    chunks: Generator[list[Buffer], None, None]


def differences(
    client: ModelIdentity, source: ModelIdentity, *, view: bool = False
) -> list[Difference]:
    """Return the first fields in which a client's and a source's identity differ.

    Args:
        client: the client's.
        source: the source's.
        view: whether only those count that decide what the checkpoint is.

    Raises:
        Refusal: they cannot be told, as one is nested almost too deep to be decoded.
    """
    if source.layout == CHECKPOINT:
        client = client.as_told_by(source)
    if view:
        client, source = client.of_checkpoint(), source.of_checkpoint()
    try:
        return [
            Difference(*(shortened(text, 200) for text in (field, repr(ours), repr(theirs))))
            for field, ours, theirs in client.differences(source)[:MAX_DIFFERENCES]
        ]
    except RecursionError:
        raise Refusal(Code.BAD_REQUEST, "a setting of the model is nested too deep") from None


def route(target: str) -> tuple[str, dict[str, str]]:
    """Return the path of `METHODS` that a request's target is, and its parameters.

    Raises:
        Refusal: there is none.
    """
    path = re.sub(r"\Ahttps?://[^/?#]*", "", target)  # as sent to a proxy
    for template, pattern in _ROUTES.items():
        if match := pattern.fullmatch(path):
            return template, match.groupdict()
    known = ", ".join(METHODS)
    raise Refusal(Code.NOT_FOUND, f"unknown path {shortened(path, 200)}; known paths: {known}")


S = TypeVar("S", bound=msgspec.Struct)


def decode(body: bytes, kind: type[S]) -> S:
    """Return a body as the struct it should be.

    Raises:
        Refusal: it is not one.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        message = f"the body is not a valid {kind.__name__}: {shortened(str(error), 500)}"
        raise Refusal(Code.BAD_REQUEST, message) from None


# msgspec looks at the fields of a struct when the first message of its kind is decoded. Where two
# threads do so at the same time, the process ends with a segmentation fault (seen with 0.22).
for _kind in [*globals().values()]:
    if isinstance(_kind, type) and issubclass(_kind, msgspec.Struct):
        msgspec.json.Decoder(_kind)


def world_of(identity: ModelIdentity, most: int) -> set[int]:
    """Return the ranks that have a model; none of them if these are more than `most`."""
    replica = identity.tp * identity.pp * identity.pcp
    # Only the last pipeline stage has a draft.
    first = replica - replica // identity.pp if identity.group == DRAFT_GROUP else 0
    if not 0 < identity.dp * (replica - first) <= most:
        return set()
    return {
        at + rank
        for at in range(0, identity.dp * replica, replica)
        for rank in range(first, replica)
    }
