"""What machine code for AMD has to hold, checked on what the manifest says of a case."""

from collections.abc import Iterator
from typing import Any

from gfxlm.device.arch import Architecture

# Whose kernels without tl.dot read weights, and little else.
MATVEC_TOPICS = ("matvec", "moe_decode")
_LEAST_BYTES = 4 << 20  # what is smaller is mostly padding where it is ragged, and over before that matters
_SHARE_ON = ("gfx1100", "gfx1151")
_MOST_OF_BYTE_TIME = 0.5
_HALF = ("f16", "bf16")

Entry = dict[str, Any]


def failures(entry: Entry, arch: Architecture) -> list[str]:
    """What a case's launches do not hold on an architecture, a line each."""
    rows = entry["launches"]
    found = [f"{row['kernel']}: {complaint}" for row in rows for complaint in _of_launch(row, arch)]
    if _is_matvec(entry):
        large = entry["nbytes"] >= _LEAST_BYTES
        if large and not any(row["wide_loads"] for row in rows):
            found.append("no load of 16 bytes a lane")
        share = vector_share(entry, arch)
        if share is None:
            found.append("loops turn on values that are not known, so that instructions cannot be counted")
        elif large and arch.name in _SHARE_ON and share > _MOST_OF_BYTE_TIME:
            found.append(f"vector instructions take {share:.0%} of the time of the bytes")
    return found


def vector_share(entry: Entry, arch: Architecture) -> float | None:
    """Issue time of a matrix-vector case's vector instructions as a share of its bytes' time; None where not known."""
    issued = _issued(entry, arch)
    return None if issued is None else arch.vector_share(issued, entry["nbytes"])


def per_weight(entry: Entry, arch: Architecture) -> float | None:
    """Vector instructions of a matrix-vector case for each multiplication of a weight; None where not known."""
    issued = _issued(entry, arch)
    return None if issued is None else issued / (entry["flops"] / 2)


def _is_matvec(entry: Entry) -> bool:
    no_dots = not any(row["dots"] for row in entry["launches"])
    return bool(entry["topic"] in MATVEC_TOPICS and entry["nbytes"] and entry["flops"] and no_dots)


def _issued(entry: Entry, arch: Architecture) -> float | None:
    """Vector instructions of all lanes."""
    rows = entry["launches"]
    if not _is_matvec(entry) or any(row["vector"] is None for row in rows):
        return None
    return float(sum(row["vector"] * row["num_warps"] * arch.wave * row["programs"] for row in rows))


def _of_launch(row: dict[str, Any], arch: Architecture) -> Iterator[str]:
    if row["spills"]:
        yield f"{row['spills']} registers spilled"
    if row["scalar_spills"]:
        yield f"{row['scalar_spills']} scalar registers spilled"
    if row["lds"] > arch.shared_bytes:
        yield f"{row['lds']} bytes of LDS, of {arch.shared_bytes}"
    kinds = row["dots"].split()
    if kinds and not row["matrix"] and (arch.matrix == "mfma" or any(kind in _HALF for kind in kinds)):
        yield f"tl.dot of {row['dots']} without matrix instructions"
