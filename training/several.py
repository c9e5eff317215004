"""Several optimizers as one, where a loss's parameters are not all for the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer


class Several(Optimizer):
    """One optimizer for its owner, who sees all groups and all state in it; each part steps on its own share of them."""

    def __init__(self, parts: Sequence[Optimizer]):
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> None:
        """One step of each. Groups and state are handed out anew, for loading a state replaces both."""
        assert closure is None
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            part.step()
            first = last
