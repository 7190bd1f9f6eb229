"""Long documents through the chains, over HTTP: that nothing is missing, what a page costs, and who has to wait for it.

Options of the chains are their defaults where nothing else is said.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from tests.bench import documents_obeyed, documents_waits, documents_whole
from tests.bench.documents_client import follow
from tests.bench.documents_found import Found, Plan
from tests.bench.documents_texts import shuffled
from tests.bench.documents_waits import Count
from tests.bench.documents_whole import translation
from tests.server import Server


def measure(
    model: str, plan: Plan, steps: Sequence[str], count: Count, logs: Path, keep: Callable[[Found], None]
) -> Found:
    """Measure what is asked for; `keep` is called whenever there is something new.

    Args:
        model: As SERVE_MODEL.
        plan: How much.
        steps: Some of `STEPS`.
        count: Tokens of a text.
        logs: Where servers write.
        keep: Takes what there is so far.
    """
    found = Found()
    work: dict[str, Callable[[Server], Iterator[object]]] = {
        "long": partial(documents_whole.long, plan=plan, found=found),
        "scale": partial(documents_whole.scale, plan=plan, found=found),
        "obeyed": partial(documents_obeyed.obeyed, plan=plan, found=found),
        "chat": partial(documents_waits.chats, plan=plan, found=found, count=count),
    }
    if chosen := [name for name in work if name in steps]:
        with Server(logs / "documents.log", model=model) as server:
            follow(server, "translate", translation(shuffled(0.05, seed=-1)))  # warm-up
            for name in chosen:
                for _ in work[name](server):
                    keep(found)
    if "first" in steps:
        # As a module: beside a script of this directory, libraries would find our files for their own.
        for engine, started in (("the model", "serve"), ("scripted", "tests.bench.documents_scripted")):
            command = (sys.executable, "-m", started)
            with Server(logs / "first.log", command=command, model=model, api_keys=documents_waits.API_KEYS) as server:
                for _ in documents_waits.first_words(server, plan=plan, found=found, engine=engine):
                    keep(found)
    return found
