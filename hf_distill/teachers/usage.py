"""What a teacher was asked for, what that cost, and where to stop."""

from __future__ import annotations

import math
import threading
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_distill.teachers.generations import Generation


class TeacherBudgetExceeded(RuntimeError):
    """The next request could cost more than is left. What was answered before is kept."""


@dataclass
class Usage:
    """What a teacher was asked for since it was made.

    Attributes:
        requests: texts it wrote, and prompts it judged.
        cache_hits: texts that were there already. A budget of a resumed run counts `requests + cache_hits`.
        prompt_tokens, completion_tokens: of the requests; a prompt counts once per text written to it, of an endpoint
            as often as it was sent.
        cost: by the prices of the budget.
        seconds: that requests to an endpoint took, added up over those that ran at once.
        retries, failures: requests to an endpoint sent again, and given up.
        estimated: answers whose tokens the endpoint did not report; they were counted from above.
    """

    requests: int = 0
    cache_hits: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    seconds: float = 0.0
    retries: int = 0
    failures: int = 0
    estimated: int = 0

    def add(self, generation: Generation) -> None:
        self.requests += 1
        self.prompt_tokens += generation.prompt_tokens
        self.completion_tokens += generation.completion_tokens

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def describe(self) -> dict:
        """Plain facts for the card."""
        return {f"teacher_{name}": round(value, 6) for name, value in asdict(self).items() if value}


@dataclass(frozen=True)
class Budget:
    """What one process may spend on a teacher. Answers that a folder holds already cost nothing.

    Attributes:
        max_cost: in the unit of the prices.
        max_tokens_total: prompt and completion tokens together.
        price_per_1k_prompt, price_per_1k_completion: of 1000 tokens.
    """

    max_cost: float | None = None
    max_tokens_total: int | None = None
    price_per_1k_prompt: float = 0.0
    price_per_1k_completion: float = 0.0

    def __post_init__(self):
        for name in ("max_cost", "max_tokens_total"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, or None for no limit, got {value}")
        for name in ("price_per_1k_prompt", "price_per_1k_completion"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or positive and finite, got {value}")
        if self.max_cost is not None and not self.price_per_1k_prompt + self.price_per_1k_completion > 0:
            raise ValueError("max_cost needs prices: give price_per_1k_prompt and price_per_1k_completion")

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.price_per_1k_prompt + completion_tokens * self.price_per_1k_completion) / 1000


class Account:
    """A budget and what was spent of it; requests reserve the most they can cost before they are sent.

    Attributes:
        usage: what was spent.
    """

    def __init__(self, budget: Budget):
        self.budget, self.usage = budget, Usage()
        self._reserved: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def reserve(self, most: tuple[int, int]) -> str | None:
        """Hold back (prompt, completion) tokens. Where they are more than is left: why, and nothing is held back."""
        limits, usage = self.budget, self.usage
        with self._lock:
            prompt, completion = (sum(x) for x in zip(*self._reserved, most, strict=True))
            tokens, cost = usage.tokens + prompt + completion, usage.cost + limits.cost(prompt, completion)
            if limits.max_tokens_total is not None and tokens > limits.max_tokens_total:
                spent = f"{usage.tokens:,} of max_tokens_total={limits.max_tokens_total:,} are spent"
                return f"{spent} and the next request can take {sum(most):,}"
            if limits.max_cost is not None and cost > limits.max_cost:
                spent = f"{usage.cost:.4f} of max_cost={limits.max_cost} is spent"
                return f"{spent} and the next request can cost {limits.cost(*most):.4f}"
            self._reserved.append(most)
        return None

    def settle(self, most: tuple[int, int], spent: tuple[int, int] | None = None, **counts: float) -> None:
        """Let go of what was held back, and count what was spent and other entries of the usage."""
        with self._lock:
            self._reserved.remove(most)
            if spent is not None:
                self.usage.prompt_tokens += spent[0]
                self.usage.completion_tokens += spent[1]
                self.usage.cost += self.budget.cost(*spent)
        self.count(**counts)

    def count(self, **counts: float) -> None:
        with self._lock:
            for name, value in counts.items():
                setattr(self.usage, name, getattr(self.usage, name) + value)


__all__ = ["Account", "Budget", "TeacherBudgetExceeded", "Usage"]
