"""`gfxlm bench serve` against a server whose speed and faults are known."""

import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gfxlm.cli.traffic.plan import Endpoint, Load, plan, warm_up
from gfxlm.cli.traffic.report import Report, percentile, statistics
from gfxlm.cli.traffic.sample import Sample
from tests.cli.runner import complaint, run
from tests.cli.stand_in_server import StandIn

LOAD = Load(requests=50, input_tokens=20, output_tokens=4, rate=10, shared_prefix=8, seed=3)


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn().running() as server:
        yield server


def measured(server: StandIn, *options: str | Path, code: int = 0) -> dict[str, object]:
    result = run("bench", "serve", "--base-url", server.address, "-o", "json", *options)
    assert result.exit_code == code, result.stderr
    report: dict[str, object] = json.loads(result.stdout)
    return report


def test_prompts_have_their_length_share_their_beginning_and_nothing_else() -> None:
    prompts = [planned.body["prompt"] for planned in plan(LOAD, "m", Endpoint.COMPLETIONS)]
    assert {len(prompt) for prompt in prompts} == {20}
    assert len({tuple(prompt[:8]) for prompt in prompts}) == 1
    assert len({tuple(prompt[8:10]) for prompt in prompts}) == 50
    first = warm_up(LOAD, "m", Endpoint.COMPLETIONS)["prompt"]
    assert len(first) == 20
    assert first[:8] != prompts[0][:8]


def test_arrivals_are_a_poisson_process_that_a_seed_repeats() -> None:
    load = Load(requests=4001, input_tokens=1, output_tokens=1, rate=20, seed=5)
    arrivals = [planned.arrival for planned in plan(load, "m", Endpoint.COMPLETIONS)]
    gaps = np.diff(arrivals)
    assert arrivals[0] == 0
    # The mean and the deviation of exponential gaps are both 1 / rate.
    assert np.mean(gaps) == pytest.approx(0.05, rel=0.06)
    assert np.std(gaps) == pytest.approx(0.05, rel=0.1)
    assert [planned.arrival for planned in plan(load, "m", Endpoint.COMPLETIONS)] == arrivals
    at_once = plan(Load(requests=5, input_tokens=1, output_tokens=1), "m", Endpoint.COMPLETIONS)
    assert {planned.arrival for planned in at_once} == {0}


def test_percentiles_are_numpys() -> None:
    values = [random.Random(1).expovariate(1) for _ in range(137)]
    for percent in (0, 50, 90, 95, 99, 100):
        assert percentile(sorted(values), percent) == pytest.approx(np.percentile(values, percent))
    summary = statistics(values)
    assert summary["mean"] == pytest.approx(np.mean(values))
    assert summary["max"] == max(values)
    assert statistics([]) == {}
    assert statistics([2.0])["p99"] == 2.0


def test_a_report_computes_what_it_says() -> None:
    samples = [
        Sample(0.0, pieces=[1.0, 1.5, 2.0], end=2.1, input_tokens=10, output_tokens=3),
        Sample(1.0, pieces=[3.0], end=4.0, input_tokens=10, output_tokens=1, cached_tokens=6),
        Sample(1.0, end=9.0, error="HTTP 500", message="no"),
    ]
    report = Report("http://x", "m", "completions", Load(3, 10, 3), samples)
    assert report.duration == 4.0
    assert report.times() == {"ttft": [1.0, 2.0], "itl": [0.5, 0.5], "tpot": [0.5], "e2el": [2.1, 3.0]}
    summary = report.as_json()
    assert (summary["completed"], summary["failed"], summary["errors"]) == (2, 1, {"HTTP 500": 1})
    assert summary["output_throughput"] == 1.0
    assert summary["total_token_throughput"] == 6.0
    assert summary["request_throughput"] == 0.5
    assert summary["total_cached_tokens"] == 6
    assert summary["p50_ttft_ms"] == 1500.0


def test_what_is_sent_and_what_is_counted(server: StandIn) -> None:
    report = measured(server, "--requests", "5", "--input-tokens", "7", "--output-tokens", "4")
    assert len(server.bodies) == 6  # the first one warms up
    for body in server.bodies:
        assert len(body.pop("prompt")) == 7
        assert body == {
            "model": "stand-in",
            "max_tokens": 4,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    assert report["model_id"] == "stand-in"
    assert (report["completed"], report["failed"]) == (5, 0)
    assert (report["total_input_tokens"], report["total_output_tokens"]) == (35, 20)
    assert report["total_cached_tokens"] == 15
    assert isinstance(report["requests"], list)
    assert len(report["requests"]) == 5


def test_chats_are_words_and_a_role_is_no_token(server: StandIn) -> None:
    server.gap = 0.05
    report = measured(server, "--requests", "2", "--input-tokens", "7", "--output-tokens", "3", "--endpoint", "chat")
    assert set(server.paths) == {"/v1/chat/completions"}
    assert len(server.bodies[0]["messages"][0]["content"].split()) == 7
    assert report["total_output_tokens"] == 6
    assert report["p50_ttft_ms"] > 49  # type: ignore[operator]


def test_times_are_the_servers(server: StandIn) -> None:
    server.gap = 0.03
    report = measured(server, "--requests", "4", "--output-tokens", "10", "--concurrency", "2")
    assert report["p50_itl_ms"] == pytest.approx(31, abs=6)
    assert report["p50_tpot_ms"] == pytest.approx(31, abs=6)
    assert report["p50_ttft_ms"] == pytest.approx(32, abs=15)
    assert report["p50_e2el_ms"] == pytest.approx(310, abs=60)
    assert report["duration"] == pytest.approx(0.62, abs=0.12)


def test_waiting_for_a_slow_server_counts_from_the_arrival(server: StandIn) -> None:
    server.gap, server.one_by_one = 0.05, True
    ten = ("--requests", "10", "--input-tokens", "4", "--output-tokens", "1")
    # Ten arrive within a tenth of a second, the server takes half a second: the last waited for most of it,
    # in the server's queue or in ours.
    for limit in ((), ("--concurrency", "1")):
        report = measured(server, *ten, "--rate", "100", *limit)
        assert report["max_e2el_ms"] > 350  # type: ignore[operator]
    # A client that sends when it has its answer never waits for others.
    report = measured(server, *ten, "--concurrency", "1")
    assert report["max_e2el_ms"] < 150  # type: ignore[operator]


def test_errors_by_kind(server: StandIn) -> None:
    server.trouble = {2: "full", 3: "breaks", 4: "error", 5: "garbage", 6: "full"}
    options = ("--requests", "8", "--output-tokens", "3", "--concurrency", "1", "--input-tokens", "4")
    report = measured(server, *options, code=1)
    assert report["errors"] == {
        "HTTP 429": 2,
        "the stream broke off": 1,
        "error in the stream": 1,
        "not an event of OpenAI's API": 1,
    }
    assert (report["completed"], report["failed"]) == (3, 5)
    assert report["total_output_tokens"] == 9
    server.trouble = {len(server.bodies) + 1: "full"}
    table = run("bench", "serve", "--base-url", server.address, *options)
    assert table.exit_code == 1
    assert "failed     1 x HTTP 429: the queue is full\n" in table.stdout


def test_nothing_but_errors(server: StandIn) -> None:
    server.trouble = dict.fromkeys(range(1, 9), "full")
    result = run("bench", "serve", "--base-url", server.address, "--requests", "2")
    assert result.exit_code == 1
    assert "failed     2 x HTTP 429" in result.stdout
    assert "first token" not in result.stdout


def test_answers_that_end_early_are_told(server: StandIn) -> None:
    server.ends_after = 2
    result = run("bench", "serve", "--base-url", f"{server.address}/v1/", "--requests", "3", "--output-tokens", "5")
    assert result.exit_code == 0
    assert "output     6 tokens" in result.stdout
    assert "(15 were asked for)" in result.stdout


def test_a_server_that_counts_nothing_has_its_pieces_counted(server: StandIn) -> None:
    server.counts = False
    report = measured(server, "--requests", "3", "--output-tokens", "5")
    assert (report["total_input_tokens"], report["total_output_tokens"]) == (0, 15)


def test_a_server_that_takes_text_alone(server: StandIn) -> None:
    server.text_alone = True
    said = complaint("bench", "serve", "--base-url", server.address)
    assert said == (
        f"{server.address}: the first request failed: HTTP 400: prompt: must be a string; "
        "--endpoint chat sends words, not token ids"
    )
    assert measured(server, "--requests", "1", "--endpoint", "chat")["completed"] == 1


def test_table_and_file(server: StandIn, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    options = ("--requests", "3", "--output-tokens", "5", "--input-tokens", "9", "--rate", "1000")
    result = run("bench", "serve", "--base-url", server.address, *options, "-o", path)
    lines = result.stdout.splitlines()
    assert lines[0] == f"stand-in at {server.address}, completions: 9 tokens in, 5 out, 1000/s"
    assert lines[2].startswith("requests   3 of 3 answered in ")
    assert lines[4].startswith("in all     42 tokens")
    assert lines[4].endswith(", 9 of them cached")
    rows = [line for line in lines if line.startswith("|")]
    assert rows[0].split("|")[2:-1] == [f" {name:>9} " for name in ("mean", "p50", "p90", "p95", "p99", "max")]
    assert len({len(row) for row in rows}) == 1
    report = json.loads(path.read_text())
    assert report["request_rate"] == 1000
    first = next(row for row in rows if row.startswith("| first token"))
    assert f"{report['p95_ttft_ms']:9.2f}" in first


def test_the_key_is_sent(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = "secret"
    options = ("bench", "serve", "--base-url", server.address, "--requests", "1", "--output-tokens", "1")
    assert complaint(*options, "--api-key", "x") == f"{server.address}/v1/models: HTTP 401: wrong API key"
    said = complaint(*options, "--model", "m", "--api-key", "x")
    assert said == f"{server.address}: the first request failed: HTTP 401: wrong API key"
    monkeypatch.setenv("GFXLM_API_KEY", "secret")
    assert run(*options).exit_code == 0


def test_plot(server: StandIn, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    path = tmp_path / "load.png"
    server.gap = 0.002
    measured(server, "--requests", "20", "--output-tokens", "5", "--rate", "200", "--plot", path)
    picture = imread(path)
    assert picture.shape[:2] == (1050, 1650)
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 50  # not an empty sheet
    bodies = len(server.bodies)
    said = complaint("bench", "serve", "--base-url", server.address, "--plot", "x.bmp3")
    assert said.startswith("--plot: x.bmp3: expected a name that ends in one of ")
    assert len(server.bodies) == bodies  # nothing was measured in vain


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    assert complaint("bench", "serve", "--plot", "x.png") == (
        "--plot: matplotlib is not installed; pip install 'gfxlm[plot]'"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--base-url", "http://127.0.0.1:9"], "http://127.0.0.1:9: "),
        (["--base-url", "127.0.0.1:8080"], "expected an address like http://127.0.0.1:8080"),
        (["--rate", "0"], "--rate: expected requests a second above 0, or inf, but got '0'"),
        (["--rate", "often"], "but got 'often'"),
        (["--rate", "nan"], "but got 'nan'"),
        (["--shared-prefix", "512"], "--shared-prefix: must leave a token of --input-tokens 512, but is 512"),
        (["-o", "csv"], "--output: expected table, json or a file that ends in .json, but got 'csv'"),
        (["-o", "/no/such/folder/x.json"], "--output: /no/such/folder/x.json: its folder does not exist"),
        (["--plot", "/no/such/folder/x.png"], "--plot: /no/such/folder/x.png: its folder does not exist"),
        (["--requests", "0"], "--requests"),
    ],
)
def test_bad_options(options: list[str], said: str) -> None:
    assert said in complaint("bench", "serve", *options)


def test_bench_and_bench_serve_are_told_apart() -> None:
    said = complaint("bench", "-p", "5", "serve")
    assert said == "--n-prompt: options of `bench serve` stand behind its name"
    assert "--shared-prefix" in run("bench", "serve", "--help").stdout
    help_text = run("bench", "--help").stdout
    assert "--n-prompt" in help_text
    assert "serve" in help_text


def test_rate_infinite_in_json() -> None:
    report = Report("http://x", "m", "completions", Load(1, 1, 1, rate=math.inf), [Sample(0.0, end=1.0, error="x")])
    assert json.loads(json.dumps(report.as_json(), allow_nan=False))["request_rate"] == "inf"
