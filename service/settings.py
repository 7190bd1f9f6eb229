"""What a user can set: by flag, by `SERVE_*` in the environment, or in `.env`; first found."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from dotenv import dotenv_values
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict


class Settings(BaseSettings):
    """LangChain chains (chat, translate, summarize) on a local Llama 3, served by LangServe.

    Every setting is a flag here, `SERVE_NAME` in the environment, or a line in `.env`.
    """

    model_config = SettingsConfigDict(env_prefix="SERVE_", env_file=".env", extra="ignore", frozen=True)

    host: Annotated[str, Field(description="Address to listen on. Whoever can reach it can use the service.")] = (
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
    max_queue: Annotated[int, Field(ge=1, description="Generations that may wait for the model.")] = 256
    max_body: Annotated[int, Field(ge=1, description="Bytes of a request body.")] = 4 * 1024 * 1024
    max_batch: Annotated[int, Field(ge=1, description="Inputs in one batch request.")] = 64
    timeout_s: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="Seconds that a request may take, waiting included.")
    ] = 600.0
    drain_timeout_s: Annotated[
        int, Field(ge=0, description="Seconds that running requests have to finish when the service is told to stop.")
    ] = 30
    cache: Annotated[
        Path | None, Field(description="Where converted GGUF models are kept; ~/.cache/llama3-langserve if not set.")
    ] = None
    langsmith: Annotated[
        bool, Field(description="Let LangSmith trace, by its own environment variables. Sends texts to its server.")
    ] = False
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Field(description="How much to log.")] = "info"


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
    for name in {*os.environ, *dotenv_values(".env")}:
        if name.upper().startswith("SERVE_") and name.upper() not in known:
            print(f"serve.py: there is no setting {name}: it is ignored", file=sys.stderr)
    try:
        return Settings(_cli_settings_source=flags)
    except ValidationError as error:
        for problem in error.errors():
            name = "_".join(str(part) for part in problem["loc"]).replace("-", "_").lower()
            flag = "--" + name.replace("_", "-")
            print(
                f"serve.py: SERVE_{name.upper()} ({flag}): {problem['msg']}, got {problem['input']!r}", file=sys.stderr
            )
        sys.exit(2)
