"""The page for people: what is hosted here, and how to try it. It loads nothing from elsewhere."""

import json
from collections.abc import Sequence
from html import escape
from string import Template

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import HTMLResponse

from chains import Chain
from llm.engine import Engine, EngineState

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Chains on a local Llama 3</title>
$refresh<link rel="icon" href="$root/favicon.ico">
<style>
:root { color-scheme: light dark; font-family: system-ui, sans-serif; line-height: 1.5; }
body { max-width: 48rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin: 2.5rem 0 0; }
p { margin: .4rem 0; }
nav a { margin-right: 1rem; }
nav a.playground { font-weight: 600; }
pre { margin: .6rem 0; padding: .75rem; border: 1px solid #8886; border-radius: .4rem; background: #8881; }
pre code { white-space: pre-wrap; overflow-wrap: anywhere; }
</style>
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


ICON = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><text y="13" font-size="13">🦙</text></svg>'


def add_index(app: FastAPI, chains: Sequence[Chain], engine: Engine) -> None:
    """Add `/`, and the icon that browsers ask for on every page without one of its own."""
    router = APIRouter(include_in_schema=False)

    @router.get("/favicon.ico")
    def icon() -> Response:
        return Response(ICON, media_type="image/svg+xml")

    @router.get("/", response_class=HTMLResponse)
    def index(request: Request) -> str:
        root = request.scope.get("root_path", "").rstrip("/")
        health = engine.health()
        return PAGE.substitute(
            refresh='<meta http-equiv="refresh" content="2">\n' if health.state is EngineState.LOADING else "",
            model=escape(health.model),
            state=escape(f"{health.state}, {health.error}" if health.error else health.state),
            root=escape(root),
            chains="".join(
                CHAIN.substitute(
                    name=escape(chain.name),
                    description=escape(chain.description),
                    root=escape(root),
                    curl=escape(curl(chain, str(request.base_url).rstrip("/"))),
                )
                for chain in chains
            ),
        )

    app.include_router(router)


def curl(chain: Chain, base_url: str) -> str:
    """A command line that tries a chain."""
    body = json.dumps({"input": chain.example}, ensure_ascii=False).replace("'", "\\u0027")
    return f"curl {base_url}/{chain.name}/invoke -H 'Content-Type: application/json' \\\n  -d '{body}'"
