"""A clock that the test advances."""

from tinkerfs.clock import Clock


class FakeTime:
    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now
        self.monotonic = 1000.0
        self.clock = Clock(now=lambda: self.now, monotonic=lambda: self.monotonic)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.monotonic += seconds
