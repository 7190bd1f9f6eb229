"""API keys: the file they are in, and the ring that knows whose a key is.

Of a key only its SHA-256 is kept: keys have 256 random bits, which nobody guesses, so a slow hash would add nothing.
Knows nothing of HTTP.
"""

import hashlib
import hmac
import logging
import os
import re
import stat
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""What a key can be called: names are shown in logs and as labels of metrics."""

LINE = re.compile(rf"({NAME.pattern}):sha256:([0-9A-Fa-f]{{64}})")
GIVEN_KEY = re.compile(r"[!-~]{16,}")
"""What HTTP headers can carry, and long enough not to be guessed."""

log = logging.getLogger(__name__)


class KeysError(Exception):
    """Keys that cannot be used. The message is one line and says where, never what the key is."""


@dataclass(frozen=True, slots=True)
class KeyFile:
    """What is in a file of keys: digests by name, and what is wrong with its other lines."""

    digests: Mapping[str, bytes]
    troubles: Sequence[str]


@dataclass(frozen=True, slots=True)
class FileState:
    """What differs once a file was written to or another was put in its place."""

    modified_ns: int
    changed_ns: int
    size: int
    inode: int


class KeyRing:
    """Knows whose a key is. Keys are in a file, which is read again when it changes, and in the environment.

    Args:
        file: Lines of `name:sha256:hex`, empty ones, and comments that begin with `#`.
        given: `name:key,name:key`.

    Raises:
        KeysError: What was configured cannot be used. Later, lines that cannot be used are left out and logged, and a
            file that cannot be read means that it has no keys.
    """

    def __init__(self, file: Path | None, given: str = "") -> None:
        self._file = file
        self._given = parse_given(given) if given else {}
        self._filed = KeyFile({}, ())
        self._seen: FileState | None = None
        if self._look():
            if self._filed.troubles:
                raise KeysError(self._filed.troubles[0])
            if not self._given and not self._filed.digests:
                log.warning("There is no key in %s: until there is one, nobody can use the service", file)

    @property
    def is_open(self) -> bool:
        """True if no keys were configured: nobody needs one."""
        return self._file is None and not self._given

    @property
    def names(self) -> Collection[str]:
        """The names of all keys, as the file was when it was read last."""
        return {*self._given, *self._filed.digests}

    def name_of(self, key: str) -> str | None:
        """Whose key it is, or None. How long that takes tells nothing about the keys. Never raises."""
        if self._look():
            for trouble in self._filed.troubles:
                log.error("Keys: %s", trouble)
            log.info("Keys: %d in %s now", len(self._filed.digests), self._file)
        digest = digest_of(key)
        found = None
        for name, known in (*self._given.items(), *self._filed.digests.items()):
            found = name if hmac.compare_digest(digest, known) else found
        return found

    def _look(self) -> bool:
        """Read the file if it is not as it was seen last; true if that brought something new."""
        if self._file is None:
            return False
        before = self._seen, self._filed
        try:
            state = state_of(self._file)  # before reading, so that what is written meanwhile is read the next time
            if state == self._seen:
                return False
            self._seen, self._filed = state, read_key_file(self._file, taken=self._given)
        except OSError as error:
            hint = "; `serve.py keys add NAME` makes it" if isinstance(error, FileNotFoundError) else ""
            trouble = f"cannot read the keys in {self._file}: {error.strerror}{hint}"
            self._seen, self._filed = None, KeyFile({}, (trouble,))
        return (self._seen, self._filed) != before


def digest_of(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def parse_given(given: str) -> Mapping[str, bytes]:
    """Digests by name of `name:key,name:key`. Raises `KeysError`, which numbers entries: a "name" may be the key."""
    digests: dict[str, bytes] = {}
    for number, entry in enumerate(given.split(","), 1):
        name, _, key = (part.strip() for part in entry.partition(":"))
        if not NAME.fullmatch(name) or not key:
            raise KeysError(f"entry {number} of SERVE_API_KEYS is not name:key")
        if not GIVEN_KEY.fullmatch(key):
            raise KeysError(f"entry {number} of SERVE_API_KEYS: a key has 16 or more ASCII characters and no spaces")
        if name in digests:
            raise KeysError(f"entry {number} of SERVE_API_KEYS: there is a key of that name already")
        digests[name] = digest_of(key)
    return digests


def state_of(file: Path) -> FileState:
    """Look at a file without reading it. Raises OSError also where it is a directory or a pipe."""
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(None, "not a regular file")
    return FileState(status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)


def read_key_file(file: Path, *, taken: Collection[str] = ()) -> KeyFile:
    """Read a file of keys. `taken` are names in use elsewhere. What a line says is never shown: it may be a key."""
    digests: dict[str, bytes] = {}
    troubles: list[str] = []
    for number, line in enumerate(read_lines(file), 1):
        if not is_entry(line):
            continue
        parsed = LINE.fullmatch(line.strip())
        if not parsed:
            troubles.append(f"{file}, line {number} is not name:sha256:hex")
        elif parsed[1] in taken:
            troubles.append(f"{file}, line {number}: there is a key named {parsed[1]} in SERVE_API_KEYS too")
        elif parsed[1] in digests:
            troubles.append(f"{file}, line {number}: there is a key named {parsed[1]} above")
        else:
            digests[parsed[1]] = bytes.fromhex(parsed[2])
    return KeyFile(digests, tuple(troubles))


def read_lines(file: Path) -> list[str]:
    """The lines as editors count them. What is not UTF-8, in a comment say, can be written back as it was."""
    text = file.read_bytes().decode("utf-8", "surrogateescape")
    return text.removesuffix("\n").split("\n") if text else []


def is_entry(line: str) -> bool:
    """False for comments and empty lines."""
    return bool(line.strip()) and not line.lstrip().startswith("#")


def is_of(line: str, name: str) -> bool:
    """Whether a line has a name's key, be the rest of it right or wrong."""
    return line.partition(":")[0].strip() == name
