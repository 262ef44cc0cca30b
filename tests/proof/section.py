"""What a section of the proof is given, and what it accounts for."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random


@dataclass(frozen=True)
class Scale:
    """How much to do, and the seed of every random choice."""

    seed: int
    short: bool = False

    def times(self, full: int, short: int) -> int:
        """Return how often a thing is done: at full length, or in the short form."""
        return short if self.short else full

    def random(self, name: str) -> Random:
        """Return the source of a section's random choices, the same for the same seed and name."""
        return Random(f"{self.seed} {name}")


@dataclass
class Account:
    """What a section did (`counts`, with figures such as milliseconds beside them) and what it found wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    figures: dict[str, float] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)


Section = Callable[[Scale], Account]
"""A part of the proof that can run by itself: it starts what it needs and leaves nothing behind."""
