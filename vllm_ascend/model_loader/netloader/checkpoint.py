"""A folder with a checkpoint in files of safetensors: its tensors, mapped, and who it is."""

import contextlib
import errno
import fcntl
import json
import math
import mmap
import os
import signal
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from .errors import ConfigError, NetLoaderError
from .executor.view.boxes import row_major
from .executor.view.offered import Viewed
from .executor.view.records import Copy, Parameter, Records, Seen, encode, name_of, parameter_of
from .identity import (
    CHECKPOINT,
    OF_EACH_TENSOR,
    ModelIdentity,
    Revision,
    cached_snapshot,
    flattened,
    plain_identity,
)
from .utils import one_line, shortened, words_of

# How safetensors names dtypes.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
_MOST_HEADER = 100_000_000  # as safetensors has it
_MOST_INDEX = 256 << 20


class CheckpointError(NetLoaderError):
    """A folder has no checkpoint that can be served; the message names the file."""


class _Entry(msgspec.Struct, frozen=True):
    """What the header of a file says of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct, frozen=True):
    """Which file has which tensor."""

    weight_map: dict[str, str]


_ENTRIES, _INDEXES = msgspec.json.Decoder(_Entry), msgspec.json.Decoder(_Index)
_HEADERS = msgspec.json.Decoder(dict[str, msgspec.Raw])


@dataclass(frozen=True)
class _File:
    path: Path
    number: int  # of the open file
    state: tuple[int, ...]
    leased: bool


@dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint, open.

    Attributes:
        tensors: name -> tensor in mapped memory, in the order of the names.
        files: where they are.
    """

    tensors: Mapping[str, torch.Tensor]
    files: tuple[_File, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def check(self) -> None:
        """Return if no file has changed, or is about to.

        Raises:
            CheckpointError: one has; names it. Its memory must not be read any more.
        """
        for file in self.files:
            # Whoever opens the file to write waits for the end of the lease.
            if file.leased and fcntl.fcntl(file.number, fcntl.F_GETLEASE) != fcntl.F_RDLCK:
                raise CheckpointError(f"{file.path} is about to be changed")
            try:
                states = [_state(os.stat(file.path)), _state(os.fstat(file.number))]
            except OSError as error:
                raise CheckpointError(f"{file.path} has gone: {error.strerror}") from None
            if states != [file.state] * 2:
                raise CheckpointError(f"{file.path} has changed")


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Checkpoint]:
    """Open the files of a checkpoint; once it is over nobody may read its tensors.

    Raises:
        CheckpointError: it has none, or a file that is not right; names it.
        OSError: one cannot be read.
    """
    with contextlib.ExitStack() as stack:
        files: list[_File] = []
        tensors: dict[str, torch.Tensor] = {}
        for path in _paths(folder):
            number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, number)
            file = _File(path, number, _state(os.fstat(number)), _leased(path, number))
            files.append(file)
            if file.leased:  # mapped memory would keep the lease
                stack.callback(fcntl.fcntl, number, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            for name, tensor in _mapped(file).items():
                if tensors.setdefault(name, tensor) is not tensor:
                    raise CheckpointError(f"{path} has {_short(name)}, as another file has")
        if missing := _indexed(folder).keys() - tensors.keys():
            raise CheckpointError(f"{folder / INDEX} has {_short(min(missing))}, and no file has")
        if not tensors:
            raise CheckpointError(f"{folder} has no tensors")
        found = Checkpoint(dict(sorted(tensors.items())), tuple(files))
        found.check()  # a file whose end is missing has become shorter while it was opened
        yield found


def view_of(checkpoint: Checkpoint) -> Viewed:
    """Return the view of a checkpoint each of whose tensors is one parameter."""
    seen: list[Seen] = []
    parameters: list[Parameter] = []
    memory: list[torch.Tensor] = []
    for name, tensor in checkpoint.tensors.items():
        dtype, shape = name_of(tensor.dtype), tuple(tensor.shape)
        copies: tuple[Copy, ...] = ()
        if tensor.numel():
            start = (0,) * len(shape)
            copies = (Copy(start, shape, len(memory), 0, row_major(shape)),)
            parameters.append(parameter_of(name, tensor))
            memory.append(tensor)
        seen.append(Seen(name, dtype, shape, copies))
    return Viewed(encode(Records(tuple(seen), tuple(parameters))), memory)


def identity_of(folder: Path, model: str | None, group: str) -> ModelIdentity:
    """Work out who the checkpoint of a folder is.

    Args:
        folder: has its configuration as well.
        model: the name to go by; None: that of the folder, as vLLM is given it.
        group: see `ModelIdentity`.

    Raises:
        ConfigError: the folder or the configuration is missing, or the latter is wrong.
    """
    if not os.path.isdir(folder):
        raise ConfigError(f"{folder}: no such folder")
    path = folder / _CONFIG
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {one_line(words_of(error))}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must have a JSON object")
    snapshot = cached_snapshot(str(folder))
    return plain_identity(
        group=group,
        model=model or (snapshot[0] if snapshot else str(folder)),
        revision=Revision(snapshot[1] if snapshot else None),
        rank=0,
        tp=1,
        pp=1,
        pcp=1,
        dp=1,
        dp_rank=0,
        ep=1,
        ep_rank=0,
        dtype=OF_EACH_TENSOR,
        quantization=None,
        config={},
        defaults=_given(flattened(settings)),
        layout=CHECKPOINT,
        vllm_version=None,
    )


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without those that the configuration's class is to fill in."""
    return {name: value for name, value in settings.items() if value is not None}


def _paths(folder: Path) -> list[Path]:
    """Return the files that have the weights, as vLLM chooses them."""
    if indexed := _indexed(folder):
        return [folder / name for name in sorted({*indexed.values()})]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise CheckpointError(f"{folder} has no files of safetensors")
    # Mistral's own format, beside the usual one.
    return [path for path in found if not path.name.startswith("consolidated")] or found


def _indexed(folder: Path) -> Mapping[str, str]:
    """Return which file has which tensor, if there is an index."""
    path = folder / INDEX
    try:
        with path.open("rb") as file:
            index = _INDEXES.decode(file.read(_MOST_INDEX))
    except FileNotFoundError:
        return {}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from None
    for name in index.weight_map.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path} names {_short(name)}, which is no file of safetensors")
    return index.weight_map


def _state(status: os.stat_result) -> tuple[int, ...]:
    """Return what is another if a file is another, or has other bytes."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _leased(path: Path, number: int) -> bool:
    """Have the kernel ask before another process writes to a file; return whether it will.

    It does so for the file's owner, on file systems of this machine.
    """
    try:
        fcntl.fcntl(number, fcntl.F_SETSIG, signal.SIGURG)  # nothing; SIGIO would end the process
        fcntl.fcntl(number, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            raise CheckpointError(f"{path} is being written") from None
        return False
    return True


def _mapped(file: _File) -> dict[str, torch.Tensor]:
    """Return the tensors of a file in mapped memory, after a look at all that its header says."""

    def wrong(why: str) -> CheckpointError:
        return CheckpointError(f"{file.path} is no file of safetensors: {why}")

    nbytes = os.fstat(file.number).st_size
    length = int.from_bytes(os.pread(file.number, 8, 0), "little")
    if nbytes < 8 or not 0 < length <= min(nbytes - 8, _MOST_HEADER):
        raise wrong(f"its header of {length} bytes does not fit into {nbytes} bytes")
    try:
        head = _HEADERS.decode(os.pread(file.number, length, 8))
        head.pop("__metadata__", None)
        entries = {name: _ENTRIES.decode(one) for name, one in head.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise wrong(f"its header: {one_line(error)}") from None
    memory = mmap.mmap(file.number, nbytes, access=mmap.ACCESS_READ)
    tensors, end = {}, 0
    for name, entry in sorted(entries.items(), key=lambda one: one[1].data_offsets):
        dtype, (first, after) = DTYPES.get(entry.dtype), entry.data_offsets
        if dtype is None:
            raise CheckpointError(
                f"{file.path}: {_short(name)} has the dtype {_short(entry.dtype)}, which is not "
                f"supported (supported: {', '.join(DTYPES)})"
            )
        count = math.prod(entry.shape)
        if min(entry.shape, default=0) < 0 or after - first != count * dtype.itemsize:
            raise wrong(f"{_short(name)} has {after - first} bytes for the shape {entry.shape}")
        if first != end:
            raise wrong(f"{_short(name)} begins at {first}, and what is before it ends at {end}")
        end, offset = after, 8 + length + first
        if 8 + length + end > nbytes:
            break
        flat = torch.empty(0, dtype=dtype)
        if count:  # at any offset: not all files have them at multiples of their size
            with warnings.catch_warnings(action="ignore"):  # that it must not be written
                flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)
        tensors[name] = flat.reshape(entry.shape)
    if 8 + length + end != nbytes:
        raise wrong(f"its tensors end at {8 + length + end}, and it has {nbytes} bytes")
    return tensors


def _short(text: str) -> str:
    return shortened(repr(text), 200)
