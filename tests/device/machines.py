"""Machines as their kernels describe them: a sysfs and a /dev for each, in a folder."""

from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30


@dataclass(frozen=True)
class Card:
    """An AMD GPU: KFD's number of its architecture, compute units and SIMDs in each, PCI device and bus, memory."""

    version: int
    units: int
    simds: int
    device: int
    bus: int
    vram: int
    gtt: int
    used: int = 0


STRIX_HALO = [Card(110501, 40, 2, 0x1586, 0xC4, GIB // 2, 62 * GIB, GIB // 4)]
RX_7900_XTX = [Card(110000, 96, 2, 0x744C, 0x03, 24 * GIB, 32 * GIB, GIB)]
MI300X = [Card(90402, 304, 4, 0x74A1, 0x05 + 0x10 * n, 192 * GIB, 1024 * GIB) for n in range(8)]
DESKTOP = [  # the integrated one first, as on many boards
    Card(100306, 2, 2, 0x164E, 0x0E, GIB // 2, 16 * GIB),
    Card(110000, 96, 2, 0x744C, 0x03, 24 * GIB, 16 * GIB),
]
MACHINES = {"Strix Halo": STRIX_HALO, "7900 XTX": RX_7900_XTX, "MI300X": MI300X, "desktop": DESKTOP}

_CPU_NODE = (
    "cpu_cores_count 32\nsimd_count 0\nmem_banks_count 1\ngfx_target_version 0\nvendor_id 0\ndrm_render_minor 0\n"
)


def build(root: Path, cards: list[Card], *, kfd: bool = True, limit: str = "max") -> Path:
    """Write the files of a machine with these cards below `root`."""
    nodes = root / "sys/class/kfd/kfd/topology/nodes"
    _write(nodes / "0/properties", _CPU_NODE)
    for number, card in enumerate(cards):
        minor = 128 + number
        device = root / f"sys/devices/pci0000:00/0000:{card.bus:02x}:00.0"
        files = {
            "vendor": "0x1002",
            "device": f"0x{card.device:04x}",
            "uevent": f"DRIVER=amdgpu\nPCI_ID=1002:{card.device:04X}\nPCI_SLOT_NAME=0000:{card.bus:02x}:00.0",
            "mem_info_vram_total": card.vram,
            "mem_info_vram_used": card.used,
            "mem_info_gtt_total": card.gtt,
            "mem_info_gtt_used": 4096,
        }
        for name, value in files.items():
            _write(device / name, f"{value}\n")
        for name in (f"card{number}", f"renderD{minor}"):
            link = root / "sys/class/drm" / name
            link.mkdir(parents=True)
            (link / "device").symlink_to(device)
        if kfd:
            _write(nodes / f"{number + 1}/properties", _gpu_node(card, minor))
        _write(root / f"dev/dri/renderD{minor}", "")
    (root / "sys/class/drm/card0-DP-1").mkdir(parents=True, exist_ok=True)
    if kfd:
        _write(root / "dev/kfd", "")
    (root / "sys/module/amdgpu").mkdir(parents=True)
    _write(root / "sys/fs/cgroup/memory.max", limit)
    return root


def _gpu_node(card: Card, minor: int) -> str:
    values = {
        "cpu_cores_count": 0,
        "simd_count": card.units * card.simds,
        "simd_per_cu": card.simds,
        "gfx_target_version": card.version,
        "vendor_id": 4098,
        "device_id": card.device,
        "location_id": card.bus << 8,
        "domain": 0,
        "drm_render_minor": minor,
        "unique_id": 2**63 + 5,
    }
    return "".join(f"{name} {value}\n" for name, value in values.items())


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
