"""Serves the hosted chains over a scripted model that says the same words to whatever it is shown: what is left of the
time to the first words is the service's own."""

import sys
from collections.abc import Iterator

from llm import ScriptedEngine
from serve import run
from service.settings import read_settings


def script(_: str) -> Iterator[str]:
    """Some words that no text begins with."""
    yield from ("Wörter, ", "die ", "in ", "keinem ", "der ", "Texte ", "stehen.")


if __name__ == "__main__":
    settings = read_settings(sys.argv[1:])
    sys.exit(run(settings, ScriptedEngine(script, max_slots=settings.max_slots or 64)))
