"""Whatever a client sends of what the server's own OpenAPI describes: no answer is the server's fault."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.config import CacheConfig, SchemathesisConfig

from gfxlm.server.app import create_app
from gfxlm.server.metrics import Metrics
from gfxlm.server.opening import Opening
from gfxlm.server.registry import Models, ModelSpec
from gfxlm.server.settings import Settings
from tests.server.conftest import LiveServer, serving


def operations() -> list[Any]:
    app = create_app(Models(Opening().specs(["builtin"]), Settings()), Settings(), Metrics())
    config = SchemathesisConfig(cache=CacheConfig(enabled=False))
    schema = schemathesis.openapi.from_dict(app.openapi(), config=config)
    return [result.ok() for result in schema.get_all_operations()]


@pytest.fixture(scope="module")
def short(make_spec: Callable[..., ModelSpec]) -> Iterator[LiveServer]:
    """A server whose texts are short, whatever is asked for."""
    with serving([make_spec(max_context=12)]) as live:
        yield live


@pytest.mark.slow
@pytest.mark.parametrize("operation", operations(), ids=lambda operation: operation.label)
def test_no_request_is_answered_with_a_5xx(short: LiveServer, operation: Any) -> None:
    # Shrinking would take minutes of generating texts; a failing body is short enough.
    @settings(
        max_examples=40,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def check(case: Any) -> None:
        response = case.call(base_url=short.url, timeout=60)
        late = response.status_code == 504 and "timeout" in case.body  # which the client itself wanted
        assert response.status_code < 500 or late, response.text
        if response.status_code >= 400:
            assert "error" in response.json(), response.text

    check()
    short.wait(lambda: short.worker.live == 0)
