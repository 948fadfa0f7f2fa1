"""docs/server.md names every route, every field of a body, every option and every metric, and no others.

The package says where its modules are.
"""

import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

from gfxlm import server
from gfxlm.cli.app import app as commands
from gfxlm.server.app import create_app
from gfxlm.server.metrics import Metrics
from gfxlm.server.opening import Opening
from gfxlm.server.registry import Models
from gfxlm.server.settings import Settings

TEXT = (Path(__file__).parents[2] / "docs" / "server.md").read_text()
CODE = set(re.findall(r"`([^`\n]+)`", TEXT))


def openapi() -> dict[str, Any]:
    metrics = Metrics()
    return create_app(Models(Opening().specs(["builtin"]), Settings(), metrics), Settings(), metrics).openapi()


def fields(schema: dict[str, Any], schemas: dict[str, Any]) -> set[str]:
    """Names of what a body holds, at its top."""
    if "$ref" in schema:
        return fields(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    return set(schema.get("properties", {}))


def serve_options() -> set[str]:
    import typer.main

    serve = typer.main.get_command(commands).commands["serve"]  # type: ignore[attr-defined]
    return {parameter.opts[0] for parameter in serve.params if parameter.name != "help" and not parameter.hidden}


def test_every_route() -> None:
    documented = {tuple(code.split()) for code in CODE if re.match(r"(GET|POST) /", code)}
    routes = {(method.upper(), path) for path, methods in openapi()["paths"].items() for method in methods}
    routes |= {("GET", "/"), ("GET", "/openapi.json")}
    routes = {(method, path.replace("{model:path}", "{model}")) for method, path in routes}
    assert documented == routes


def test_every_field() -> None:
    api = openapi()
    missing = {}
    for path, methods in api["paths"].items():
        for operation in methods.values():
            content = operation.get("requestBody", {}).get("content", {})
            for media in content.values():
                names = {name for name in fields(media["schema"], api["components"]["schemas"]) if name not in CODE}
                if names:
                    missing[path] = names
    assert missing == {}


def test_every_module_is_on_the_map() -> None:
    names = {module.name for module in pkgutil.iter_modules(server.__path__)}
    words = re.findall(r"\w+", (server.__doc__ or "").partition("\n\n")[2])
    assert names <= set(words)


def test_every_option() -> None:
    section = TEXT.split("## Options")[1].split("\n## ")[0]
    rows = "\n".join(line.split("|")[1] for line in section.splitlines() if line.startswith("|"))
    assert set(re.findall(r"`(--[a-z-]+)`", rows)) == serve_options()


@pytest.mark.parametrize("word", sorted(code for code in CODE if code.startswith("vllm:")))
def test_every_metric_exists(word: str) -> None:
    metrics = Metrics()
    metrics.model("m").watch(lambda: 0, lambda: 0, lambda: 0)
    assert f"# TYPE {word} " in metrics.render().decode()


def test_every_metric_is_there() -> None:
    names = re.findall(r"^# TYPE (vllm:\S+|gfxlm_\S+) ", Metrics().render().decode(), re.MULTILINE)
    assert {name for name in names if not name.endswith("_created")} <= CODE
