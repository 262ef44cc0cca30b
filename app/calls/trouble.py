"""Wallets in trouble: somebody keeps them locked, or the database refuses their operations."""

from collections.abc import Sequence

from app.calls.line import UNTRIED, Outcome, Request, refused
from app.metrics import WALLETS_APART

LIMIT = 10_000
"""Wallets that are known to be in trouble, at most."""


class Trouble:
    """Which wallets are in trouble, until a request for them has had an outcome that shows that they are not."""

    def __init__(self) -> None:
        self.wallets: set[str] = set()
        self.refusals: dict[str, str] = {}
        """Those of them to which the database refused something, and with what SQLSTATE.

        Only an applied request ends this; a WA... refusal doesn't.
        """

    def meets(self, request: Request) -> bool:
        """Tell whether a request needs a wallet in trouble."""
        return not self.wallets.isdisjoint(request.wallets())

    def outcome_of(self, *requests: Request) -> Outcome:
        """Return the outcome of a request, or of each of an atomic bulk request, that there was no time to try."""
        wallets = (wallet for request in requests for wallet in request.wallets())
        return refused(next((self.refusals[one] for one in wallets if one in self.refusals), "55P03"))

    def note(self, requests: Sequence[Request], outcomes: Sequence[Outcome]) -> None:
        """Note how the wallets of a call fared.

        A failed transfer doesn't show which of its wallets was the cause. A wallet that this call shows to be free is
        not suspected. If either wallet is known to be in this kind of trouble, the other one is not suspected.
        """
        fared = list(zip(requests, outcomes, strict=True))
        failed = [(request, outcome) for request, outcome in fared if not (outcome.is_ours() or outcome is UNTRIED)]
        if not failed and not self.wallets:
            return
        applied = {wallet for request, outcome in fared if outcome.is_new() for wallet in request.wallets()}
        free = {wallet for request, outcome in fared if outcome.shows_free() for wallet in request.wallets()}
        for wallet in applied & self.refusals.keys():
            del self.refusals[wallet]
        free -= self.refusals.keys()
        self.wallets -= free
        for request, outcome in failed:
            well, known = (free, self.wallets) if outcome.is_locked() else (applied, self.refusals.keys())
            suspects = [wallet for wallet in request.wallets() if wallet not in well]
            if known.isdisjoint(suspects) and len(self.wallets) < LIMIT:
                self.wallets.update(suspects)
                if not outcome.is_locked():
                    self.refusals.update(dict.fromkeys(suspects, str(outcome.sqlstate)))
        WALLETS_APART.set(len(self.wallets))
