"""`gfxlm warmup`: compile kernels before they are needed."""

from typing import TYPE_CHECKING, Annotated

import typer

from gfxlm.cli.gpu import chosen, require_triton
from gfxlm.cli.options import DType
from gfxlm.cli.progress import progress_bar
from gfxlm.cli.text import note
from gfxlm.errors import UserError

if TYPE_CHECKING:
    from gfxlm.device.arch import Architecture


def warmup(
    arch: Annotated[
        list[str] | None, typer.Option(help="Compile for this architecture (may be repeated). Default: this GPU's.")
    ] = None,
    op: Annotated[
        list[str] | None, typer.Option(help="A kind of work, or the beginning of a case's name. Default: all.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="What this model launches: a folder or a hub name.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    dtype: Annotated[DType | None, typer.Option(help="Type of activations. Default: the model's.")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Processes. Default: one a core.")] = None,
) -> None:
    """Compile the kernels into Triton's cache, for this GPU or for one that is not here.

    With --model, those that this model launches for steps, prompts, chats that share memory in pages, the sampler and
    the self-test; its weights are not read. On an AMD GPU the BLAS libraries are tried, too, so that the first load
    waits for nothing. Without, those of popular models' shapes.
    What the cache has is not compiled again: an interrupted run continues where it stopped. TRITON_CACHE_DIR says where
    the cache is.
    """
    require_triton()
    archs = chosen(arch)
    if model is not None and op:
        raise UserError("--op: a model's cases are not sorted by operations")

    from gfxlm.kernels.codegen import Job, compile_all
    from gfxlm.kernels.codegen import jobs as all_jobs

    if model is None:
        todo = all_jobs(archs, op)
    else:
        from gfxlm.engine.warmup import ModelCases

        cases = ModelCases(model, revision, dtype.value if dtype else None)
        todo = [Job(found.name, model, name, cases) for found in archs for name in cases.names()]
    compiled = 0
    errors = []
    with progress_bar("compiling") as progress:
        for done in compile_all(todo, jobs, progress):
            compiled += done.compiled
            if done.error:
                errors.append(f"{done.job.arch}: {done.job.case}: {done.error}")
    for line in errors:
        note(line)
    names = ", ".join(found.name for found in archs)
    print(f"{names}: {compiled} kernels compiled for {len(todo)} cases, {len(errors)} cases failed")
    if model is not None:
        _try_blas(archs)
    if errors:
        raise typer.Exit(1)


def _try_blas(archs: "list[Architecture]") -> None:
    """What the first load on this machine's GPU would do, if that is among those that are compiled for."""
    import torch

    from gfxlm.device.arch import architecture
    from gfxlm.device.gemm_probe import ensure
    from gfxlm.device.select import pick_device

    device = pick_device()
    if device.type == "cuda" and torch.version.hip and architecture(device) in archs:
        ensure(device)
