"""The small files beside a model's weights: configuration, tokenizer, chat template, code."""

import contextlib
import functools
import hashlib
import re
from collections.abc import Generator
from pathlib import Path

from .interaction.api import MAX_FILE, MAX_FILES, Bytes, ModelFile
from .utils import Buffer

_PIECE = 1 << 20  # bytes of a file that are in memory at once

# What a client needs beside weights. Nothing else of a folder is told or sent.
_KINDS = re.compile(
    r"""
    (config|generation_config|params|tokenizer|tokenizer_config|vocab|added_tokens
    |special_tokens_map|chat_template|tekken|preprocessor_config|video_preprocessor_config
    |processor_config|quantize_config|quant_config|hf_quant_config|quant_model_description[\w.]*
    |modules|sentence_bert_config)\.json
    | (tokenizer|spiece|sentencepiece\.bpe)\.model | tokenizer\.model\.v\d+
    | (merges|vocab)\.txt
    | chat_template\.jinja | \w[\w.-]*\.tiktoken | \w+\.py
    """,
    re.VERBOSE | re.ASCII,
)


def is_code(name: str) -> bool:
    """Return whether a file is code that a model brings along."""
    return name.endswith(".py")


def is_allowed(name: str) -> bool:
    """Return whether a file of this name may be sent, or written."""
    return len(name) <= 128 and _KINDS.fullmatch(name) is not None


def files_of(folder: Path) -> list[ModelFile]:
    """Return the files of a model's folder that clients may get."""
    found = []
    for path in sorted(folder.iterdir()):
        with contextlib.suppress(OSError):  # one that cannot be read costs no other
            if is_allowed(path.name) and _is_within(path, folder) and path.is_file():
                status = path.stat()
                if status.st_size <= MAX_FILE:
                    digest = _digest(path, status.st_size, status.st_mtime_ns)
                    found.append(ModelFile(path.name, status.st_size, digest))
    return found[:MAX_FILES]


def read(folder: Path, name: str) -> Bytes | None:
    """Return what a file has; None: there is none that clients may get."""
    nbytes = next((file.nbytes for file in files_of(folder) if file.name == name), None)
    return None if nbytes is None else Bytes(nbytes, _pieces(folder / name, nbytes))


def digest_of(data: bytes) -> str:
    """Return the digest of a file's bytes."""
    return hashlib.sha256(data).hexdigest()


def _is_within(path: Path, folder: Path) -> bool:
    """Return whether a file lies in the folder, or where the Hub's cache has the folder's files."""
    target, snapshot = path.resolve(), folder.resolve()
    blobs = snapshot.parent.parent / "blobs"
    return target.parent == snapshot or (
        snapshot.parent.name == "snapshots" and target.parent == blobs
    )


def _pieces(path: Path, nbytes: int) -> Generator[list[Buffer], None, None]:
    """Yield the first bytes of a file; fewer if it has become shorter."""
    with path.open("rb") as file:
        while piece := file.read(min(nbytes, _PIECE)):
            nbytes -= len(piece)
            yield [memoryview(piece)]


@functools.lru_cache(maxsize=4 * MAX_FILES)
def _digest(path: Path, nbytes: int, changed: int) -> str:
    """Return a file's SHA-256, once for each size and time of change."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
