"""The table of cases over SQL: one by one, as one batch, as two, and as one that is atomic."""

from collections import Counter

import psycopg
import pytest

from tests.cases import CASES, MESSAGES, Case
from tests.db.door import apply, apply_all, balances, call, create, held

each_case = pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "_") for case in CASES])


@pytest.fixture
def service(shared_service: psycopg.Connection, emptied: None) -> psycopg.Connection:
    return shared_service


def set_up(connection: psycopg.Connection, case: Case) -> None:
    create(connection, case.wallets, case.currencies, case.statuses, case.holds, case.due)


@each_case
def test_one_by_one(case: Case, service: psycopg.Connection) -> None:
    set_up(service, case)

    for request in case.requests:
        if request.outcome is None:
            row = apply(service, request)
            assert (row.wallet_uuid, row.operation_type, row.operation_uuid) == (
                request.wallet,
                request.type,
                request.operation,
            )
            assert row.amount == request.amount or request.type == "RELEASE"
            assert (row.counterparty_uuid, row.hold_uuid, row.expires_at) == (
                request.counterparty,
                request.hold,
                request.expires_at,
            )
            assert row.metadata == (request.metadata or None)
            assert {request.wallet: row.balance_after} == balances(service, [request.wallet])
        else:
            with pytest.raises(psycopg.Error) as refused:
                apply(service, request)
            assert refused.value.sqlstate == request.outcome
            if request.outcome in MESSAGES:
                assert refused.value.diag.message_primary == MESSAGES[request.outcome]

    assert balances(service, case.wallets) == case.balances
    assert held(service, case.wallets) == case.held
    assert call(service, "verify") == []


@pytest.mark.parametrize("first", [0, 1, 2], ids=["as_one_batch", "after_a_batch_of_one", "after_a_batch_of_two"])
@each_case
def test_in_batches(case: Case, first: int, service: psycopg.Connection) -> None:
    set_up(service, case)

    rows = apply_all(service, case.requests[:first]) + apply_all(service, case.requests[first:])

    assert [row.sqlstate for row in rows] == [request.outcome for request in case.requests]
    for row, request in zip(rows, case.requests, strict=True):
        if request.outcome is None:
            assert row.message is None
            assert row.same_request is True
            assert (row.wallet_uuid, row.operation_type, row.operation_uuid) == (
                request.wallet,
                request.type,
                request.operation,
            )
            assert row.amount == request.amount or request.type == "RELEASE"
            assert (row.counterparty_uuid, row.hold_uuid, row.expires_at) == (
                request.counterparty,
                request.hold,
                request.expires_at,
            )
            assert row.metadata == (request.metadata or None)
        elif request.outcome in MESSAGES:
            assert row.message == MESSAGES[request.outcome]
        else:
            assert row.message
    assert balances(service, case.wallets) == case.balances
    assert held(service, case.wallets) == case.held
    assert call(service, "verify") == []


@each_case
def test_as_one_atomic_batch(case: Case, service: psycopg.Connection) -> None:
    set_up(service, case)

    rows = apply_all(service, case.requests, atomic=True)

    refused = any(request.outcome for request in case.requests)
    assert [row.sqlstate for row in rows] == [
        request.outcome or ("WA425" if refused else None) for request in case.requests
    ]
    recorded = {(request.wallet, request.operation) for request in [*case.holds, *case.due]}
    for row, request in zip(rows, case.requests, strict=True):
        assert row.message == MESSAGES.get(row.sqlstate, row.message)
        if request.outcome == "WA409" and request.operation in {operation for _, operation in recorded}:
            assert (row.seq is None) is ((request.wallet, request.operation) not in recorded)
            assert row.same_request is False
        else:
            assert (row.seq is None) is refused
            assert row.same_request is (None if refused else True)
    assert balances(service, case.wallets) == (case.wallets if refused else case.balances)
    before = Counter[str]()
    for request in case.holds:
        before[request.wallet] += request.amount or 0
    assert held(service, case.wallets) == (before if refused else case.held)
    assert call(service, "verify") == []
