"""A client that openapi-python-client makes of /openapi.json knows every answer, errors too.

Of openapi-generator's clients (python, java, go) and openapi-typescript's, which need Java and Node, it stands for the
rest. What they ask of the document is in test_openapi.py.
"""

import asyncio
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from aiohttp.test_utils import TestClient
from pytest_aiohttp.plugin import AiohttpClient

from app.settings import Settings
from app.web import docs
from app.web.application import make_app
from tests.api.door import create
from tests.api.test_keys import knows, make_key


@pytest.fixture(scope="session", params=[False, True], ids=["open", "keys"])
def generated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the client, package wallet_client, which was generated without a warning."""
    folder = tmp_path_factory.mktemp("generated")
    (folder / "openapi.json").write_bytes(docs.description(wants_keys=request.param))
    beside_python = str(Path(sys.executable).parent)
    options = ["--path", "openapi.json", "--meta", "none", "--output-path", "wallet_client", "--fail-on-warning"]
    ran = subprocess.run(
        [sys.executable, "-m", "openapi_python_client", "generate", *options],
        cwd=folder,
        env={**os.environ, "PATH": os.pathsep.join([beside_python, os.environ["PATH"]])},  # it runs ruff
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


@pytest.fixture
def wallet_client(generated: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(generated)
    yield importlib.import_module("wallet_client")
    for name in [name for name in sys.modules if name.partition(".")[0] == "wallet_client"]:
        del sys.modules[name]


async def test_a_generated_client_gets_every_answer_whole(client: TestClient, wallet_client: ModuleType) -> None:
    await create(client, {"ann": 10})
    models: Any = importlib.import_module("wallet_client.models")
    service = wallet_client.Client(str(client.make_url("")), raise_on_unexpected_status=True)

    def call(function: str, *path: str, **arguments: Any) -> Any:
        module = importlib.import_module(f"wallet_client.api.{function}")
        return module.sync(*path, client=service, **arguments)

    def apply(operation: str, kind: str, amount: int) -> Any:
        body = models.OperationRequest(operation, models.OperationType(kind), amount=amount)
        return call("operations.apply_operation", "ann", body=body)

    def session() -> None:
        operation = str(uuid4())
        assert apply(operation, "DEPOSIT", 5) == UUID(operation)

        again = apply(operation, "DEPOSIT", 5)
        assert isinstance(again, models.Problem)
        assert (again.status, again.code, again.same_request) == (400, "duplicate_operation", True)
        assert (str(again.operation.operation_uuid), again.operation.balance_after) == (operation, 15)
        assert apply(operation, "WITHDRAW", 5).same_request is False

        invalid = apply("no-uuid", "DEPOSIT", 5)
        assert (invalid.code, invalid.detail) == ("invalid_request", "body.operation_uuid: Invalid UUID")
        assert [error.loc for error in invalid.errors] == [["body", "operation_uuid"]]

        assert apply(str(uuid4()), "WITHDRAW", 16).code == "insufficient_funds"
        assert call("wallets.get_wallet", "nobody").code == "wallet_not_found"
        assert call("wallets.get_wallet", "ann").balance == 15
        assert call("wallets.create_wallet").balance == 0
        assert call("wallets.create_wallet", body=models.WalletRequest("ann")).code == "wallet_exists"

        bulk = [
            models.BulkOperation("ann", name, models.OperationType("DEPOSIT"), amount=2)
            for name in (str(uuid4()), operation)
        ]
        applied, refused = call("operations.apply_operations", body=models.BulkRequest(bulk)).results
        assert (applied.applied, applied.balance_after, applied.seq) == (True, 17, 3)
        assert (refused.applied, refused.code) == (False, "duplicate_operation")

        zoe = call("wallets.put_wallet", "zoe")
        assert (zoe.currency, zoe.status, zoe.seq) == (None, "OPEN", 0)
        terms = models.OperationTerms(
            models.OperationType("TRANSFER"),
            amount=7,
            counterparty_uuid="zoe",
            metadata=models.MetadataType0.from_dict({"order": [4711]}),
        )
        transfer = str(uuid4())
        for _ in range(2):  # applied now, and before
            paid = call("operations.put_operation", "ann", transfer, body=terms)
            assert (paid.counterparty_uuid, paid.balance_after, paid.metadata["order"]) == ("zoe", 10, [4711])
        received = call("operations.get_operation", "zoe", transfer)
        assert (received.operation_type, received.counterparty_uuid) == ("RECEIVE", "ann")
        terms.amount = 8
        assert call("operations.put_operation", "ann", transfer, body=terms).same_request is False
        assert call("wallets.get_balance", "zoe", at=received.created_at).available == 7
        assert call("wallets.set_status", "zoe", body=models.StatusRequest(models.WalletStatus("FROZEN"))).balance == 7
        wallets = call("wallets.list_wallets", limit=1, after="yes")
        assert ([one.uuid for one in wallets.wallets], wallets.next_ is None) == (["zoe"], True)
        both = [
            models.BulkOperation(wallet, str(uuid4()), models.OperationType("WITHDRAW"), amount=1)
            for wallet in ("ann", "zoe")
        ]
        told = call("operations.apply_operations", body=models.BulkRequest(both, atomic=True)).results
        assert [one.code for one in told] == ["not_applied", "wallet_frozen"]

        until = datetime(2099, 12, 31, tzinfo=UTC)
        hold = models.OperationTerms(models.OperationType("HOLD"), amount=6, expires_at=until)
        name = str(uuid4())
        assert call("operations.put_operation", "ann", name, body=hold).expires_at == until
        open_holds = call("operations.list_holds", "ann")
        assert [(str(one.hold_uuid), one.amount, one.expires_at) for one in open_holds.holds] == [(name, 6, until)]
        assert call("wallets.get_balance", "ann").held == 6
        freed = models.OperationTerms(models.OperationType("RELEASE"), hold_uuid=name)
        assert call("operations.put_operation", "ann", str(uuid4()), body=freed).amount == 6
        assert call("operations.put_operation", "ann", str(uuid4()), body=freed).code == "hold_closed"

        page = call("operations.list_operations", "ann", limit=2, before=5)
        assert ([one.seq for one in page.operations], page.next_) == ([4, 3], 3)
        assert call("operations.list_operations", "ann", limit=2, before=page.next_).next_ is None
        assert call("operations.get_operation", "ann", operation).seq == 2
        assert call("operations.get_operation", "ann", str(uuid4())).code == "operation_not_found"
        assert call("service.get_health").status == call("service.get_readiness").status == "ok"

    await asyncio.to_thread(session)


async def test_a_generated_client_presents_a_key(
    superuser: psycopg.Connection, database_url: str, aiohttp_client: AiohttpClient, wallet_client: ModuleType
) -> None:
    client = await aiohttp_client(make_app(Settings(database_url=database_url, access="keys")))
    secret = make_key(superuser, "shop", "create", "metrics")
    await knows(client, secret)
    url = str(client.make_url(""))
    models: Any = importlib.import_module("wallet_client.models")
    put_wallet: Any = importlib.import_module("wallet_client.api.wallets.put_wallet")
    get_wallet: Any = importlib.import_module("wallet_client.api.wallets.get_wallet")

    def session() -> None:
        nobody = wallet_client.Client(url, raise_on_unexpected_status=True)
        shop = wallet_client.AuthenticatedClient(url, token=secret, raise_on_unexpected_status=True)
        assert put_wallet.sync("ann", client=shop).balance == 0
        refused = get_wallet.sync("ann", client=shop)
        assert isinstance(refused, models.Problem)
        assert (refused.status, refused.code) == (403, "forbidden")
        assert get_wallet.sync("ann", client=nobody).code == "unauthorized"

    await asyncio.to_thread(session)
