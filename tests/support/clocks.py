"""A clock that the test advances."""

from tinkerfs.clock import Clock


class FakeTime:
    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now
        self.monotonic = 1000.0
        self.with_suspend = 70_000.0
        self.clock = Clock(
            now=lambda: self.now,
            monotonic=lambda: self.monotonic,
            with_suspend=lambda: self.with_suspend,
        )

    def advance(self, seconds: float) -> None:
        self.suspend(seconds)
        self.monotonic += seconds

    def suspend(self, seconds: float) -> None:
        """Advance the clocks that do not stop while the machine is suspended."""
        self.now += seconds
        self.with_suspend += seconds
