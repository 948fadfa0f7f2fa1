"""Whether there will be graphs, as far as it can be told without a GPU."""

import warnings

import pytest
import torch

from gfxlm.device.graph import shared_pool


def test_switched_off_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GFXLM_NO_GRAPH", "1")
    with pytest.warns(UserWarning, match="GFXLM_NO_GRAPH is set"):
        assert shared_pool(torch.device("cuda")) is None


def test_a_cpu_is_quiet() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shared_pool(torch.device("cpu")) is None
