import json
from pathlib import Path

from tests.bench import machine, report
from tests.bench.alone import Measurement
from tests.bench.compare import Plan, Result
from tests.bench.figures import Figures
from tests.bench.limits import Limits
from tests.bench.load import Answer, Load


def figures(requests: int) -> Figures:
    answers = tuple(Answer(1.0, 2.0, ((1.5, "a"), (2.0, "b"))) for _ in range(requests))
    return Figures.of(Load(1, answers, 0.0, 4.0, 0.02), lambda text: range(1, len(text) + 1), max_tokens=64)


OURS = Result("ours", "this", figures={1: [figures(4), figures(6), figures(8)], 16: [figures(40)]})
TUTORIAL = Result("tutorial", "that", figures={1: [figures(2), figures(2), figures(2)]})
VLLM = Result("vllm", "not here", failure="vllm is not on the PATH")
LIMITS = Limits(device="cpu", read_bytes_per_s=4e10, copy_bytes_per_s=3e10, bfloat16_flops=1e12, float32_flops=5e11)


def test_the_table_shows_medians_and_says_who_was_not_there() -> None:
    table = report.table([OURS, TUTORIAL, VLLM]).splitlines()

    assert [line.split("|")[1:4] for line in table[2:5]] == [
        [" 1       ", " ours     ", " 1.50       "],
        [" 1       ", " tutorial ", " 0.50       "],
        [" 16      ", " ours     ", " 10.00      "],
    ]
    assert table[-1] == "vllm: vllm is not on the PATH"


def test_ratios_are_taken_repeat_by_repeat_where_both_were_measured() -> None:
    assert report.ratios([OURS, TUTORIAL, VLLM]) == {"tutorial": {"1": 3.0}}
    assert "3.00 x" in report.ratio_table({"tutorial": {"1": 3.0}})


def test_the_table_of_the_engine_alone_shows_what_could_not_be_measured() -> None:
    measured = [
        Measurement("decode", 1, 128, "tokens/s", (50.0,), limit=100.0),
        Measurement("decode", 16, 128, "tokens/s", ()),
    ]

    table = report.alone_table(measured, LIMITS).splitlines()

    assert "40.0 GB/s" in table[0]
    assert [cell.strip() for cell in table[-2].split("|")[4:8]] == ["50 tokens/s", "50 to 50", "100", "50%"]
    assert [cell.strip() for cell in table[-1].split("|")[4:8]] == ["- tokens/s", "-", "-", "-"]


def test_all_is_kept_and_names_no_place_on_this_machine(tmp_path: Path) -> None:
    results = [OURS, TUTORIAL, VLLM]
    everything = report.record(machine.described(), {"model": "embedded"}, results, [], LIMITS)

    report.write(tmp_path / "new", everything, "text", results)

    kept = (tmp_path / "new" / "bench.json").read_text()
    assert json.loads(kept)["engines"][0]["levels"][0]["median"]["requests_per_s"] == 1.5
    assert str(Path.home()) not in kept
    assert str(Path.cwd()) not in kept
    assert (tmp_path / "new" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_is_shown_without_directories() -> None:
    assert machine.command(["--model", "/models/llama", "--out", "a/b"]) == (
        "python -m tests.bench --model llama --out b"
    )


def test_a_client_alone_asks_twice_as_often_and_all_ask_once_to_warm_up() -> None:
    plan = Plan()

    assert [plan.num_asks(clients) for clients in (1, 4, 16, 64)] == [21, 48, 192, 768]
