"""`serve.py keys`: adds, lists and removes API keys in their file, also while the service is running."""

import argparse
import os
import secrets
import stat
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from service.entry.keys import NAME, digest_of, is_of, read_key_file, read_lines

PREFIX = "llama-"
"""Of the keys made here, so that people and secret scanners recognise them."""

LOCK_TIMEOUT_S = 30.0


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
