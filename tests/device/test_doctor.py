"""What is said of hosts that are not here: findings, and the fix beside each that is not as it should be."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gfxlm.device import doctor
from gfxlm.device.doctor import Host, TorchGPU, devices, driver, environment, facts, kernel, libraries, memory
from gfxlm.device.finding import Finding, examined
from gfxlm.device.system import DeviceFile, read_system
from tests.device.machines import DESKTOP, GIB, MACHINES, STRIX_HALO, build

CUDA = torch.device("cuda", 0)
VERSIONS = {"python": "3.12.3", "torch": "2.11.0+rocm7.2", "rocm": "7.2", "cuda": "", "driver": "amdgpu 6.18.4"}
TRITON = ("triton-rocm", "3.6.0")
RADEON_8060S = TorchGPU(0, "gfx1151", "Radeon 8060S", True, 40, 62 * GIB, "0000:c4:00")
XTX = TorchGPU(0, "gfx1100", "RX 7900 XTX", False, 96, 24 * GIB, "0000:03:00")
INSIDE = TorchGPU(1, "gfx1036", "AMD Radeon Graphics", True, 2, GIB // 2, "0000:0e:00")


@pytest.fixture
def strix_halo(tmp_path: Path) -> Host:
    """A healthy one, but that its GPU reaches half of the memory."""
    system = read_system(build(tmp_path, STRIX_HALO), "6.18.4-arch1-1")
    wanted = dict([TRITON])
    return Host(system, CUDA, (RADEON_8060S,), VERSIONS, wanted, True, TRITON, {}, (124 * GIB, 120 * GIB))


@pytest.fixture
def desktop(tmp_path: Path) -> Host:
    system = read_system(build(tmp_path, DESKTOP), "6.14.0")
    return Host(system, CUDA, (XTX, INSIDE), VERSIONS, dict([TRITON]), True, TRITON, {}, (32 * GIB, 30 * GIB))


def found(check: Callable[[Host], Iterator[Finding]], host: Host) -> dict[str, Finding]:
    return {finding.name: finding for finding in check(host)}


def warned(check: Callable[[Host], Iterator[Finding]], host: Host) -> list[Finding]:
    """What is not as it should be; each says what to do."""
    bad = [finding for finding in check(host) if finding.level != "ok"]
    assert all(finding.fix for finding in bad)
    return bad


@pytest.mark.parametrize(
    ("release", "good"),
    [
        ("6.18.4-arch1-1", True),
        ("6.19.0", True),
        ("7.1.2-1", True),
        ("6.17.0-19-generic", True),
        ("6.17.0-35-generic", True),
        ("6.17.0-1008-oem", True),
        ("6.14.0-1018-oem", True),
        ("6.14.0-1017-oem", False),
        ("6.17.0-18-generic", False),
        ("6.17.0-1022-azure", False),
        ("6.18.3", False),
        ("6.17.9-arch1-1", False),
        ("6.14.0-37-generic", False),
        ("6.8.0", False),
    ],
)
def test_kernels_on_which_a_strix_halo_hangs(release: str, good: bool, strix_halo: Host) -> None:
    bad = warned(kernel, replace(strix_halo, system=replace(strix_halo.system, kernel=release)))
    assert bool(bad) != good
    assert all("6.18.4" in finding.fix and finding.value == release for finding in bad)


def test_other_gpus_do_not_mind_the_kernel(desktop: Host) -> None:
    assert warned(kernel, desktop) == []


def test_a_healthy_driver(strix_halo: Host) -> None:
    assert [finding.value for finding in driver(strix_halo)] == ["amdgpu 6.18.4", "may be opened"]


def test_files_that_may_not_be_opened(strix_halo: Host) -> None:
    files = {"kfd": DeviceFile("/dev/kfd", False), "renders": (DeviceFile("/dev/dri/renderD128", False),)}
    bad = warned(driver, replace(strix_halo, system=replace(strix_halo.system, **files)))  # type: ignore[arg-type]
    assert [finding.name for finding in bad] == ["/dev/kfd", "/dev/dri/renderD128"]
    assert {finding.fix for finding in bad} == {"sudo usermod -aG render,video $USER, then log in again"}


@pytest.mark.parametrize(("container", "fix"), [("", "sudo modprobe amdgpu"), ("docker", "--device /dev/kfd")])
def test_kfd_is_missing(container: str, fix: str, strix_halo: Host) -> None:
    system = replace(strix_halo.system, kfd=None, container=container)
    [finding] = warned(driver, replace(strix_halo, system=system))
    assert fix in finding.fix


def test_a_torch_for_another_platform(strix_halo: Host) -> None:
    versions = VERSIONS | {"torch": "2.11.0+cpu", "rocm": ""}
    [finding] = warned(libraries, replace(strix_halo, gpus=(), versions=versions))
    assert finding.value == "is there, but torch was not built for ROCm: plain CPU work"
    assert finding.fix == (
        "install the ROCm wheel of torch: pip install --index-url https://repo.amd.com/rocm/whl-multi-arch/ "
        '"torch[device-gfx1151]"'
    )


def test_a_torch_that_sees_nothing(strix_halo: Host) -> None:
    [finding] = warned(libraries, replace(strix_halo, gpus=()))
    assert "torch does not see it" in finding.value


@pytest.mark.parametrize(
    ("installed", "value"),
    [
        ({"triton-rocm": "3.6.0", "triton": "3"}, "two are installed over each other: triton-rocm 3.6.0, triton 3"),
        ({"triton": "3.6.0"}, "triton 3.6.0, but torch asks for triton-rocm"),
        ({"triton-rocm": "3.5.1"}, "triton-rocm 3.5.1, but torch asks for 3.6.0"),
    ],
)
def test_the_wrong_tritons(installed: dict[str, str], value: str, strix_halo: Host) -> None:
    [finding] = warned(libraries, replace(strix_halo, tritons=installed))
    assert finding.value == value
    assert finding.fix.startswith(f"pip uninstall -y {' '.join(installed)}, then install again triton-rocm==3.6.0")


def test_the_right_triton(strix_halo: Host) -> None:
    assert found(libraries, strix_halo)["triton"] == Finding("triton", "triton-rocm 3.6.0")
    local = replace(strix_halo, tritons={"triton-rocm": "3.6.0+git1234"})
    assert warned(libraries, local) == []


def test_no_triton_matters_on_a_gpu_alone(strix_halo: Host) -> None:
    without = replace(strix_halo, tritons={}, has_triton=False)
    [finding] = warned(libraries, without)
    assert (finding.value, finding.fix.split("=", 1)[0]) == (
        "is not installed: plain torch does the work, slowly", "pip install --force-reinstall torch",
    )  # fmt: skip
    nothing = replace(without, gpus=(), system=replace(without.system, gpus=()))
    assert warned(libraries, nothing) == []


def test_variables(strix_halo: Host) -> None:
    given = {"HSA_OVERRIDE_GFX_VERSION": "11.0.0", "HIP_VISIBLE_DEVICES": "0", "TRITON_INTERPRET": "0", "HOME": "/root"}
    host = replace(strix_halo, environment=given)
    assert [finding.name for finding in warned(environment, host)] == ["HSA_OVERRIDE_GFX_VERSION"]
    assert list(found(environment, host)) == ["HIP_VISIBLE_DEVICES", "HSA_OVERRIDE_GFX_VERSION", "TRITON_INTERPRET"]


def test_secrets_are_not_told(strix_halo: Host) -> None:
    host = replace(strix_halo, environment={"GFXLM_API_KEY": "sesame"})
    assert [finding.value for finding in environment(host)] == ["is set"]


def test_which_gpu_is_used(desktop: Host) -> None:
    said = found(devices, desktop)
    assert said["cuda:0"].value == "RX 7900 XTX, gfx1100, 96 units, 25.77 GB, discrete: used"
    assert said["cuda:1"].value.endswith("integrated: not used")
    [finding] = warned(devices, replace(desktop, device=torch.device("cuda", 1)))
    assert finding.value == "the integrated GPU is used beside a discrete one"


def test_a_gpu_that_torch_has_no_code_for(desktop: Host) -> None:
    both = ("gfx1100", "gfx1036")
    assert warned(devices, replace(desktop, compiled_for=both)) == []
    assert warned(devices, replace(desktop, compiled_for=("gfx11-generic", "gfx10-3-generic"))) == []
    [finding] = warned(devices, replace(desktop, compiled_for=("gfx942", "gfx1036")))
    assert finding.value == "torch has code for gfx942, gfx1036, not for gfx1100"
    assert "invalid device function" in finding.fix
    assert '"torch[device-gfx1100]"' in finding.fix


def test_a_gpu_that_torch_does_not_see(desktop: Host) -> None:
    said = found(devices, replace(desktop, gpus=(XTX,)))
    assert said["/dev/dri/renderD128"].value == "gfx1036 1002:164e: torch does not see it"
    assert "/dev/dri/renderD129" not in said


def test_on_the_cpu(strix_halo: Host) -> None:
    host = replace(strix_halo, device=torch.device("cpu"), gpus=())
    assert found(devices, host)["used"].value == "the CPU"
    assert found(facts, host)["architecture"].value == "plain torch, on the CPU"


@pytest.mark.parametrize(
    ("name", "text", "level"),
    [
        (
            "gfx1151",
            "gfx1151, family gfx11, wave 32, wmma, 64 KiB shared, lines of 128 bytes, integrated, slow where rows lie "
            "a multiple of 1024 bytes apart",
            "ok",
        ),
        ("gfx1153", "gfx1153, family gfx11, wave 32, wmma, 64 KiB shared, lines of 128 bytes, integrated", "warning"),
        ("gfx1030", "gfx1030: there are no kernels for it, plain torch does the work", "warning"),
    ],
)
def test_facts(name: str, text: str, level: str, strix_halo: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "architecture", lambda device: doctor_arch(name))
    [finding] = facts(strix_halo)
    assert (finding.value, finding.level) == (text, level)


def doctor_arch(name: str) -> Any:
    from gfxlm.device.arch import likely

    return likely(name)


@pytest.fixture
def torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GIB, 62 * GIB))
    monkeypatch.setattr(doctor, "available_bytes", lambda device: 60 * GIB)
    monkeypatch.setattr(doctor, "unified", lambda device: True)


@pytest.mark.usefixtures("torch_says")
def test_half_of_the_memory(strix_halo: Host) -> None:
    said = found(memory, strix_halo)
    assert said["torch"].data == {"total": 62 * GIB, "free": 60 * GIB}
    assert said["driver"].data["gtt_total"] == 62 * GIB
    assert said["host"].value == "133.14 GB, 128.85 GB free"
    assert said["gfxlm"].value == "64.42 GB for weights, caches and work, weights in the host's memory"
    [finding] = warned(memory, strix_halo)
    assert finding.fix == (
        "the GPU reaches 67.11 GB of 133.68 GB: set the firmware's share for graphics to its least, and boot with "
        f"ttm.pages_limit={(124 * GIB + GIB // 2 - 8 * GIB) // 4096} (or: pipx install amd-debug-tools, then amd-ttm "
        "--set 116)"
    )


@pytest.mark.usefixtures("torch_says")
def test_all_of_the_memory(strix_halo: Host) -> None:
    [gpu] = strix_halo.system.gpus
    system = replace(strix_halo.system, gpus=(replace(gpu, gtt_total=116 * GIB),), memory_limit=8 * GIB)
    host = replace(strix_halo, system=system)
    assert warned(memory, host) == []
    assert found(memory, host)["cgroup"].value == "8.59 GB at most"


@pytest.mark.usefixtures("torch_says")
def test_a_desktops_small_gpu_is_left_alone(desktop: Host) -> None:
    """Half of the host's memory is enough for one that nobody uses."""
    assert warned(memory, desktop) == []


def test_a_check_that_raises_is_a_finding(strix_halo: Host) -> None:
    def broken_driver(host: Host) -> Iterator[Finding]:
        yield Finding("first", "fine")
        raise RuntimeError("HIP error:\n  invalid device function")

    first, second = examined(broken_driver, strix_halo)
    assert first.name == "first"
    assert second == Finding(
        "broken driver", "failed with RuntimeError: HIP error: invalid device function", "warning", "please report this"
    )


@pytest.mark.parametrize("machine", MACHINES)
def test_every_machine_through_every_check(machine: str, tmp_path: Path) -> None:
    """On this torch, which knows none of them."""
    host = replace(doctor.this_host(torch.device("cpu"), build(tmp_path, MACHINES[machine])), gpus=())
    for checks in doctor.SECTIONS.values():
        for check in checks:
            assert all(not finding.value.startswith("failed with") for finding in examined(check, host))
