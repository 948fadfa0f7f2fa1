"""What sysfs says of machines that are not here."""

import os
from pathlib import Path

import pytest

from gfxlm.device.system import DeviceFile, SystemGPU, gfx_name, read_system, version_of
from tests.device.machines import DESKTOP, GIB, MACHINES, MI300X, RX_7900_XTX, STRIX_HALO, build


def test_strix_halo(tmp_path: Path) -> None:
    system = read_system(build(tmp_path, STRIX_HALO), "6.18.4-arch1-1")
    assert system.gpus == (
        SystemGPU(
            vendor="amd",
            pci="0000:c4:00.0",
            pci_id="1002:1586",
            render="/dev/dri/renderD128",
            name="gfx1151",
            units=40,
            vram_total=GIB // 2,
            vram_used=GIB // 4,
            gtt_total=62 * GIB,
            gtt_used=4096,
        ),
    )
    assert system.gpus[0].integrated
    assert system.kernel == "6.18.4-arch1-1"
    assert system.kfd == DeviceFile("/dev/kfd", True)
    assert system.renders == (DeviceFile("/dev/dri/renderD128", True),)
    assert system.amdgpu_loaded
    assert (system.container, system.memory_limit) == ("", None)


def test_rx_7900_xtx(tmp_path: Path) -> None:
    [gpu] = read_system(build(tmp_path, RX_7900_XTX)).gpus
    assert (gpu.name, gpu.units, gpu.vram_total, gpu.integrated) == ("gfx1100", 96, 24 * GIB, False)


def test_mi300x(tmp_path: Path) -> None:
    gpus = read_system(build(tmp_path, MI300X)).gpus
    assert {(gpu.name, gpu.units, gpu.vram_total, gpu.integrated) for gpu in gpus} == {
        ("gfx942", 304, 192 * GIB, False)
    }
    assert len({gpu.pci for gpu in gpus}) == 8


def test_a_desktop_with_two(tmp_path: Path) -> None:
    inside, card = read_system(build(tmp_path, DESKTOP)).gpus
    assert (inside.name, inside.units, inside.integrated) == ("gfx1036", 2, True)
    assert (card.name, card.units, card.integrated) == ("gfx1100", 96, False)


def test_mi300a_shares_the_hosts_memory() -> None:
    assert SystemGPU("amd", "", "1002:74a0", "", "gfx942").integrated
    assert not SystemGPU("amd", "", "1002:74a1", "", "gfx942").integrated


@pytest.mark.parametrize("machine", MACHINES)
def test_without_rocms_part_of_the_driver(machine: str, tmp_path: Path) -> None:
    system = read_system(build(tmp_path, MACHINES[machine], kfd=False))
    assert system.kfd is None
    assert all(gpu.vram_total and not gpu.name and not gpu.units for gpu in system.gpus)


def test_nothing_there(tmp_path: Path) -> None:
    system = read_system(tmp_path)
    assert (system.gpus, system.kfd, system.renders, system.amdgpu_loaded) == ((), None, (), False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
def test_files_that_may_not_be_opened(tmp_path: Path) -> None:
    build(tmp_path, STRIX_HALO)
    (tmp_path / "dev/kfd").chmod(0)
    assert read_system(tmp_path).kfd == DeviceFile("/dev/kfd", False)


def test_damaged_files_are_left_out(tmp_path: Path) -> None:
    build(tmp_path, STRIX_HALO)
    device = tmp_path / "sys/class/drm/renderD128/device"
    (device / "mem_info_vram_total").write_text("many")
    (device / "mem_info_gtt_total").write_bytes(b"\xff\xfe")
    (device / "uevent").unlink()
    (tmp_path / "sys/class/kfd/kfd/topology/nodes/1/properties").write_text("simd_count\nsimd_count 80 80\n\n")
    [gpu] = read_system(tmp_path).gpus
    assert (gpu.vram_total, gpu.gtt_total, gpu.pci, gpu.name) == (0, 0, "", "")


@pytest.mark.parametrize(
    ("file", "container"),
    [
        (".dockerenv", "docker"),
        ("run/.containerenv", "podman"),
        ("run/secrets/kubernetes.io", "kubernetes"),
        ("dev/dxg", "wsl"),
    ],
)
def test_containers(file: str, container: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    assert read_system(tmp_path).container == container


@pytest.mark.parametrize(("text", "limit"), [("max", None), ("8589934592", 8 * GIB), ("9223372036854771712", None)])
def test_limits_of_the_cgroup(text: str, limit: int | None, tmp_path: Path) -> None:
    assert read_system(build(tmp_path, [], limit=text)).memory_limit == limit


@pytest.mark.parametrize(
    ("version", "name"),
    [
        (110501, "gfx1151"),
        (90010, "gfx90a"),
        (90402, "gfx942"),
        (90500, "gfx950"),
        (100306, "gfx1036"),
        (120001, "gfx1201"),
        (0, ""),
    ],
)
def test_names(version: int, name: str) -> None:
    assert gfx_name(version) == name


@pytest.mark.parametrize(
    ("release", "version"),
    [
        ("6.18.4-arch1-1", (6, 18, 4)),
        ("6.17.0-1008-oem", (6, 17, 0)),
        ("7.0", (7, 0)),
        ("6.18.0-rc3", (6, 18, 0)),
        ("", ()),
    ],
)
def test_releases(release: str, version: tuple[int, ...]) -> None:
    assert version_of(release) == version
