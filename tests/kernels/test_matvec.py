"""The matrix-vector kernel: numbers under Triton's interpreter (or on a GPU), machine code for AMD."""

import json
import os
import subprocess
import sys

import pytest
import torch

from gfxlm.kernels.matvec import matvec
from gfxlm.ops.quantized import dequantize, quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_against_float64(bits: int, dtype: torch.dtype, interleaved: bool) -> None:
    for rows, n, columns, group_size in ((1, 9, 64, 64), (1, 5, 2240, 32), (3, 7, 384, 128), (8, 4, 192, 64)):
        w_q, scales, biases = quantize(torch.randn(n, columns).to(dtype), group_size, bits)
        x = torch.randn(rows, columns).to(dtype)
        exact = x.double() @ dequantize(w_q, scales, biases, group_size, bits, dtype=torch.float64).mT
        if interleaved:
            scales, biases = torch.stack((scales, biases), dim=-1).unbind(-1)
        on_device = (t.to(DEVICE) for t in (x, w_q))
        pair = (scales, biases) if DEVICE == "cpu" else torch.stack((scales, biases), -1).to(DEVICE).unbind(-1)
        y = matvec(*on_device, *pair, group_size, bits).cpu()
        assert y.dtype == dtype
        # One rounding of the result, and fp32's own in the sum.
        bound = torch.finfo(dtype).eps * exact.abs() + 1e-5 * exact.abs().max()
        assert ((y.double() - exact).abs() <= bound).all()


def test_nothing() -> None:
    w_q, scales, biases = quantize(torch.randn(4, 64))
    assert matvec(torch.empty(0, 64), w_q, scales, biases, 64, 4).shape == (0, 4)


CODEGEN = """
import json, re, sys
from collections import Counter
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from gfxlm.kernels.matvec import MatvecConfig, matvec_kernel

arch, wave = sys.argv[1], int(sys.argv[2])
report = []
for rows, bits in ((1, 4), (1, 8), (8, 4)):
    config = MatvecConfig.of((rows, 4096, 4096), bits, 64, "bfloat16")
    types = {"p_x": "*bf16", "p_w": "*i32", "p_scales": "*i32", "p_biases": "*bf16", "p_y": "*bf16"}
    types |= dict.fromkeys(("M", "N", "stride_row", "stride_group"), "i32")
    types |= dict.fromkeys(config.constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(5)}
    source = ASTSource(fn=matvec_kernel, signature=types, constexprs=config.constants, attrs=aligned)
    kernel = compile(source, target=GPUTarget("hip", arch, wave), options={"num_warps": config.num_warps})
    assembly = kernel.asm["amdgcn"]
    loop = Counter(re.findall(r"^\\s+(\\w+)", assembly, re.M))
    words = config.constants["BLOCK_N"] * config.constants["BLOCK_W"] / (config.num_warps * wave)
    report.append({
        "spills": sum(map(int, re.findall(r"_spill_count:\\s*(\\d+)", assembly))),
        "lds": kernel.metadata.shared,
        "wide": sum(n for name, n in loop.items() if re.search(r"load_(b128|dwordx4)", name)),
        "valu_per_weight": sum(n for name, n in loop.items() if name.startswith("v_")) / (words * 32 / bits),
    })
print(json.dumps(report))
"""


@pytest.mark.parametrize(("arch", "wave"), [("gfx942", 64), ("gfx1100", 32), ("gfx1151", 32), ("gfx1201", 32)])
def test_amd_code(arch: str, wave: int) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CODEGEN, arch, str(wave)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=True,
    )
    for entry in json.loads(done.stdout):
        assert entry["spills"] == 0
        assert entry["lds"] <= 64 << 10
        assert entry["wide"] > 0
