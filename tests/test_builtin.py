"""The model in the package: it loads, is small, writes Python, and predicts library files that it never saw."""

import hashlib
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import gfxlm
from gfxlm.engine.load import built_in_folder
from gfxlm.engine.perplexity import perplexity

# Files of CPython's library that training never saw, and that are the same in 3.11, 3.12 and 3.13.
HELD_OUT = (
    "email/mime/multipart.py",
    "email/quoprimime.py",
    "idlelib/debugobj_r.py",
    "idlelib/mainmenu.py",
    "importlib/metadata/_collections.py",
    "string.py",
    "xml/dom/minicompat.py",
    "zoneinfo/__init__.py",
)
DIGEST = "36429d16930c49931b3e4af894e59c1ab1e06b13ed8e0973c1758217d3c2acdb"
PERPLEXITY = {"4-bit": 13.018, "dequantised to bf16": 13.018}


@pytest.fixture(scope="module")
def held_out() -> str:
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / name for name in HELD_OUT]
    if not all(file.is_file() for file in files):
        pytest.skip("this Python has no complete standard library")
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    if hashlib.sha256(text.encode()).hexdigest() != DIGEST:
        pytest.skip("this Python's library differs from the one that was measured")
    return text


@pytest.mark.parametrize("precision", PERPLEXITY)
def test_held_out_perplexity(precision: str, held_out: str, tmp_path: Path) -> None:
    folder = built_in_folder()
    if precision != "4-bit":
        folder = tmp_path / "dense"
        gfxlm.convert(built_in_folder(), folder, dequantize=True)
    model, tokenizer = gfxlm.load(folder)
    assert model.dtype == torch.bfloat16
    # Few enough rows at a time for the int4 kernel, not the dense product, to do the work.
    found = perplexity(model, tokenizer.encode(held_out), 256, batch_size=1)
    assert found.value == pytest.approx(PERPLEXITY[precision], rel=0.01)


def test_command_writes_python_with_no_model_named() -> None:
    command = [sys.executable, "-m", "gfxlm", "generate", "-p", "def fibonacci(n):", "--max-tokens", "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    code = "def fibonacci(n):" + done.stdout
    first = code[: code.index("\n\n")] if "\n\n" in code else code
    compile(first, "generated", "exec")
    assert "Generation: 40 tokens" in done.stderr


def test_package_stays_small() -> None:
    assert sum(file.stat().st_size for file in built_in_folder().iterdir()) <= 12_000_000


def test_every_part_of_the_headline_model_is_in_it() -> None:
    model, _ = gfxlm.load("builtin")
    names = [name for name, _ in model.named_modules()]
    for part in ("linear_attn.in_proj", "self_attn.qkv_proj", "mlp.switch_mlp", "mlp.shared_expert", "mlp.gate"):
        assert any(part in name for name in names)
    assert model.config.model_type == "qwen3_next"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees_with_the_cpu() -> None:
    on_cpu, tokenizer = gfxlm.load("builtin", device="cpu", dtype=torch.float32)
    on_gpu, _ = gfxlm.load("builtin", device="cuda", dtype=torch.float32)
    tokens = torch.tensor([tokenizer.encode("class Stack:\n    def push(self, item):\n        self.items")])
    ours, expected = on_gpu(tokens).cpu(), on_cpu(tokens)
    assert (ours - expected).abs().max() <= 1e-3 * expected.std()
    prompt = "def fibonacci(n):"
    assert gfxlm.generate(on_gpu, tokenizer, prompt, max_tokens=32) == gfxlm.generate(
        on_cpu, tokenizer, prompt, max_tokens=32
    )
