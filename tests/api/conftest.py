"""What the tests over HTTP share."""

import pytest

from app.calls import line


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls wait for locked wallets past their deadline: most tests lock a wallet to keep a lane busy."""
    monkeypatch.setattr(line, "LOCK_SHARE", 1000)
    monkeypatch.setattr(line, "LOCK_TIMEOUT", 3600)
