"""The tiers as numbers: a tier's code is its place in the settings, 0 the lowest."""

from __future__ import annotations

from typing import Final

import numpy as np

from inference.admission.settings import AdmissionSettings
from inference.types import Priority

PRIORITIES: Final = 3
PRIORITY_CODES: Final[dict[Priority, int]] = {"low": 0, "normal": 1, "high": 2}


class Tiers:
    """Names to codes, and the limits of each as columns [tiers]; no limit is infinity."""

    def __init__(self, settings: AdmissionSettings) -> None:
        self.tiers = settings.tiers
        self.names = tuple(tier.name for tier in settings.tiers)
        self.default = self.names.index(settings.default_tier)
        self._codes = {name: code for code, name in enumerate(self.names)}
        self.client_rate = np.array([tier.client_rate or np.inf for tier in self.tiers])
        self.client_burst = np.array([float(tier.at_once or 1) for tier in self.tiers])
        self.any_client_limit = bool(np.isfinite(self.client_rate).any())

    def __len__(self) -> int:
        return len(self.names)

    def code(self, name: str | None) -> int:
        """The code of a tier by name; of the default one for None and for a name nobody knows any more."""
        return self.default if name is None else self._codes.get(name, self.default)
