"""Which GPU of several is used."""

from types import SimpleNamespace

import pytest
import torch

from gfxlm.device.select import best_gpu, pick_device
from gfxlm.errors import UserError

RAPHAEL = ("gfx1036", True, 2, 512 << 20)
PHOENIX = ("gfx1103", True, 12, 8 << 30)
XTX = ("gfx1100", False, 96, 24 << 30)
STRIX_HALO = ("gfx1151", True, 40, 62 << 30)
POLARIS = ("gfx803", False, 36, 8 << 30)
R9700 = ("gfx1201:sramecc-:xnack-", False, 64, 32 << 30)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> object:
    """Makes torch see these GPUs: names, integrated or not, units and bytes."""

    def see(*gpus: tuple[str, bool, int, int]) -> None:
        def told(index: int) -> SimpleNamespace:
            name, integrated, units, total = gpus[index]
            return SimpleNamespace(
                gcnArchName=name, is_integrated=integrated, multi_processor_count=units, total_memory=total
            )

        monkeypatch.setattr(torch.version, "hip", "7.2")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_properties", told)
        for name in ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)

    return see


@pytest.mark.parametrize(
    ("gpus", "index"),
    [
        ([RAPHAEL, XTX], 1),
        ([XTX, RAPHAEL], 0),
        ([PHOENIX, XTX], 1),
        ([STRIX_HALO, R9700], 1),
        ([STRIX_HALO, POLARIS], 0),  # for which there are no kernels
        ([XTX, R9700], 0),
        ([XTX, XTX], 0),
        ([RAPHAEL, XTX, XTX], 1),
        ([XTX, (*XTX[:3], 48 << 30)], 1),
    ],
)
def test_the_best_of_several(host: object, gpus: list[tuple[str, bool, int, int]], index: int) -> None:
    host(*gpus)  # type: ignore[operator]
    assert pick_device() == torch.device("cuda", index)


def test_one_is_one(host: object) -> None:
    host(RAPHAEL)  # type: ignore[operator]
    assert pick_device() == torch.device("cuda")


def test_none_is_the_cpu(host: object) -> None:
    host()  # type: ignore[operator]
    assert best_gpu() is None
    assert pick_device() == torch.device("cpu")


@pytest.mark.parametrize("name", ["HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"])
def test_what_the_user_names_comes_first(host: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host(RAPHAEL, XTX)  # type: ignore[operator]
    monkeypatch.setenv(name, "0,1")
    assert pick_device() == torch.device("cuda")


def test_a_name_is_taken_as_it_is() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="device 'gpu'"):
        pick_device("gpu")
