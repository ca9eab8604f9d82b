"""The clocks, as a value that is handed down, so that tests turn the hands themselves."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Clock:
    """Where the time comes from.

    Attributes:
        now: seconds since 1970 (UTC), for what people and servers see.
        monotonic: seconds that never run backwards, for ages and bounds.
    """

    now: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic


SYSTEM_CLOCK = Clock()
