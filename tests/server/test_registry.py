"""Several models behind one server: who is in memory, and who waits for whom."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gfxlm.device.memory import taken_bytes
from gfxlm.engine.load import built_in_folder
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.tokenizer import Tokenizer
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM
from gfxlm.server.errors import ApiError
from gfxlm.server.opening import Opening
from gfxlm.server.registry import Models, ModelSpec
from gfxlm.server.residency import Residency
from gfxlm.server.settings import Settings
from tests.server.conftest import serving

LONG = SamplingParams(max_tokens=2000, logit_bias={0: float("-inf")})
MakeSpec = Callable[..., ModelSpec]


def run_with(
    specs: list[ModelSpec],
    test: Callable[[Models], Awaitable[None]],
    *,
    resident: int = 1,
    max_queue: int = 256,
    request_timeout: float | None = None,
) -> None:
    async def whole() -> None:
        models = Models(specs, Settings(max_queue=max_queue, request_timeout=request_timeout), resident=resident)
        models.start()
        try:
            await test(models)
        finally:
            await models.close()

    asyncio.run(whole())


async def begun(models: Models, name: str, hold: asyncio.Event) -> str:
    """A request: it has the model until `hold` is set."""
    worker = await models.get(name)
    generation = worker.generate([17, 300], LONG)
    await anext(generation)
    await hold.wait()
    generation.cancel()
    return worker.name


def test_a_model_is_switched_when_nobody_uses_the_other(make_spec: MakeSpec) -> None:
    async def test(models: Models) -> None:
        hold = asyncio.Event()
        first = asyncio.ensure_future(begun(models, "a", hold))
        while not models._uses["a"]:
            await asyncio.sleep(0.01)
        second = asyncio.ensure_future(begun(models, "b", hold))
        third = asyncio.ensure_future(begun(models, "a", hold))  # behind the one that waits, or it would never come
        await asyncio.sleep(0.2)
        assert list(models.loaded) == ["a"]
        assert models.health == "ok"
        hold.set()
        assert await asyncio.gather(first, second, third) == ["a", "b", "a"]
        assert list(models.loaded) == ["a"]
        assert not any(models._uses.values())

    run_with([make_spec("a"), make_spec("b")], test)


def test_those_who_fit_stay_and_the_one_used_least_lately_goes(make_spec: MakeSpec) -> None:
    async def test(models: Models) -> None:
        async def use(name: str) -> None:
            await models.get(name)

        for name in ("a", "b", "a", "c"):
            await asyncio.create_task(use(name))
        assert sorted(models.loaded) == ["a", "c"]

    run_with([make_spec("a"), make_spec("b"), make_spec("c")], test, resident=2)


def test_waiting_for_a_model_is_bounded_in_number_and_time(make_spec: MakeSpec) -> None:
    async def test(models: Models) -> None:
        hold = asyncio.Event()
        first = asyncio.ensure_future(begun(models, "a", hold))
        while not models._uses["a"]:
            await asyncio.sleep(0.01)
        waiting = asyncio.ensure_future(begun(models, "b", hold))
        await asyncio.sleep(0.05)
        with pytest.raises(ApiError) as caught:
            await models.get("b")
        assert caught.value.status == 429
        with pytest.raises(ApiError) as caught:
            await waiting
        assert caught.value.status == 504
        hold.set()
        assert await first == "a"

    run_with([make_spec("a"), make_spec("b")], test, max_queue=1, request_timeout=1.0)


def test_a_model_that_cannot_be_loaded_fails_its_requests_and_not_the_others(make_spec: MakeSpec) -> None:
    def broken() -> tuple[CausalLM, Tokenizer]:
        raise UserError("the weights are gone")

    bad = ModelSpec(name="bad", load=broken, make_engine=Opening().make_engine)

    async def test(models: Models) -> None:
        assert await models.first() == "a"
        for _ in range(2):
            with pytest.raises(ApiError, match="the weights are gone") as caught:
                await models.get("bad")
            assert caught.value.status == 503
        assert (await models.get("a")).name == "a"

    run_with([make_spec("a"), bad], test)


def test_who_waits_for_a_model_is_refused_when_the_server_stops(make_spec: MakeSpec) -> None:
    slow = threading.Event()

    def loading() -> tuple[CausalLM, Tokenizer]:
        slow.wait(10)
        raise UserError("too late")

    async def test(models: Models) -> None:
        waiting = [asyncio.ensure_future(models.get(name)) for name in ("a", "b", "a")]
        await asyncio.sleep(0.05)
        models.stop()
        for one in waiting:
            with pytest.raises(ApiError, match="shutting down"):
                await asyncio.wait_for(one, 5)
        with pytest.raises(ApiError, match="shutting down"):
            await models.get("a")
        slow.set()

    run_with([ModelSpec(name="a", load=loading, make_engine=Opening().make_engine), make_spec("b")], test)


def test_names_and_aliases(make_spec: MakeSpec) -> None:
    models = Models(Opening().specs(["/models/some", "other"], ["short"]), Settings())
    for name in ("short", "/models/some", "some", None, "", "default"):
        assert models.resolve(name) == "short"
    assert models.resolve("other") == "other"
    with pytest.raises(ApiError, match="there is short, other"):
        models.resolve("nope")


def test_who_is_in_memory_is_seen_over_http(make_spec: MakeSpec) -> None:
    with serving([make_spec("a"), make_spec("b")]) as live, live.client() as client:
        for name in ("a", "b", "a"):
            answer = client.post("/v1/completions", json={"prompt": "import", "model": name, "max_tokens": 2})
            assert answer.json()["model"] == name
            listed = client.get("/v1/models").json()["data"]
            assert {model["id"]: model["loaded"] for model in listed} == {"a": name == "a", "b": name == "b"}


def test_a_model_that_comes_early_leaves_the_others_what_they_need() -> None:
    residency = Residency(90, 10, {"a": 30, "b": 40})
    assert residency.fits
    assert not Residency(69, 10, {"a": 30, "b": 40}).fits
    assert (residency.limit("a"), residency.limit("b")) == (60, 70)

    class Loaded:
        pass

    model = Loaded()
    residency.opened("a", model)  # type: ignore[arg-type]
    assert residency.limit("b") == 100
    del model
    assert residency.limit("b") == 70


def test_memory_decides_whether_all_stay(tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    twin.symlink_to(built_in_folder())
    paths = ["builtin", str(twin)]
    opening = Opening(max_concurrency=2, max_context=256)
    residency = opening.residency(paths)
    assert residency is not None
    assert opening.residency(["builtin"]) is None
    need = opening._need("builtin", torch.device("cpu"))
    tight = taken_bytes(torch.device("cpu")) + need * 3 // 2
    assert replace(opening, load={"memory_limit": tight}).residency(paths) is None
    model, _ = opening.open(paths[0], residency)
    assert model.memory_limit is not None
    whole = residency.limit(paths[1])
    assert model.memory_limit < whole
