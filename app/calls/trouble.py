"""Wallets in trouble: somebody keeps them locked, or the database refuses them something."""

from collections.abc import Sequence

from app.calls.line import Outcome, Request
from app.metrics import WALLETS_APART

LIMIT = 10_000
"""Wallets that are known to be in trouble, at most."""
_UNTRIED = ("WA400", "WA404", "WA409")
"""Refusals that rank before a locked wallet: they say nothing of it."""


class Trouble:
    """Which wallets are in trouble, until a request for them has had an outcome that shows that they are not."""

    def __init__(self) -> None:
        self.wallets: set[str] = set()
        self._refused: set[str] = set()
        """Those of them to which the database refused something: a refusal of ours says nothing of what it does."""

    def meets(self, request: Request) -> bool:
        """Tell whether a request needs a wallet in trouble."""
        return not self.wallets.isdisjoint(request.wallets())

    def note(self, requests: Sequence[Request], outcomes: Sequence[Outcome]) -> None:
        """Note how the wallets of a call fared.

        A transfer that fails says of neither wallet that it is the one. Where the same call shows that a wallet is
        well, or one of the two is known to be in trouble, the others are not suspected.
        """
        fared = list(zip(requests, outcomes, strict=True))
        failed = [(request, outcome) for request, outcome in fared if not outcome.is_ours()]
        if not failed and not self.wallets:
            return
        applied = {wallet for request, outcome in fared if outcome.sqlstate is None for wallet in request.wallets()}
        free = applied | {
            wallet
            for request, outcome in fared
            if outcome.is_ours() and outcome.sqlstate not in _UNTRIED
            for wallet in request.wallets()
        }
        self._refused -= applied
        self.wallets -= free - self._refused
        for request, outcome in failed:
            well = free - self._refused if outcome.is_locked() else applied
            suspects = [wallet for wallet in request.wallets() if wallet not in well]
            if self.wallets.isdisjoint(suspects) and len(self.wallets) < LIMIT:
                self.wallets.update(suspects)
            if not outcome.is_locked():
                self._refused.update(self.wallets.intersection(suspects))
        WALLETS_APART.set(len(self.wallets))
