"""What the system itself says of its GPUs: sysfs, device files and cgroups, without torch or any driver library.

Where torch sees no GPU, this says why. All paths are below a root, so that tests bring a machine of their own.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gfxlm.device.arch import ARCHITECTURES

_VENDORS = {"0x1002": "amd", "0x10de": "nvidia"}
# Integrated ones that have no kernels, or that only their relatives have; of the others the table of facts knows it.
_INTEGRATED = {"gfx902", "gfx909", "gfx90c", "gfx1013", "gfx1033", "gfx1035", "gfx1036", "gfx1037", "gfx1153"}
_MI300A = "0x74a0"  # a gfx942 as the MI300X is, but with the host's memory
_ACCESS = os.R_OK | os.W_OK


@dataclass(frozen=True, slots=True)
class SystemGPU:
    """A GPU that a driver of the kernel's knows. Bytes and units are 0 where the driver does not say."""

    vendor: str  # amd, nvidia, other
    pci: str  # its place: 0000:c4:00.0
    pci_id: str  # its kind: 1002:1586
    render: str  # its device file: /dev/dri/renderD128
    name: str = ""  # gfx1151
    units: int = 0
    vram_total: int = 0
    vram_used: int = 0
    gtt_total: int = 0  # of the host's memory, what the GPU may map
    gtt_used: int = 0

    @property
    def integrated(self) -> bool:
        """Whether its memory is the host's."""
        known = ARCHITECTURES.get(self.name)
        return (known is not None and known.integrated) or self.name in _INTEGRATED or self._is_mi300a

    @property
    def _is_mi300a(self) -> bool:
        return self.vendor == "amd" and f"0x{self.pci_id.partition(':')[2]}" == _MI300A


@dataclass(frozen=True, slots=True)
class DeviceFile:
    """A file that a program has to open to reach a GPU."""

    path: str
    usable: bool


@dataclass(frozen=True, slots=True)
class System:
    """A machine as its kernel describes it."""

    kernel: str  # 6.18.4-arch1-1
    gpus: tuple[SystemGPU, ...]
    kfd: DeviceFile | None  # what ROCm goes through; None where the amdgpu driver is not there, or not in the container
    renders: tuple[DeviceFile, ...]
    amdgpu: str  # the driver's version where it is not the kernel's own, else ""
    amdgpu_loaded: bool
    container: str  # docker, podman, kubernetes, wsl, or ""
    memory_limit: int | None  # of the cgroup


def read_system(root: Path = Path("/"), kernel: str | None = None) -> System:
    """Read it all. What is not there is left out; nothing is raised."""
    renders = sorted((root / "dev/dri").glob("renderD*")) if (root / "dev/dri").is_dir() else []
    kfd = root / "dev/kfd"
    module = root / "sys/module/amdgpu"
    return System(
        kernel=os.uname().release if kernel is None else kernel,
        gpus=tuple(_gpus(root)),
        kfd=_device_file(kfd, root) if kfd.exists() else None,
        renders=tuple(_device_file(path, root) for path in renders),
        amdgpu=_text(module / "version"),
        amdgpu_loaded=module.is_dir(),
        container=_container(root),
        memory_limit=_memory_limit(root),
    )


def gfx_name(version: int) -> str:
    """The name of KFD's number: 110501 is gfx1151 and 90010 gfx90a, the last digit hexadecimal. "" for a CPU's 0."""
    return f"gfx{version // 10000}{version // 100 % 100}{version % 100:x}" if version else ""


def version_of(release: str) -> tuple[int, ...]:
    """The numbers a kernel's release begins with: 6.17.0-1008-oem is (6, 17, 0)."""
    match = re.match(r"\d+(\.\d+)*", release)
    return tuple(map(int, match[0].split("."))) if match else ()


def _gpus(root: Path) -> Iterator[SystemGPU]:
    nodes = _kfd_nodes(root)
    for render in sorted((root / "sys/class/drm").glob("renderD*")):
        device = render / "device"
        vendor, kind = _text(device / "vendor"), _text(device / "device")
        if not vendor:
            continue  # a part of a partitioned GPU, or no PCI device
        properties = nodes.get(int(render.name.removeprefix("renderD")), {})
        yield SystemGPU(
            vendor=_VENDORS.get(vendor, "other"),
            pci=_slot(device),
            pci_id=f"{vendor.removeprefix('0x')}:{kind.removeprefix('0x')}",
            render=f"/dev/dri/{render.name}",
            name=gfx_name(properties.get("gfx_target_version", 0)),
            units=properties.get("simd_count", 0) // max(1, properties.get("simd_per_cu", 1)),
            vram_total=_number(device / "mem_info_vram_total"),
            vram_used=_number(device / "mem_info_vram_used"),
            gtt_total=_number(device / "mem_info_gtt_total"),
            gtt_used=_number(device / "mem_info_gtt_used"),
        )


def _kfd_nodes(root: Path) -> dict[int, dict[str, int]]:
    """Properties of the GPUs that ROCm may use, by the number of their render file."""
    nodes = {}
    for file in sorted((root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties")):
        pairs = (line.split() for line in _text(file).splitlines())
        properties = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
        if properties.get("simd_count"):  # else a CPU
            nodes[properties.get("drm_render_minor", -1)] = properties
    return nodes


def _slot(device: Path) -> str:
    lines = (line.partition("=") for line in _text(device / "uevent").splitlines())
    return next((value for name, _, value in lines if name == "PCI_SLOT_NAME"), "")


def _device_file(path: Path, root: Path) -> DeviceFile:
    return DeviceFile(f"/{path.relative_to(root)}", os.access(path, _ACCESS))


def _container(root: Path) -> str:
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    if (root / "run/secrets/kubernetes.io").exists():
        return "kubernetes"
    return "wsl" if (root / "dev/dxg").exists() else ""


def _memory_limit(root: Path) -> int | None:
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _text(root / "sys/fs/cgroup" / name)
        if text.isdecimal():
            limit = int(text)
            return limit if limit < 1 << 60 else None  # the first version of cgroups writes a huge number for none
    return None


def _number(path: Path) -> int:
    text = _text(path)
    return int(text) if text.isdecimal() else 0


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
