import pytest
import torch

from gfxlm.engine.diagnose import check_device
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.request import Request

LOST = torch.device("meta")  # nothing can be read back from it


def failed(error: Exception | None) -> Request:
    return Request([1], SamplingParams(), exception=error)


def test_a_device_is_tried_where_a_request_has_failed_on_it() -> None:
    accelerator = failed(torch.AcceleratorError("an illegal memory access"))
    check_device([failed(None), failed(ValueError())], LOST)
    check_device([accelerator], torch.device("cpu"))
    with pytest.raises(NotImplementedError):
        check_device([failed(None), accelerator], LOST)
