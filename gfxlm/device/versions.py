"""Which versions of what a program runs on, without importing any of it."""

import importlib.metadata
import importlib.util
import platform
import re
from pathlib import Path

import torch

# What has been distributed under which name as the module `triton`.
TRITONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows")


def versions() -> dict[str, str]:
    """Versions by name, "" for what is not there."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rocm": str(torch.version.hip or ""),
        "cuda": str(torch.version.cuda or ""),
        "triton": " ".join(tritons().values()),
        "driver": driver(),
    }


def tritons() -> dict[str, str]:
    """Every installed distribution that brings a module `triton`, and its version."""
    found = {}
    for name in TRITONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def wanted_triton() -> tuple[str, str]:
    """The distribution and version that torch was installed with, "" for each that it does not name."""
    for line in importlib.metadata.requires("torch") or ():
        match = re.match(r"([\w-]*triton[\w-]*)\s*\(?(?:==\s*([\w.+]+))?", line)
        if match and "extra ==" not in line:
            return match[1].lower(), match[2] or ""
    return "", ""


def triton_there() -> bool:
    """Whether `import triton` would find something."""
    return importlib.util.find_spec("triton") is not None


def driver(root: Path = Path("/")) -> str:
    """The GPU driver's version: amdgpu's own or the kernel it came with, or NVIDIA's; "" without either."""
    for module in ("amdgpu", "nvidia"):
        folder = root / "sys/module" / module
        if folder.is_dir():
            file = folder / "version"
            return f"{module} {file.read_text().strip() if file.is_file() else platform.release()}"
    return ""
