"""The two model hubs behind one seam: what is cached, what a repository holds, fetch these files of it.

Knows each hub's client and turns its errors into ours. Deliberately does not know what makes a checkpoint whole or
which of its files are wanted. The clients are imported when a hub is first used.
"""

import errno
import os
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from llm.errors import AccessDenied, BadReference, CacheNotWritable, DownloadFailed, ModelError, ModelNotFound
from llm.network import HTTPX, REQUESTS, Client, find_trouble, proxy_variable

_CANNOT_WRITE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC, errno.EDQUOT}
)


class Hub(Protocol):
    """One repository at one revision. Every method raises only `ModelError`s."""

    def cached(self, names: Set[str]) -> Path | None:
        """The directory of earlier fetches, unless it is known to lack some of `names`; never uses the network."""

    def listing(self) -> Set[str]:
        """The names of the repository's files, as the hub has them now."""

    def fetch(self, names: Set[str]) -> Path:
        """Have these files of the state that was listed last in one directory, and return it."""

    def finished(self) -> None:
        """All that was wanted of the state that was listed last has come."""


class HuggingFace:
    """`hf:`, through `huggingface_hub`: its cache (HF_HOME), its token (HF_TOKEN), its endpoint (HF_ENDPOINT)."""

    def __init__(self, repo: str, revision: str | None) -> None:
        self._repo = repo
        self._revision = revision
        self._state: Any = revision  # a commit, once it was listed

    def __str__(self) -> str:
        return f"hf:{self._repo}" + (f"@{self._revision}" if self._revision else "")

    def cached(self, names: Set[str]) -> Path | None:
        """Asks the cache, which keeps the listing of each commit beside its files."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            return Path(
                snapshot_download(
                    self._repo, revision=self._revision, local_files_only=True, allow_patterns=sorted(names)
                )
            )
        except HFValidationError as error:
            raise BadReference(f"{self} is no model reference: {error}") from error
        except LocalEntryNotFoundError:
            return None

    def listing(self) -> Set[str]:
        """Settles which commit the revision is now, and lists that."""
        from huggingface_hub import HfApi

        with self._errors():
            info = HfApi().model_info(self._repo, revision=self._revision)
            # Asks once more, and notes the commit in the cache; alone it would go by an old note when the hub is away.
            self._state = HfApi().resolve_revision(self._repo, revision=self._revision)
            return {file.rfilename for file in info.siblings or ()}

    def fetch(self, names: Set[str]) -> Path:
        """Fetches into the snapshot of the commit that was listed."""
        from huggingface_hub import snapshot_download

        # One file at a time: since https://github.com/huggingface/huggingface_hub/pull/4228 a file that an interrupted
        # call leaves half done is thrown away, and eight at a time would throw away a whole 8B model.
        with self._errors():
            return Path(
                snapshot_download(self._repo, revision=self._state, allow_patterns=sorted(names), max_workers=1)
            )

    def finished(self) -> None:
        """Nothing to do: the cache keeps the listing of each commit."""

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from huggingface_hub import errors

        try:
            yield
        except ModelError:
            raise
        except Exception as error:  # a bad proxy alone is an ImportError, a ValueError or an InvalidURL
            # What the hub answered is the cause when the client fell back to its cache and found nothing.
            answer = error.__cause__ if isinstance(error.__cause__, errors.HfHubHTTPError) else error
            raise self._explained(answer) from error

    def _explained(self, error: BaseException) -> ModelError:
        from huggingface_hub import constants, errors

        page = f"{constants.ENDPOINT}/{self._repo}"
        if isinstance(error, errors.GatedRepoError):
            return AccessDenied(
                f"{self} is gated: accept its licence at {page}, then set HF_TOKEN to a token of that account"
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return ModelNotFound(f"{self} is not at {page}, or is private: check the name, or set HF_TOKEN")
        if isinstance(error, errors.RevisionNotFoundError):
            return ModelNotFound(f"{self._repo} has no revision {self._revision!r}: see {page}/tree/main")
        if isinstance(error, errors.HfHubHTTPError):
            status = error.response.status_code
            if status in (401, 403):
                return AccessDenied(f"{constants.ENDPOINT} refuses access to {self} ({status}): check HF_TOKEN")
            return DownloadFailed(f"{constants.ENDPOINT} answered {status} for {self}: try again later")
        if isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
            return DownloadFailed(
                f"{self} is not whole in {constants.HF_HUB_CACHE} and HF_HUB_OFFLINE is set: unset it for one "
                f"`python -m llm.download {self}`"
            )
        if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
            return _not_writable(error, constants.HF_HUB_CACHE, "HF_HOME or HF_HUB_CACHE")
        return _unreachable(str(self), constants.HF_HUB_CACHE, constants.ENDPOINT, "HF_ENDPOINT", HTTPX, error)


class ModelScope:
    """`modelscope:`, through the client of the `modelscope` package.

    Its cache is MODELSCOPE_CACHE, its token MODELSCOPE_API_TOKEN, its endpoint MODELSCOPE_ENDPOINT.
    """

    def __init__(self, repo: str, revision: str | None) -> None:
        try:
            from modelscope_hub.api import HubApi
            from modelscope_hub.config import HubConfig
        except ImportError as error:
            raise ModelError(
                "modelscope: references need one more package: make install-modelscope, or pip install modelscope"
            ) from error
        self._repo = repo
        self._revision = revision or "master"
        self._files: list[dict[str, Any]] = []
        self._config = HubConfig()
        # An endpoint of our own choosing: without one the client probes both of its sites for every repository.
        # The client would also keep an identifier of this installation and send it along "for telemetry": where it
        # cannot be stored, a random one is used. The token has been read by now.
        self._config.config_dir = Path(os.devnull) / "modelscope"
        # Before a download the client would ask which cloud region this machine is in.
        os.environ.setdefault("MODELSCOPE_DOWNLOAD_INTRA_CLOUD", "false")
        self._api = HubApi(config=self._config, endpoint=self._config.endpoint)

    def __str__(self) -> str:
        return f"modelscope:{self._repo}" + (f"@{self._revision}" if self._revision != "master" else "")

    def cached(self, names: Set[str]) -> Path | None:
        """The branch's directory. The cache keeps no listings: that nothing is on its way must do for `names`."""
        from modelscope_hub.errors import CacheNotFound

        if self._unfinished.exists():
            return None
        try:
            return self._api.download_repo(self._repo, "model", revision=self._revision, local_files_only=True)
        except CacheNotFound:
            return None

    def listing(self) -> Set[str]:
        """Lists the revision, with the sizes and checksums that `fetch` goes by."""
        with self._errors():
            try:
                files = self._api.list_repo_files(self._repo, "model", revision=self._revision)
            except self._not_found:
                self._api.legacy.get_repo_info(self._repo, "model")  # raises too, unless it is the revision
                raise ModelNotFound(f"{self._repo} has no revision {self._revision!r}: see {self._page}") from None
        self._files = [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in files]
        return {file.path for file in files}

    def fetch(self, names: Set[str]) -> Path:
        """Fetches into the branch's directory, what differs from the listing only."""
        with self._errors():
            # The cache keeps one directory per branch and renews it in place; this marks it until all has come.
            self._unfinished.parent.mkdir(parents=True, exist_ok=True)
            self._unfinished.touch()
            files = [file for file in self._files if file["path"] in names]
            return self._api.download_repo(self._repo, "model", revision=self._revision, file_list=files)

    def finished(self) -> None:
        """Takes the mark away."""
        with self._errors():
            self._unfinished.unlink(missing_ok=True)

    @property
    def _unfinished(self) -> Path:
        name = f".unfinished-{self._revision.replace('/', '--')}"
        return self._config.cache_dir / "models" / self._repo.replace("/", "--") / name

    @property
    def _page(self) -> str:
        return f"{self._config.endpoint}/models/{self._repo}"

    @property
    def _not_found(self) -> type[Exception]:
        from modelscope_hub.errors import NotExistError

        return NotExistError

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from modelscope_hub.errors import FileDownloadError

        try:
            yield
        except ModelError:
            raise
        except Exception as error:  # of the HTTP client, too, whose own errors need not be OSErrors
            files = error.failed_files.values() if isinstance(error, FileDownloadError) else ()
            raise self._explained(next(iter(files), error)) from error

    def _explained(self, error: BaseException) -> ModelError:
        from modelscope_hub.errors import AuthenticationError, PermissionDeniedError

        if isinstance(error, self._not_found):
            return ModelNotFound(
                f"{self} is not at {self._page}, or is private: check the name, or set MODELSCOPE_API_TOKEN"
            )
        if isinstance(error, AuthenticationError | PermissionDeniedError):
            return AccessDenied(
                f"{self} is gated or private: ask for access at {self._page}, then set MODELSCOPE_API_TOKEN to a token "
                "of that account"
            )
        if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
            return _not_writable(error, self._config.cache_dir, "MODELSCOPE_CACHE")
        endpoint = self._config.endpoint or ""
        return _unreachable(str(self), self._config.cache_dir, endpoint, "MODELSCOPE_ENDPOINT", REQUESTS, error)


def _not_writable(error: OSError, directory: Path | str, variable: str) -> CacheNotWritable:
    return CacheNotWritable(f"cannot write to {directory} ({error.strerror}): set {variable} to a directory with room")


def _unreachable(
    model: str, cache: Path | str, endpoint: str, endpoint_variable: str, client: Client, error: BaseException
) -> DownloadFailed:
    missing = f"{model} is not whole in {cache} and could not be fetched"
    if trouble := find_trouble(client, endpoint, endpoint_variable):
        return DownloadFailed(f"{missing}: {trouble}")
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return DownloadFailed(
            f"{missing} from {endpoint}, whose certificate is not trusted: where a proxy opens TLS connections, set "
            f"{client.certificates[0]} to a file of CA certificates that has its own"
        )
    proxy = proxy_variable(endpoint)
    if isinstance(error, ImportError | ValueError) or type(error).__name__ == "InvalidURL":  # the client's own set-up
        check = "check HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY"
    else:
        check = f"check the proxy in {proxy}" if proxy else "check the connection"
    return DownloadFailed(
        f"{missing} from {endpoint} ({_headline(error)}): {check} and try again; what has come is kept"
    )


def _headline(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
