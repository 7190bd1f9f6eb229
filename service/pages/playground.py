"""LangServe's playgrounds, in pages of our own.

LangServe pastes a chain's schemas into a script that stands in the page, where `</script>` in a description ends it and
begins something else. Here they are in a file beside it, so that no script has to be allowed in the page. With them
comes a script of ours, which mends what LangServe's gets wrong: `static/playground.js`.
"""

import json
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import langserve
from fastapi import APIRouter, FastAPI, Request
from fastapi.params import Depends
from fastapi.responses import FileResponse, HTMLResponse, Response

from chains import Chain
from service.pages.headers import policy
from service.pages.index import root_of

FOLDERS = {"default": "playground", "chat": "chat_playground"}

POLICIES = {
    # The form compiles its schemas to functions, and both put styles into the page as they go.
    "default": policy(script="'unsafe-eval'", style="'unsafe-inline'"),
    "chat": policy(style="'unsafe-inline'"),
}

INLINE_SCRIPT = re.compile("<script>.*</script>", re.DOTALL)

SCRIPTS = """<link rel="stylesheet" href="____ROOT/static/playground.css">
    <script src="/____LANGSERVE_BASE_URL/schemas.js"></script>
    <script src="____ROOT/static/playground.js"></script>"""


def add_playground(app: FastAPI, chain: Chain, dependencies: Sequence[Depends]) -> None:
    """Add a chain's playground. Its page asks the dependencies, which mind what is no share link."""
    path = f"/{chain.name}/playground"
    files = Path(langserve.__file__).parent / FOLDERS[chain.playground] / "dist"
    template, num_replaced = INLINE_SCRIPT.subn(SCRIPTS, (files / "index.html").read_text())
    if num_replaced != 1:
        raise RuntimeError("this version of LangServe has another playground page than the one that is known here")
    template = template.replace("/____LANGSERVE_BASE_URL", f"____ROOT{path}")
    schemas = {
        "CONFIG_SCHEMA": chain.runnable.get_config_jsonschema(include=["configurable"]),
        "INPUT_SCHEMA": chain.runnable.get_input_jsonschema(),
        "OUTPUT_SCHEMA": chain.runnable.get_output_jsonschema(),
        "FEEDBACK_ENABLED": "false",
        "PUBLIC_TRACE_LINK_ENABLED": "false",
    }
    script = f"Object.assign(window, {json.dumps(schemas)});"
    router = APIRouter(include_in_schema=False)

    @router.get(f"{path}/", dependencies=dependencies)
    @router.get(f"/{chain.name}/c/{{config_hash}}/playground/", dependencies=dependencies)
    def page(request: Request) -> Response:
        return HTMLResponse(template.replace("____ROOT", root_of(request)), headers=POLICIES[chain.playground])

    @router.get(f"{path}/schemas.js")
    def read_schemas() -> Response:
        return Response(script, media_type="text/javascript")

    for file in [files / "favicon.ico", *(files / "assets").iterdir()]:
        router.get(f"{path}/{file.relative_to(files)}")(reader(file))
    app.include_router(router)


def reader(file: Path) -> Callable[[], Awaitable[Response]]:
    """Make the function that answers with a file."""

    async def read() -> Response:
        return FileResponse(file, headers={"Cache-Control": "private, max-age=86400"})

    return read
