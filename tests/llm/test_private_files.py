"""Who could have changed a file. Ownership is changed by a patched user id: tests run as any user."""

import os
import stat
from pathlib import Path

import pytest

from llm.errors import UnsafeCache
from llm.private_files import check_directory, is_private, make_directory, open_file, take_permissions

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="about owners and permissions of POSIX")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "cache" / "kernel"
    make_directory(made)
    (made / "a.so").write_bytes(b"content")
    (made / "a.so").chmod(0o600)
    return made


def read(path: Path) -> bytes:
    with os.fdopen(open_file(path), "rb") as file:
        return file.read()


def test_a_new_directory_and_its_new_parents_are_for_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_directory(tmp_path / "a" / "b")
        make_directory(tmp_path / "a" / "b")
    finally:
        os.umask(before)

    assert [mode(tmp_path / "a"), mode(tmp_path / "a" / "b")] == [0o700, 0o700]


def test_an_existing_directory_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(0o755)

    make_directory(tmp_path / "a" / "b")

    assert mode(tmp_path / "a") == 0o755


def test_a_private_file_is_opened(directory: Path) -> None:
    assert read(directory / "a.so") == b"content"


def test_others_may_read(directory: Path) -> None:
    directory.chmod(0o755)
    (directory / "a.so").chmod(0o644)

    assert read(directory / "a.so") == b"content"


@pytest.mark.parametrize("permissions", [0o770, 0o702, 0o777, 0o1777])
def test_a_directory_that_others_can_write_to_is_refused(directory: Path, permissions: int) -> None:
    directory.chmod(permissions)

    with pytest.raises(UnsafeCache, match=rf"{directory} can be changed by other users .*chmod go-w {directory}"):
        check_directory(directory)
    with pytest.raises(UnsafeCache, match="chmod go-w"):
        open_file(directory / "a.so")


@pytest.mark.parametrize("permissions", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_to_is_refused(directory: Path, permissions: int) -> None:
    (directory / "a.so").chmod(permissions)

    with pytest.raises(UnsafeCache, match=r"a\.so can be changed by other users"):
        open_file(directory / "a.so")


def test_another_users_directory_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = directory.stat().st_uid
    if owner == 0:  # root's files are trusted by everybody
        os.chown(directory, 12345, -1)
        owner = 12345
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)

    with pytest.raises(UnsafeCache, match=f"belongs to the user with the id {owner}.*SERVE_CACHE"):
        open_file(directory / "a.so")


def test_a_link_in_place_of_a_file_is_refused(directory: Path) -> None:
    (directory / "b.so").symlink_to(directory / "a.so")

    with pytest.raises(UnsafeCache, match=r"b\.so is a symbolic link"):
        open_file(directory / "b.so")


def test_a_link_in_place_of_a_directory_is_refused(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(directory)

    with pytest.raises(UnsafeCache, match="link is a symbolic link"):
        open_file(tmp_path / "link" / "a.so")


def test_a_pipe_is_refused_and_does_not_block(directory: Path) -> None:
    os.mkfifo(directory / "pipe", 0o600)

    with pytest.raises(UnsafeCache, match="not a regular file"):
        open_file(directory / "pipe")


def test_a_missing_file_is_told_apart(directory: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_file(directory / "b.so")


def test_no_descriptor_is_left_open_by_a_refusal(directory: Path) -> None:
    (directory / "a.so").chmod(0o666)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    for _ in range(20):
        with pytest.raises(UnsafeCache):
            open_file(directory / "a.so")

    assert (len(os.listdir("/proc/self/fd")) if before else 0) == before


def test_a_tree_is_private_only_if_all_of_it_is(directory: Path) -> None:
    assert is_private(directory.parent)

    (directory / "a.so").chmod(0o620)
    assert not is_private(directory.parent)

    take_permissions(directory.parent)
    assert is_private(directory.parent)
    assert mode(directory / "a.so") == 0o600

    (directory / "link").symlink_to("/etc/hostname")
    assert not is_private(directory.parent)
