"""API keys: the file they are in, the ring that knows whose a key is, and `serve.py keys`, which adds and removes them.

Of a key only its SHA-256 is kept: keys have 256 random bits, which nobody guesses, so a slow hash would add nothing.
Knows nothing of HTTP.
"""

import argparse
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""What a key can be called: names are shown in logs and as labels of metrics."""

LINE = re.compile(rf"({NAME.pattern}):sha256:([0-9A-Fa-f]{{64}})")
GIVEN_KEY = re.compile(r"[!-~]{16,}")
"""What HTTP headers can carry, and long enough not to be guessed."""

PREFIX = "llama-"
"""Of the keys made here, so that people and secret scanners recognise them."""

LOCK_TIMEOUT_S = 30.0

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


def manage(arguments: Sequence[str], file: Path | None) -> int:
    """Run `serve.py keys …` and return the exit code. `file` is used where `--file` is not given."""
    options = _read_arguments(arguments)
    file = options.file or file
    if file is None:
        return _say("which file of keys? Set SERVE_API_KEYS_FILE or give --file", 2)
    file = file.resolve()  # a link stays one
    try:
        if options.action == "list":
            return _list(file)
        with FileLock(file.with_name(f"{file.name}.lock"), timeout=LOCK_TIMEOUT_S):
            return (_add if options.action == "add" else _remove)(file, options.name)
    except OSError as error:
        return _say(f"{file}: {error.strerror or error}", 1)


def _read_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="serve.py keys", description="Add, list and remove API keys.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="add | list | remove")
    for action, help_ in (
        ("add", "make a key and print it, this once"),
        ("list", "print the names of the keys"),
        ("remove", "make a key invalid, at once and also where the service is running"),
    ):
        command = actions.add_parser(action, help=help_, description=help_.capitalize() + ".")
        if action != "list":
            command.add_argument("name", type=_name, metavar="NAME", help="whose key it is; shown in logs and metrics")
        command.add_argument("--file", type=Path, metavar="PATH", help="the file; SERVE_API_KEYS_FILE if not given")
    return parser.parse_args(arguments)


def _name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise argparse.ArgumentTypeError("a name is 1 to 64 of A-Z a-z 0-9 _ . - and begins with a letter or a digit")
    return text


def _add(file: Path, name: str) -> int:
    lines = read_lines(file) if file.exists() else []
    if any(is_of(line, name) for line in lines):
        return _say(f"there is a key named {name} in {file} already", 1)
    key = PREFIX + secrets.token_urlsafe(32)
    _write(file, [*lines, f"{name}:sha256:{digest_of(key).hex()}"])
    print(key, flush=True)
    return _say(f"this is the key of {name}, shown only this once", 0)


def _list(file: Path) -> int:
    content = read_key_file(file)
    for name in content.digests:
        print(name)
    for trouble in content.troubles:
        _say(trouble, 1)
    return 1 if content.troubles else 0


def _remove(file: Path, name: str) -> int:
    lines = read_lines(file)
    left = [line for line in lines if not is_of(line, name)]
    if left == lines:
        return _say(f"there is no key named {name} in {file}", 1)
    _write(file, left)
    return _say(f"the key of {name} is removed", 0)


def _write(file: Path, lines: Sequence[str]) -> None:
    """Put new content in a file's place, at once and with the mode and the owner that it had: 0600 for a new one."""
    content = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with open(handle, "wb") as new:
            if file.exists():
                before, now = file.stat(), os.fstat(handle)
                if (before.st_uid, before.st_gid) != (now.st_uid, now.st_gid):
                    os.fchown(handle, before.st_uid, before.st_gid)  # else the service could not read it any more
                os.fchmod(handle, stat.S_IMODE(before.st_mode))
            new.write(content)
            new.flush()
            os.fsync(handle)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
    directory = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # a key that was removed stays so, also after a power failure
    finally:
        os.close(directory)


def _say(message: str, exit_code: int) -> int:
    print(f"serve.py keys: {message}", file=sys.stderr)
    return exit_code
