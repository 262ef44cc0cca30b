"""The table of cases over REST."""

import psycopg
import pytest
from aiohttp.test_utils import TestClient

from tests.api.door import apply, balance, create, problem
from tests.cases import CASES, MESSAGES, PROBLEMS, Case


@pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "_") for case in CASES])
async def test_one_by_one(case: Case, client: TestClient, service: psycopg.Connection) -> None:
    await create(client, case.wallets)

    for request in case.requests:
        answer = await apply(client, request.wallet, request.type, request.amount, request.operation)
        if request.outcome is None:
            assert (answer.status, await answer.json()) == (200, str(request.operation))
        else:
            told = await problem(answer, *PROBLEMS[request.outcome])
            if request.outcome in MESSAGES:
                assert told["detail"] == MESSAGES[request.outcome]

    assert {wallet: await balance(client, wallet) for wallet in case.wallets} == case.balances
    assert service.execute("select * from wallet.verify()").fetchall() == []
