"""Calls as Llama 3 writes them: all of the answer is an object with name and parameters, or a list of Python calls."""

import ast
import re
from collections.abc import Generator, Mapping, Sequence

from gfxlm.server.incremental import Malformed, Source
from gfxlm.server.tools.grammar import Symbol, any_of
from gfxlm.server.tools.json_call import json_call
from gfxlm.server.tools.qwen import json_body
from gfxlm.server.tools.tool import (
    CallArguments,
    CallBegin,
    CallEnd,
    Parse,
    Reading,
    Tool,
    ToolEvent,
    content,
    given_back,
    line,
    new_call_id,
)

_TAG = "<|python_tag|>"
_FIRST_CALL = re.compile(r"\[\s*([A-Za-z_][\w.]*)\s*\(")
_FIRST_CALL_BEGINS = re.compile(r"\[\s*([A-Za-z_][\w.]*)?\s*")
_NAMES = {"true": True, "false": False, "null": None}


class Llama:
    """Calls stand where the answer begins, or behind a tag, and name a tool that there is: all else is content."""

    name = "llama"
    trigger = ""

    def parse(self, source: Source, tools: Mapping[str, Tool]) -> Parse:
        """Content and calls."""
        called = False
        while True:
            try:
                called |= yield from _calls(source, tools)
            except Malformed:
                yield from given_back(source)
            if not (yield from content(source, (_TAG,))):
                break
        if not called:
            source.position = len(source.text)
            yield from given_back(source)

    def call_id(self) -> str:
        """A new one, as any other."""
        return new_call_id()

    def rules(self, tools: Sequence[Tool], symbol: Symbol, *, parallel: bool) -> str:
        """The rule `rest`: one call, as these models' templates take no more than one back."""
        return "rest: body\n" + any_of("body", (json_body(tool, "parameters") for tool in tools))


def _calls(source: Source, tools: Mapping[str, Tool]) -> Generator[ToolEvent | None, None, bool]:
    """Read calls, if there are any. Raises Malformed where a tag or a bracket stands before something else."""
    yield from source.skip_space()
    tag = yield from source.starts_with(_TAG)
    source.position += len(tag)
    called = False
    while (bracket := (yield from source.skip_space(also=";" if called else ""))) in ("{", "["):
        yield from json_call(source, tools) if bracket == "{" else _python_calls(source, tools)
        called = True
    if tag and not called:
        raise Malformed
    source.rewind()
    return called


def _python_calls(source: Source, tools: Mapping[str, Tool]) -> Reading:
    """[name(argument=value, ...), ...]: passed on once the bracket closes. Raises Malformed for any other list."""
    while (begin := _FIRST_CALL.match(source.rest)) is None:
        if not _FIRST_CALL_BEGINS.fullmatch(source.rest):
            raise Malformed
        yield from source.more()
    if begin[1] not in tools:
        raise Malformed
    calls = parsed_calls((yield from source.nested("\"'")), tools)
    source.commit()
    for name, arguments in calls:
        yield CallBegin(name)
        yield CallArguments(arguments)
        yield CallEnd()


def parsed_calls(text: str, tools: Mapping[str, Tool]) -> list[tuple[str, str]]:
    """Names and JSON arguments of a list of Python calls. Raises Malformed for anything else."""
    try:
        tree = ast.parse(text, mode="eval").body
        elements = tree.elts if isinstance(tree, ast.List) else [tree]
        return [_parsed_call(call, tools) for call in elements]
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise Malformed from error


def _parsed_call(call: ast.expr, tools: Mapping[str, Tool]) -> tuple[str, str]:
    if not isinstance(call, ast.Call) or call.args or ast.unparse(call.func) not in tools:
        raise Malformed
    arguments = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise Malformed
        arguments[keyword.arg] = ast.literal_eval(_JsonNames().visit(keyword.value))
    return ast.unparse(call.func), line(arguments)


class _JsonNames(ast.NodeTransformer):
    """Reads true, false and null, too."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_NAMES[node.id]) if node.id in _NAMES else node
