"""`python -m gfxlm`."""

from gfxlm.cli import main

main()
