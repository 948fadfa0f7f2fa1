"""What a model's text says: thinking, an answer, calls of tools."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gfxlm.server.incremental import Incremental
from gfxlm.server.reasoning import Reasoning, Thinking, split
from gfxlm.server.tools import Format
from gfxlm.server.tools.tool import CallArguments, CallBegin, CallEnd, Content, Tool, ToolEvent


@dataclass(frozen=True, slots=True)
class ToolCall:
    """Call number `index` of the answer begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolArguments:
    """More of its arguments' JSON text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """It is complete, or the text has ended."""

    index: int


Event = Reasoning | Content | ToolCall | ToolArguments | ToolCallEnd


@dataclass(slots=True)
class Call:
    """A whole call."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Said:
    """All that an answer has said so far."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, events: Iterable[Event]) -> None:
        """Go on by what came next."""
        for event in events:
            match event:
                case Reasoning(text):
                    self.reasoning += text
                case Content(text):
                    self.content += text
                case ToolCall(_, id, name):
                    self.calls.append(Call(id, name))
                case ToolArguments(index, text):
                    self.calls[index].arguments += text


class OutputParser:
    """Text in, events out. Without a `form` there are no calls."""

    def __init__(self, thinking: Thinking | None, form: Format | None, tools: Mapping[str, Tool]) -> None:
        self._thoughts = Incremental[Reasoning | Content](lambda source: split(source, thinking))
        self._form = form
        self._calls = None if form is None else Incremental[ToolEvent](lambda source: form.parse(source, tools))
        self.calls = 0

    def feed(self, text: str) -> list[Event]:
        """Take the next piece of text; what it settles."""
        return self._read(self._thoughts.feed(text))

    def finish(self) -> list[Event]:
        """What is left once no more text can come."""
        events = self._read(self._thoughts.finish())
        return events if self._calls is None else events + [self._numbered(event) for event in self._calls.finish()]

    def _read(self, parts: list[Reasoning | Content]) -> list[Event]:
        events: list[Event] = []
        for part in parts:
            if isinstance(part, Reasoning) or self._calls is None:
                events.append(part)
            else:
                events += [self._numbered(event) for event in self._calls.feed(part.text)]
        return events

    def _numbered(self, event: ToolEvent) -> Event:
        match event:
            case CallBegin(name):
                assert self._form is not None
                self.calls += 1
                return ToolCall(self.calls - 1, self._form.call_id(), name)
            case CallArguments(text):
                return ToolArguments(self.calls - 1, text)
            case CallEnd():
                return ToolCallEnd(self.calls - 1)
        return event
