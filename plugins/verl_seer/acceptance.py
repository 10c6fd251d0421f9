"""How often drafted tokens are accepted, by their position in the draft."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class AcceptanceStats:
    """Acceptance by position, collected online with exponential forgetting.

    Position i (from 1) is reached when the i - 1 tokens before it were accepted and a token was drafted there.

    Args:
        max_length: longest draft that is counted.
        half_life: number of drafts after which an observation has half its weight; 0 forgets nothing.
        prior: acceptance assumed before anything is seen, in [0, 1].
        prior_weight: how many drafts the prior is worth.
    """

    max_length: int
    half_life: float = 2000.0
    prior: float = 0.5
    prior_weight: float = 10.0
    _reached: list[float] = field(init=False, repr=False)
    _accepted: list[float] = field(init=False, repr=False)
    _keep: float = field(init=False, repr=False)
    drafts: int = field(init=False, default=0)
    drafted_tokens: int = field(init=False, default=0)
    accepted_tokens: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")
        if self.half_life < 0:
            raise ValueError(f"half_life must not be negative, got {self.half_life}: 0 forgets nothing")
        if not 0 <= self.prior <= 1 or self.prior_weight < 0:
            raise ValueError(
                f"prior must be in [0, 1] and prior_weight not negative, got {self.prior} and {self.prior_weight}"
            )
        self._keep = 0.5 ** (1 / self.half_life) if self.half_life else 1.0
        self._reached = [self.prior_weight] * self.max_length
        self._accepted = [self.prior_weight * self.prior] * self.max_length

    def record(self, drafted: int, accepted: int) -> None:
        """One verified draft of `drafted` tokens, of which the first `accepted` were right."""
        if not 0 <= accepted <= drafted <= self.max_length:
            raise ValueError(
                f"need 0 <= accepted <= drafted <= {self.max_length}, got accepted {accepted} of {drafted}"
            )
        if drafted == 0:
            return
        self.drafts += 1
        self.drafted_tokens += drafted
        self.accepted_tokens += accepted
        keep, reached, right = self._keep, self._reached, self._accepted
        for i in range(accepted):
            reached[i] = reached[i] * keep + 1
            right[i] = right[i] * keep + 1
        if accepted < drafted:
            reached[accepted] = reached[accepted] * keep + 1
            right[accepted] *= keep

    def conditional(self) -> list[float]:
        """Probability that position i is accepted given that it is reached; index 0 is position 1."""
        return [
            accepted / reached if reached else self.prior
            for accepted, reached in zip(self._accepted, self._reached)
        ]

    def chained(self, weight: float = 10.0) -> list[float]:
        """As `conditional`, each position leaning on the one before it with the weight of so many drafts.

        So a position that is hardly reached is not thought better than those that keep drafts from reaching it.
        """
        out, before = [], self.prior
        for accepted, reached in zip(self._accepted, self._reached):
            before = (accepted + weight * before) / (reached + weight)
            out.append(before)
        return out

    def cumulative(self) -> list[float]:
        """Probability that positions 1 to i are all accepted; index 0 is position 1. Never rises."""
        out, product = [], 1.0
        for p in self.conditional():
            product *= p
            out.append(product)
        return out

    @property
    def mean_accepted_length(self) -> float:
        """Tokens of a verification step with a draft: the accepted ones and the model's own."""
        return 1 + self.accepted_tokens / self.drafts if self.drafts else 1.0
