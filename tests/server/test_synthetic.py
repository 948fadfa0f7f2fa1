"""`gfxlm serve --synthetic`: a model of random weights behind the same worker."""

import asyncio
import json
from pathlib import Path

import pytest

from benchmarks import serve_engine
from gfxlm import SamplingParams
from gfxlm.engine.load import built_in_folder
from gfxlm.server.opening import Opening
from gfxlm.server.worker import Worker
from tests.cli.runner import complaint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A config.json of the built-in model's shapes, and nothing else."""
    config = json.loads((built_in_folder() / "config.json").read_text())
    shapes = {name: value for name, value in config.items() if not name.startswith("quantization")}
    (tmp_path / "config.json").write_text(json.dumps(shapes))
    return tmp_path


def test_it_is_served_under_its_name(folder: Path) -> None:
    opening = Opening(load={"device": "cpu", "revision": None, "self_test": True}, max_context=64, max_concurrency=2)
    spec = opening.synthetic(str(folder))
    assert spec.name == str(folder)

    async def answer() -> tuple[int, str]:
        worker = Worker(spec.name, spec.load, spec.make_engine, capacity=2)
        worker.start()
        await worker.ready()
        generation = worker.generate(worker.tokenizer.encode("hello"), SamplingParams(max_tokens=12))
        text = "".join([piece.text async for piece in generation])
        await worker.close()
        return generation.generated_tokens, text

    tokens, text = asyncio.run(answer())
    assert tokens == 12
    assert text


def test_it_is_alone() -> None:
    assert complaint("serve", "--synthetic", "qwen3-8b", "--model", "x").startswith("--synthetic: is served alone")


def test_the_workers_benchmark_runs(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    sizes = ["--input-tokens", "8", "--output-tokens", "4", "--clients", "1,3", "--rounds", "2"]
    serve_engine.main([*sizes, "--device", "cpu", "--synthetic", str(folder), "--json", str(report)])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith(("| 1 |", "| 3 |"))]
    assert [row[1].strip() for row in rows] == ["1", "3"]
    alone, together = json.loads(report.read_text())
    assert (alone["completed"], together["completed"]) == (2, 6)
    assert together["total_output_tokens"] == 24
    assert together["total_cached_tokens"] == 0
    assert float(rows[1][3]) == pytest.approx(together["output_throughput"] / alone["output_throughput"], abs=0.006)
