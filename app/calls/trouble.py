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

    def meets(self, request: Request) -> bool:
        """Tell whether a request needs a wallet in trouble."""
        return not self.wallets.isdisjoint(request.wallets())

    def note(self, requests: Sequence[Request], outcomes: Sequence[Outcome]) -> None:
        """Note how the wallets of a call fared.

        A transfer that fails says of neither wallet that it is the one. Where the same call shows that a wallet is
        well, or one of the two is known to be in trouble, the others are not suspected.
        """
        failed = [request for request, outcome in zip(requests, outcomes, strict=True) if not outcome.is_ours()]
        if not failed and not self.wallets:
            return
        well = {
            wallet
            for request, outcome in zip(requests, outcomes, strict=True)
            if outcome.is_ours() and outcome.sqlstate not in _UNTRIED
            for wallet in request.wallets()
        }
        self.wallets -= well
        for request in failed:
            suspects = [wallet for wallet in request.wallets() if wallet not in well]
            if self.wallets.isdisjoint(suspects) and len(self.wallets) < LIMIT:
                self.wallets.update(suspects)
        WALLETS_APART.set(len(self.wallets))
