"""What /metrics tells, read by Prometheus' own parsers."""

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from gfxlm.server import metrics as module
from gfxlm.server.metrics import Metrics

# What dashboards for vLLM ask for, with the suffixes that Prometheus stores.
_VLLM_SERIES = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_inference_time_seconds_sum",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_params_max_tokens_bucket",
)


class Clock:
    """A `time.monotonic` that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def samples(metrics: Metrics) -> Iterator[tuple[str, dict[str, str], float]]:
    text = metrics.render().decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = [amount for series, its, amount in samples(metrics) if series == name and labels.items() <= its.items()]
    assert len(found) == 1, f"{name}{labels}: {found}"
    return found[0]


def absent(metrics: Metrics, name: str) -> bool:
    return all(series != name for series, _, _ in samples(metrics))


def test_the_series_of_a_vllm_dashboard_are_there() -> None:
    metrics = Metrics()
    model = metrics.model("m")
    model.watch(lambda: 0, lambda: 0, lambda: 0)
    model.on_request(1, 1)
    there = {(name, labels.get("model_name")) for name, labels, _ in samples(metrics)}
    assert {(name, "m") for name in _VLLM_SERIES} <= there
    reasons = {
        labels["finished_reason"] for name, labels, _ in samples(metrics) if name == "vllm:request_success_total"
    }
    assert reasons == {"stop", "length", "abort", "error"}
    assert value(metrics, "process_resident_memory_bytes") > 0


def test_a_request_on_its_way(clock: Clock) -> None:
    metrics = Metrics()
    request = metrics.model("m").on_request(prompt_tokens=10, max_tokens=3)
    clock.now += 2
    request.on_started(cached_tokens=4)
    clock.now += 3
    request.on_tokens()
    clock.now += 0.5
    request.on_tokens()
    clock.now += 0.5
    request.on_tokens()
    request.on_finish("length")
    assert value(metrics, "vllm:prompt_tokens_total") == 10
    assert value(metrics, "vllm:prefix_cache_queries_total") == 10
    assert value(metrics, "vllm:prefix_cache_hits_total") == 4
    assert value(metrics, "vllm:generation_tokens_total") == 3
    assert value(metrics, "vllm:request_success_total", finished_reason="length") == 1
    assert value(metrics, "vllm:request_success_total", finished_reason="stop") == 0
    seconds = {
        "time_to_first_token": 5,
        "inter_token_latency": 1,
        "request_time_per_output_token": 0.5,
        "e2e_request_latency": 6,
        "request_queue_time": 2,
        "request_prefill_time": 3,
        "request_decode_time": 1,
        "request_inference_time": 4,
    }
    for name, total in seconds.items():
        assert value(metrics, f"vllm:{name}_seconds_sum") == total, name
    assert value(metrics, "vllm:inter_token_latency_seconds_count") == 2
    assert value(metrics, "vllm:inter_token_latency_seconds_bucket", le="0.5") == 2
    assert value(metrics, "vllm:inter_token_latency_seconds_bucket", le="0.4") == 0
    assert value(metrics, "vllm:request_prompt_tokens_sum") == 10
    assert value(metrics, "vllm:request_generation_tokens_sum") == 3
    assert value(metrics, "vllm:request_params_max_tokens_sum") == 3


def test_a_start_in_the_past_counts_from_then(clock: Clock) -> None:
    metrics = Metrics()
    request = metrics.model("m").on_request(10, 3)
    clock.now += 5
    request.on_started(at=101.0)
    assert value(metrics, "vllm:request_queue_time_seconds_sum") == 1


def test_a_request_that_never_started_counts_as_no_work(clock: Clock) -> None:
    metrics = Metrics()
    request = metrics.model("m").on_request(10, -1)
    clock.now += 7
    request.on_finish("abort")
    assert value(metrics, "vllm:request_success_total", finished_reason="abort") == 1
    assert value(metrics, "vllm:e2e_request_latency_seconds_sum") == 7
    assert value(metrics, "vllm:request_prefill_time_seconds_count") == 0
    assert value(metrics, "vllm:prompt_tokens_total") == 0
    assert value(metrics, "vllm:request_params_max_tokens_count") == 0


def test_gauges_are_read_when_somebody_asks_and_go_with_their_model() -> None:
    metrics = Metrics()
    engine = SimpleNamespace(running=1, waiting=2, usage=0.25)
    model = metrics.model("m")
    model.watch(lambda: engine.running, lambda: engine.waiting, lambda: engine.usage)
    engine.running = 5
    assert value(metrics, "vllm:num_requests_running", model_name="m") == 5
    assert value(metrics, "vllm:num_requests_waiting") == 2
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.25
    model.on_request(1, 1).on_tokens(3)
    model.unwatch()
    assert absent(metrics, "vllm:num_requests_running")
    assert value(metrics, "vllm:generation_tokens_total") == 3
    metrics.model("m").on_request(1, 1).on_tokens(4)
    assert value(metrics, "vllm:generation_tokens_total") == 7


def test_a_gauge_forgets_the_worker_it_read() -> None:
    import gc
    import weakref

    class Engine:
        running = 1

    metrics, engine = Metrics(), Engine()
    model = metrics.model("m")
    model.watch(lambda engine=engine: engine.running, lambda: 0, lambda: 0)  # type: ignore[misc]
    gone = weakref.ref(engine)
    model.unwatch()
    del engine
    gc.collect()
    assert gone() is None


def test_models_are_told_apart() -> None:
    metrics = Metrics()
    metrics.model("a").on_request(1, 1).on_tokens(2)
    metrics.model("b").on_request(1, 1).on_tokens(5)
    assert value(metrics, "vllm:generation_tokens_total", model_name="a") == 2
    assert value(metrics, "vllm:generation_tokens_total", model_name="b") == 5


def test_two_servers_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.on_http("GET", "/health", 200)
    assert absent(other, "gfxlm_http_requests_total")


def test_http_answers_by_method_route_and_status() -> None:
    metrics = Metrics()
    for method in ("GET", "GET", "X-MADE-UP", "X-OTHER"):
        metrics.on_http(method, "/health", 200)
    assert value(metrics, "gfxlm_http_requests_total", method="GET", route="/health", status="200") == 2
    assert value(metrics, "gfxlm_http_requests_total", method="other") == 2


def test_threads_lose_no_count() -> None:
    metrics = Metrics()
    model = metrics.model("m")

    def work() -> None:
        request = model.on_request(1, 1)
        for _ in range(2000):
            request.on_tokens()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(metrics, "vllm:generation_tokens_total") == 8000


def test_a_token_costs_next_to_nothing() -> None:
    request = Metrics().model("m").on_request(1, 1)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(2000):
            request.on_tokens()
        seconds.append((time.perf_counter() - begin) / 2000)
    assert min(seconds) < 5e-6


# Prometheus 2 asks for OpenMetrics first, Prometheus 3 for names in UTF-8 as well.
_PROMETHEUS_2 = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,*/*;q=0.1"
_PROMETHEUS_3 = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.3"


@pytest.mark.parametrize("accept", ["*/*", _PROMETHEUS_2, _PROMETHEUS_3])
def test_the_route_keeps_vllms_names_whoever_asks(accept: str) -> None:
    app = FastAPI()
    app.state.metrics = Metrics()
    app.state.metrics.model("m").on_request(3, 1).on_tokens()
    app.include_router(module.router)
    with TestClient(app) as client:
        answer = client.get("/metrics", headers={"accept": accept})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert '\nvllm:generation_tokens_total{model_name="m"} 1.0\n' in answer.text
