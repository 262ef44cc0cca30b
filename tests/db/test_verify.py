"""wallet.verify() finds whatever somebody with every right has done to the books."""

from random import Random
from uuid import uuid4

import psycopg
import pytest

from tests.cases import MAX, A, Request, deposit, withdraw
from tests.db.door import apply, apply_all, call, create

WALLETS = ("w", "v", "u")


@pytest.fixture
def tampering(superuser: psycopg.Connection, service: psycopg.Connection) -> psycopg.Connection:
    """A superuser's connection to a ledger of three wallets and some twenty operations, all of it in order."""
    chance = Random(1)
    create(service, dict.fromkeys(WALLETS, 20))
    kinds = ("DEPOSIT", "WITHDRAW")
    apply_all(
        service,
        [Request(chance.choice(WALLETS), uuid4(), chance.choice(kinds), chance.randint(1, 9), None) for _ in range(20)],
    )
    assert call(service, "verify") == []
    return superuser


def found(connection: psycopg.Connection) -> set[str]:
    """Return the invariants that the audit finds broken."""
    return {row.invariant for row in call(connection, "verify")}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("balance", "balance + 1"),
        ("balance", "0"),
        ("balance", f"{MAX}"),
        ("seq", "seq + 1"),
        ("seq", "seq - 1"),
        ("uuid", "'x' || uuid"),
    ],
)
def test_any_wallet_with_another_value_is_found(tampering: psycopg.Connection, column: str, value: str) -> None:
    for wallet in WALLETS:
        with tampering.transaction(force_rollback=True):
            tampering.execute(f"update wallet.wallet set {column} = {value} where uuid = %s", [wallet])
            assert found(tampering), wallet


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("amount", "amount + 1"),
        ("amount", f"{MAX}"),
        ("balance_after", "balance_after + 1"),
        ("balance_after", f"{MAX}"),
        ("operation_type", "case operation_type when 'DEPOSIT' then 'WITHDRAW' else 'DEPOSIT' end"),
        ("seq", "seq + 1000"),
        ("wallet_uuid", "'nobody'"),
        ("wallet_uuid", "'new'"),
    ],
)
def test_any_operation_with_another_value_is_found(tampering: psycopg.Connection, column: str, value: str) -> None:
    create(tampering, {"new": 0})
    operations = tampering.execute("select operation_uuid from wallet.operation where wallet_uuid <> 'new'").fetchall()
    assert len(operations) > 15
    for [operation] in operations:
        with tampering.transaction(force_rollback=True):
            tampering.execute(f"update wallet.operation set {column} = {value} where operation_uuid = %s", [operation])
            assert found(tampering), operation


def test_any_deleted_operation_is_found(tampering: psycopg.Connection) -> None:
    for [operation] in tampering.execute("select operation_uuid from wallet.operation").fetchall():
        with tampering.transaction(force_rollback=True):
            tampering.execute("delete from wallet.operation where operation_uuid = %s", [operation])
            assert found(tampering), operation


def test_any_two_operations_that_changed_places_are_found(tampering: psycopg.Connection) -> None:
    pairs = tampering.execute("""
        select a.operation_uuid, a.seq, b.operation_uuid, b.seq
        from wallet.operation as a join wallet.operation as b on b.wallet_uuid = a.wallet_uuid and b.seq > a.seq""")
    for one, one_seq, other, other_seq in pairs.fetchall():
        with tampering.transaction(force_rollback=True):
            for operation, seq in ((one, -1), (other, one_seq), (one, other_seq)):
                tampering.execute("alter table wallet.operation drop constraint if exists operation_seq_check")
                tampering.execute("update wallet.operation set seq = %s where operation_uuid = %s", [seq, operation])
            assert found(tampering), (one_seq, other_seq)


def test_an_operation_of_a_wallet_that_never_was_is_found(tampering: psycopg.Connection) -> None:
    tampering.execute("insert into wallet.operation values ('nobody', 'DEPOSIT', gen_random_uuid(), 1, 5, 5)")

    [fault] = call(tampering, "verify")

    assert (fault.invariant, fault.wallet_uuid, fault.seq) == ("operation belongs to a wallet", "nobody", 1)


def test_a_forged_operation_is_found_even_where_the_balance_was_adjusted(tampering: psycopg.Connection) -> None:
    """It went in first, and what follows was moved up: only the running balance still tells."""
    tampering.execute("alter table wallet.operation drop constraint operation_pkey")
    tampering.execute("update wallet.operation set seq = seq + 1 where wallet_uuid = 'w'")
    tampering.execute("insert into wallet.operation values ('w', 'DEPOSIT', gen_random_uuid(), 1, 5, 5)")
    tampering.execute("update wallet.wallet set seq = seq + 1, balance = balance + 5 where uuid = 'w'")
    tampering.execute("""
        update wallet.operation as o set balance_after = w.balance
        from wallet.wallet as w where w.uuid = 'w' and o.wallet_uuid = 'w' and o.seq = w.seq""")

    assert found(tampering) == {"balance_after follows from the operation before"}


def test_money_that_was_moved_from_wallet_to_wallet_is_found(tampering: psycopg.Connection) -> None:
    """The sum over all wallets stays what it was."""
    tampering.execute("""
        update wallet.wallet set balance = balance + case uuid when 'w' then 1 else -1 end where uuid in ('w', 'v')""")

    assert {(row.wallet_uuid, row.invariant) for row in call(tampering, "verify")} == {
        (wallet, invariant)
        for wallet in ("w", "v")
        for invariant in ("balance is the last balance_after", "balance is the sum of the operations")
    }


def test_forged_amounts_cannot_overflow_the_audit(tampering: psycopg.Connection) -> None:
    create(tampering, {"full": 0})
    tampering.execute(f"""
        insert into wallet.operation
        select 'full', 'DEPOSIT', gen_random_uuid(), n, {MAX}, {MAX} from generate_series(1, 100) as n""")
    tampering.execute(f"update wallet.wallet set seq = 100, balance = {MAX} where uuid = 'full'")

    assert found(tampering) == {
        "balance is the sum of the operations",
        "balance_after follows from the operation before",
    }


def test_a_ledger_at_its_limits_is_in_order(service: psycopg.Connection) -> None:
    create(service, {"full": 0})
    apply(service, deposit("full", A, MAX))
    for _ in range(3):
        apply(service, withdraw("full", uuid4(), MAX))
        apply(service, deposit("full", uuid4(), MAX))

    assert call(service, "verify") == []
