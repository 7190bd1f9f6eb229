"""Serves the hosted chains over a scripted model, which does what the last message tells it to.

fail         the answer breaks off with an error after a few words
slow         a long answer, 50 ms a word
cipher       the same again in ROT13, 5 ms a word, which no chain takes for the same again
else         says the same again
"""

import codecs
import re
import sys
import time
from collections.abc import Iterator

from llm import ScriptedEngine
from serve import run
from service.settings import read_settings

SLOW_WORDS = 200

SLOW = ", ".join(["a slow text"] * 20)
"""A text whose translation takes seconds: it may only be so much longer than the text."""


def script(message: str) -> Iterator[str]:
    """Do as the message says."""
    if "fail" in message:
        yield "it was going well "
        raise RuntimeError("secret detail")
    if "slow" in message:
        for index in range(SLOW_WORDS):
            time.sleep(0.05)
            yield f"word{index} "
    elif "cipher" in message:
        for word in re.findall(r"\s*\S+\s*", message):
            time.sleep(0.005)
            yield codecs.encode(word, "rot13")
    else:
        yield message


if __name__ == "__main__":
    settings = read_settings(sys.argv[1:])
    sys.exit(run(settings, ScriptedEngine(script, max_slots=settings.max_slots or 16)))
