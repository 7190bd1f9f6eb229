"""Stand-ins for the two model hubs: real HTTP servers on loopback, and a process of its own that resolves against them.

They speak as much of each hub's protocol as its client needs for public, gated and missing repositories, revisions,
ranges and broken connections, and keep what was asked of them. The clients read their settings when they are imported,
so `resolve` runs in a fresh process.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that a stand-in has seen, and how many bytes of a file it sent for it."""

    method: str
    path: str
    range: str | None
    agent: str
    sent: int = 0


@dataclass(slots=True)
class StandIn:
    """What a stand-in serves, how it misbehaves, and what it was asked."""

    variables: Mapping[str, str]
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """Files by repository and revision."""
    gated: set[str] = field(default_factory=set)
    token: str = "opens-it"
    break_after: dict[str, int] = field(default_factory=dict)
    """The connection breaks after so many bytes of a file, once."""
    failing: set[str] = field(default_factory=set)
    """Files that are not to be had: answered with 410, after which neither client tries again."""
    asked: list[Asked] = field(default_factory=list)

    def files_sent(self) -> dict[str, int]:
        """Bytes sent of each file, over all requests."""
        total: dict[str, int] = {}
        for asked in self.asked:
            if asked.sent:
                name = asked.path.rpartition("/")[2]
                total[name] = total.get(name, 0) + asked.sent
        return total


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandIn

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base class's name
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.answer(
            unquote(url.path).strip("/").split("/"), {key: value[0] for key, value in parse_qs(url.query).items()}
        )

    def answer(self, path: list[str], query: dict[str, str]) -> None:
        raise NotImplementedError

    def reply(self, status: int, body: object, **headers: str) -> None:
        self.note(self.path)
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def reply_file(self, name: str, content: bytes, **headers: str) -> None:
        if name in self.hub.failing:
            self.reply(410, {})
            return
        start = 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        rest = content[start:]
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for header, value in headers.items():
            self.send_header(header.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if self.command == "HEAD":
            self.note(name)
            return
        if (cut := self.hub.break_after.pop(name, None)) is not None:
            rest = rest[:cut]
            self.close_connection = True
        self.note(name, len(rest))
        self.wfile.write(rest)

    def note(self, path: str, sent: int = 0) -> None:
        agent = self.headers.get("User-Agent", "")
        self.hub.asked.append(Asked(self.command, path, self.headers.get("Range"), agent, sent))

    def is_let_in(self, repo: str) -> bool:
        return repo not in self.hub.gated or self.hub.token in str(self.headers)


class _HuggingFaceHandler(_Handler):
    def answer(self, path: list[str], query: dict[str, str]) -> None:
        api = path[:2] == ["api", "models"]
        repo = "/".join(path[2:4] if api else path[:2])
        rest = path[4:] if api else path[2:]
        if repo not in self.hub.repos:
            self.reply(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return
        revisions = self.hub.repos[repo]
        asked_for = rest[1] if len(rest) > 1 else "main"
        commits = {_commit(files): revision for revision, files in revisions.items()}
        revision = commits.get(asked_for, asked_for)
        if revision not in revisions:
            self.reply(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            return
        files = revisions[revision]
        commit = _commit(files)
        if api and rest[:1] == ["tree"]:
            self.reply(200, [_tree_entry(name, content) for name, content in files.items()])
        elif api:
            siblings = [{"rfilename": name} for name in files]
            self.reply(200, {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": []})
        elif not self.is_let_in(repo):
            self.reply(401, {"error": "Access is restricted"}, X_Error_Code="GatedRepo")
        else:
            name = "/".join(rest[2:])
            etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
            self.reply_file(name, files[name], ETag=etag, X_Repo_Commit=commit, Accept_Ranges="bytes")


class _ModelScopeHandler(_Handler):
    def answer(self, path: list[str], query: dict[str, str]) -> None:
        if path[:3] != ["api", "v1", "models"]:
            self.reply(404, {"Code": 404, "Message": "not found", "Success": False})
            return
        repo, rest = "/".join(path[3:5]), path[5:]
        revisions = self.hub.repos.get(repo)
        if revisions is None or query.get("Revision", "master") not in revisions:
            self.reply(404, {"Code": 10010205001, "Message": "record not found", "Success": False})
            return
        files = revisions[query.get("Revision", "master")]
        if rest == ["repo", "files"]:
            self.reply(200, {"Code": 200, "Data": {"Files": [_modelscope_entry(*item) for item in files.items()]}})
        elif not rest:
            self.reply(200, {"Code": 200, "Data": {"Name": repo}})
        elif not self.is_let_in(repo):
            self.reply(403, {"Code": 403, "Message": "no permission", "Success": False})
        else:
            self.reply_file(query["FilePath"], files[query["FilePath"]])


@contextmanager
def hugging_face_hub() -> Iterator[StandIn]:
    with _served(_HuggingFaceHandler, "HF_ENDPOINT") as hub:
        yield hub


@contextmanager
def modelscope_hub() -> Iterator[StandIn]:
    with _served(_ModelScopeHandler, "MODELSCOPE_ENDPOINT") as hub:
        yield hub


@contextmanager
def _served(kind: type[_Handler], variable: str) -> Iterator[StandIn]:
    hub = StandIn(variables={})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (kind,), {"hub": hub}))
    hub.variables = {variable: f"http://127.0.0.1:{server.server_port}"}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _commit(files: Mapping[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def _tree_entry(name: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def _modelscope_entry(name: str, content: bytes) -> dict[str, object]:
    return {"Path": name, "Type": "blob", "Size": len(content), "Sha256": hashlib.sha256(content).hexdigest()}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a `resolve` in a process of its own: a directory, or an error."""

    directory: Path | None
    error: str
    message: str


_SCRIPT = """
import json, sys
from llm.errors import ModelError
from llm.references import resolve
try:
    print(json.dumps({"directory": str(resolve(sys.argv[1], refresh=sys.argv[2] == "refresh").directory)}))
except ModelError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


def environment(home: Path, variables: Mapping[str, str]) -> dict[str, str]:
    """A user's environment whose caches lie below `home`, who has no tokens, and whom nothing keeps waiting."""
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "LANG") if name in os.environ}
    caches = {
        "HF_HOME": str(home / "hf"),
        "MODELSCOPE_CACHE": str(home / "modelscope"),
        "SERVE_CACHE": str(home / "own"),
    }
    patience = {"MODELSCOPE_DOWNLOAD_MAX_RETRIES": "0", "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1"}
    return {**kept, **caches, **patience, "HOME": str(home), "PYTHONPATH": str(ROOT), **variables}


def resolve(reference: str, home: Path, variables: Mapping[str, str] = {}, *, refresh: bool = False) -> Outcome:
    """`llm.references.resolve`, in a process of its own."""
    command = [sys.executable, "-c", _SCRIPT, reference, "refresh" if refresh else ""]
    done = subprocess.run(
        command, env=environment(home, variables), cwd=home, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    directory = said.get("directory")
    return Outcome(Path(directory) if directory else None, said.get("error", ""), said.get("message", ""))
