"""`gfxlm tune`: measure which tile sizes are fastest on this GPU."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gfxlm.cli.gpu import require_triton
from gfxlm.cli.text import note
from gfxlm.errors import UserError

if TYPE_CHECKING:
    import torch


def tune(
    op: Annotated[list[str] | None, typer.Option(help="An operation (may be repeated). Default: all.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write <output>/<architecture>/<operation>.json. Default: gfxlm's cache.")
    ] = None,
    blas: Annotated[
        bool, typer.Option("--blas", help="Instead: try the BLAS libraries, and on AMD find their fastest kernels.")
    ] = False,
) -> None:
    """Measure tile sizes on this GPU, and write tables of the fastest.

    Tables in gfxlm's cache (GFXLM_CONFIGS, or ~/.cache/gfxlm/configs) are used from then on, as is what --blas finds
    (in ~/.cache/gfxlm/blas).
    """
    import torch

    from gfxlm.device.select import best_gpu

    found = best_gpu()
    if found is None:
        raise UserError("there is no GPU here, and nothing to measure")
    device = torch.device("cuda", found.index or 0)
    torch.cuda.set_device(device)
    if blas:
        if op or output:
            raise UserError("--blas: there are no operations to choose from, and its results go to gfxlm's cache")
        return _tune_blas(device)
    require_triton()

    from gfxlm.kernels import tuner
    from gfxlm.kernels.tuning import user_configs

    folder = output or user_configs()
    if folder is None:
        raise UserError("GFXLM_CONFIGS is empty: name a folder with --output")
    for name in op or tuner.tunable():
        results = []
        for result in tuner.tune(name, device):
            results.append(result)
            facts = " ".join(f"{fact}={value}" for fact, value in result.facts)
            note(f"{name} {facts}: {result.before_us:.2f} µs, now {result.best_us:.2f} µs with {result.best}")
        if results:
            print(tuner.write(folder, name, device, results))


def _tune_blas(device: "torch.device") -> None:
    """Verdicts on the libraries anew, and on AMD the fastest kernel for every product of the cases."""
    import torch

    from gfxlm.device import tunable
    from gfxlm.device.gemm import TRITON
    from gfxlm.device.gemm_probe import ProbeError, probe

    try:
        found = probe(device)
    except ProbeError as error:
        raise UserError(f"the BLAS libraries could not be tried: {error}") from error
    for verdict in found.bad:
        instead = found.chosen(getattr(torch, verdict.dtype), verdict.rows)
        who = "gfxlm's own kernel" if instead == TRITON else instead
        note(f"{verdict.library}: {verdict.dtype}: {verdict.outcome} ({verdict.detail}); {who} serves instead")
    print(found.path)
    if torch.version.hip is None:
        note("NVIDIA's library chooses among its kernels itself: there is nothing to record")
        return
    require_triton()

    from gfxlm.kernels.cases import catalogue

    def products() -> None:
        for case in catalogue(["wide"])["wide"]:
            note(case.name)
            case.make(device)()

    with torch.inference_mode():
        print(tunable.record(device, products))
