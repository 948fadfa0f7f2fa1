"""`gfxlm convert`: a transformers checkpoint to MLX's format, or a quantised one back."""

from enum import StrEnum
from typing import Annotated

import typer

from gfxlm.cli.options import DType
from gfxlm.cli.progress import progress_bar
from gfxlm.cli.text import note
from gfxlm.errors import UserError


class Mode(StrEnum):
    """MLX's ways of quantising."""

    AFFINE = "affine"
    MXFP4 = "mxfp4"
    MXFP8 = "mxfp8"
    NVFP4 = "nvfp4"


class Recipe(StrEnum):
    """Two widths in one model: the sensitive matrices get the larger one."""

    MIXED_2_6 = "mixed_2_6"
    MIXED_3_4 = "mixed_3_4"
    MIXED_3_6 = "mixed_3_6"
    MIXED_4_6 = "mixed_4_6"


def convert(
    model: Annotated[
        str, typer.Option("--model", "--hf-path", help="A model folder or a hub name.", show_default=False)
    ],
    out: Annotated[str, typer.Option("--out", "--mlx-path", help="The folder to write.")] = "mlx_model",
    quantize: Annotated[bool, typer.Option("--quantize", "-q", help="Quantise the matrices.")] = False,
    bits: Annotated[int | None, typer.Option("--bits", "--q-bits", help="Bits of a code. Default: the mode's.")] = None,
    group_size: Annotated[
        int | None,
        typer.Option("--group-size", "--q-group-size", help="Weights that share a scale. Default: the mode's."),
    ] = None,
    mode: Annotated[Mode | None, typer.Option("--mode", "--q-mode", help="How to quantise. Default: affine.")] = None,
    mixed: Annotated[
        Recipe | None, typer.Option("--mixed", "--quant-predicate", help="Give sensitive matrices more bits.")
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Type of what is not quantised. Default: the checkpoint's.")
    ] = None,
    dequantize: Annotated[bool, typer.Option("--dequantize", "-d", help="Turn a quantised model back.")] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace the output folder.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Accepted as mlx-lm does; no code of a model is ever run here.")
    ] = False,
) -> None:
    """Write a model in MLX's format: quantised with -q, as it is without, and dense again with -d."""
    formats = {"--bits": bits, "--group-size": group_size, "--mode": mode, "--mixed": mixed}
    if not quantize and (given := [name for name, value in formats.items() if value is not None]):
        raise UserError(f"{', '.join(given)}: of use with -q only")

    from gfxlm.engine.convert import convert as write
    from gfxlm.engine.info import describe
    from gfxlm.engine.load import open_checkpoint

    with progress_bar("converting", in_bytes=True) as progress:
        write(
            model,
            out,
            quantize=quantize,
            q_group_size=group_size,
            q_bits=bits,
            q_mode=(mode or Mode.AFFINE).value,
            dtype=dtype.value if dtype else None,
            revision=revision,
            dequantize=dequantize,
            quant_predicate=mixed.value if mixed else None,
            trust_remote_code=trust_remote_code,
            force=force,
            progress=progress,
        )
    written = describe(open_checkpoint(out))
    size = f"{written.bits_per_weight:.3f} bits per weight, {written.disk_bytes / 1e9:.3f} GB"
    note(f"{out}: {written.quantization}; {size}")
