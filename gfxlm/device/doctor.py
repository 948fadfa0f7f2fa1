"""Checks of a machine that run nothing on its GPU: system, driver, versions, environment, memory.

Each takes a `Host` and yields findings, so that tests can describe any host.
"""

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from gfxlm.device.arch import ARCHITECTURES, architecture, gpu_name
from gfxlm.device.arena import unified
from gfxlm.device.finding import Finding
from gfxlm.device.memory import available_bytes, shown, total_bytes
from gfxlm.device.system import System, SystemGPU, read_system, version_of
from gfxlm.device.versions import triton_there, tritons, versions, wanted_triton

_STRIX_HALO = "gfx1151"
_STRIX_HALO_KERNEL = (6, 18, 4)
_UBUNTU_KERNELS = {"generic": (6, 17, 0, 19), "oem": (6, 14, 0, 1018)}  # that have what it needs of newer ones
# AMD's wheels hold what a GPU needs in packages of its own; PyTorch's know the commoner ones.
_ROCM_WHEEL = 'pip install --index-url https://repo.amd.com/rocm/whl-multi-arch/ "torch[device-{}]"'
_GROUPS = "sudo usermod -aG render,video $USER, then log in again"
_CONTAINER = "start the container with --device /dev/kfd --device /dev/dri --group-add video --group-add render"
# What is left to the host where a GPU may use all but so much of its memory.
_LEFT_TO_HOST = 8 << 30
_MUCH_MEMORY, _MOST_OF_IT = 24 << 30, 0.7

# Variables that change what is computed or how fast, and what to say of them where they are set.
_REMARKS = {
    "HSA_OVERRIDE_GFX_VERSION": "code for another GPU than is there may crash or compute nonsense: "
    "unset HSA_OVERRIDE_GFX_VERSION",
    "TRITON_INTERPRET": "kernels are interpreted, a thousand times slower: unset TRITON_INTERPRET",
    "AMD_SERIALIZE_KERNEL": "every kernel is waited for: unset AMD_SERIALIZE_KERNEL",
    "HIP_LAUNCH_BLOCKING": "every kernel is waited for: unset HIP_LAUNCH_BLOCKING",
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for: unset CUDA_LAUNCH_BLOCKING",
    "GFXLM_NO_GRAPH": "steps are not recorded, and the host decides the speed: unset GFXLM_NO_GRAPH",
    "GFXLM_ASSUME_ARCH": "decisions are made as on another GPU: unset GFXLM_ASSUME_ARCH to run on this one",
}
_HARMLESS = {"", "0", "false", "False"}
_SHOWN = (
    "HIP_",
    "HSA_",
    "ROCR_",
    "ROCBLAS_",
    "HIPBLASLT_",
    "CUDA_",
    "PYTORCH_",
    "TORCH_BLAS",
    "TRITON_",
    "AMD_",
    "GFXLM_",
)
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")  # reports are for others to read
_SHOWN_TOO = ("OMP_NUM_THREADS", "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL")


@dataclass(frozen=True, slots=True)
class TorchGPU:
    """A GPU that torch sees."""

    index: int
    arch: str
    name: str
    integrated: bool
    units: int
    total: int
    pci: str = ""  # its bus: 0000:c4:00


@dataclass(frozen=True, slots=True)
class Host:
    """What the checks look at."""

    system: System
    device: torch.device  # that is to be used
    gpus: tuple[TorchGPU, ...]
    versions: Mapping[str, str]
    tritons: Mapping[str, str]
    has_triton: bool
    wanted_triton: tuple[str, str] = ("", "")  # by torch: name and version
    environment: Mapping[str, str] = field(default_factory=dict)
    memory: tuple[int, int] = (0, 0)  # of the host: bytes, and those that are free
    compiled_for: tuple[str, ...] = ()  # architectures that torch has code for

    @property
    def names(self) -> set[str]:
        """Names of all GPUs, whoever sees them."""
        return {gpu.arch for gpu in self.gpus} | {gpu.name for gpu in self.system.gpus}

    def of_system(self, vendor: str) -> list[SystemGPU]:
        """A vendor's GPUs that the kernel knows."""
        return [gpu for gpu in self.system.gpus if gpu.vendor == vendor]

    def behind(self, gpu: TorchGPU) -> SystemGPU | None:
        """What the kernel knows of a GPU of torch's."""
        known = [x for x in self.system.gpus if (gpu.pci and x.pci.startswith(gpu.pci)) or x.name == gpu.arch]
        return max(known, key=lambda x: bool(gpu.pci) and x.pci.startswith(gpu.pci), default=None)


def this_host(device: torch.device, root: Path = Path("/")) -> Host:
    """The host this runs on."""
    return Host(
        system=read_system(root),
        device=device,
        gpus=tuple(_torch_gpu(index) for index in range(torch.cuda.device_count())),
        versions=versions(),
        tritons=tritons(),
        has_triton=triton_there(),
        wanted_triton=wanted_triton(),
        compiled_for=tuple(torch.cuda.get_arch_list()),
        environment=dict(os.environ),
        memory=(total_bytes(torch.device("cpu")), available_bytes(torch.device("cpu"))),
    )


def _torch_gpu(index: int) -> TorchGPU:
    told = torch.cuda.get_device_properties(index)
    places = [getattr(told, f"pci_{name}_id", -1) for name in ("domain", "bus", "device")]
    pci = "" if -1 in places else "{:04x}:{:02x}:{:02x}".format(*places)
    units, total = told.multi_processor_count, told.total_memory
    return TorchGPU(index, gpu_name(index), told.name, bool(told.is_integrated), units, total, pci)


def kernel(host: Host) -> Iterator[Finding]:
    """The kernel's version, which on some GPUs decides whether they hang."""
    release = host.system.kernel
    if _STRIX_HALO in host.names and version_of(release) < _STRIX_HALO_KERNEL and not _ubuntu_has_it(release):
        yield Finding(
            "kernel", release, "warning",
            "gfx1151 hangs and faults under load with older kernels: use 6.18.4 or newer, or of Ubuntu 24.04 the HWE "
            "kernel from 6.17.0-19 or the OEM kernel from 6.14.0-1018 on",
        )  # fmt: skip
    else:
        yield Finding("kernel", release)
    if host.system.container:
        yield Finding("container", host.system.container)


def _ubuntu_has_it(release: str) -> bool:
    """Whether this is one of Ubuntu's kernels, 6.17.0-19-generic, with the fixes that a Strix Halo needs."""
    match = re.fullmatch(r"([\d.]+-\d+)-(\w+)", release)
    if match is None or match[2] not in _UBUNTU_KERNELS:
        return False
    return tuple(map(int, re.split(r"[.-]", match[1]))) >= _UBUNTU_KERNELS[match[2]]


def driver(host: Host) -> Iterator[Finding]:
    """The driver, and whether its device files may be opened."""
    system, ours = host.system, host.of_system("amd")
    yield Finding("driver", host.versions["driver"] or "no GPU driver is loaded")
    if not ours:
        return
    if system.kfd is None:
        fix = _CONTAINER if system.container else "load the amdgpu driver with ROCm's part of it: sudo modprobe amdgpu"
        yield Finding("/dev/kfd", "is not there, and no AMD GPU can be used", "warning", fix)
    for file in ([system.kfd] if system.kfd else []) + list(system.renders):
        if not file.usable:
            yield Finding(file.path, "may not be opened by this user", "warning", _GROUPS)
        elif file is system.kfd:
            yield Finding(file.path, "may be opened")


def libraries(host: Host) -> Iterator[Finding]:
    """torch, what it was built for, and its Triton."""
    found = host.versions
    yield Finding("python", found["python"])
    built = (
        f"for ROCm {found['rocm']}" if found["rocm"] else f"for CUDA {found['cuda']}" if found["cuda"] else "for CPUs"
    )
    yield Finding("torch", f"{found['torch']}, built {built}", data={"rocm": found["rocm"], "cuda": found["cuda"]})
    for vendor, platform, index in (("amd", "rocm", "ROCm"), ("nvidia", "cuda", "CUDA")):
        if host.of_system(vendor) and not host.gpus:
            wrong = not found[platform]
            what = f"was not built for {index}" if wrong else "does not see it"
            wheel = f"install the {index} wheel of torch"
            if named := [gpu.name for gpu in host.of_system(vendor) if vendor == "amd" and gpu.name]:
                wheel += f": {_ROCM_WHEEL.format(named[0])}"
            fix = wheel if wrong else "see what is said of the driver and of permissions"
            yield Finding(f"{vendor} GPU", f"is there, but torch {what}: plain CPU work", "warning", fix)
    if not host.has_triton:
        fix = f"pip install --force-reinstall torch=={found['torch'].split('+')[0]} from the index it came from"
        lacking = bool(host.gpus)
        yield Finding(
            "triton", "is not installed" + (": plain torch does the work, slowly" if lacking else ""),
            "warning" if lacking else "ok", fix if lacking else "",
        )  # fmt: skip
        return
    yield _triton(host)


def _triton(host: Host) -> Finding:
    names = ", ".join(f"{name} {version}" for name, version in host.tritons.items())
    wanted, version = host.wanted_triton
    again = f"pip uninstall -y {' '.join(host.tritons)}, then install again "
    again += f"{wanted}{f'=={version}' if version else ''}, which torch asks for" if wanted else "the one you want"
    if len(host.tritons) > 1:
        return Finding("triton", f"two are installed over each other: {names}", "warning", again)
    if wanted and host.tritons and wanted not in host.tritons:
        return Finding("triton", f"{names}, but torch asks for {wanted}", "warning", again)
    if version and host.tritons and host.tritons[wanted].split("+")[0] != version.split("+")[0]:
        return Finding("triton", f"{names}, but torch asks for {version}", "warning", again)
    return Finding("triton", names or "there, by no distribution")


def environment(host: Host) -> Iterator[Finding]:
    """Variables that change what is run."""
    for name, value in sorted(host.environment.items()):
        if name in _REMARKS and value not in _HARMLESS:
            yield Finding(name, value, "warning", _REMARKS[name])
        elif name.startswith(_SHOWN) or name in _SHOWN_TOO:
            yield Finding(name, "is set" if any(word in name for word in _SECRET) else value)


def devices(host: Host) -> Iterator[Finding]:
    """What torch sees, and which of it is used."""
    if host.device.type == "cpu":
        yield Finding("used", "the CPU", data={"threads": torch.get_num_threads()})
    chosen = host.device.index or 0
    for gpu in host.gpus:
        kind = "integrated" if gpu.integrated else "discrete"
        used = "used" if host.device.type == "cuda" and gpu.index == chosen else "not used"
        yield Finding(
            f"cuda:{gpu.index}", f"{gpu.name}, {gpu.arch}, {gpu.units} units, {shown(gpu.total)}, {kind}: {used}",
            data={"arch": gpu.arch, "units": gpu.units, "bytes": gpu.total, "integrated": gpu.integrated, "used": used},
        )  # fmt: skip
        yield from _without_code(gpu, host)
        if gpu.index == chosen and gpu.integrated and any(not other.integrated for other in host.gpus):
            yield Finding(
                "choice", "the integrated GPU is used beside a discrete one", "warning",
                "name the other with --device, or leave HIP_VISIBLE_DEVICES unset",
            )  # fmt: skip
    seen = {known.render for gpu in host.gpus if (known := host.behind(gpu))}
    for known in host.system.gpus:
        findable = bool(known.name) or all(gpu.pci for gpu in host.gpus)
        if known.render not in seen and known.vendor != "other" and findable:
            yield Finding(known.render, f"{known.name or known.vendor} {known.pci_id}: torch does not see it")


def _without_code(gpu: TorchGPU, host: Host) -> Iterator[Finding]:
    """An AMD GPU for which torch was not built; NVIDIA's run code of their relatives."""
    generic = any(name.endswith("-generic") for name in host.compiled_for)
    if gpu.arch.startswith("gfx") and host.compiled_for and gpu.arch not in host.compiled_for and not generic:
        yield Finding(
            f"cuda:{gpu.index}", f"torch has code for {', '.join(host.compiled_for)}, not for {gpu.arch}", "warning",
            f"if it fails with 'invalid device function': {_ROCM_WHEEL.format(gpu.arch)}",
        )  # fmt: skip


def facts(host: Host) -> Iterator[Finding]:
    """What is known of the architecture that decisions are made for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arch = architecture(host.device)
    if arch.vendor == "none":
        yield Finding("architecture", "plain torch, on the CPU")
        return
    known = arch.name in ARCHITECTURES
    text = f"{arch.name}, family {arch.family}, wave {arch.wave}, {arch.matrix}, {arch.shared_bytes >> 10} KiB shared"
    text += f", lines of {arch.cache_line} bytes" + (", integrated" if arch.integrated else "")
    text += f", slow where rows lie a multiple of {arch.stride_cliff} bytes apart" if arch.stride_cliff else ""
    data = {name: getattr(arch, name) for name in ("family", "wave", "matrix", "shared_bytes", "integrated", "units")}
    if not arch.kernels:
        names = ", ".join(x.name for x in ARCHITECTURES.values() if x.kernels)
        yield Finding(
            "architecture", f"{arch.name}: there are no kernels for it, plain torch does the work", "warning",
            f"there are kernels for {names}", data,
        )  # fmt: skip
    elif not known:
        yield Finding("architecture", text, "warning", "not known: treated as its relatives; please report", data)
    else:
        yield Finding("architecture", text, data=data)


def memory(host: Host) -> Iterator[Finding]:
    """What each of them says there is: torch, the driver, the host, the cgroup; and what gfxlm goes by."""
    total, free = host.memory
    gpu = next((gpu for gpu in host.gpus if host.device.type == "cuda" and gpu.index == (host.device.index or 0)), None)
    if gpu is not None:
        left, all_of_it = torch.cuda.mem_get_info(host.device)
        yield Finding("torch", f"{shown(all_of_it)}, {shown(left)} free", data={"total": all_of_it, "free": left})
    used = host.behind(gpu) if gpu else host.system.gpus[0] if len(host.system.gpus) == 1 else None
    for known in host.system.gpus:
        if known.vram_total:
            yield _of_driver(known, total, used=known is used)
    yield Finding("host", f"{shown(total)}, {shown(free)} free", data={"total": total, "free": free})
    limit = host.system.memory_limit
    if limit is not None:
        yield Finding("cgroup", f"{shown(limit)} at most", data={"limit": limit})
    usable = available_bytes(host.device)
    where = ", weights in the host's memory" if unified(host.device) else ""
    yield Finding("gfxlm", f"{shown(usable)} for weights, caches and work{where}", data={"bytes": usable})


def _of_driver(gpu: SystemGPU, host_bytes: int, *, used: bool) -> Finding:
    text = f"{gpu.name or gpu.pci_id}: {shown(gpu.vram_total)} VRAM, {shown(gpu.vram_used)} used; "
    text += f"{shown(gpu.gtt_total)} GTT, {shown(gpu.gtt_used)} used"
    names = ("vram_total", "vram_used", "gtt_total", "gtt_used")
    data = {name: getattr(gpu, name) for name in names}
    everything, reached = host_bytes + gpu.vram_total, gpu.vram_total + gpu.gtt_total
    if used and gpu.integrated and everything > _MUCH_MEMORY and reached < _MOST_OF_IT * everything:
        pages = (everything - _LEFT_TO_HOST) // 4096
        fix = (
            f"the GPU reaches {shown(reached)} of {shown(everything)}: set the firmware's share for graphics to its "
            f"least, and boot with ttm.pages_limit={pages} (or: pipx install amd-debug-tools, then amd-ttm --set "
            f"{pages * 4096 >> 30})"
        )
        return Finding("driver", text, "warning", fix, data)
    return Finding("driver", text, data=data)


SECTIONS: dict[str, tuple[Callable[[Host], Iterator[Finding]], ...]] = {
    "system": (kernel, driver, libraries, environment),
    "devices": (devices, facts),
    "memory": (memory,),
}
