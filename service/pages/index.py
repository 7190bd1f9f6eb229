"""The pages for people: what is hosted here and how to try it, and the API's documentation. They load nothing from
elsewhere, and there is no script in them: `headers.py` lets none run."""

import json
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from chains import Chain
from llm.engine import Engine, EngineState

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Chains on a local Llama 3</title>
$refresh<link rel="icon" href="$root/favicon.ico">
<link rel="stylesheet" href="$root/static/index.css">
</head>
<body>
<h1>Chains on a local Llama 3</h1>
<p>Model <strong>$model</strong>: $state.</p>
<nav><a href="$root/docs">API documentation</a> <a href="$root/health">Health</a></nav>
$chains
</body>
</html>
""")

CHAIN = Template("""<h2>$name</h2>
<p>$description</p>
<nav><a class="playground" href="$root/$name/playground/">Playground</a>
<a href="$root/$name/input_schema">Input schema</a>
<a href="$root/$name/output_schema">Output schema</a>
<a href="$root/$name/config_schema">Options schema</a></nav>
<pre><code>$curl</code></pre>
""")

DOCS = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title: API</title>
<link rel="icon" href="$root/favicon.ico">
<link rel="stylesheet" href="$root/static-offline-docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="$root/static-offline-docs/swagger-ui-bundle.js"></script>
<script src="$root/static/docs.js" data-openapi="$root/openapi.json"></script>
</body>
</html>
""")

ICON = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><text y="13" font-size="13">🦙</text></svg>'


def add_pages(app: FastAPI, chains: Sequence[Chain], engine: Engine) -> None:
    """Add `/` and `/docs`, and the icon that browsers ask for on every page without one of its own."""
    router = APIRouter(include_in_schema=False)

    @router.get("/favicon.ico")
    def icon() -> Response:
        return Response(ICON, media_type="image/svg+xml")

    @router.get("/", response_class=HTMLResponse)
    def index(request: Request) -> str:
        health = engine.health()
        return PAGE.substitute(
            refresh='<meta http-equiv="refresh" content="2">\n' if health.state is EngineState.LOADING else "",
            model=escape(health.model),
            state=escape(f"{health.state}, {health.error}" if health.error else health.state),
            root=root_of(request),
            chains="".join(
                CHAIN.substitute(
                    name=escape(chain.name),
                    description=escape(chain.description),
                    root=root_of(request),
                    curl=escape(curl(chain, str(request.base_url).rstrip("/"), asks_key=bool(request.state.key))),
                )
                for chain in chains
            ),
        )

    @router.get("/docs", response_class=HTMLResponse)
    def docs(request: Request) -> str:
        return DOCS.substitute(title=escape(app.title), root=root_of(request))

    app.include_router(router)
    app.mount("/static", StaticFiles(directory=Path(__file__).with_name("static")))


def root_of(request: Request) -> str:
    """What the addresses of a page begin with, in HTML: the prefix that a proxy in front strips."""
    return escape(request.scope.get("root_path", "").rstrip("/"))


def curl(chain: Chain, base_url: str, *, asks_key: bool) -> str:
    """A command line that tries a chain."""
    body = json.dumps({"input": chain.example}, ensure_ascii=False).replace("'", "\\u0027")
    key = ' -H "X-API-Key: $KEY"' if asks_key else ""
    url = shlex.quote(f"{base_url}/{chain.name}/invoke")  # whatever the request called this host
    return f"curl {url}{key} -H 'Content-Type: application/json' \\\n  -d '{body}'"
