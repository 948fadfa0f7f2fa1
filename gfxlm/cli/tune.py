"""`gfxlm tune`: measure which tile sizes are fastest on this GPU."""

from pathlib import Path
from typing import Annotated

import typer

from gfxlm.cli.gpu import require_triton
from gfxlm.cli.text import note
from gfxlm.errors import UserError


def tune(
    op: Annotated[list[str] | None, typer.Option(help="An operation (may be repeated). Default: all.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write <output>/<architecture>/<operation>.json. Default: gfxlm's cache.")
    ] = None,
) -> None:
    """Measure tile sizes on this GPU, and write tables of the fastest.

    Tables in gfxlm's cache (GFXLM_CONFIGS, or ~/.cache/gfxlm/configs) are used from then on.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError("there is no GPU here, and nothing to measure")
    require_triton()

    from gfxlm.kernels import tuner
    from gfxlm.kernels.tuning import user_configs

    folder = output or user_configs()
    if folder is None:
        raise UserError("GFXLM_CONFIGS is empty: name a folder with --output")
    device = torch.device("cuda", torch.cuda.current_device())
    for name in op or tuner.tunable():
        results = []
        for result in tuner.tune(name, device):
            results.append(result)
            facts = " ".join(f"{fact}={value}" for fact, value in result.facts)
            note(f"{name} {facts}: {result.before_us:.2f} µs, now {result.best_us:.2f} µs with {result.best}")
        if results:
            print(tuner.write(folder, name, device, results))
