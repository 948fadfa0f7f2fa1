"""The command `gfxlm`. Nothing here imports torch before a command has something to compute."""


def main() -> None:
    """Run the command line and exit."""
    from gfxlm.cli.app import app

    app(prog_name="gfxlm")
