"""The system clocks, passed explicitly so that tests can control the time."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from tinkerfs.operating_system import time_with_suspend


@dataclass(frozen=True, slots=True)
class Clock:
    """Source of the time.

    Attributes:
        now: seconds since 1970 (UTC), for values that users and servers see.
        monotonic: seconds that never decrease, for timeouts. It stops during a suspend, so that an
            operation in progress does not time out because of one.
        with_suspend: seconds that never decrease and count a suspend, for the lifetime of cached
            values. Its instants are not comparable with those of `monotonic`.
    """

    now: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    with_suspend: Callable[[], float] = time_with_suspend


SYSTEM_CLOCK = Clock()
