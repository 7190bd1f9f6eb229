import hashlib
import logging
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.entry.keys import KeyRing, KeysError
from service.entry.keys_command import manage

ADA = "llama-the-key-of-ada"
BEA = "llama-the-key-of-bea"


def line(name: str, key: str) -> str:
    return f"{name}:sha256:{hashlib.sha256(key.encode()).hexdigest()}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(line("ada", ADA) + line("bea", BEA))
    return file


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_nobody_needs_a_key_where_none_is_configured(file: Path, tmp_path: Path) -> None:
    assert KeyRing(None).is_open
    assert KeyRing(None).name_of(ADA) is None
    assert not KeyRing(file).is_open
    assert not KeyRing(None, f"ada:{ADA}").is_open


def test_an_empty_file_lets_nobody_in_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.touch()
    ring = KeyRing(file)
    assert not ring.is_open
    assert ring.name_of(ADA) is None
    assert "nobody can use the service" in caplog.text


def test_a_key_has_the_name_that_it_was_given_in_the_file_or_in_the_environment(file: Path) -> None:
    ring = KeyRing(file, "cleo:the:key:of:cleopatra, dan : key-of-16-chars- ")
    assert ring.name_of(ADA) == "ada"
    assert ring.name_of(BEA) == "bea"
    assert ring.name_of("the:key:of:cleopatra") == "cleo"
    assert ring.name_of("key-of-16-chars-") == "dan"


def test_comments_empty_lines_capitals_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    digest = hashlib.sha256(ADA.encode()).hexdigest().upper()
    file.write_bytes(f"# f\xfcr Ada\r\n\r\n  # :\r\n  ada:sha256:{digest} \r\n".encode("latin-1"))
    assert KeyRing(file).name_of(ADA) == "ada"


@given(st.text(st.characters(exclude_categories=())))
@example("\ud800")
def test_what_is_no_key_is_nobodys(key: str) -> None:
    assert KeyRing(None, f"ada:{ADA}").name_of(key) is None


def test_a_digest_is_not_its_key(file: Path) -> None:
    assert KeyRing(file).name_of(hashlib.sha256(ADA.encode()).hexdigest()) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"ada:{ADA}\n", "line 1 is not name:sha256:hex"),
        (f"{ADA}\n", "line 1 is not name:sha256:hex"),
        ("# keys\n\n" + line("a da", ADA), "line 3 is not name:sha256:hex"),
        (line("-ada", ADA), "line 1 is not name:sha256:hex"),
        (line("a" * 65, ADA), "line 1 is not name:sha256:hex"),
        (line("ädä", ADA), "line 1 is not name:sha256:hex"),
        (line("ada", ADA).replace("sha256", "md5"), "line 1 is not name:sha256:hex"),
        (line("ada", ADA)[:-2] + "\n", "line 1 is not name:sha256:hex"),
        (line("ada", ADA).strip() + " # Ada's\n", "line 1 is not name:sha256:hex"),
        (line("ada", ADA) + line("bea", BEA) + line("ada", BEA), "line 3: there is a key named ada above"),
        (line("env", ADA), "line 1: there is a key named env in SERVE_API_KEYS too"),
    ],
)
def test_a_wrong_file_is_refused_at_the_start_with_its_line(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(KeysError) as refused:
        KeyRing(file, "env:given-in-the-environment")
    message = str(refused.value)
    assert message.startswith(str(file))
    assert message.endswith(said)
    assert ADA not in message
    assert "\n" not in message


def test_a_file_that_is_not_there_or_is_none_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match=r"nowhere: No such file or directory; `serve.py keys add NAME` makes it"):
        KeyRing(tmp_path / "nowhere")
    with pytest.raises(KeysError, match="not a regular file"):
        KeyRing(tmp_path)


def test_a_pipe_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(KeysError, match="not a regular file"):
        KeyRing(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ("secret-key-0123456789", "entry 1 of SERVE_API_KEYS is not name:key"),
        ("ada:", "entry 1 of SERVE_API_KEYS is not name:key"),
        (" ", "entry 1 of SERVE_API_KEYS is not name:key"),
        ("ada:secret-key-0123456789,", "entry 2 of SERVE_API_KEYS is not name:key"),
        ("a da:secret-key-0123456789", "entry 1 of SERVE_API_KEYS is not name:key"),
        ("ada:secret-key-0123", "entry 1 of SERVE_API_KEYS: a key has 16 or more"),
        ("secret-key-0123456789:ada", "entry 1 of SERVE_API_KEYS: a key has 16 or more"),
        ("ada:secret-key 0123456789", "entry 1 of SERVE_API_KEYS: a key has 16 or more"),
        ("ada:secret-kéy-0123456789", "entry 1 of SERVE_API_KEYS: a key has 16 or more"),
        ("ada:secret-key-0123456789,ada:secret-key-9876543210", "entry 2 of SERVE_API_KEYS: there is a key of that"),
    ],
)
def test_wrong_keys_in_the_environment_are_refused_at_the_start_and_not_shown(entries: str, said: str) -> None:
    with pytest.raises(KeysError) as refused:
        KeyRing(None, entries)
    assert said in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_key_is_added_and_revoked_without_a_restart(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    ring = KeyRing(file)
    assert ring.name_of(ADA) == "ada"
    file.write_text(line("bea", BEA))
    assert ring.name_of(ADA) is None
    assert ring.name_of(BEA) == "bea"
    file.write_text(line("bea", BEA) + line("ada", ADA))
    assert ring.name_of(ADA) == "ada"
    assert not errors(caplog)


def test_a_file_put_in_the_others_place_is_read_though_its_time_and_its_size_are_the_same(file: Path) -> None:
    ring = KeyRing(file)
    other = file.with_name("other")
    other.write_text(line("ada", BEA) + line("bea", "llama-a-new-key-of-bea"))
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    assert ring.name_of(BEA) == "bea"
    other.replace(file)
    assert ring.name_of(BEA) == "ada"


def test_a_file_that_has_not_changed_is_not_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = KeyRing(file)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read again"))
    assert ring.name_of(ADA) == "ada"


def test_a_line_that_becomes_wrong_is_left_out_and_told_once(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    ring = KeyRing(file, "env:given-in-the-environment")
    file.write_text(f"ada:{ADA}\n" + line("bea", BEA) + line("bea", ADA) + line("env", ADA))
    for _ in range(3):
        assert ring.name_of(ADA) is None
        assert ring.name_of(BEA) == "bea"
        assert ring.name_of("given-in-the-environment") == "env"
    assert [re.sub(r".*, line", "line", error) for error in errors(caplog)] == [
        "line 1 is not name:sha256:hex",
        "line 3: there is a key named bea above",
        "line 4: there is a key named env in SERVE_API_KEYS too",
    ]
    assert ADA not in caplog.text


def test_a_file_that_vanishes_has_no_keys_until_it_is_back(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    ring = KeyRing(file, "env:given-in-the-environment")
    content = file.read_text()
    file.unlink()
    for _ in range(3):
        assert ring.name_of(ADA) is None
        assert ring.name_of("given-in-the-environment") == "env"
    assert not ring.is_open
    (error,) = errors(caplog)
    assert "No such file" in error
    file.mkdir()
    assert ring.name_of(ADA) is None
    file.rmdir()
    file.write_text(content)
    assert ring.name_of(ADA) == "ada"
    assert len(errors(caplog)) == 2


def test_a_file_that_cannot_be_read_for_a_moment_is_tried_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of such a file is as it was: with that remembered, it would never be read again."""
    ring = KeyRing(file)
    file.write_text(line("ada", ADA))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda self: (_ for _ in ()).throw(OSError(24, "Too many open files")))
        assert ring.name_of(ADA) is None
    assert ring.name_of(ADA) == "ada"


def test_add_makes_a_key_that_works_and_prints_it_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    assert manage(["add", "ada"], file) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"llama-[A-Za-z0-9_-]{43}\n", out)
    assert out.strip() not in err
    assert "only this once" in err
    assert KeyRing(file).name_of(out.strip()) == "ada"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text().startswith("ada:sha256:")


def test_add_refuses_a_name_that_is_there(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = file.read_text()
    assert manage(["add", "bea"], file) == 1
    assert capsys.readouterr() == ("", f"serve.py keys: there is a key named bea in {file} already\n")
    assert file.read_text() == before


@pytest.mark.parametrize("name", ["", "-x", "a b", "a:b", "ä", "a" * 65, "a\n", "#a"])
def test_a_name_that_logs_and_metrics_could_not_show_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        manage(["add", "--", name], tmp_path / "keys")
    assert exit_.value.code == 2
    assert "serve.py keys add: error: argument NAME" in capsys.readouterr().err
    assert not (tmp_path / "keys").exists()


def test_what_is_not_a_key_survives_adding_and_removing(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    kept = b"# ada: f\xfcr die Werkstatt\n\n" + line("bea", BEA).encode() + b"\n# the end, without a line end"
    file.write_bytes(kept)
    assert manage(["add", "ada"], file) == 0
    assert file.read_bytes().startswith(kept + b"\nada:sha256:")
    assert manage(["remove", "ada"], file) == 0
    assert file.read_bytes() == kept + b"\n"


def test_the_mode_of_the_file_and_the_link_to_it_stay(file: Path, tmp_path: Path) -> None:
    file.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(file)
    assert manage(["add", "cleo"], link) == 0
    assert link.is_symlink()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert "cleo" in file.read_text()


def test_a_removed_key_is_invalid_at_once(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ring = KeyRing(file)
    assert ring.name_of(ADA) == "ada"
    assert manage(["remove", "ada"], file) == 0
    assert ring.name_of(ADA) is None
    assert ring.name_of(BEA) == "bea"
    assert manage(["remove", "ada"], file) == 1
    assert f"there is no key named ada in {file}" in capsys.readouterr().err


def test_the_last_key_can_be_removed_and_the_first_added_again(file: Path) -> None:
    assert [manage(["remove", name], file) for name in ("ada", "bea")] == [0, 0]
    assert file.read_text() == ""
    assert manage(["add", "ada"], file) == 0
    assert len(file.read_text().splitlines()) == 1


def test_remove_takes_out_a_line_that_is_wrong_too(file: Path) -> None:
    file.write_text(f"ada:{ADA}\n# ada: her key\n" + line("bea", BEA))
    assert manage(["remove", "ada"], file) == 0
    assert file.read_text() == "# ada: her key\n" + line("bea", BEA)


def test_list_prints_the_names_and_says_what_is_wrong(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert manage(["list"], file) == 0
    assert capsys.readouterr() == ("ada\nbea\n", "")
    with file.open("a") as content:
        content.write(f"cleo:{ADA}\n")
    assert manage(["list"], file) == 1
    assert capsys.readouterr() == ("ada\nbea\n", f"serve.py keys: {file}, line 3 is not name:sha256:hex\n")


def test_the_flag_comes_before_the_setting(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert manage(["list", "--file", str(file)], tmp_path / "nowhere") == 0
    assert capsys.readouterr().out == "ada\nbea\n"


@pytest.mark.parametrize("arguments", [["add", "ada"], ["list"], ["remove", "ada"]])
def test_without_a_file_both_ways_to_name_one_are_told(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert manage(arguments, None) == 2
    err = capsys.readouterr().err
    assert "SERVE_API_KEYS_FILE" in err
    assert "--file" in err


@pytest.mark.parametrize("arguments", [["list"], ["remove", "ada"]])
def test_a_file_that_is_not_there_is_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert manage(arguments, tmp_path / "nowhere") == 1
    expected = f"serve.py keys: {tmp_path / 'nowhere'}: No such file or directory\n"
    assert capsys.readouterr() == ("", expected)


def test_a_write_that_fails_leaves_the_file_as_it_was(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = file.read_text()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert manage(["add", "cleo"], file) == 1
    assert capsys.readouterr() == ("", f"serve.py keys: {file}: No space left on device\n")
    assert file.read_text() == before
    assert {path.name for path in file.parent.iterdir()} <= {"keys", "keys.lock"}


def test_keys_that_are_added_at_once_are_all_there(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    script = "import sys; from service.entry.keys_command import manage; sys.exit(manage(sys.argv[1:], None))"
    running = [
        subprocess.Popen([sys.executable, "-c", script, "add", f"name{n}", "--file", file], stdout=subprocess.PIPE)
        for n in range(8)
    ]
    keys = [process.communicate()[0].decode().strip() for process in running]
    assert [process.returncode for process in running] == [0] * 8
    ring = KeyRing(file)
    assert [ring.name_of(key) for key in keys] == [f"name{n}" for n in range(8)]
