"""wallet.verify() finds whatever somebody with every right has done to the books."""

from datetime import timedelta
from random import Random
from uuid import UUID, uuid4

import psycopg
import pytest

from tests.cases import FUTURE, MAX, A, B, C, D, X, Y, deposit, hold, release, withdraw
from tests.db.door import apply, apply_all, call, create, let_expire

WALLETS = ("w", "v", "u")
CHAIN = "balance_after follows from the operation before"
SIDES = "both sides of a transfer agree"
HELD = "held_after follows from the operation before"
AVAILABLE = "available is not negative"
OPEN = "open holds are those without an end"
ENDS = "a hold has one end"
BELONGS = "an end belongs to a hold before it"
IN_TIME = "a hold ends before it is due, or expires then"

FIRST, SECOND, THIRD, TRANSFER, RECEIVE = (
    f"update wallet.operation set {{}} where {row}"
    for row in (
        *(f"wallet_uuid = 'w' and seq = {seq}" for seq in (1, 2, 3)),
        *(f"operation_type = '{side}'" for side in ("TRANSFER", "RECEIVE")),
    )
)


def transfer(connection: psycopg.Connection, payer: str, payee: str, operation: UUID, amount: int) -> None:
    connection.execute(
        "select wallet.apply_operation(%s, %s, 'TRANSFER', %s, p_counterparty_uuid => %s)",
        [payer, operation, amount, payee],
    )


@pytest.fixture
def tampering(superuser: psycopg.Connection, service: psycopg.Connection) -> psycopg.Connection:
    """A superuser's connection to a ledger of three wallets and some thirty rows, all of it in order."""
    chance = Random(1)
    create(service, dict.fromkeys(WALLETS, 90))
    for kind in chance.choices((deposit, withdraw, transfer), k=20):
        wallet, other = chance.sample(WALLETS, 2)
        if kind is transfer:
            transfer(service, wallet, other, uuid4(), chance.randint(1, 9))
        else:
            apply(service, kind(wallet, uuid4(), chance.randint(1, 9)))
    assert call(service, "verify") == []
    return superuser


def found(connection: psycopg.Connection) -> set[str]:
    """Return the invariants that the audit finds broken."""
    return {row.invariant for row in call(connection, "verify")}


def rows(connection: psycopg.Connection, condition: str = "true") -> list[str]:
    """Return where each row of the ledger stands."""
    return [row for (row,) in connection.execute(f"select ctid::text from wallet.operation where {condition}".encode())]


def change(connection: psycopg.Connection, row: str, assignment: str) -> None:
    connection.execute(f"update wallet.operation set {assignment} where ctid = %s::tid".encode(), [row])


@pytest.mark.parametrize(
    ("tampering", "invariants"),
    [
        (FIRST.format("amount = amount + 1"), {CHAIN}),
        (SECOND.format("operation_type = 'DEPOSIT'"), {CHAIN}),
        (FIRST.format("balance_after = balance_after + 1"), {CHAIN}),
        ("delete from wallet.operation where wallet_uuid = 'w' and seq = 1", {CHAIN, "seq has no gap"}),
        ("delete from wallet.operation where wallet_uuid = 'w' and seq = 2", {CHAIN, "seq has no gap"}),
        (THIRD.format("seq = 7"), {"seq has no gap"}),
        (
            SECOND.format("created_at = created_at - interval '1 hour'"),
            {"created_at never goes back"},
        ),
        ("delete from wallet.wallet where uuid = 'w'", {"operation belongs to a wallet"}),
        (
            SECOND.format("operation_uuid = '00000000-0000-0000-0000-000000000000'"),
            {"operation is well formed"},
        ),
        (
            "alter table wallet.operation drop constraint operation_held_after_check;"
            "insert into wallet.operation (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after)"
            " values ('v', 'WITHDRAW', gen_random_uuid(), 2, 21, -1)",
            {"operation is well formed", AVAILABLE},
        ),
        (
            "insert into wallet.operation (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after)"
            " values ('v', 'EXPIRE', gen_random_uuid(), 2, 1, 20)",
            {"operation has no nulls"},
        ),
        (
            "drop index wallet.operation_requested_idx;"
            "insert into wallet.operation (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after)"
            " select 'v', 'DEPOSIT', operation_uuid, 2, 1, 21 from wallet.operation"
            " where wallet_uuid = 'w' and seq = 2",
            {"operation_uuid is unique"},
        ),
        # Wallets
        ("insert into wallet.wallet (uuid) values ('a b')", {"wallet is well formed"}),
        (
            "alter table wallet.wallet drop constraint wallet_status_check;"
            "update wallet.wallet set status = 'open' where uuid = 'w'",
            {"wallet is well formed"},
        ),
        (
            "alter table wallet.wallet drop constraint wallet_currency_check;"
            "update wallet.wallet set currency = 'eur' where uuid in ('w', 'v')",
            {"wallet is well formed"},
        ),
        (
            "alter table wallet.wallet alter id set generated by default;"
            "insert into wallet.wallet (uuid, id) select 'copy', id from wallet.wallet where uuid = 'w'",
            {"wallet id is unique"},
        ),
        ("update wallet.wallet set status = 'CLOSED' where uuid = 'w'", {"closed wallet is empty"}),
        # Transfers
        (
            "update wallet.wallet set currency = 'EUR' where uuid = 'v'",
            {"both sides of a transfer have one currency"},
        ),
        (
            "update wallet.wallet set currency = case uuid when 'v' then 'EUR' else 'USD' end where uuid in ('w', 'v')",
            {"both sides of a transfer have one currency"},
        ),
        ("delete from wallet.operation where operation_type = 'RECEIVE'", {SIDES}),
        ("delete from wallet.operation where operation_type = 'TRANSFER'", {SIDES}),
        (RECEIVE.format("created_at = created_at + interval '1 hour'"), {SIDES}),
        (RECEIVE.format("counterparty_uuid = 'untouched'"), {SIDES}),
        (TRANSFER.format("counterparty_uuid = 'untouched'"), {SIDES}),
        (RECEIVE.format("amount = 19, balance_after = 19"), {SIDES}),
        (TRANSFER.format("amount = 19, balance_after = 51"), {SIDES}),
        (RECEIVE.format("operation_uuid = gen_random_uuid()"), {SIDES}),
        (
            TRANSFER.format("operation_type = 'WITHDRAW', counterparty_uuid = null"),
            {SIDES},
        ),
        (
            RECEIVE.format("operation_type = 'DEPOSIT', counterparty_uuid = null, operation_uuid = gen_random_uuid()"),
            {SIDES},
        ),
        (
            "insert into wallet.wallet (uuid) values ('copy');" + RECEIVE.format("wallet_uuid = 'copy'"),
            {SIDES},
        ),
        (
            "update wallet.operation set counterparty_uuid = null where operation_type in ('TRANSFER', 'RECEIVE')",
            {"a transfer and nothing else has a counterparty", SIDES},
        ),
        (
            FIRST.format("counterparty_uuid = 'v'"),
            {"a transfer and nothing else has a counterparty"},
        ),
        # What stands with holds only
        (SECOND.format("held_after = 1"), {HELD}),
        (SECOND.format("hold_uuid = operation_uuid"), {BELONGS}),
        (FIRST.format("hold_uuid = operation_uuid"), {"operation is well formed", BELONGS}),
        (SECOND.format("expires_at = created_at + interval '1 hour'"), {"operation is well formed"}),
        # Metadata
        (SECOND.format("metadata = '[]'"), {"operation is well formed"}),
        (SECOND.format("metadata = '{}'"), {"operation is well formed"}),
        (SECOND.format("metadata = 'null'"), {"operation is well formed"}),
        (
            SECOND.format("metadata = jsonb_build_object('a', repeat('x', 2040))"),
            {"operation is well formed"},
        ),
    ],
)  # fmt: skip
def test_the_audit_finds_what_was_tampered_with(
    tampering: str, invariants: set[str], service: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    create(service, {"w": 0, "v": 0, "untouched": 10})
    apply(service, deposit("w", A, 100))
    apply(service, withdraw("w", B, 30))
    transfer(service, "w", "v", C, 20)
    assert call(service, "verify") == []

    superuser.execute(tampering.encode())

    faults = call(service, "verify")
    assert {row.invariant for row in faults} == invariants
    assert {row.wallet_uuid for row in faults} <= {"w", "v", "a b", "copy"}
    assert all(row.detail for row in faults)


# Holds


def row(seq: int, assignment: str) -> str:
    return f"update wallet.operation set {assignment} where wallet_uuid = 'w' and seq = {seq}"


@pytest.mark.parametrize(
    ("tampering", "invariants"),
    [
        # 1 DEPOSIT 100, 2 HOLD X 30, 3 HOLD Y 20 until FUTURE, 4 HOLD A 10, 5 HOLD B 5 and 6 HOLD C 4 until one
        # moment, 7 and 8 EXPIRE of B and C, 9 WITHDRAW 10 of X, 10 RELEASE of A, 11 HOLD D 40; open: Y, D
        ("delete from wallet.hold where seq = 11", {OPEN}),
        ("update wallet.hold set amount = 41 where seq = 11", {OPEN}),
        ("update wallet.hold set expires_at = null where seq = 3", {OPEN}),
        ("update wallet.hold set expires_at = expires_at + interval '1 us' where seq = 3", {OPEN}),
        ("update wallet.hold set seq = 1 where seq = 3", {OPEN}),
        ("update wallet.hold set created_at = created_at - interval '1 us' where seq = 3", {OPEN}),
        ("update wallet.hold set wallet_uuid = 'v' where seq = 3", {OPEN}),
        ("update wallet.hold set hold_uuid = gen_random_uuid() where seq = 3", {OPEN}),
        ("insert into wallet.hold values ('w', gen_random_uuid(), 99, 1, null, now())", {OPEN}),
        (
            "insert into wallet.hold select wallet_uuid, operation_uuid, seq, amount, expires_at, created_at"
            " from wallet.operation where wallet_uuid = 'w' and seq = 2",
            {OPEN},
        ),
        (
            "update wallet.hold set expires_at = created_at + interval '1 us' where seq = 3;"
            "update wallet.operation set expires_at = created_at + interval '1 us' where wallet_uuid = 'w' and seq = 3",
            {"an operation records the holds that are due"},
        ),
        (
            "alter table wallet.hold drop constraint hold_pkey; drop index wallet.hold_seq_idx;"
            "insert into wallet.hold select * from wallet.hold where seq = 11",
            {"an open hold stands once"},
        ),
        (
            "update wallet.hold set expires_at = 'infinity' where seq = 3;"
            "update wallet.operation set expires_at = 'infinity' where wallet_uuid = 'w' and seq = 3",
            {"operation is well formed"},
        ),
        (
            "insert into wallet.operation select wallet_uuid, 'RELEASE', gen_random_uuid(), 12, 30, balance_after,"
            " created_at, held_after - 30, null, (select operation_uuid from wallet.operation where seq = 2)"
            " from wallet.operation where seq = 11",
            {ENDS},
        ),
        (row(2, "held_after = 29"), {HELD}),
        (row(11, "held_after = 0"), {HELD}),
        (
            "alter table wallet.operation drop constraint operation_held_after_check;" + row(11, "held_after = -1"),
            {HELD, AVAILABLE},
        ),
        (
            "alter table wallet.operation drop constraint operation_held_after_check;" + row(11, "held_after = 91"),
            {HELD, AVAILABLE},
        ),
        (row(2, "amount = 31"), {HELD}),
        (row(9, "amount = 31, balance_after = 69"), {BELONGS, CHAIN}),
        (row(9, "hold_uuid = null"), {HELD, OPEN}),
        (row(9, "hold_uuid = gen_random_uuid()"), {HELD, OPEN, BELONGS}),
        (
            row(9, "hold_uuid = (select operation_uuid from wallet.operation where wallet_uuid = 'w' and seq = 11)"),
            {HELD, OPEN, BELONGS},
        ),
        (row(10, "operation_type = 'EXPIRE', operation_uuid = hold_uuid"), {IN_TIME}),
        (row(10, "amount = 9"), {BELONGS}),
        (row(10, "hold_uuid = null"), {"operation has no nulls", HELD, OPEN}),
        (row(10, "expires_at = created_at + interval '1 day'"), {"operation is well formed"}),
        (row(7, "amount = 4"), {BELONGS}),
        (row(7, "operation_uuid = gen_random_uuid()"), {"operation is well formed"}),
        (row(7, "metadata = '{\"a\": 1}'"), {"operation is well formed"}),
        (row(7, "operation_type = 'RELEASE', operation_uuid = gen_random_uuid()"), {IN_TIME}),
        (row(8, "created_at = created_at + interval '1 us'"), {IN_TIME}),
        (row(7, "created_at = created_at - interval '1 us'"), {IN_TIME}),
        (row(5, "expires_at = expires_at + interval '1 us'"), {IN_TIME}),
        (row(5, "expires_at = null"), {IN_TIME}),
        (row(5, "expires_at = created_at"), {IN_TIME, "operation is well formed"}),
        (row(2, "expires_at = created_at + interval '1 us'"), {IN_TIME}),
        (row(2, "hold_uuid = operation_uuid"), {"operation is well formed", BELONGS, ENDS, HELD}),
        (row(2, "operation_type = 'DEPOSIT', balance_after = 130"), {HELD, BELONGS, CHAIN}),
        ("update wallet.operation set wallet_uuid = 'v' where seq = 2", {HELD, BELONGS, CHAIN, "seq has no gap"}),
    ],
)  # fmt: skip
def test_the_audit_finds_what_was_tampered_with_in_holds(
    tampering: str, invariants: set[str], service: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    create(service, {"w": 100, "v": 0})
    apply_all(service, [hold("w", X, 30), hold("w", Y, 20, expires_at=FUTURE), hold("w", A, 10)])
    let_expire(service, [hold("w", B, 5), hold("w", C, 4)])
    for request in (withdraw("w", uuid4(), 10, hold=X), release("w", uuid4(), A), hold("w", D, 40)):
        apply(service, request)
    assert [row.operation_type for row in call(service, "list_operations", "w")][:5] == [
        "HOLD",
        "RELEASE",
        "WITHDRAW",
        "EXPIRE",
        "EXPIRE",
    ]
    assert call(service, "verify") == []

    superuser.execute(tampering.encode())

    faults = call(service, "verify")
    assert {fault.invariant for fault in faults} == invariants
    assert all(fault.detail for fault in faults)


def test_a_wallet_with_another_name_is_found(tampering: psycopg.Connection) -> None:
    for wallet in WALLETS:
        with tampering.transaction(force_rollback=True):
            tampering.execute("update wallet.wallet set uuid = 'x' || uuid where uuid = %s", [wallet])
            assert found(tampering) == {"operation belongs to a wallet"}, wallet


@pytest.mark.parametrize(
    "assignment",
    [
        "amount = amount + 1",
        f"amount = {MAX}",
        "balance_after = balance_after + 1",
        f"balance_after = {MAX}",
        "operation_type = case operation_type when 'DEPOSIT' then 'WITHDRAW' else 'DEPOSIT' end,"
        " operation_uuid = gen_random_uuid()",
        "seq = seq + 1000",
        "wallet_uuid = 'nobody'",
        "wallet_uuid = 'new'",
        "held_after = 1",
        "counterparty_uuid = 'new'",
    ],
)
def test_any_operation_with_another_value_is_found(tampering: psycopg.Connection, assignment: str) -> None:
    create(tampering, {"new": 0})
    ledger = rows(tampering)
    assert len(ledger) > 25
    for row in ledger:
        with tampering.transaction(force_rollback=True):
            change(tampering, row, assignment)
            assert found(tampering), row


def test_any_deleted_operation_is_found_but_a_wallet_s_last_that_was_no_transfer(
    tampering: psycopg.Connection,
) -> None:
    """A wallet's balance is what its last row says: nothing else tells that another came after it."""
    last = "seq = (select max(l.seq) from wallet.operation as l where l.wallet_uuid = operation.wallet_uuid)"
    undetectable = set(rows(tampering, f"{last} and operation_type in ('DEPOSIT', 'WITHDRAW')"))
    for row in rows(tampering):
        with tampering.transaction(force_rollback=True):
            tampering.execute("delete from wallet.operation where ctid = %s::tid", [row])
            assert bool(found(tampering)) == (row not in undetectable), row


def test_any_two_operations_that_changed_places_are_found(tampering: psycopg.Connection) -> None:
    pairs = tampering.execute("""
        select a.wallet_uuid, a.seq, b.seq
        from wallet.operation as a join wallet.operation as b on b.wallet_uuid = a.wallet_uuid and b.seq > a.seq""")
    tampering.execute("alter table wallet.operation drop constraint operation_seq_check")
    for wallet, one, other in pairs.fetchall():
        with tampering.transaction(force_rollback=True):
            for before, after in ((one, -1), (other, one), (-1, other)):
                tampering.execute(
                    "update wallet.operation set seq = %s where wallet_uuid = %s and seq = %s", [after, wallet, before]
                )
            assert found(tampering), (wallet, one, other)


NO_CONSTRAINTS = """
    do $$
    declare
      v_constraint record;
    begin
      for v_constraint in
        select conrelid::regclass as on_table, conname from pg_constraint
        where connamespace = 'wallet'::regnamespace and contype <> 'n'
      loop
        execute format('alter table %s drop constraint %I', v_constraint.on_table, v_constraint.conname);
      end loop;
    end
    $$;
    drop index wallet.operation_requested_idx;
    drop index wallet.operation_receive_idx;
    alter table wallet.wallet alter id drop identity;
    alter table wallet.wallet alter uuid drop not null, alter id drop not null, alter status drop not null,
      alter created_at drop not null;
    alter table wallet.operation alter wallet_uuid drop not null, alter operation_type drop not null,
      alter operation_uuid drop not null, alter seq drop not null, alter amount drop not null,
      alter balance_after drop not null, alter held_after drop not null, alter created_at drop not null;
"""
"""Takes away whatever the tables forbid."""


@pytest.mark.parametrize("column", ["uuid", "id", "status", "created_at"])
def test_any_wallet_with_a_null_is_found(tampering: psycopg.Connection, column: str) -> None:
    create(tampering, {"empty": 0})
    tampering.execute(NO_CONSTRAINTS)
    assert found(tampering) == set()
    for wallet in [*WALLETS, "empty"]:
        with tampering.transaction(force_rollback=True):
            tampering.execute(f"update wallet.wallet set {column} = null where uuid = %s".encode(), [wallet])
            assert "wallet has no nulls" in found(tampering), wallet


@pytest.mark.parametrize(
    "column",
    [
        "wallet_uuid",
        "operation_type",
        "operation_uuid",
        "seq",
        "amount",
        "balance_after",
        "held_after",
        "created_at",
    ],
)
def test_any_operation_with_a_null_is_found(tampering: psycopg.Connection, column: str) -> None:
    tampering.execute(NO_CONSTRAINTS)
    for row in rows(tampering):
        with tampering.transaction(force_rollback=True):
            change(tampering, row, f"{column} = null")
            assert "operation has no nulls" in found(tampering), row


@pytest.mark.parametrize(
    "column", ["operation_type", "amount", "balance_after", "seq", "operation_uuid", "wallet_uuid"]
)
def test_a_history_of_nothing_but_nulls_is_found(tampering: psycopg.Connection, column: str) -> None:
    tampering.execute(NO_CONSTRAINTS)
    tampering.execute(f"update wallet.operation set {column} = null".encode())
    assert "operation has no nulls" in found(tampering)


@pytest.mark.parametrize("wallet", [*WALLETS, "empty"])
@pytest.mark.parametrize("copy", ["id", "id + 1000", "null"])
def test_a_wallet_that_stands_twice_is_found(tampering: psycopg.Connection, wallet: str, copy: str) -> None:
    create(tampering, {"empty": 0})
    tampering.execute(NO_CONSTRAINTS)
    tampering.execute(
        f"insert into wallet.wallet (uuid, id) select uuid, {copy} from wallet.wallet where uuid = %s".encode(),
        [wallet],
    )
    assert "wallet uuid is unique" in found(tampering)


def test_a_wallet_id_that_stands_twice_is_found(tampering: psycopg.Connection) -> None:
    tampering.execute(NO_CONSTRAINTS)
    tampering.execute("update wallet.wallet set id = (select min(id) from wallet.wallet)")
    assert found(tampering) == {"wallet id is unique"}


@pytest.mark.parametrize(
    ("copy", "invariants"),
    [
        ("operation_uuid, seq", {"operation_uuid is unique", "seq has no gap"}),
        ("gen_random_uuid(), seq", {"seq has no gap"}),
        ("operation_uuid, 1000", {"operation_uuid is unique", "seq has no gap"}),
        ("null, seq", {"operation has no nulls", "seq has no gap"}),
    ],
)
def test_an_operation_that_stands_twice_is_found(
    tampering: psycopg.Connection, copy: str, invariants: set[str]
) -> None:
    tampering.execute(NO_CONSTRAINTS)
    for row in rows(tampering):
        with tampering.transaction(force_rollback=True):
            tampering.execute(
                f"""
                insert into wallet.operation (
                  wallet_uuid, operation_type, counterparty_uuid, operation_uuid, seq, amount, balance_after, created_at
                )
                select wallet_uuid, operation_type, counterparty_uuid, {copy}, amount, balance_after, created_at
                from wallet.operation where ctid = %s::tid""".encode(),
                [row],
            )
            assert found(tampering) >= invariants, row


@pytest.mark.parametrize(
    "assignment",
    ["amount = 0", "amount = -1", "operation_type = 'deposit'", "operation_type = ''", "seq = 0", "seq = -1",
     "operation_uuid = '00000000-0000-0000-0000-000000000000'", "balance_after = -1", "wallet_uuid = ''",
     "held_after = -1", "held_after = balance_after + 1", "metadata = '1'", "counterparty_uuid = wallet_uuid"],
)  # fmt: skip
def test_any_operation_that_the_tables_would_forbid_is_found(tampering: psycopg.Connection, assignment: str) -> None:
    tampering.execute(NO_CONSTRAINTS)
    for row in rows(tampering):
        with tampering.transaction(force_rollback=True):
            change(tampering, row, assignment)
            assert found(tampering), row


def test_the_audit_may_use_several_processors(superuser: psycopg.Connection) -> None:
    parallel = "select proparallel from pg_proc where oid = 'wallet.verify'::regproc"
    assert superuser.execute(parallel).fetchall() == [("s",)]


def test_an_operation_of_a_wallet_that_never_was_is_found(tampering: psycopg.Connection) -> None:
    tampering.execute("""
        insert into wallet.operation (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after)
        values ('nobody', 'DEPOSIT', gen_random_uuid(), 1, 5, 5)""")

    [fault] = call(tampering, "verify")

    assert (fault.invariant, fault.wallet_uuid, fault.seq) == ("operation belongs to a wallet", "nobody", 1)


def test_a_forged_operation_is_found_even_where_the_balance_was_adjusted(tampering: psycopg.Connection) -> None:
    """It went in first, and the last row was moved up: only the running balance still tells."""
    tampering.execute("alter table wallet.operation drop constraint operation_pkey")
    tampering.execute("update wallet.operation set seq = seq + 1 where wallet_uuid = 'w'")
    tampering.execute("""
        insert into wallet.operation
          (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after, created_at)
        select 'w', 'DEPOSIT', gen_random_uuid(), 1, 5, 5, created_at from wallet.wallet where uuid = 'w'""")
    tampering.execute("""
        update wallet.operation as o set balance_after = balance_after + 5 where wallet_uuid = 'w' and seq =
          (select max(seq) from wallet.operation where wallet_uuid = 'w')""")

    assert found(tampering) == {CHAIN}


def test_money_that_was_moved_from_wallet_to_wallet_is_found(tampering: psycopg.Connection) -> None:
    """The sum over all wallets stays what it was."""
    tampering.execute("""
        update wallet.operation as o
        set balance_after = balance_after + case wallet_uuid when 'w' then 1 else -1 end
        where wallet_uuid in ('w', 'v') and seq =
          (select max(l.seq) from wallet.operation as l where l.wallet_uuid = o.wallet_uuid)""")

    assert {(row.wallet_uuid, row.invariant) for row in call(tampering, "verify")} == {("w", CHAIN), ("v", CHAIN)}


def test_forged_amounts_cannot_overflow_the_audit(tampering: psycopg.Connection) -> None:
    create(tampering, {"full": 0})
    tampering.execute(
        f"""
        insert into wallet.operation (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after)
        select 'full', 'DEPOSIT', gen_random_uuid(), n, {MAX}, {MAX} from generate_series(1, 100) as n""".encode()
    )

    assert found(tampering) == {CHAIN}


def test_forged_seqs_cannot_overflow_the_audit(tampering: psycopg.Connection) -> None:
    create(tampering, {"full": 0})
    tampering.execute("alter table wallet.operation drop constraint operation_pkey")
    tampering.execute(
        f"""
        insert into wallet.operation (wallet_uuid, operation_type, operation_uuid, seq, amount, balance_after)
        select 'full', 'DEPOSIT', gen_random_uuid(), {MAX}, 1, n from generate_series(1, 2) as n""".encode()
    )

    assert "seq has no gap" in found(tampering)


def test_a_hold_that_no_operation_will_ever_find_due_is_found(
    service: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    create(service, {"w": 100}, holds=[hold("w", Y, 20, expires_at=FUTURE)])
    [moment] = let_expire(service, [hold("w", B, 5)])
    assert call(service, "expire_holds", "w")[0].expire_holds == 1
    assert call(service, "verify") == []
    for table in ("operation", "hold"):
        superuser.execute(
            f"update wallet.{table} set expires_at = %s where expires_at = %s".encode(),
            [moment - timedelta(microseconds=1), FUTURE],
        )
    assert found(superuser) == {"an operation records the holds that are due"}


def test_forged_holds_of_a_closed_wallet_cannot_overflow_the_audit(
    service: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    create(service, {"w": 100}, holds=[hold("w", Y, 20)])
    superuser.execute("update wallet.wallet set status = 'CLOSED'")
    superuser.execute(
        f"""
        insert into wallet.hold (wallet_uuid, hold_uuid, seq, amount, expires_at, created_at)
        select 'w', gen_random_uuid(), 10 + n, {MAX}, clock_timestamp(), clock_timestamp() - interval '1 s'
        from generate_series(1, 3) as n""".encode()
    )
    assert found(superuser) >= {"closed wallet is empty", OPEN}


def test_a_ledger_at_its_limits_is_in_order(service: psycopg.Connection) -> None:
    create(service, {"full": 0, "other": 0})
    apply(service, deposit("full", A, MAX))
    for _ in range(3):
        apply(service, withdraw("full", uuid4(), MAX))
        apply(service, deposit("full", uuid4(), MAX))
        transfer(service, "full", "other", uuid4(), MAX)
        transfer(service, "other", "full", uuid4(), MAX)

    assert call(service, "verify") == []


def test_an_audit_of_many_holds_takes_seconds_whatever_the_statistics_say(
    service: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    """They are from before the first hold."""
    superuser.execute("alter table wallet.operation set (autovacuum_enabled = false)")
    superuser.execute("alter table wallet.hold set (autovacuum_enabled = false)")
    create(service, {"w": 10_000})
    apply_all(service, [deposit("w", uuid4(), 1) for _ in range(1000)])
    superuser.execute("analyze wallet.operation")
    holds = [uuid4() for _ in range(10_000)]
    for requests in (
        [hold("w", name, 1) for name in holds],
        [withdraw("w", uuid4(), 1, hold=name) for name in holds[:9_000]],
    ):
        assert all(row.sqlstate is None for row in apply_all(service, requests))
    superuser.execute("set statement_timeout = '10s'")  # a look at each hold for each end took half a minute
    assert superuser.execute("select * from wallet.verify()").fetchall() == []
