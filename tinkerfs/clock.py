"""The system clocks, passed explicitly so that tests can control the time."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Clock:
    """Source of the time.

    Attributes:
        now: seconds since 1970 (UTC), for values that users and servers see.
        monotonic: seconds that never decrease, for ages and deadlines.
    """

    now: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic


SYSTEM_CLOCK = Clock()
