"""Triton's interpreter patches its language anew at every call of a helper; once a launch is enough."""

from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang

    @pytest.fixture(autouse=True)
    def patch_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
        patched: set[Any] = set()
        run = interpreter.GridExecutor.__call__

        def launched(self: Any, *args: Any, **kwargs: Any) -> None:
            patched.clear()
            run(self, *args, **kwargs)

        def called(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.fn not in patched:
                patched.add(self.fn)
                _patch(self.fn)
            return self.rewrite()(*args, **kwargs)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
        monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", called)
