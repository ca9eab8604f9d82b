import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.support.clocks import FakeTime
from tests.support.mount import wait_until
from tinkerfs import errors
from tinkerfs.cache.metadata import (
    DEGRADED_WAIT_S,
    ERROR_TTL_S,
    REVALIDATE_WAIT_S,
    CachePolicy,
    MetadataCache,
)
from tinkerfs.context import BACKGROUND_CONTEXT, RequestContext, Validity
from tinkerfs.telemetry import Telemetry

POLICY = CachePolicy(ttl_s=30, stale_s=3600, negative_ttl_s=5)


class Loads:
    """A load whose answers are set by the test, and counted."""

    def __init__(self):
        self.answer = "one"
        self.calls = 0
        self.held = threading.Event()
        self.held.set()
        self._lock = threading.Lock()

    def __call__(self, interest):
        self.interest = interest
        with self._lock:
            self.calls += 1
            answer = self.answer
        assert self.held.wait(10)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def time():
    return FakeTime()


@pytest.fixture
def telemetry(time):
    return Telemetry(time.clock)


@pytest.fixture
def cache(time, telemetry):
    return MetadataCache(telemetry, time.clock)


def test_of_more_values_than_are_kept_those_go_that_were_used_least_recently(time, telemetry):
    cache = MetadataCache(telemetry, time.clock, max_entries=3)
    load = Loads()
    for key in ("a", "b", "c", "a", "d"):
        cache.get(key, load, POLICY, BACKGROUND_CONTEXT)
    assert load.calls == 4
    assert [key for key in "abcd" if cache.peek(key) is not None] == ["a", "c", "d"]


def test_a_value_is_loaded_once_within_its_ttl(cache, time):
    load = Loads()
    for _ in range(3):
        assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "one"
    time.advance(27.9)
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "one"
    assert load.calls == 1
    time.advance(2.2)
    load.answer = "two"
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "two"
    assert load.calls == 2


def test_what_is_in_use_is_served_while_it_is_refreshed_behind(cache, time, telemetry):
    load = Loads()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    time.advance(29)
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "one"
    time.advance(1.5)
    load.answer = "two"
    load.held.clear()
    for _ in range(3):  # nobody waits, and there is one refresh for all
        assert cache.get("k", load, POLICY, RequestContext(timeout_s=5)) == "one"
    load.held.set()
    assert cache.get("k", load, POLICY, RequestContext(timeout_s=5)) in ("one", "two")
    deadline = threading.Event()
    while cache.peek("k") == "one":
        assert not deadline.wait(0.01)
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "two"
    assert load.calls == 2
    assert telemetry.snapshot()["counters"]["refreshed_behind"] >= 3


def test_what_is_in_use_is_not_served_for_ever(cache, time):
    load = Loads()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    time.advance(29.9)
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    time.advance(1)
    load.answer = "two"
    load.held.clear()
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "one"
    time.advance(1.5)
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "one"
    time.advance(1.5)  # the refresh takes longer than anybody is asked to bear: it is waited for
    load.held.set()
    while cache.peek("k") == "one":
        pass
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "two"


def test_without_a_ttl_every_look_is_a_new_one(cache):
    load, policy = Loads(), CachePolicy(ttl_s=0, stale_s=3600, negative_ttl_s=0)
    for number in range(3):
        load.answer = f"{number}"
        assert cache.get("k", load, policy, BACKGROUND_CONTEXT) == f"{number}"


def test_a_change_has_a_time(cache, time):
    load = Loads()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    assert cache.last_changed("k") is None
    time.advance(100)
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    assert cache.last_changed("k") is None
    time.advance(100)
    load.answer = "two"
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    assert cache.last_changed("k") == time.clock.now()
    time.advance(100)
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    assert cache.last_changed("k") == time.clock.now() - 100
    cache.update("k", str.upper, is_exact=True)
    assert cache.last_changed("k") == time.clock.now()


def test_a_failure_that_cost_nothing_is_not_remembered(cache, time):
    load = Loads()
    load.answer = errors.ConnectionFailed("gone").as_local()
    for _ in range(3):
        with pytest.raises(errors.ConnectionFailed):
            cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    assert load.calls == 3
    load.answer = "back"
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "back"


def test_what_is_asked_for_without_a_wait_is_loaded_once_and_joined(cache):
    load = Loads()
    load.held.clear()
    assert cache.prefetch("k", load, POLICY)
    assert not cache.prefetch("k", load, POLICY)
    while load.calls == 0:
        pass
    assert not load.interest.is_demand
    waiting = threading.Thread(target=lambda: cache.get("k", load, POLICY, BACKGROUND_CONTEXT))
    waiting.start()
    while not load.interest.is_demand:
        pass
    load.held.set()
    waiting.join(10)
    assert not cache.prefetch("k", load, POLICY), "it is fresh"
    assert load.calls == 1


@pytest.mark.parametrize("is_remembered", [False, True])
def test_a_guess_that_failed_is_asked_again_unless_it_was_an_answer(cache, is_remembered):
    load = Loads()
    load.answer = errors.NotFound("no") if is_remembered else errors.ServerError("down")
    load.held.clear()
    cache.prefetch("k", load, POLICY)
    flight = cache._flights["k"].future
    load.held.set()
    with pytest.raises(errors.ApiError):
        flight.result(10)
    load.answer = "there"
    if is_remembered:
        assert not cache.prefetch("k", load, POLICY)
        for is_news in (True, False, False):
            with pytest.raises(errors.NotFound) as told:
                cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
            assert told.value.is_local != is_news
    else:
        assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "there"


def test_what_an_earlier_mount_kept_will_do_until_the_first_answer_comes(cache, telemetry):
    load = Loads()
    load.held.clear()
    for _ in range(2):
        assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT, lambda: "kept") == "kept"
    assert cache.is_warm("k")
    with pytest.raises(TimeoutError):  # for whom only this mount's own will do
        cache.get("k", load, POLICY, RequestContext(timeout_s=0.05))
    flight = cache._flights["k"].future
    load.held.set()
    assert flight.result(10) == "one"
    assert not cache.is_warm("k")
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT, lambda: "kept") == "one"
    assert load.calls == 1
    assert telemetry.counter_value("warm_starts") == 1


@pytest.mark.parametrize("answer", ["one", errors.Unauthorized("no"), errors.ServerError("down")])
def test_a_first_answer_that_comes_at_once_is_the_one_that_counts(cache, answer):
    load = Loads()
    load.answer = answer
    if answer == "one":
        assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT, lambda: "kept") == "one"
    else:
        with pytest.raises(type(answer)):
            cache.get("k", load, POLICY, BACKGROUND_CONTEXT, lambda: "kept")
    assert not cache.is_warm("k")


@pytest.mark.parametrize("kind", [errors.Unauthorized, errors.ServerError])
def test_what_an_earlier_mount_kept_ends_with_the_first_answer_also_a_failure(cache, kind):
    load = Loads()
    load.answer = kind("no")
    load.held.clear()
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT, lambda: "kept") == "kept"
    flight = cache._flights["k"].future
    load.held.set()
    with pytest.raises(kind):
        flight.result(10)
    with pytest.raises(kind):
        cache.get("k", load, POLICY, BACKGROUND_CONTEXT, lambda: "kept")


def test_where_nothing_was_kept_the_first_answer_is_waited_for(cache):
    load = Loads()
    load.held.clear()
    with pytest.raises(TimeoutError):
        cache.get("k", load, POLICY, RequestContext(timeout_s=0.4), lambda: None)
    with pytest.raises(InterruptedError):
        cache.get("k", load, POLICY, RequestContext(is_cancelled=lambda: True), lambda: "kept")
    load.held.set()
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT, lambda: None) == "one"
    assert load.calls == 1


def test_a_refresh_behind_is_a_guess(cache, time):
    load = Loads()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    assert load.interest.is_demand
    time.advance(29)
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    time.advance(1.5)
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    while load.calls < 2:
        pass
    assert not load.interest.is_demand


@pytest.mark.parametrize("answer", ["value", errors.NotFound("no"), errors.ServerError("down")])
def test_all_who_wait_share_one_load_and_its_outcome(cache, answer):
    load = Loads()
    load.answer = answer
    load.held.clear()
    outcomes = []

    def ask():
        try:
            outcomes.append(cache.get("k", load, POLICY, BACKGROUND_CONTEXT))
        except errors.ApiError as error:
            outcomes.append(type(error))

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    load.held.set()
    for thread in threads:
        thread.join(10)
    wanted = type(answer) if isinstance(answer, Exception) else answer
    assert outcomes == [wanted] * 16
    assert load.calls == 1


def test_absence_is_remembered_for_its_own_time_and_marked_as_remembered(cache, time):
    load = Loads()
    load.answer = errors.NotFound("no such run")
    with pytest.raises(errors.NotFound) as first:
        cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    assert not first.value.is_local
    time.advance(4.9)
    with pytest.raises(errors.NotFound, match="no such run") as again:
        cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    assert again.value.is_local
    assert load.calls == 1
    time.advance(0.2)
    load.answer = "made"
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "made"


@pytest.mark.expect_warnings("refused|down")
def test_an_outage_serves_the_last_good_answer_and_is_told(cache, time, telemetry):
    load = Loads()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    time.advance(31)
    load.answer = errors.ConnectionFailed("refused")
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "one"
    assert "refused" in telemetry.errors_text()
    assert telemetry.snapshot()["counters"]["stale_answers"] == 1
    calls = load.calls
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "one"
    assert load.calls == calls, "a failure is remembered for a moment"
    time.advance(ERROR_TTL_S)
    load.answer = "two"
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "two"


@pytest.mark.expect_warnings("refused|down")
def test_the_last_good_answer_has_an_end(cache, time):
    load = Loads()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    load.answer = errors.ConnectionFailed("refused")
    time.advance(3599)
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "one"
    time.advance(3)
    with pytest.raises(errors.ConnectionFailed):
        cache.get("k", load, POLICY, BACKGROUND_CONTEXT)


@pytest.mark.parametrize("kind", [errors.Unauthorized, errors.NotFound])
def test_an_answer_about_the_thing_itself_replaces_the_last_good_one(cache, time, kind):
    load = Loads()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    time.advance(31)
    load.answer = kind("no more")
    with pytest.raises(kind):
        cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    assert cache.peek("k") is None


def test_who_has_a_last_good_answer_does_not_wait_long_for_a_newer_one(cache, time):
    load = Loads()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    time.advance(31)
    load.held.clear()
    load.answer = "two"
    impatient = RequestContext(timeout_s=0.05)
    assert cache.get("k", load, POLICY, impatient) == "one"
    load.held.set()
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) in ("one", "two")


def test_what_was_waited_for_in_vain_is_not_waited_for_so_long_at_the_next_key_of_its_kind(
    cache, time
):
    patiences = []

    class Noted(RequestContext):
        def with_timeout(self, seconds):
            patiences.append(seconds)
            return RequestContext(timeout_s=0.01)

    load = Loads()
    for key in [("listing", "a"), ("listing", "b"), ("record", "a")]:
        cache.get(key, load, POLICY, BACKGROUND_CONTEXT)
    time.advance(31)
    load.held.clear()
    for key in [("listing", "a"), ("listing", "b"), ("record", "a")]:
        assert cache.get(key, load, POLICY, Noted()) == "one"
    assert patiences == [REVALIDATE_WAIT_S, DEGRADED_WAIT_S, REVALIDATE_WAIT_S]
    load.held.set()
    # What has come since says that there is hope again.
    for key in [("listing", "a"), ("listing", "b"), ("record", "a")]:
        cache.reload(key, load, POLICY, BACKGROUND_CONTEXT)
    time.advance(31)
    patiences.clear()
    cache.get(("listing", "b"), load, POLICY, Noted())
    assert patiences == [REVALIDATE_WAIT_S]


def test_a_wait_without_a_last_good_answer_ends_with_its_bound_or_its_interruption(cache):
    load = Loads()
    load.held.clear()
    with pytest.raises(TimeoutError):
        cache.get("k", load, POLICY, RequestContext(timeout_s=0.05))
    with pytest.raises(InterruptedError):
        cache.get("k", load, POLICY, RequestContext(is_cancelled=lambda: True))
    load.held.set()
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "one"
    assert load.calls == 1, "the load went on, and the next try joined it"


def test_a_load_that_began_before_a_change_is_not_kept(cache):
    old, new = Loads(), Loads()
    cache.get("k", old, POLICY, BACKGROUND_CONTEXT)
    old.held.clear()
    old.answer = "before the change"
    slow = threading.Thread(target=lambda: cache.reload("k", old, POLICY, BACKGROUND_CONTEXT))
    slow.start()
    while old.calls < 2:
        pass
    cache.update("k", lambda _value: "after the change", is_exact=True)
    old.held.set()
    slow.join(10)
    assert cache.get("k", new, POLICY, BACKGROUND_CONTEXT) == "after the change"
    assert new.calls == 0


def test_an_inexact_amendment_is_asked_for_again(cache):
    load = Loads()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    cache.update("k", lambda _value: "guess", is_exact=False)
    assert cache.peek("k") == "guess"
    load.answer = "truth"
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "truth"


@pytest.mark.expect_warnings("down")
def test_expired_value_is_asked_for_and_serves_an_outage(cache):
    load = Loads()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    cache.expire("k")
    load.answer = errors.ServerError("down")
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "one"
    cache.expire("k")
    load.answer = "two"
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "two"
    assert load.calls == 3


def test_load_in_flight_when_a_value_expires_is_not_cached(cache):
    load = Loads()
    load.held.clear()
    caller = threading.Thread(target=lambda: cache.get("k", load, POLICY, BACKGROUND_CONTEXT))
    caller.start()
    wait_until(lambda: load.calls == 1)
    cache.expire("k")
    load.held.set()
    caller.join()
    assert cache.peek("k") is None


@pytest.mark.expect_warnings("refused|down")
def test_reload_never_takes_a_kept_answer(cache):
    load = Loads()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    load.answer = "two"
    assert cache.reload("k", load, POLICY, BACKGROUND_CONTEXT) == "two"
    load.answer = errors.ServerError("down")
    with pytest.raises(errors.ServerError):
        cache.reload("k", load, POLICY, BACKGROUND_CONTEXT)
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "two"


class CacheMachine(RuleBasedStateMachine):
    """The cache against a dictionary and a clock."""

    keys = st.sampled_from("abc")

    def __init__(self):
        super().__init__()
        self.time = FakeTime()
        self.cache = MetadataCache(Telemetry(self.time.clock), self.time.clock)
        self.truth = dict.fromkeys("abc", 0)
        self.model = {}

    @rule(key=keys)
    def change_on_the_server(self, key):
        self.truth[key] += 1

    @rule(seconds=st.floats(0, 40))
    def time_passes(self, seconds):
        self.time.advance(seconds)

    @rule(key=keys)
    def get(self, key):
        now = self.time.monotonic
        value, until = self.model.get(key, (None, -1.0))
        if now >= until:
            value = self.truth[key]
            self.model[key] = (value, now + POLICY.ttl_s)
        assert (
            self.cache.get(key, lambda _interest: self.truth[key], POLICY, BACKGROUND_CONTEXT)
            == value
        )

    @rule(key=keys)
    def amend(self, key):
        self.cache.update(key, lambda value: value + 100, is_authoritative=True)
        if key in self.model:
            value, until = self.model[key]
            self.model[key] = (value + 100, until)

    @rule()
    def clear(self):
        self.cache.clear()
        self.model.clear()

    @invariant()
    def nothing_is_invented(self):
        for key in "abc":
            assert self.cache.peek(key) in (None, self.model.get(key, (None,))[0])


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


# What rests on kept values.


def leased(cache, loads, time, policy=POLICY):
    """Get a value; return the lease that its call was told of."""
    lease = Validity()
    cache.get("key", loads, policy, BACKGROUND_CONTEXT.tracking(lease))
    return lease


def test_what_rests_on_a_value_holds_while_that_is_fresh(cache, time):
    loads = Loads()
    assert leased(cache, loads, time).is_uncacheable, "it has just come: the next look may keep it"
    lease = leased(cache, loads, time)
    time.advance(29.9)
    assert lease.check_and_touch(time.monotonic)
    time.advance(0.1)
    assert not lease.check_and_touch(time.monotonic)


def test_who_rests_on_a_value_keeps_it_in_use(cache, telemetry, time):
    loads = Loads()
    leased(cache, loads, time)
    lease = leased(cache, loads, time)
    time.advance(29.9)
    assert lease.check_and_touch(time.monotonic)
    time.advance(0.2)
    leased(cache, loads, time)
    assert telemetry.counter_value("refreshed_behind") == 1


@pytest.mark.parametrize("ending", ["amend", "clear", "reload"])
def test_what_rests_on_a_value_ends_with_it(cache, time, ending):
    loads = Loads()
    leased(cache, loads, time)
    lease, epoch = leased(cache, loads, time), cache.generation
    if ending == "amend":
        cache.update("key", lambda _value: "other", is_exact=True)
    elif ending == "clear":
        cache.clear()
    else:
        loads.answer = "other"
        cache.reload("key", loads, POLICY, BACKGROUND_CONTEXT)
    assert not lease.check_and_touch(time.monotonic)
    assert cache.generation != epoch


def test_a_value_that_comes_again_is_the_one_that_was_there(cache, time):
    loads = Loads()
    loads.answer = ["a", "listing"]
    first = cache.get("key", loads, POLICY, BACKGROUND_CONTEXT)
    lease, epoch = leased(cache, loads, time), cache.generation
    loads.answer = ["a", "listing"]
    time.advance(20)
    assert cache.reload("key", loads, POLICY, BACKGROUND_CONTEXT) is first
    time.advance(20)
    assert lease.check_and_touch(time.monotonic), "fresh from when it came again"
    assert cache.generation == epoch


@pytest.mark.expect_warnings("key refresh")
def test_a_stale_answer_is_rested_on_by_nothing(cache, time):
    loads = Loads()
    leased(cache, loads, time)
    time.advance(31)
    loads.answer = errors.ConnectionFailed("out")
    assert leased(cache, loads, time).is_uncacheable


def test_a_lease_goes_on_from_another():
    first = Validity()
    first.mark_uncacheable()
    assert first.copy().is_uncacheable
    assert Validity().check_and_touch(0.0), "on nothing that could end"
