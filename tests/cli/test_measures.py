"""`gfxlm perplexity`, `bench`, `info` and `convert`: what they print, and what they refuse."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import gfxlm
from gfxlm.engine.budget import remaining
from gfxlm.engine.info import describe
from gfxlm.engine.perplexity import perplexity
from gfxlm.models.synthetic import synthetic_checkpoint
from gfxlm.nn.cache import KVFormat
from gfxlm.weights.checkpoint import Checkpoint
from tests.checkpoints import CORPUS, FAMILIES, mlx_checkpoint, transformers_checkpoint
from tests.cli.runner import complaint, run


@pytest.fixture(scope="module")
def folder() -> Path:
    return mlx_checkpoint("qwen3")


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine can do is measured on less, to save time."""
    monkeypatch.setattr("gfxlm.device.ceilings._READ_BYTES", {"cpu": 1 << 24})
    monkeypatch.setattr("gfxlm.device.ceilings._MATRIX_SIZE", {"cpu": 128})


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(CORPUS)
    return path


def test_perplexity(folder: Path, text: Path) -> None:
    model, tokenizer = gfxlm.load(folder)
    expected = perplexity(model, tokenizer.encode(CORPUS)[:300], 64, 4)
    options = ("--model", folder, "--sequence-length", "64", "-b", "4", "-m", "300")
    result = run("perplexity", text, *options)
    figures = f"perplexity {expected.value:.4f} ± {expected.standard_error:.4f} (295 tokens in windows of 64, "
    assert result.stdout.startswith(figures)
    assert result.stderr == ""
    printed = json.loads(run("perplexity", "-", *options, "-o", "json", text=CORPUS).stdout)
    assert printed["perplexity"] == pytest.approx(expected.value)
    assert printed["standard_error"] == pytest.approx(expected.standard_error)
    assert (printed["tokens"], printed["sequence_length"]) == (295, 64)


def test_perplexity_refuses(folder: Path, tmp_path: Path, text: Path) -> None:
    assert complaint("perplexity", "/no/such", "--model", folder) == "/no/such: No such file or directory"
    assert complaint("perplexity", tmp_path, "--model", folder) == f"{tmp_path}: Is a directory"
    (tmp_path / "binary").write_bytes(b"a\xff")
    assert complaint("perplexity", tmp_path / "binary", "--model", folder).endswith("not UTF-8 text (byte 1 is 0xff)")
    assert "at least 2 are needed" in complaint("perplexity", "/dev/null", "--model", folder)
    assert "but is 1025" in complaint("perplexity", text, "--model", folder, "--sequence-length", "1025")


def bench(folder: Path, *options: str) -> str:
    result = run("bench", "-m", folder, "-r", "2", *options)
    assert result.exit_code == 0
    assert result.stderr.startswith("measured on this machine: ")
    return result.stdout


def test_bench_table_is_llama_benchs(folder: Path) -> None:
    lines = bench(folder, "-p", "8,16", "-n", "2", "-pg", "4,3", "-d", "0,5").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "model",
        "size",
        "params",
        "backend",
        "threads",
        "test",
        "t/s",
        "GB/s",
        "% bw",
        "TFLOP/s",
        "% mm",
    ]
    assert all(set(cell) == {"-", ":"} and cell.endswith(":") for cell in cells[1])
    names = ["pp8", "pp16", "tg2", "pp4+tg3"]
    assert [row[5] for row in cells[2:]] == names + [f"{name} @ d5" for name in names]
    info = describe(Checkpoint.open(folder))
    for row in cells[2:]:
        assert row[0] == folder.name
        assert row[1:4] == [f"{info.weight_bytes / 2**20:.2f} MiB", f"{info.parameters / 1e6:.2f} M", "CPU"]
        mean, deviation = row[6].split(" ± ")
        assert float(mean) > 0 <= float(deviation)
        generates, reads = row[5].startswith("tg"), row[5].startswith("pp") and "+" not in row[5]
        assert [bool(cell) for cell in row[7:]] == [generates, generates, reads, reads]
    assert len({len(line) for line in lines}) == 1


def test_bench_batch_has_a_column(folder: Path) -> None:
    header, _, row = bench(folder, "-p", "8", "-n", "0", "-b", "3").splitlines()
    column = [cell.strip() for cell in header.split("|")].index("batch")
    assert row.split("|")[column].strip() == "3"


def test_bench_in_other_forms(folder: Path) -> None:
    options = ("-p", "8", "-n", "2", "-d", "4", "--no-warmup")
    rows: dict[str, list[dict[str, Any]]] = {
        "json": json.loads(bench(folder, *options, "-o", "json")),
        "jsonl": [json.loads(line) for line in bench(folder, *options, "-o", "jsonl").splitlines()],
        "csv": list(csv.DictReader(io.StringIO(bench(folder, *options, "-o", "csv")))),
    }
    info = describe(Checkpoint.open(folder))
    for form, (prompt, generation) in rows.items():
        number = float if form == "csv" else lambda value: value
        assert (prompt["test"], generation["test"]) == ("pp8 @ d4", "tg2 @ d4")
        assert [number(prompt[name]) for name in ("n_prompt", "n_gen", "n_depth", "batch_size")] == [8, 0, 4, 1]
        if form != "csv":
            assert len(prompt["samples_ts"]) == 2
        operations = number(prompt["avg_ts"]) * info.prefill_operations(8, 4) / 8
        assert number(prompt["operations_per_second"]) == pytest.approx(operations)
        assert number(prompt["matmul_share"]) == pytest.approx(operations / number(prompt["matmul_rate"]))
        nbytes = number(generation["avg_ts"]) * info.decode_bytes(4 + 1.5)
        assert number(generation["bytes_per_second"]) == pytest.approx(nbytes)
        assert number(generation["bandwidth_share"]) == pytest.approx(nbytes / number(generation["read_bandwidth"]))
        assert generation["matmul_share"] in (None, "")


def test_bench_tells_the_first_prompt(folder: Path) -> None:
    result = run("bench", "-m", folder, "-r", "1", "-p", "8,16", "-n", "2")
    assert re.fullmatch(r"first prompt: pp8 \d+\.\d\d t/s, pp16 \d+\.\d\d t/s", result.stderr.splitlines()[1])
    assert len(run("bench", "-m", folder, "-r", "1", "-p", "0", "-n", "2").stderr.splitlines()) == 1
    prompt, generation = json.loads(bench(folder, "-p", "8", "-n", "2", "-o", "json"))
    assert prompt["first_ts"] > 0
    assert generation["first_ts"] is None
    # Of a CPU nobody counts what was allocated.
    assert prompt["peak_bytes"] is prompt["memory_share"] is None


def test_bench_with_quantised_keys_and_values(folder: Path) -> None:
    options = ("-p", "0", "-n", "2", "-d", "50", "--kv-bits", "4", "--kv-group-size", "32")
    (row,) = json.loads(bench(folder, *options, "-o", "json"))
    assert (row["kv_bits"], row["kv_group_size"]) == (4, 32)
    info = describe(Checkpoint.open(folder)).with_kv(KVFormat(4, 32))
    assert row["bytes_per_second"] == pytest.approx(row["avg_ts"] * info.decode_bytes(50 + 1.5))
    header, _, cells = (line.split("|") for line in bench(folder, *options).splitlines())
    assert cells[[cell.strip() for cell in header].index("kv bits")].strip() == "4"


def test_bench_trace(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    result = run("bench", "-m", folder, "--trace", path, "-p", "8,16", "-d", "0,5", "--prefill-step-size", "6")
    assert "launches are calls of torch's operators" in result.stderr
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines()]
    assert lines[0] == ["step", "layers", "", "launches", "µs", "launches/layer", "µs/layer", "%"]
    heads = [line for line in lines[2:] if line[0]]
    kinds = ["2 x attention + MLP", "embedding, head, sampling", "all"]
    assert [line[0] for line in heads] == ["pp6 @ d5"] * 3 + ["tg1 @ d5"] * 3
    assert [line[1].split(",")[0] for line in heads] == [kind.split(",")[0] for kind in kinds] * 2
    assert heads[2][1].endswith(" µs a token")
    assert int(heads[3][3]) == 2 * float(heads[3][5])
    assert int(heads[3][3]) + int(heads[4][3]) == int(heads[5][3])
    assert len({len(line) for line in result.stdout.splitlines()}) == 1
    assert json.loads(path.read_text())["traceEvents"]
    rows = json.loads(run("bench", "-m", folder, "--trace", path, "-p", "0", "-o", "json").stdout)
    assert {row["step"] for row in rows} == {"tg1"}
    layers = [row for row in rows if row["name"] == "all"]
    assert [row["layers"] for row in layers] == ["attention + MLP", "embedding, head, sampling", "all"]
    assert sum(row["share"] for row in rows if row["name"] != "all") == pytest.approx(1)
    assert layers[0]["launches"] == 2 * layers[0]["launches_per_layer"]


def test_bench_refuses(folder: Path) -> None:
    assert complaint("bench", "-m", folder, "--trace", "/no/such/trace.json") == (
        "/no/such/trace.json: its folder does not exist"
    )
    assert complaint("bench", "-m", folder, "--kv-bits", "5").startswith("a KV cache can have 4 or 8 bits")
    assert "groups of 32 or 64 fit" in complaint("bench", "-m", folder, "--kv-bits", "4", "--kv-group-size", "128")
    assert complaint("bench", "-m", folder, "-p", "a,b") == "-p: expected numbers with commas between, but got 'a,b'"
    assert complaint("bench", "-m", folder, "-pg", "5").startswith("-pg: expected two numbers above 0")
    assert complaint("bench", "-m", folder, "-p", "2000").startswith("pp2000 needs 2000 positions")


def test_info(folder: Path) -> None:
    found = describe(Checkpoint.open(folder))
    text = run("info", folder, "--device", "cpu").stdout
    lines = {line[:20].strip(): line[20:] for line in text.splitlines()}
    assert lines["architecture"] == "qwen3"
    assert lines["quantisation"] == "4-bit affine, group 64"
    assert (
        lines["parameters"] == f"{found.parameters / 1e6:.2f} M, active per token {found.active_parameters / 1e6:.2f} M"
    )
    assert lines["bytes per token"] == f"{found.bytes_per_token / 1e3:.2f} kB at batch 1, none of it state"
    # Two layers, two heads of 64 features, keys and values; with a scale and a bias for 64 of them.
    assert lines["KV cache per token"] == "1.02 kB with 16 bits, 544 bytes with 8 bits, 288 bytes with 4 bits"
    assert lines["KV cache at 1024"] == "1.05 MB with 16 bits, 557.06 kB with 8 bits, 294.91 kB with 4 bits"
    assert lines["fits at 1024"].startswith("yes: needs ")
    hybrid = run("info", mlx_checkpoint("qwen3_next"), "--device", "cpu").stdout
    assert "4 (3 gated delta net, 1 attention)" in hybrid


def test_info_of_heads_that_do_not_divide(tmp_path: Path) -> None:
    """Groups of 64 where they fit, else of 32, else none; rows of 48 bytes take 64."""
    config = FAMILIES["llama"] | {"model_type": "llama", "num_attention_heads": 4}
    for head_dim, sizes in ((96, {"16": 1536, "8": 864, "4": 608}), (80, {"16": 1280})):
        folder = tmp_path / str(head_dim)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | {"head_dim": head_dim}))
        tensors = synthetic_checkpoint(str(folder), torch.device("cpu"), group_size=32).tensors
        save_file({name: tensor.read() for name, tensor in tensors.items()}, folder / "model.safetensors")
        quantized = config | {"head_dim": head_dim, "quantization": {"bits": 4, "group_size": 32}}
        (folder / "config.json").write_text(json.dumps(quantized))
        printed = json.loads(run("info", folder, "--device", "cpu", "--json").stdout)["kv_bits"]
        assert {bits: entry["bytes_per_token"] for bits, entry in printed.items()} == sizes
        assert all(entry["bytes"] == 1024 * entry["bytes_per_token"] for entry in printed.values())


def test_info_when_memory_is_short(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, plan = describe(Checkpoint.open(folder)), remaining(gfxlm.load(folder)[0])
    monkeypatch.setattr("gfxlm.engine.budget.available_bytes", lambda *_: plan.needed(100) + 2 * plan.position)
    text = run("info", folder, "--device", "cpu").stdout
    assert "no: needs" in text
    assert re.search(r"^longest context +(\d+) tokens fit$", text, re.MULTILINE)
    printed = json.loads(run("info", folder, "--device", "cpu", "--json").stdout)
    assert printed["fits"] == {"1024": False}
    assert 90 <= printed["longest_context"] <= 102  # norms are weights to one, and none to the other
    assert printed["bytes_per_token"] == found.bytes_per_token
    assert printed["bits_per_weight"] == pytest.approx(found.bits_per_weight)


def test_info_refuses(tmp_path: Path) -> None:
    assert complaint("info", tmp_path) == f"{tmp_path}: not a model folder (no config.json in it)"


@pytest.mark.parametrize(
    ("options", "quantization"),
    [
        (["-q"], "4-bit affine, group 64"),
        (["-q", "--bits", "3", "--group-size", "32"], "3-bit affine, group 32"),
        (["--quantize", "--q-bits", "8", "--q-group-size", "128"], "8-bit affine, group 128"),
        (["-q", "--mode", "mxfp4"], "mxfp4"),
        (["-q", "--q-mode", "nvfp4"], "nvfp4"),
        (["-q", "--mixed", "mixed_3_6"], "3-bit affine, group 64; 2 matrices 6-bit affine, group 64"),
        (["--dtype", "float16"], "float16"),
    ],
)
def test_convert(options: list[str], quantization: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("convert", "--model", transformers_checkpoint("qwen3"), "--out", out, *options)
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.startswith(f"{out}: {quantization}; ")
    assert describe(Checkpoint.open(out)).quantization == quantization


def test_convert_there_and_back_and_over(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("convert", "--hf-path", folder, "--mlx-path", out, "-d")
    assert run(*arguments).exit_code == 0
    assert describe(Checkpoint.open(out)).quantization == "bfloat16"
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    assert "--force" in complaint(*arguments)
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before
    assert run(*arguments, "--force", "--dtype", "float32").exit_code == 0
    assert describe(Checkpoint.open(out)).quantization == "float32"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-q", "--bits", "7"], "q_bits: 7 is not one of"),
        (["-q", "--group-size", "48"], "q_group_size: 48 is not one of"),
        (["--bits", "4", "--mixed", "mixed_3_6"], "--bits, --mixed: of use with -q only"),
        (["-q", "-d"], "quantize, dequantize: choose one of the two"),
    ],
)
def test_convert_refuses(options: list[str], said: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert complaint("convert", "--model", transformers_checkpoint("qwen3"), "--out", out, *options).startswith(said)
    assert list(tmp_path.iterdir()) == []
