"""`gfxlm generate` with structured output."""

import json
import re
from pathlib import Path

import pytest

from tests.cli.runner import complaint, run

SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}


def answer(*options: object) -> str:
    result = run("generate", "-p", "x", "-m", "100", "--quiet", "--temp", "1", "--seed", "1", *options)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout.removesuffix("\n")


def test_what_an_answer_looks_like(tmp_path: Path) -> None:
    file = tmp_path / "given"
    file.write_text(json.dumps(SCHEMA))
    for schema in (json.dumps(SCHEMA), file):
        assert json.loads(answer("--json-schema", schema))["a"] in ("x", "y")
    assert re.fullmatch("[ab]{3}-[0-9]", answer("--regex", "[ab]{3}-[0-9]"))
    file.write_text('start: "yes" | "no"')
    assert answer("--grammar", file) in ("yes", "no")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--regex", "a", "--json-schema", "{}"], "--json-schema and --regex: give one of them"),
        (["--json-schema", "{"], "--json-schema: not valid JSON"),
        (["--grammar", "not-there.lark"], "not-there.lark: No such file"),
        (["--regex", "["], "unclosed character class"),
        (["--json-schema", '{"type": "strung"}'], "Invalid type: strung"),
    ],
)
def test_what_is_wrong(options: list[str], says: str) -> None:
    assert says in complaint("generate", "-p", "x", *options)
