"""Products with unquantised matrices: who does them where."""

import pytest
import torch
import torch.nn.functional as F

from gfxlm.device import gemm
from gfxlm.device.arch import assume, named
from gfxlm.kernels.launch import recording
from gfxlm.ops.matrix import dense_matmul
from gfxlm.weights.weight import DenseWeight


@pytest.mark.parametrize("shape", [(3, 8), (8,), (2, 3, 8), (0, 8), (2, 0, 8)])
def test_against_torch(shape: tuple[int, ...]) -> None:
    x, w = torch.randn(shape), torch.randn(5, 8)
    assert torch.allclose(dense_matmul(x, w), (x @ w.mT), atol=1e-5)
    assert torch.equal(DenseWeight(w).matmul(x), dense_matmul(x, w))


def test_wrong_columns() -> None:
    with pytest.raises(ValueError, match=r"^x: last dimension 7 does not match w \(5, 8\)$"):
        dense_matmul(torch.randn(3, 7), torch.randn(5, 8))


def test_gradients_are_torchs() -> None:
    w = torch.randn(5, 8, requires_grad=True)
    dense_matmul(torch.randn(3, 8), w).sum().backward()
    assert w.grad is not None


@pytest.mark.parametrize(("library", "launched"), [(gemm.TRITON, 1), (gemm.HIPBLASLT, 0)])
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, library: str, launched: int) -> None:
    monkeypatch.setattr(gemm, "library", lambda device, dtype, rows: library)
    x, w = (torch.empty(3, 8, dtype=torch.bfloat16, device="meta") for _ in range(2))
    with torch.inference_mode(), recording(named("gfx1151")) as launches:
        assert dense_matmul(x[None], w).shape == (1, 3, 3)
    assert [launch.kernel.__name__ for launch in launches] == ["dense_kernel"] * launched


def test_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "library", lambda *_: gemm.TRITON)
    with assume(named("gfx1030")):
        x = torch.empty(3, 8, device="meta")
        assert dense_matmul(x, x).shape == (3, 3)


def test_half_precision_on_a_cpu_sees_few_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, seen = F.linear, set()

    def counted(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        seen.add(len(x))
        return linear(x, w)

    w = torch.randn(24, 32).bfloat16()
    monkeypatch.setattr(F, "linear", counted)
    for rows in range(1, 600):
        x = torch.randn(rows, 32).bfloat16()
        y = dense_matmul(x, w)
        assert y.shape == (rows, 24)
        torch.testing.assert_close(y.double(), x.double() @ w.double().mT, rtol=2**-8, atol=1e-3)
    assert len(seen) <= 8 + 7 + 9  # oneDNN keeps something for each of them
