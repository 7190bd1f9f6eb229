"""Measurements: this service beside what one would take instead, its engine alone beside what the machine can do, and
long documents through its chains.

    make bench                                      everything that is installed, with the embedded model
    make bench ARGS="--quick"                       whether it works at all; the figures mean nothing
    python -m tests.bench compare --engines ours,tutorial --clients 1,16
    python -m tests.bench alone
    python -m tests.bench documents --steps first,chat
    python -m tests.bench --shape llama3-8b         random weights of that shape, on a GPU

Run nothing beside it. llama-server and vLLM take part where they are on the PATH, or named by BENCH_LLAMA_SERVER and
BENCH_VLLM. All engines get the same messages, 64 new tokens at most, greedy, one engine after the other; figures are
medians of the repeats, and ratios are taken repeat by repeat.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

from tests.bench.compare import NAMES, Plan, Result, compare
from tests.bench.documents_found import QUICK as QUICK_DOCUMENTS
from tests.bench.documents_found import STEPS, Found
from tests.bench.documents_found import Plan as DocumentsPlan

P = ParamSpec("P")
R = TypeVar("R")

PARTS = ("compare", "alone", "documents")


def main() -> None:
    """Measure, print, and keep what was found."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        reference = options.model
        if options.shape:
            reference = str(_built(options.shape, scratch / options.shape))
        _measure(options, reference, scratch)


def _measure(options: argparse.Namespace, reference: str, scratch: Path) -> None:
    from llm.loading import prepare
    from llm.references import resolve
    from tests.bench import alone, documents, documents_report, generate, limits, machine, report
    from tests.bench.peers import Weights

    source = resolve(reference)
    directory = prepare(reference).directory
    device = _apart(limits.device)
    gguf = source.directory / source.gguf if source.gguf else None
    weights = Weights(reference, directory, gguf, device)
    plan = Plan(clients=options.clients, repeats=options.repeats, seed=options.seed, limit_s=options.seconds)
    work = DocumentsPlan(
        pages=options.pages,
        passes=options.passes,
        translate_pages=options.translate_pages,
        summarize_pages=options.summarize_pages,
    )
    size = alone.Size(repeats=options.repeats)
    if options.quick:
        plan = Plan(clients=options.clients[:2], repeats=1, seed=options.seed, requests_per_client=2, limit_s=20)
        size, work = alone.QUICK, QUICK_DOCUMENTS
    found, measured, results = None, list[alone.Measurement](), list[Result]()
    texts = []

    if "alone" in options.parts:
        found = _apart(limits.measure, device)
        cost = limits.Cost.of(directory, _apart(limits.weight_bytes, reference))
        measured = _apart(alone.measure, reference, size, cost, found)
        for name in size.formats if device == "cpu" else ():
            measured += _apart(alone.measure, reference, size, cost, found, quantize=name)
        measured += _apart(generate.measure, reference, size, device)
        texts.append(report.alone_table(measured, found))

    def keep() -> None:
        model = options.shape or Path(options.model).name
        settings = {"model": model, "device": device, "quick": options.quick, **asdict(plan)}
        everything = report.record(machine.described(), settings, results, measured, found)
        report.write(options.out, everything, "\n\n".join(texts) + "\n", results)

    def keep_documents(measured: Found) -> None:
        settings = {"model": Path(options.model).name, "quick": options.quick, **asdict(work)}
        documents_report.write(options.out, machine.described(), settings, measured)

    if set(options.parts) & {"alone", "compare"}:
        keep()
    if "documents" in options.parts:
        counted = _token_ends(directory)
        done = documents.measure(
            reference, work, options.steps, lambda text: len(counted(text)), scratch, keep_documents
        )
        texts.append(documents_report.text(done))
    if "compare" in options.parts:
        for result in compare(weights, options.engines, plan, _token_ends(directory), scratch):
            results.append(result)
            keep()  # a run takes long, and may be broken off
        texts += [report.table(results), report.ratio_table(report.ratios(results))]
        keep()
    print("\n\n".join(text for text in texts if text))
    print(f"\nKept in {options.out}", file=sys.stderr)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; all if not given")
    parser.add_argument("--engines", type=_names, default=NAMES, help=f"some of {','.join(NAMES)}; default: all")
    parser.add_argument("--clients", type=_numbers, default=(1, 4, 16, 64), help="default: 1,4,16,64")
    parser.add_argument("--repeats", type=int, default=3, help="of everything; default: 3")
    parser.add_argument("--seconds", type=float, default=120, help="for each number of clients at most; default: 120")
    parser.add_argument("--seed", type=int, default=0, help="of the texts; default: 0")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", default="embedded", help="as SERVE_MODEL; default: embedded")
    model.add_argument("--shape", choices=("llama3-8b", "llama3-tiny"), help="random weights of that shape")
    parser.add_argument("--steps", type=_steps, default=STEPS, help=f"of documents: some of {','.join(STEPS)}")
    parser.add_argument("--pages", type=float, default=30, help="of the long document; default: 30")
    parser.add_argument("--passes", type=int, default=1, help="how often that is translated; default: 1")
    for verb in ("translate", "summarize"):
        default: tuple[float, ...] = getattr(DocumentsPlan(), f"{verb}_pages")
        described = f"to {verb}, to see what a page costs; default: {','.join(f'{pages:g}' for pages in default)}"
        parser.add_argument(f"--{verb}-pages", type=_pages, default=default, help=described)
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few minutes")
    parser.add_argument("--out", type=Path, help="directory for bench.json, .md and .png; default: a new one in /tmp")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(unknown)}: {', '.join(PARTS)}")
    options.parts = options.parts or PARTS
    options.out = options.out or Path(tempfile.mkdtemp(prefix="bench-results-"))
    return options


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(NAMES):
        raise argparse.ArgumentTypeError(f"no engine is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    return names


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _pages(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _steps(text: str) -> tuple[str, ...]:
    steps = tuple(text.split(","))
    if unknown := set(steps) - set(STEPS):
        raise argparse.ArgumentTypeError(f"there is no step {', '.join(unknown)}: there are {', '.join(STEPS)}")
    return steps


def _apart(work: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
    """Do something in a process of its own: torch keeps a team of CPU threads per thread that has used it.

    It must be a function of another module: the new process does not import this one.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(work, *arguments, **named).result()


def _built(name: str, directory: Path) -> Path:
    from tests.bench.shape import SHAPES, ShapeRefused, build

    directory.mkdir()
    try:
        return _apart(build, SHAPES[name], directory)
    except ShapeRefused as error:
        sys.exit(f"--shape {name}: {error}")


def _token_ends(directory: Path) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return lambda text: [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]


if __name__ == "__main__":
    main()
