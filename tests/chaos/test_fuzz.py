"""Whatever fits the service's own description of itself, or just does not, is answered, and as described."""

import json
from collections import Counter
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langserve.lzstring import LZString
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
)
from schemathesis.core.result import Ok

from tests.chaos.conftest import KEY
from tests.chaos.watch import assert_refused, held
from tests.server import Server

CASE_TIMEOUT_S = 20


def share_link(options: dict[str, Any]) -> str:
    link: str = LZString.compressToEncodedURIComponent(json.dumps({"configurable": options}))  # type: ignore[no-untyped-call]
    return link


def send_cases(server: Server, *, per_operation: int, key: str | None) -> Counter[int]:
    """Cases for each operation, half of them such as it says that it takes; says how many got which status."""
    description = httpx.get(f"{server.url}/openapi.json", headers={"X-API-Key": KEY}).json()
    statuses: Counter[int] = Counter()
    headers = {} if key is None else {"X-API-Key": key}
    for found in schemathesis.openapi.from_dict(description).get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()
        either = operation.as_strategy() | operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)

        @settings(
            max_examples=per_operation,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=either, link=st.none() | st.sampled_from([share_link({}), share_link({"max_tokens": 3})]))
        def send(case: schemathesis.Case[Any], link: str | None) -> None:
            if link is not None and "config_hash" in case.path_parameters:
                case.path_parameters["config_hash"] = link
            response = case.call(base_url=server.url, headers=headers, timeout=CASE_TIMEOUT_S)
            statuses[response.status_code] += 1
            if response.status_code >= 400:
                assert_refused(response.status_code, response.headers["x-request-id"][0], response.json())
                return
            checks = [
                not_a_server_error,
                response_schema_conformance,
                response_headers_conformance,
                content_type_conformance,
            ]
            case.validate_response(response, checks=checks)

        send()
    return statuses


def test_whatever_fits_the_description_or_does_not_is_answered(guarded_server: Server) -> None:
    statuses = send_cases(guarded_server, per_operation=6, key=KEY)
    assert statuses[200] > 20
    assert statuses[422] > 20


def test_without_a_key_nothing_but_health_is_told(guarded_server: Server) -> None:
    statuses = send_cases(guarded_server, per_operation=2, key=None)
    assert set(statuses) <= {200, 401, 405}
    assert statuses[401] > 50
    assert statuses[200] <= 2 * 2


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("key", [KEY, None, "not-the-key-that-it-should-be"], ids=["key", "no key", "wrong key"])
def test_five_thousand_cases_break_nothing(
    guarded_server: Server, key: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = held(guarded_server)
    statuses = send_cases(guarded_server, per_operation=110, key=key)
    with capsys.disabled():
        print(f"\n{statuses.total()} cases: {dict(statuses)}; {before} before, {held(guarded_server)} after")
    assert statuses.total() >= 5000
    if key != KEY:
        assert set(statuses) <= {200, 401, 405}
