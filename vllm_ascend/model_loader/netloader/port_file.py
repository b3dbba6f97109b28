"""The file in which a rank publishes its address (OUTPUT_PREFIX), gone when its process is."""

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path

from .utils import Address

# Waits until the write end of its standard input is closed by the death of the process that holds
# it, and removes the file if nobody else has written it since. A line says that this is not needed:
# by then the same address may have been published anew.
_WATCH = """
exec 3<&0
( read -r _ <&3 || { [ "$(cat -- "$1")" = "$2" ] && rm -f -- "$1"; } ) >/dev/null 2>&1 &
"""


class PortFile:
    """A published address.

    Unless `--shutdown-timeout` is set, vLLM ends its workers with SIGKILL, so no worker can be
    relied on to remove its file itself. A shell does it for them, detached because vLLM kills the
    children of its workers too.

    Args:
        prefix: OUTPUT_PREFIX.
        rank: global rank of the process.
        address: where it listens.
    """

    def __init__(self, prefix: str, rank: int, address: Address) -> None:
        self.path = Path(f"{prefix}{rank}.txt")
        self._text = str(address)
        self._watch: subprocess.Popen[bytes] | None = None

    def publish(self) -> None:
        """Write the file such that a reader sees all of it or none.

        Raises:
            OSError: it cannot be written; nothing is left behind.
        """
        write_atomically(self.path, self._text)
        try:
            self._watch = subprocess.Popen(
                ["sh", "-c", _WATCH, "sh", str(self.path.absolute()), self._text],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError:
            self.remove()
            raise
        self._watch.wait()  # for the outer shell, which ends once it has started the inner one

    def remove(self) -> None:
        """Remove the file unless somebody else has written it since."""
        with contextlib.suppress(OSError, UnicodeError):
            if self.path.read_text() == self._text:
                self.path.unlink()
        watch, self._watch = self._watch, None  # two threads may stop one server
        if watch is not None and watch.stdin is not None:
            with contextlib.suppress(OSError):  # somebody has killed it
                watch.stdin.write(b"\n")
                watch.stdin.close()


def write_atomically(path: Path, text: str) -> None:
    """Write a file such that a reader sees all of it or none.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
