"""Pace: whether a server answers sooner when it is asked less at once.

A server that has no room for all calls of a mount queues them: more of them at once bring nothing,
and make who waits wait longer. That shows in how long answers take; but so do a network that became
slower, and answers that differ. So it is tried: when the answers of two windows on end took over
twice as long as the quickest had, half as many guesses are allowed. Where calls queued, each takes
half as long then, and as many are answered as before. Where they did not nothing is gained, and all
are allowed again. Knows nothing of HTTP and no clock.
"""

import math

#: Answers of a window, for each call of the limit: enough to tell halves from chance.
ANSWERS_IN_WINDOW = 4

#: So many times the quickest answer is slow: half as many calls then still keep a queue busy.
SLOW = 2.0

#: What halving has to make of how long answers take: some 0.6 where they queued (one call that is
#: waited for is always among them), 1 where they did not.
MIN_IMPROVEMENT = 0.75

#: After halving in vain it is not tried again for so long, seconds.
COOLDOWN_S = 60.0

#: What is quicker than this counts as this, seconds: nobody notices, and threads' turns take that.
QUICK_S = 0.01


class LatencyGradient:
    """How many calls at once the times of answers speak for; not thread-safe.

    Attributes:
        allowed: how many, the limit or as few as one more than half of it.

    Args:
        limit: the most calls at once, 1 or more.
    """

    def __init__(self, limit: int) -> None:
        self.allowed = limit
        self._limit = limit
        # Guesses leave one turn for who waits: with that one, half as many of them.
        self._half = min(limit // 2 + 1, limit)
        #: How long the quickest answer of each endpoint took, seconds.
        self._quickest: dict[str, float] = {}
        self._was_slow = False  # in the last window
        self._slow_before = math.inf  # when all were allowed
        self._rests_until = -math.inf
        self._begin(-math.inf)

    def _begin(self, now: float) -> None:
        """Begin a window: calls from before it were among as many as were allowed then."""
        self._began, self._answers, self._logs = now, 0, 0.0

    def record(self, label: str, began: float, ended: float, *, is_full: bool) -> None:
        """Take note of an answer.

        Args:
            label: the endpoint's.
            began: when the call began, on the monotonic clock.
            ended: when its answer was there.
            is_full: whether it was among as many as are allowed.
        """
        took_s = max(ended - began, QUICK_S)
        quickest_s = self._quickest[label] = min(took_s, self._quickest.get(label, took_s))
        if not is_full or began < self._began:
            return
        # The mean of logarithms: one answer that takes a hundred times as long moves it little.
        self._answers, self._logs = self._answers + 1, self._logs + math.log(took_s / quickest_s)
        if self._answers >= ANSWERS_IN_WINDOW * self._limit:
            self._judge(math.exp(self._logs / self._answers), ended)
            self._begin(ended)

    def _judge(self, slow: float, now: float) -> None:
        """Decide by how many times the quickest answer those of a window took, in the mean."""
        was_slow, self._was_slow = self._was_slow, slow > SLOW
        if slow <= SLOW:
            self.allowed = min(self.allowed + 1, self._limit)
        elif self.allowed == self._limit:
            # In the first slow window the queue may only have begun to grow.
            if was_slow and now >= self._rests_until:
                self._slow_before, self.allowed = slow, self._half
        elif self.allowed > self._half:
            self.allowed = self._half
        elif slow > MIN_IMPROVEMENT * self._slow_before:
            self.allowed, self._rests_until = self._limit, now + COOLDOWN_S
            # It may be that nothing is that quick any more; what is, will tell so again.
            self._quickest = {label: 2 * took_s for label, took_s in self._quickest.items()}
