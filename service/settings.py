"""What a user can set: by flag, by `SERVE_*` in the environment, or in `.env`; first found."""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal, Self

from dotenv import dotenv_values
from pydantic import AfterValidator, BeforeValidator, Field, FilePath, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from service.entry.access import host_pattern
from service.entry.body_reader import MAX_VALUES, VALUE_BYTES
from service.entry.keys import NAME
from service.entry.limits import Limits, limit_of, parse_per_chain
from service.entry.quota import parse_rate


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _check_rate(rate: str) -> str:
    parse_rate(rate)
    return rate


def _check_hosts(hosts: tuple[str, ...]) -> tuple[str, ...]:
    for host in hosts:
        host_pattern(host)
    return hosts


def _check_names(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a key: letters, digits and _ . - after the first")
    return names


def _numbers(kind: type[float]) -> AfterValidator:
    def check(value: str) -> str:
        parse_per_chain(kind, value)
        return value

    return AfterValidator(check)


PerChain = Annotated[str, BeforeValidator(str)]
"""A number for all chains, and others for single ones: `600,chat=300`."""


def _check_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    for origin in origins:
        if not ORIGIN.fullmatch(origin):
            raise ValueError(f"{origin!r} is no origin: https://example.com, without a slash at its end, or *")
    return origins


ORIGIN = re.compile(r"\*|https?://[^/\sA-Z]+")
"""As browsers send it."""

Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
"""In the environment and as a flag: separated by commas."""


class SettingsError(Exception):
    """Settings that do not fit what they are for. The message is one line."""


_ADDRESS = r"[0-9a-fA-F.:]+"
_SERVICE_LINKS = (
    (r"_SERVICE_HOST", _ADDRESS),
    (r"_SERVICE_PORT(_\w+)?", r"\d+"),
    (r"_PORT(_\d+_(TCP|UDP|SCTP))?", r"(tcp|udp|sctp)://.+"),
    (r"_PORT_\d+_(TCP|UDP|SCTP)_PROTO", r"tcp|udp|sctp"),
    (r"_PORT_\d+_(TCP|UDP|SCTP)_PORT", r"\d+"),
    (r"_PORT_\d+_(TCP|UDP|SCTP)_ADDR", _ADDRESS),
)
"""What Kubernetes puts into every container for each service of its namespace, after the service's name in capitals:
https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables"""


def is_service_link(name: str, value: str) -> bool:
    """Whether an environment variable is one that Kubernetes sets for a service called `serve` or `serve-…`."""
    return any(
        re.fullmatch(rf"SERVE(_\w+)?{suffix}", name.upper()) and re.fullmatch(shape, value)
        for suffix, shape in _SERVICE_LINKS
    )


class _Environment(EnvSettingsSource):
    """The process environment without service links. Nothing else writes them, so elsewhere their values are wrong."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[object, str, bool]:
        value, key, is_complex = super().get_field_value(field, field_name)
        is_link = isinstance(value, str) and is_service_link(f"SERVE_{field_name}", value)
        return (None if is_link else value), key, is_complex


class Settings(BaseSettings):
    """LangChain chains (chat, translate, summarize) on a local Llama 3, served by LangServe.

    Every setting is a flag here, `SERVE_NAME` in the environment, or a line in `.env`.
    """

    model_config = SettingsConfigDict(env_prefix="SERVE_", env_file=".env", extra="ignore", frozen=True)

    host: Annotated[str, Field(description="Address to listen on; one that other machines can reach needs keys.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen on; 0 takes a free one.")] = 8000
    root_path: Annotated[
        str, Field(pattern=r"^(/[\w.~-]+)*$", description="Path prefix that a proxy in front strips, like /llama.")
    ] = ""
    model: Annotated[
        str,
        Field(
            min_length=1,
            description="The model: embedded, a local path, hf:org/name[@revision] or modelscope:org/name[@revision].",
        ),
    ] = "embedded"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        Field(description="Number format of the weights; auto takes the checkpoint's own."),
    ] = "auto"
    device: Annotated[
        str,
        Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto (all GPUs, else the CPU), cpu, cuda or cuda:N."),
    ] = "auto"
    quantize: Annotated[
        Literal["auto", "none", "int8", "int4"],
        Field(
            description="Weights on a CPU: none, int8, int4, or auto, which is int4 where the model was made with no "
            "more bits. int8 and int4 need a C compiler."
        ),
    ] = "auto"
    max_slots: Annotated[
        int | None, Field(ge=1, description="Generations that run at once; 64, or what memory allows, if not set.")
    ] = None
    max_context: Annotated[
        int | None,
        Field(
            ge=16,
            description="Tokens of prompt and answer together; what the model was trained for, or what memory allows, "
            "if not set.",
        ),
    ] = None
    api_keys_file: Annotated[
        Path | None,
        Field(
            description="Who may call: a file of keys, made by `serve.py keys add NAME`; read again when it changes."
        ),
    ] = None
    api_keys: Annotated[SecretStr, Field(description="More keys, as name:key,name:key.")] = SecretStr("")
    insecure: Annotated[
        bool, Field(description="Serve beyond this machine without keys: whoever reaches the port may call.")
    ] = False
    allowed_hosts: Annotated[
        Names,
        AfterValidator(_check_hosts),
        Field(description="Host names to answer to, like *.example.com; if none: any with keys, else loopback."),
    ] = ()
    cors_origins: Annotated[
        Names,
        AfterValidator(_check_origins),
        Field(description="Origins of other sites whose pages may call, like https://app.example.com."),
    ] = ()
    trusted_proxies: Annotated[
        str, Field(description="Addresses of proxies whose X-Forwarded-For and -Proto are believed.")
    ] = "127.0.0.1,::1"
    ssl_certfile: Annotated[FilePath | None, Field(description="Certificate (PEM) to serve HTTPS with.")] = None
    ssl_keyfile: Annotated[FilePath | None, Field(description="Its private key, if not in the same file.")] = None
    ssl_keyfile_password: Annotated[SecretStr | None, Field(description="What the private key is locked with.")] = None
    rate_limit: Annotated[
        str,
        AfterValidator(_check_rate),
        Field(
            description="Calls of one key, or of one address where there are no keys, like 10/second or 5000/hour; "
            "empty for any number."
        ),
    ] = "6000/minute"
    page_rate_limit: Annotated[
        str,
        AfterValidator(_check_rate),
        Field(
            description="Requests other than calls (pages, schemas, metrics) of one key, or of one address where there "
            "is no key; empty for any number. /health and /ready are not limited."
        ),
    ] = "3000/minute"
    login_rate_limit: Annotated[
        str,
        AfterValidator(_check_rate),
        Field(
            description="Requests with an invalid key of one address (IPv6: of its /64 network) that get 401; more get "
            "429. Empty for any number."
        ),
    ] = "20/minute"
    operator_keys: Annotated[
        Names,
        AfterValidator(_check_names),
        Field(description="Names of the keys that see the metrics of all keys; others see those of their own."),
    ] = ()
    max_concurrent: Annotated[
        int | None,
        Field(
            ge=1, description="Requests of one key at once; half of all, if not set, or all where there are no keys."
        ),
    ] = None
    redis_url: Annotated[
        SecretStr,
        Field(
            description="Redis where processes that share the load count calls and requests of keys together, like "
            "redis://host:6379/0."
        ),
    ] = SecretStr("")
    max_queue: Annotated[
        int, Field(ge=0, description="Requests that may wait, when as many run as the model has slots.")
    ] = 16
    max_body: Annotated[PerChain, _numbers(int), Field(description="Bytes of a request body, per chain.")] = (
        "4194304,chat=1048576,summarize=33554432,brief=33554432"
    )
    max_body_total: Annotated[
        int | None,
        Field(
            ge=1,
            description="Bytes of memory of all request bodies together, from their first byte to the end of their "
            "request; one key, or one address where there are no keys, may have half. Enough for four of the largest "
            "bodies if not set.",
        ),
    ] = None
    max_file: Annotated[PerChain, _numbers(int), Field(description="Bytes of an uploaded file, per chain.")] = (
        "20971520"
    )
    max_pages: Annotated[PerChain, _numbers(int), Field(description="Pages of an uploaded file, per chain.")] = "2000"
    max_batch: Annotated[PerChain, _numbers(int), Field(description="Inputs in one batch request, per chain.")] = "64"
    max_input_tokens: Annotated[
        PerChain, _numbers(int), Field(description="Prompt tokens of a request, all its inputs together, per chain.")
    ] = "1000000"
    max_output_tokens: Annotated[PerChain, _numbers(int), Field(description="New tokens of an answer, per chain.")] = (
        "4096"
    )
    timeout_s: Annotated[
        PerChain, _numbers(float), Field(description="Seconds that a request may take, waiting included, per chain.")
    ] = "3600,chat=300"
    max_connections: Annotated[
        int,
        Field(
            ge=1,
            description="Connections open at once; beyond, one that waits for its client is closed for each new one.",
        ),
    ] = 4096
    idle_timeout_s: Annotated[
        float,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="Seconds after which a connection is cut: request half sent, answer not read.",
        ),
    ] = 30.0
    body_timeout_s: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="Seconds that a request body may take to arrive.")
    ] = 300.0
    min_body_rate: Annotated[
        float,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="Bytes per second that a request body must come at on average, after SERVE_IDLE_TIMEOUT_S; 0 "
            "for any rate.",
        ),
    ] = 1000.0
    min_read_rate: Annotated[
        float,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="Bytes per second that a client must read on average, after SERVE_IDLE_TIMEOUT_S, of an answer "
            "that waits for it; 0 for any rate.",
        ),
    ] = 1000.0
    drain_timeout_s: Annotated[
        int, Field(ge=0, description="Seconds that running requests have to finish when the service is told to stop.")
    ] = 30
    on_engine_death: Annotated[
        Literal["exit", "stay"],
        Field(
            description="When the engine has failed for good: exit with 1 once running requests got their error, so "
            "that a supervisor starts the service again, or stay and answer 503."
        ),
    ] = "exit"
    cache: Annotated[
        Path | None, Field(description="Where converted GGUF models are kept; ~/.cache/llama3-langserve if not set.")
    ] = None
    langsmith: Annotated[
        bool, Field(description="Let LangSmith trace, by its own environment variables. Sends texts to its server.")
    ] = False
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Field(description="How much to log.")] = "info"
    log_format: Annotated[Literal["human", "json"], Field(description="Lines for people, or one JSON object each.")] = (
        "human"
    )
    log_texts: Annotated[
        bool, Field(description="Log what callers send and what they get. Off: no text of theirs.")
    ] = False

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return pydantic's sources of settings; the first that has a setting wins."""
        return init_settings, _Environment(settings_cls), dotenv_settings, file_secret_settings

    @model_validator(mode="after")
    def _check_exposure(self) -> Self:
        if not (self.has_keys or self.insecure or is_loopback(self.host)):
            raise ValueError(
                f"SERVE_HOST (--host): {self.host} can be reached from other machines, and there are no keys: set "
                "SERVE_API_KEYS_FILE (`serve.py keys add NAME` makes one) or SERVE_API_KEYS; or say --insecure"
            )
        if self.operator_keys and not self.has_keys:
            raise ValueError(
                "SERVE_OPERATOR_KEYS (--operator-keys): there are no keys, so everybody sees all metrics: set "
                "SERVE_API_KEYS_FILE or SERVE_API_KEYS too"
            )
        return self

    @model_validator(mode="after")
    def _check_body_total(self) -> Self:
        if self.max_body_total is not None and self.max_body_total < self._least_body_total:
            raise ValueError(
                f"SERVE_MAX_BODY_TOTAL (--max-body-total): at least {self._least_body_total}, so that two of "
                f"the largest bodies of SERVE_MAX_BODY fit, got {self.max_body_total}"
            )
        return self

    @property
    def body_total(self) -> int:
        """Bytes that all request bodies may have together."""
        return self.max_body_total or 2 * self._least_body_total

    @property
    def _least_body_total(self) -> int:
        # One tenant has half of it. A text takes up to four times as many bytes in memory as in UTF-8.
        general, chains = parse_per_chain(int, self.max_body)
        size = max([general, *chains.values()])
        return 2 * (4 * size + VALUE_BYTES * min(MAX_VALUES, size))

    def limits(self, chain: str) -> Limits:
        """What one request to a chain may ask for."""
        return Limits(
            max_body=limit_of(int, self.max_body, chain),
            max_batch=limit_of(int, self.max_batch, chain),
            max_input_tokens=limit_of(int, self.max_input_tokens, chain),
            max_output_tokens=limit_of(int, self.max_output_tokens, chain),
            timeout_s=limit_of(float, self.timeout_s, chain),
            max_file=limit_of(int, self.max_file, chain),
            max_pages=limit_of(int, self.max_pages, chain),
        )

    def check_chains(self, hosted: Sequence[str]) -> None:
        """Raise `SettingsError` if a limit is set for a chain that is not hosted."""
        for limit in (limit for limit in fields(Limits) if limit.name in self.model_fields_set):
            for chain in parse_per_chain(float, getattr(self, limit.name))[1]:
                if chain not in hosted:
                    raise SettingsError(
                        f"SERVE_{limit.name.upper()}: there is no chain {chain!r}, but {', '.join(hosted)}"
                    )

    @property
    def ssl_password(self) -> str | None:
        """What the private key is locked with."""
        return None if self.ssl_keyfile_password is None else self.ssl_keyfile_password.get_secret_value()

    @property
    def has_keys(self) -> bool:
        """Whether callers need a key."""
        return self.api_keys_file is not None or bool(self.api_keys.get_secret_value())


def is_secret(name: str) -> bool:
    """Whether a setting must not be shown."""
    field = Settings.model_fields.get(name)
    return field is not None and "SecretStr" in str(field.annotation)


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is this machine's own alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def read_settings(arguments: Sequence[str]) -> Settings:
    """Read all settings. Prints help or what is wrong, and exits, as command lines do."""
    flags: CliSettingsSource[Settings] = CliSettingsSource(
        Settings,
        cli_prog_name="serve.py",
        cli_parse_args=list(arguments),
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_implicit_flags=True,
    )
    known = {f"SERVE_{name.upper()}" for name in Settings.model_fields}
    links = {name for name, value in os.environ.items() if is_service_link(name, value)}
    for name in sorted(links):
        if name.upper() in known:
            print(
                f"serve.py: {name} is {os.environ[name]!r}, a service link of Kubernetes for a service called `serve`: "
                f"it is ignored; use --{name[6:].lower().replace('_', '-')}, or set enableServiceLinks: false in the "
                "pod's spec",
                file=sys.stderr,
            )
    for name in {*os.environ, *dotenv_values(".env")} - links:
        if name.upper().startswith("SERVE_") and name.upper() not in known:
            print(f"serve.py: there is no setting {name}: it is ignored", file=sys.stderr)
    try:
        return Settings(_cli_settings_source=flags)
    except ValidationError as error:
        for problem in error.errors():
            if not problem["loc"]:  # of several settings together; the message names them
                print(f"serve.py: {problem['ctx']['error']}", file=sys.stderr)
                continue
            name = "_".join(str(part) for part in problem["loc"]).replace("-", "_").lower()
            flag = "--" + name.replace("_", "-")
            trouble = problem["msg"].removeprefix("Value error, ")
            got = "" if is_secret(name) else f", got {problem['input']!r}"
            print(f"serve.py: SERVE_{name.upper()} ({flag}): {trouble}{got}", file=sys.stderr)
    sys.exit(2)
