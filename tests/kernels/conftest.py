"""Triton's interpreter, made to treat bfloat16 as a GPU does: by itself it truncates, and multiplies bits."""

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl

if not torch.cuda.is_available():
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    _cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def _rounded(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return _cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        even = (bits >> 16) & 1
        rounded = ((bits + np.uint32(0x7FFF) + even) >> 16).astype(np.uint16)
        rounded = np.where(np.isnan(src.data), np.uint16(0x7FC0), rounded)
        return TensorHandle(rounded, tl.bfloat16)

    def _multiplied(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (_cast(self, side, tl.float32) for side in (a, b))
        return _dot(self, a, b, d, *precision)

    @pytest.fixture(autouse=True)
    def bfloat16_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(InterpreterBuilder, "cast_impl", _rounded)
        for name in ("create_fp_trunc", "create_fp_ext"):
            monkeypatch.setattr(InterpreterBuilder, name, _rounded)
        monkeypatch.setattr(InterpreterBuilder, "create_dot", _multiplied)
