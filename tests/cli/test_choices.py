"""What the options offer is what the engine knows: `--help` must not import torch, so the lists stand twice."""

from gfxlm.cli.convert import Mode, Recipe
from gfxlm.cli.options import DType
from gfxlm.engine.convert import DTYPES, RECIPES
from gfxlm.ops.formats import MODES


def test_choices_are_the_engines() -> None:
    assert tuple(Mode) == MODES
    assert set(Recipe) == set(RECIPES)
    assert set(DType) == set(DTYPES)
