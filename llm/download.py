"""`python -m llm.download REF…`: fetch models ahead of time, so that serving needs no network.

Knows the command line. What a reference means and how it is fetched is `llm.references` and `llm.loading`.
"""

import argparse
import sys
from collections.abc import Sequence

from llm.errors import ModelError
from llm.loading import prepare


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch each model and print its directory; 1 when one could not be had, after trying the others."""
    parser = argparse.ArgumentParser(
        prog="python -m llm.download",
        description="Fetch models and make them ready, so that serving needs no network. A model that is there "
        "already is brought up to date; an interrupted download goes on where it stopped.",
        epilog="Gated models: accept the licence on the model's page, then set HF_TOKEN. "
        "Caches: HF_HOME, MODELSCOPE_CACHE, and SERVE_CACHE for what is converted.",
    )
    parser.add_argument(
        "references",
        nargs="+",
        metavar="REF",
        help="embedded, hf:org/name[@revision], modelscope:org/name[@revision], or a path",
    )
    failed = False
    for reference in parser.parse_args(arguments).references:
        try:
            print(prepare(reference, refresh=True).directory)
        except ModelError as error:
            failed = True
            print(f"error: {error}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: what has come is kept")
