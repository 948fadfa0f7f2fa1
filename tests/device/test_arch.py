"""Which architecture a GPU is, and what is done about one that nobody has heard of."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from gfxlm.device import arch as module
from gfxlm.device.arch import AMD, ARCHITECTURES, PORTABLE, architecture, assume, named, recognized
from gfxlm.errors import UserError
from gfxlm.ops._common import on_gpu

CUDA = torch.device("cuda", 0)


def test_a_cpu_is_portable() -> None:
    assert architecture(torch.device("cpu")) == PORTABLE


def test_assume_nests_and_ends() -> None:
    with assume(named("gfx1151")):
        assert architecture(CUDA).name == "gfx1151"
        with assume(named("sm_90")):
            assert architecture(torch.device("cpu")).name == "sm_90"
        assert architecture(torch.device("meta")).name == "gfx1151"
    assert architecture(torch.device("cpu")) == PORTABLE


def test_unknown_name() -> None:
    with pytest.raises(UserError, match="'gfx1' is not known; known are gfx90a"):
        named("gfx1")


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_known_ones_are_recognised_in_silence(name: str) -> None:
    if not named(name).kernels:
        pytest.skip("has no kernels")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert recognized(name) is named(name)


@pytest.mark.parametrize(("name", "family"), [("gfx1153", "gfx11"), ("sm_87", "sm_80"), ("sm_103", "sm_90")])
def test_relatives_use_the_familys_tables(name: str, family: str) -> None:
    with pytest.warns(UserWarning, match=f"{name} is not known"):
        arch = recognized(name)
    assert (arch.name, arch.family, arch.kernels) == (name, family, True)


def test_a_relative_is_taken_for_the_smallest() -> None:
    with pytest.warns(UserWarning, match="sm_87"):
        assert recognized("sm_87").shared_bytes == named("sm_86").shared_bytes


@pytest.mark.parametrize("name", ["gfx1030", "gfx1036", "gfx906", "gfx1250", "gfx1310", "sm_75", "sm_70"])
def test_the_rest_gets_plain_torch_and_a_warning(name: str) -> None:
    with pytest.warns(UserWarning, match=f"there are no kernels for {name}"):
        arch = recognized(name)
    assert not arch.kernels
    with assume(arch):
        assert not on_gpu(torch.empty(1, device="meta"))


@pytest.fixture
def fresh_detection(monkeypatch: pytest.MonkeyPatch) -> None:
    module._detect.cache_clear()
    yield
    module._detect.cache_clear()


@pytest.mark.usefixtures("fresh_detection")
def test_rocm_tells_the_name_with_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.2")
    told = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told)
    assert architecture(CUDA) is named("gfx942")


@pytest.mark.usefixtures("fresh_detection")
def test_the_warning_comes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [architecture(CUDA).kernels for _ in range(3)] == [False] * 3
    assert len(caught) == 1


@pytest.mark.usefixtures("fresh_detection")
def test_without_triton_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="triton is not installed"):
        assert not architecture(CUDA).kernels


@pytest.mark.usefixtures("fresh_detection")
def test_assumed_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GFXLM_ASSUME_ARCH", "gfx1100")
    assert architecture(torch.device("cpu")).name == "gfx1100"


def test_occupancy() -> None:
    # As LLVM's own remark on each of these kernels' assembly says.
    assert named("gfx1151").occupancy(143, 0, 2) == 10
    assert named("gfx1201").occupancy(120, 0, 2) == 12
    assert named("gfx942").occupancy(158, 0, 2) == 3
    assert named("gfx90a").occupancy(124, 0, 2) == 4
    # 64 KiB each: two programs of eight waves over four SIMDs.
    assert named("gfx1100").occupancy(64, 64 << 10, 8) == 4
    assert named("gfx942").occupancy(64, 64 << 10, 8) == 2


def test_vector_share() -> None:
    arch = named("gfx1100")
    # A clock issues 64 lanes a unit, and reads 960 / (2.5 * 96) = 4 bytes a unit: 64 instructions in 4 bytes' time.
    assert arch.vector_share(64, 4) == pytest.approx(1.0)
    assert all(named(name).units and named(name).bandwidth for name in AMD)
