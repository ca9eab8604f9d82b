"""Latency gradient: lowers the concurrency limit while a server queues requests.

If a server queues the requests of a mount, more concurrency does not raise the throughput, but it
delays demand requests. Queueing raises the latency. A slower network and varying response times
raise it as well.

An experiment distinguishes these causes. After two consecutive slow windows the limit for
prefetches is halved. If requests were queued, their latency falls at the same throughput, and the
lower limit stays. If not, the full limit is restored.

Pure: uses neither HTTP nor a clock.
"""

import math

#: Responses per window and permit of the limit: enough to distinguish a halved latency from noise.
RESPONSES_PER_WINDOW = 4

#: A mean latency above this multiple of the lowest one is slow. Half as many requests then still
#: keep the queue busy.
SLOW_RATIO = 2.0

#: Halving must reduce the latency to this fraction, or the limit is restored. Expected are 0.6 with
#: a queue, because a demand request is always in flight as well, and 1 without.
MIN_IMPROVEMENT = 0.75

#: Delay after a halving without improvement before the next one, seconds.
COOLDOWN_S = 60.0

#: Lower latencies count as this one, seconds: below it thread scheduling dominates.
MIN_LATENCY_S = 0.01


class LatencyGradient:
    """Derives a concurrency limit from response latencies. Not thread-safe.

    Attributes:
        limit: current limit, between half of the maximum plus one and the maximum.

    Args:
        limit: maximum number of requests in flight, 1 or more.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._max_limit = limit
        # One permit is reserved for demand requests: this limit halves the number of prefetches.
        self._halved_limit = min(limit // 2 + 1, limit)
        #: Lowest latency of each endpoint, seconds.
        self._lowest_s: dict[str, float] = {}
        self._was_slow = False  # in the previous window
        self._full_limit_ratio = math.inf  # of the last window before the limit was halved
        self._cooldown_until = -math.inf
        self._start_window(-math.inf)

    def _start_window(self, now: float) -> None:
        """Start a window; requests that started earlier ran under the previous limit."""
        self._window_started_at, self._responses, self._log_ratio_sum = now, 0, 0.0

    def record(
        self, label: str, started_at: float, ended_at: float, *, was_saturated: bool
    ) -> None:
        """Record the latency of a response and adjust the limit at the end of a window.

        Args:
            label: label of the endpoint.
            started_at: start of the request, on the monotonic clock.
            ended_at: arrival of the response, on the monotonic clock.
            was_saturated: whether the request ran at the concurrency limit.
        """
        latency_s = max(ended_at - started_at, MIN_LATENCY_S)
        lowest_s = self._lowest_s[label] = min(latency_s, self._lowest_s.get(label, latency_s))
        if not was_saturated or started_at < self._window_started_at:
            return
        # A geometric mean, because a single outlier hardly changes it.
        self._responses += 1
        self._log_ratio_sum += math.log(latency_s / lowest_s)
        if self._responses >= RESPONSES_PER_WINDOW * self._max_limit:
            self._adjust_limit(math.exp(self._log_ratio_sum / self._responses), ended_at)
            self._start_window(ended_at)

    def _adjust_limit(self, ratio: float, now: float) -> None:
        """Adjust the limit to a window's mean ratio of the latency to the lowest latency."""
        was_slow, self._was_slow = self._was_slow, ratio > SLOW_RATIO
        if ratio <= SLOW_RATIO:
            self.limit = min(self.limit + 1, self._max_limit)
        elif self.limit == self._max_limit:
            # In the first slow window the queue may still be growing.
            if was_slow and now >= self._cooldown_until:
                self._full_limit_ratio, self.limit = ratio, self._halved_limit
        elif self.limit > self._halved_limit:
            self.limit = self._halved_limit
        elif ratio > MIN_IMPROVEMENT * self._full_limit_ratio:
            self.limit, self._cooldown_until = self._max_limit, now + COOLDOWN_S
            # The network may have become slower: let the lowest latencies rise.
            self._lowest_s = {label: 2 * lowest_s for label, lowest_s in self._lowest_s.items()}
