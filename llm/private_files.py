"""Directories and files that no other user can have changed: how they are created, and how they are checked.

Knows owners, permissions and symbolic links. Knows nothing of what the files are for.
"""

import errno
import os
import stat
from pathlib import Path

from llm.errors import UnsafeCache

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OPEN = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a FIFO must not block the open


def make_directory(path: Path) -> None:
    """Create a directory, and its missing parents, for this user alone (mode 0700). An existing one is not changed."""
    if path.is_dir():
        return
    make_directory(path.parent)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        if not path.is_dir():
            raise


def check_directory(path: Path) -> None:
    """Raise `UnsafeCache` if another user could have changed what the directory holds, or if it is a symbolic link."""
    os.close(_open_directory(path))


def open_file(path: Path) -> int:
    """Open a file for reading, and check it and its directory. Returns a file descriptor.

    The opened file is checked, not its path, so it cannot be replaced in between.

    Raises:
        UnsafeCache: Another user could have changed the file, or it is no regular file.
        OSError: It cannot be opened; `FileNotFoundError` if it is missing.
    """
    if os.open not in os.supports_dir_fd:  # Windows, whose access lists are not looked at
        return os.open(path, _OPEN)
    directory = _open_directory(path.parent)
    try:
        file = _open(path, directory)
    finally:
        os.close(directory)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise UnsafeCache(f"{path} is not a regular file: delete it")
        _check(path, status)
    except BaseException:
        os.close(file)
        raise
    return file


def is_private(directory: Path) -> bool:
    """True if no other user could have changed a directory, nor a file or directory below it."""
    try:
        for folder, folders, files in os.walk(directory):
            for path in (Path(folder), *(Path(folder, name) for name in (*folders, *files))):
                status = path.lstat()
                if stat.S_ISLNK(status.st_mode):
                    return False
                _check(path, status)
    except UnsafeCache:
        return False
    return True


def take_permissions(directory: Path) -> None:
    """Let no other user write to a directory of this user's, nor to anything below it."""
    for folder, _, files in os.walk(directory):
        for path in (Path(folder), *(Path(folder, name) for name in files)):
            mode = path.lstat().st_mode
            if mode & _OTHERS_WRITE and not stat.S_ISLNK(mode):
                path.chmod(stat.S_IMODE(mode) & ~_OTHERS_WRITE)


def _open_directory(path: Path) -> int:
    if not hasattr(os, "O_DIRECTORY"):
        return os.open(os.devnull, os.O_RDONLY)
    file = _open(path, None)
    try:
        status = os.fstat(file)
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        _check(path, status)
    except BaseException:
        os.close(file)
        raise
    return file


def _open(path: Path, directory: int | None) -> int:
    try:
        return os.open(path if directory is None else path.name, _OPEN, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafeCache(f"{path} is a symbolic link: delete it") from error
        raise


def _check(path: Path, status: os.stat_result) -> None:
    if not hasattr(os, "geteuid"):
        return
    user = os.geteuid()
    if status.st_uid not in (user, 0):
        raise UnsafeCache(
            f"{path} belongs to the user with the id {status.st_uid}, and this process runs as {user}: delete it, or "
            "set SERVE_CACHE to a directory of this user's"
        )
    if status.st_mode & _OTHERS_WRITE:
        mode = stat.S_IMODE(status.st_mode)
        raise UnsafeCache(
            f"{path} can be changed by other users (mode {mode:04o}): delete it, or run chmod go-w {path}"
        )
