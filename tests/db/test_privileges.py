"""Who may do what, tried: become the role, do the forbidden thing, expect the refusal."""

from collections.abc import Callable, Iterator, Sequence

import psycopg
import pytest
from psycopg import sql

from tests.cases import MESSAGES, A, B, deposit, withdraw
from tests.conftest import url_of
from tests.db.door import apply, apply_all, balances, call, create, outcome

INLINED = {"name_fault", "names_fault", "argument_fault", "state_fault", "fault_message", "is_same_request"}
"""Not security definer and not pinned: such a function could not be inlined into its callers, which are both."""

INTERNAL = [
    "select wallet.name_fault('w')",
    "select wallet.names_fault('w', 'v')",
    "select wallet.argument_fault('w', gen_random_uuid(), 'DEPOSIT', 1, null, null, null, null)",
    "select wallet.state_fault('DEPOSIT', 1, 'OPEN', 1, null, null, null, null)",
    "select wallet.is_same_request(null, 'DEPOSIT', 1, null, null, null, null)",
    "select wallet.fault_message('WA404')",
    "select wallet.raise_wallet_not_found('w')",
    "select wallet.raise_isolation_level()",
    "select wallet.lock_wallets('{w}')",
    "select wallet.wait_for_wallet('w', '1s')",
    "select wallet.seq_before('w', now())",
    "select wallet.record_expiries('w', now())",
    "select wallet.apply_request('w', gen_random_uuid(), 'DEPOSIT', 1, null, null, null, null, null)",
]
READING = [
    "select wallet.get_wallet('w')",
    "select wallet.get_operation('w', 'aaaaaaaa-0000-4000-8000-000000000000')",
    "select wallet.list_operations('w')",
    "select wallet.list_wallets()",
    "select wallet.list_holds('w')",
    "select wallet.contract_version()",
    "select wallet.verify()",
]
WRITING = [
    "select wallet.create_wallet()",
    "select wallet.set_status('w', 'OPEN')",
    "select wallet.apply_operation('w', gen_random_uuid(), 'DEPOSIT', 1)",
    "select wallet.apply_operations('{w}', array[gen_random_uuid()], '{DEPOSIT}', '{1}')",
    "select wallet.expire_holds('w')",
    "do 'begin perform wallet.raise_too_late(); exception when query_canceled then end'",
]
CHECKING_KEYS = ["select wallet.live_keys()"]
MANAGING_KEYS = [
    "select wallet.create_key('k', '{read}')",
    "select wallet.list_keys()",
    "select wallet.revoke_key('k')",
]
SELECTS = [
    "select from wallet.wallet",
    "select from wallet.operation",
    "select from wallet.hold",
    "select from wallet.balance",
]
TAMPERING = [
    "insert into wallet.wallet (uuid) values ('forged')",
    "insert into wallet.operation values ('w', 'DEPOSIT', gen_random_uuid(), 2, 1, 101)",
    "update wallet.wallet set status = 'CLOSED'",
    "insert into wallet.hold values ('w', gen_random_uuid(), 1, 1, null, now())",
    "update wallet.operation set amount = 1000000",
    "update wallet.hold set amount = 1",
    "delete from wallet.wallet",
    "delete from wallet.operation",
    "delete from wallet.hold",
    "truncate wallet.wallet",
    "truncate wallet.operation",
    "truncate wallet.hold",
    "select from wallet.key",
    "insert into wallet.key values ('mine', sha256(''), '{admin}')",
    "update wallet.key set revoked_at = null",
    "delete from wallet.key",
    "truncate wallet.key",
    "do 'begin lock table wallet.wallet; end'",
    "select from wallet.wallet for update",
    "select nextval('wallet.wallet_id_seq')",
    "select setval('wallet.wallet_id_seq', 1)",
    "copy wallet.wallet (uuid) from stdin",
    "alter table wallet.operation drop constraint operation_pkey",
    "drop table wallet.operation",
    "drop function wallet.verify()",
    "drop schema wallet cascade",
    "create table wallet.mine ()",
    "create function wallet.verify(int) returns int language sql as 'select 1'",
    "alter function wallet.verify() security invoker",
    "create or replace function wallet.fault_message(p_sqlstate text) returns text language sql as 'select null'",
    "alter table wallet.operation owner to current_user",
    "alter table wallet.operation disable trigger all",
    "alter schema wallet rename to mine",
    "create view wallet.mine as select 1",
    "create type wallet.mine as (n int)",
    "create index on wallet.operation (amount)",
    "create trigger mine before update on wallet.wallet execute function suppress_redundant_updates_trigger()",
    "create rule mine as on insert to wallet.operation do instead nothing",
    "create policy mine on wallet.wallet",
    "comment on table wallet.wallet is 'mine'",
    "explain delete from wallet.operation",
    "copy wallet.operation from program 'true'",
]
ABOVE_THE_SCHEMA = [
    "create schema mine",
    "create role mine",
    "create event trigger mine on ddl_command_end execute function pg_notify()",
    "alter role wallet_owner login",
    "alter role current_user superuser",
    "set session_replication_role = replica",
    "select pg_read_file('postgresql.conf')",
    "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'postgres'",
    "copy (select 1) to '/tmp/mine'",
    "copy (select 1) to program 'true'",
]
BECOMING_THE_OWNER = [
    "set role wallet_owner",
    "set session authorization wallet_owner",
    "grant wallet_owner to current_user",
    "grant wallet_app to current_user with admin option",
    "reassign owned by wallet_owner to current_user",
    "drop owned by wallet_owner",
    "create schema mine authorization wallet_owner",
]
BECOMING_THE_ADMIN = [
    "set role wallet_admin",
    "set session authorization wallet_admin",
    "grant wallet_admin to current_user",
]


@pytest.fixture
def report(superuser: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """A connection of a login that is only a member of wallet_reader."""
    with psycopg.connect(url_of(superuser, "report"), autocommit=True) as connection:
        yield connection


@pytest.fixture(autouse=True)
def ledger(service: psycopg.Connection) -> None:
    create(service, {"w": 0})
    apply(service, deposit("w", A, 100))


def forbidden(connection: psycopg.Connection, statements: list[str]) -> list[str]:
    """Try each statement and return those that are refused for want of a privilege."""
    refused = []
    for statement in statements:
        try:
            with connection.transaction():
                connection.execute(statement)
        except psycopg.errors.InsufficientPrivilege:
            refused.append(statement)
    return refused


def test_the_service_touches_no_table_and_nothing_internal(service: psycopg.Connection) -> None:
    statements = SELECTS + TAMPERING + INTERNAL + ABOVE_THE_SCHEMA + BECOMING_THE_OWNER
    assert forbidden(service, statements) == statements
    assert call(service, "verify") == []


def test_the_service_may_call_every_public_function_but_those_that_manage_keys(service: psycopg.Connection) -> None:
    assert forbidden(service, READING + WRITING + CHECKING_KEYS) == []
    statements = MANAGING_KEYS + BECOMING_THE_ADMIN
    assert forbidden(service, statements) == statements


def test_an_admin_manages_keys_and_is_else_as_the_service(admin: psycopg.Connection) -> None:
    assert forbidden(admin, READING + WRITING + CHECKING_KEYS + MANAGING_KEYS) == []
    statements = SELECTS + TAMPERING + INTERNAL + ABOVE_THE_SCHEMA + BECOMING_THE_OWNER
    assert forbidden(admin, statements) == statements


def test_a_reader_changes_nothing(report: psycopg.Connection) -> None:
    statements = TAMPERING + INTERNAL + WRITING + CHECKING_KEYS + MANAGING_KEYS
    statements += ABOVE_THE_SCHEMA + BECOMING_THE_OWNER + BECOMING_THE_ADMIN
    assert forbidden(report, statements) == statements
    assert balances(report, ["w"]) == {"w": 100}


def test_a_reader_may_read(report: psycopg.Connection) -> None:
    assert forbidden(report, SELECTS + READING) == []


def test_nobody_can_pass_on_what_was_granted(service: psycopg.Connection, report: psycopg.Connection) -> None:
    """To somebody who has a privilege without the right to grant it PostgreSQL says so in a warning."""
    granted = """
        select array_agg(acl::text) from (
          select nspacl from pg_namespace where nspname = 'wallet'
          union all (select proacl from pg_proc where pronamespace = 'wallet'::regnamespace order by oid)
          union all (select relacl from pg_class where relnamespace = 'wallet'::regnamespace order by oid)
        ) as o (acl)"""
    before = service.execute(granted).fetchone()
    told: list[str | None] = []
    for connection, grant in (
        (service, "grant execute on function wallet.create_wallet(text, text, timestamptz) to public"),
        (service, "grant usage on schema wallet to public"),
        (report, "grant select on wallet.operation to public"),
    ):
        connection.add_notice_handler(lambda notice: told.append(notice.sqlstate))
        connection.execute(grant)
    assert set(told) == {"01007"}
    assert service.execute(granted).fetchone() == before


@pytest.fixture
def passer_by(superuser: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """A connection of a login that is a member of nothing: whatever it may do, PUBLIC may."""
    superuser.execute("create role passer_by login")
    with psycopg.connect(url_of(superuser, "passer_by"), autocommit=True) as connection:
        yield connection
    superuser.execute("drop role passer_by")


def test_anybody_else_may_do_nothing(passer_by: psycopg.Connection) -> None:
    statements = SELECTS + TAMPERING + INTERNAL + READING + WRITING + CHECKING_KEYS + MANAGING_KEYS
    statements += ABOVE_THE_SCHEMA + BECOMING_THE_OWNER + BECOMING_THE_ADMIN
    assert forbidden(passer_by, statements) == statements


def test_statistics_tell_the_service_nothing_of_the_ledger(
    superuser: psycopg.Connection, service: psycopg.Connection
) -> None:
    superuser.execute("analyze wallet.wallet, wallet.operation")
    seen = "select count(*) from pg_stats where schemaname = 'wallet'"
    assert superuser.execute(seen).fetchone() != (0,)
    assert service.execute(seen).fetchone() == (0,)


# What stands in the catalogue


@pytest.fixture
def listed(superuser: psycopg.Connection) -> Callable[[str], list[object]]:
    """Returns the first column of a query over the catalogue."""
    return lambda query: [row[0] for row in superuser.execute(query).fetchall()]


def test_everything_belongs_to_the_owner(listed: Callable[[str], list[object]]) -> None:
    owners = """
        select pg_get_userbyid(proowner)::text from pg_proc where pronamespace = 'wallet'::regnamespace
        union select pg_get_userbyid(relowner) from pg_class where relnamespace = 'wallet'::regnamespace
        union select pg_get_userbyid(typowner) from pg_type where typnamespace = 'wallet'::regnamespace
        union select pg_get_userbyid(nspowner) from pg_namespace where nspname = 'wallet'"""
    assert listed(owners) == ["wallet_owner"]


def test_the_owner_cannot_log_in_and_only_the_admin_is_a_member_of_another_role(
    listed: Callable[[str], list[object]],
) -> None:
    assert listed("select rolname from pg_roles where rolname like 'wallet\\_%' and rolcanlogin") == ["wallet_service"]
    members = """
        select format('%s in %s', member::regrole, roleid::regrole)
        from pg_auth_members where roleid::regrole::text like 'wallet\\_%' order by 1"""
    assert listed(members) == [
        "keeper in wallet_admin",
        "report in wallet_reader",
        "wallet_admin in wallet_app",
        "wallet_service in wallet_app",
    ]


def test_nothing_is_granted_to_public(listed: Callable[[str], list[object]]) -> None:
    granted = """
        select o.name from (
          select oid::regprocedure::text, coalesce(proacl, acldefault('f', proowner))
          from pg_proc where pronamespace = 'wallet'::regnamespace
          union all select oid::regclass::text, coalesce(relacl, acldefault('r', relowner))
          from pg_class where relnamespace = 'wallet'::regnamespace
          union all select nspname, coalesce(nspacl, acldefault('n', nspowner))
          from pg_namespace where nspname = 'wallet'
        ) as o (name, acl), aclexplode(o.acl) as a where a.grantee = 0"""
    assert listed(granted) == []


def test_nobody_but_the_owner_may_change_a_table(superuser: psycopg.Connection) -> None:
    privileges = superuser.execute("""
        select distinct c.relname::text, a.grantee::regrole::text, a.privilege_type
        from pg_class as c, aclexplode(c.relacl) as a
        where c.relnamespace = 'wallet'::regnamespace and a.grantee <> c.relowner order by 1, 2, 3""").fetchall()
    assert privileges == [(name, "wallet_reader", "SELECT") for name in ("balance", "hold", "operation", "wallet")]


@pytest.mark.parametrize(
    "statement",
    [
        "delete from wallet.wallet",
        "truncate wallet.wallet",
        "update wallet.operation set amount = 1",
        "delete from wallet.operation",
        "truncate wallet.operation",
    ],
)
def test_the_owner_neither_deletes_a_wallet_nor_changes_the_ledger_by_mistake(
    statement: str, superuser: psycopg.Connection, service: psycopg.Connection
) -> None:
    with superuser.transaction():
        superuser.execute("set local role wallet_owner")
        with pytest.raises(psycopg.errors.InsufficientPrivilege), superuser.transaction():
            superuser.execute(statement.encode())
    assert balances(service, ["w"]) == {"w": 100}
    apply(service, deposit("w", B, 5))


def test_no_role_may_change_the_ledger_however_it_came_by_it(superuser: psycopg.Connection) -> None:
    """By membership or by column, too. Superusers and PostgreSQL's own pg_write_all_data may by definition."""
    able = superuser.execute("""
        select r.rolname, c.relname, p.privilege
        from pg_roles as r, pg_class as c,
          unnest('{insert,update,delete,truncate,references,trigger}'::text[]) as p (privilege)
        where c.relnamespace = 'wallet'::regnamespace and c.relkind = 'r'
          and not r.rolsuper and r.rolname not in ('wallet_owner', 'pg_write_all_data')
          and (has_table_privilege(r.oid, c.oid, p.privilege) or p.privilege in ('insert', 'update', 'references')
            and has_any_column_privilege(r.oid, c.oid, p.privilege))""").fetchall()
    assert able == []


def test_nothing_is_granted_by_default_and_nothing_runs_unasked(listed: Callable[[str], list[object]]) -> None:
    assert listed("select defaclacl::text from pg_default_acl") == []
    unasked = """
        select tgname from pg_trigger join pg_class as c on c.oid = tgrelid where relnamespace = 'wallet'::regnamespace
        union all select rulename from pg_rewrite join pg_class as c on c.oid = ev_class
        where relnamespace = 'wallet'::regnamespace and relkind <> 'v'"""
    assert listed(unasked) == []


def test_functions_run_as_the_owner_with_a_pinned_search_path(listed: Callable[[str], list[object]]) -> None:
    unpinned = """
        select proname from pg_proc where pronamespace = 'wallet'::regnamespace
        and not (prosecdef and coalesce(proconfig @> array['search_path=pg_catalog, pg_temp'], false))"""
    assert set(listed(unpinned)) == INLINED


def test_everything_has_a_comment(listed: Callable[[str], list[object]]) -> None:
    silent = """
        select oid::regprocedure::text from pg_proc
        where pronamespace = 'wallet'::regnamespace and obj_description(oid, 'pg_proc') is null
        union all select oid::regclass::text from pg_class
        where relnamespace = 'wallet'::regnamespace and relkind in ('r', 'v')
          and obj_description(oid, 'pg_class') is null
        union all select attrelid::regclass || '.' || attname from pg_attribute
        where attrelid in (select oid from pg_class where relnamespace = 'wallet'::regnamespace and relkind = 'r')
        and attnum > 0 and not attisdropped and col_description(attrelid, attnum) is null
        union all select nspname from pg_namespace
        where nspname = 'wallet' and obj_description(oid, 'pg_namespace') is null"""
    assert listed(silent) == []


# What a caller brings along


def test_objects_of_the_caller_do_not_stand_in_for_the_real_ones(
    service: psycopg.Connection, superuser: psycopg.Connection
) -> None:
    superuser.execute("create schema trap authorization wallet_service")
    service.execute("grant usage on schema trap to public")
    for name in ("wallet", "operation"):
        service.execute(sql.SQL("create temporary table {} (like pg_class)").format(sql.Identifier(name)))
    service.execute("create temporary table unnest (n int)")
    for schema in ("pg_temp", "trap"):
        for function in ("cardinality(anyarray)", "array_ndims(anyarray)"):
            service.execute(f"create function {schema}.{function} returns int language sql as 'select 0'")
        service.execute(f"create function {schema}.gen_random_uuid() returns uuid language sql as 'select null::uuid'")
        service.execute(f"create function {schema}.more(bigint, bigint) returns bool language sql as 'select false'")
        service.execute(f"create operator {schema}.> (function = {schema}.more, leftarg = bigint, rightarg = bigint)")
    service.execute("set search_path = pg_temp, trap, pg_catalog")
    service.execute("set enable_indexscan = off")

    assert outcome(service, withdraw("w", B, 101)) == "WA402"
    assert [row.sqlstate for row in apply_all(service, [withdraw("w", B, 101), withdraw("w", B, 100)])] == [
        "WA402",
        None,
    ]
    assert len(call(service, "create_wallet")[0].uuid) == 36
    assert [operation.seq for operation in call(service, "list_operations", "w")] == [2, 1]
    assert call(service, "verify") == []


def test_types_of_the_caller_do_not_stand_in_for_the_real_ones(service: psycopg.Connection) -> None:
    for name in ("text", "uuid", "jsonb"):
        service.execute(f"create domain pg_temp.{name} as pg_catalog.{name} check (false)")
    service.execute("set search_path = pg_temp, pg_catalog")
    operation = f"'{{w}}', '{{{B}}}', '{{WITHDRAW}}', '{{100}}'"

    created = service.execute("select count(wallet.create_wallet())").fetchone()
    applied = service.execute(f"select sqlstate from wallet.apply_operations({operation})").fetchone()

    assert (created, applied) == ((1,), (None,))
    assert service.execute("select balance from wallet.get_wallet('w')").fetchone() == (0,)
    assert service.execute("select * from wallet.verify()").fetchall() == []


@pytest.mark.parametrize(
    "settings",
    [
        ["client_min_messages = error", "datestyle = 'ISO, DMY'", "intervalstyle = 'iso_8601'"],
        ["array_nulls = off", "bytea_output = escape", "transform_null_equals = on", "row_security = off"],
        ["plan_cache_mode = force_custom_plan", "enable_hashjoin = off", "enable_hashagg = off", "enable_sort = off"],
        ["standard_conforming_strings = off", "client_encoding = 'LATIN1'", "timezone = 'Pacific/Kiritimati'"],
    ],
)
def test_settings_of_the_caller_change_no_outcome(settings: Sequence[str], service: psycopg.Connection) -> None:
    for setting in settings:
        service.execute(f"set {setting}")
    requests = [withdraw("w", B, 60), withdraw("w", B, 60), withdraw("w", A, 60), deposit("nobody", A, 1)]
    refused = [(row.sqlstate, row.message) for row in apply_all(service, requests)]
    assert refused == [(code, MESSAGES.get(code or "")) for code in (None, "WA409", "WA409", "WA404")]
    assert call(service, "verify") == []
