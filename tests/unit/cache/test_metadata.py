import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.support.clocks import FakeTime
from tests.support.mount import wait_until
from tinkerfs import errors
from tinkerfs.cache.cache_policy import ERROR_TTL_S, CachePolicy
from tinkerfs.cache.metadata import DEGRADED_WAIT_S, REVALIDATE_WAIT_S, MetadataCache
from tinkerfs.context import BACKGROUND_CONTEXT, RequestContext
from tinkerfs.telemetry import Telemetry
from tinkerfs.validity import Validity

WAIT = RequestContext(timeout_s=10)
POLICY = CachePolicy(ttl_s=30, stale_if_error_s=3600, negative_ttl_s=5)


class Loads:
    """A loader that counts its calls and returns the `result` that the test sets."""

    def __init__(self):
        self.result = "one"
        self.calls = 0
        self.held = threading.Event()
        self.held.set()
        self._lock = threading.Lock()

    def __call__(self, priority):
        self.priority = priority
        with self._lock:
            self.calls += 1
            result = self.result
        assert self.held.wait(10)
        if isinstance(result, Exception):
            raise result
        return result


@pytest.fixture
def time():
    return FakeTime()


@pytest.fixture
def telemetry(time):
    return Telemetry(time.clock)


@pytest.fixture
def cache(time, telemetry):
    return MetadataCache(telemetry, time.clock)


def test_full_cache_evicts_the_least_recently_used_values(time, telemetry):
    cache = MetadataCache(telemetry, time.clock, max_entries=3)
    load = Loads()
    for key in ("a", "b", "c", "a", "d"):
        cache.get(key, load, POLICY, BACKGROUND_CONTEXT)
    assert load.calls == 4
    assert [key for key in "abcd" if cache.peek(key, BACKGROUND_CONTEXT)] == ["a", "c", "d"]


def test_value_is_loaded_once_within_its_ttl(cache, time):
    load = Loads()
    for _ in range(3):
        assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "one"
    time.advance(27.9)
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "one"
    assert load.calls == 1
    time.advance(2.2)
    load.result = "two"
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "two"
    assert load.calls == 2


def test_shared_value_is_as_old_as_its_oldest_response(cache, time):
    def load(priority):
        assert priority.shared_reads.max_age_s == POLICY.ttl_s
        for age_s in (10.0, 25.0, 20.0):
            priority.shared_reads.record(time.clock.with_suspend() - age_s)
        return "shared"

    validity = Validity()
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "shared"
    time.advance(4.9)
    again = Loads()
    assert cache.get("k", again, POLICY, BACKGROUND_CONTEXT.tracking(validity)) == "shared"
    assert validity.check_and_touch(time.clock.with_suspend())
    time.advance(2.2)  # the value has been used: it is refreshed in the background
    cache.get("k", again, POLICY, BACKGROUND_CONTEXT)
    cache.wait_idle(WAIT)
    assert again.calls == 1
    assert not validity.check_and_touch(time.clock.with_suspend())


def test_shared_refusal_is_as_old_as_its_request(cache, time):
    calls = []

    def load(priority):
        calls.append(priority)
        priority.shared_reads.record(time.clock.with_suspend() - 4.0)
        raise errors.NotFound("gone")

    for advance_s, expected in ((0.0, 1), (0.9, 1), (0.2, 2)):
        time.advance(advance_s)
        with pytest.raises(errors.NotFound):
            cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
        assert len(calls) == expected


def test_reload_uses_no_shared_response(cache):
    load = Loads()
    cache.reload("k", load, POLICY, BACKGROUND_CONTEXT)
    assert load.priority.shared_reads.max_age_s == 0


@pytest.mark.expect_warnings("refresh EHOSTUNREACH")
def test_expire_all_reloads_values_and_keeps_them_for_outages(cache, time):
    load, validity = Loads(), Validity()
    for key in ("a", "b"):
        cache.get(key, load, POLICY, BACKGROUND_CONTEXT.tracking(validity))
    time.advance(10)
    generation = cache.generation
    cache.expire_all()
    assert cache.generation != generation
    load.result = errors.ConnectionFailed("down")
    assert [cache.get(key, load, POLICY, WAIT) for key in ("a", "b")] == ["one", "one"]
    assert load.calls == 4


def test_expire_all_discards_a_load_in_flight(cache):
    load = Loads()
    load.held.clear()
    started = cache.prefetch("k", load, POLICY)
    assert started
    cache.expire_all()
    load.held.set()
    cache.wait_idle(WAIT)
    load.result = "two"
    assert cache.get("k", load, POLICY, WAIT) == "two"


def test_expired_value_in_use_is_served_while_revalidated(cache, time, telemetry):
    load = Loads()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    time.advance(29)
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "one"
    time.advance(1.5)
    load.result = "two"
    load.held.clear()
    for _ in range(3):  # no caller waits, and all share one refresh
        assert cache.get("k", load, POLICY, RequestContext(timeout_s=5)) == "one"
    load.held.set()
    assert cache.get("k", load, POLICY, RequestContext(timeout_s=5)) in ("one", "two")
    cache.wait_idle(WAIT)
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "two"
    assert load.calls == 2
    assert telemetry.snapshot()["counters"]["background_revalidations"] >= 3


def test_value_in_use_is_not_served_stale_forever(cache, time):
    load = Loads()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    time.advance(29.9)
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    time.advance(1)
    load.result = "two"
    load.held.clear()
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "one"
    time.advance(1.5)
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "one"
    time.advance(1.5)  # the refresh takes too long, so that the caller waits for it
    load.held.set()
    cache.wait_idle(WAIT)
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "two"


def test_suspend_ends_the_lifetime_of_values(cache, time):
    load = Loads()
    validity = validity_of_get(cache, load, time)
    time.suspend(POLICY.ttl_s)
    assert not validity.check_and_touch(time.with_suspend)
    load.result = "two"
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "two"
    time.suspend(POLICY.ttl_s + POLICY.stale_if_error_s)
    load.result = errors.ConnectionFailed("no network")
    with pytest.raises(errors.ConnectionFailed):
        cache.get("k", load, POLICY, BACKGROUND_CONTEXT)


def test_suspend_does_not_count_as_wait_for_a_refresh(cache, time, telemetry):
    load = Loads()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    time.advance(29.9)
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    time.advance(1)
    load.held.clear()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    time.suspend(1)  # less than the window of stale-while-revalidate
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    load.held.set()
    cache.wait_idle(WAIT)
    assert telemetry.counter_value("background_revalidations") == 2


def test_get_with_zero_ttl_loads_every_time(cache):
    load, policy = Loads(), CachePolicy(ttl_s=0, stale_if_error_s=3600, negative_ttl_s=0)
    for number in range(3):
        load.result = f"{number}"
        assert cache.get("k", load, policy, BACKGROUND_CONTEXT) == f"{number}"


def test_change_of_a_value_sets_last_changed(cache, time):
    load = Loads()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    assert cache.last_changed("k") is None
    time.advance(100)
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    assert cache.last_changed("k") is None
    time.advance(100)
    load.result = "two"
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    assert cache.last_changed("k") == time.clock.now()
    time.advance(100)
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    assert cache.last_changed("k") == time.clock.now() - 100
    cache.update("k", str.upper, is_authoritative=True)
    assert cache.last_changed("k") == time.clock.now()


def test_local_error_is_not_cached(cache, time):
    load = Loads()
    load.result = errors.ConnectionFailed("gone").as_local()
    for _ in range(3):
        with pytest.raises(errors.ConnectionFailed):
            cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    assert load.calls == 3
    load.result = "back"
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "back"


def test_prefetch_is_loaded_once_and_joined_by_get(cache):
    load = Loads()
    load.held.clear()
    assert cache.prefetch("k", load, POLICY)
    assert not cache.prefetch("k", load, POLICY)
    wait_until(lambda: load.calls == 1)
    assert not load.priority.is_demand
    waiting = threading.Thread(target=lambda: cache.get("k", load, POLICY, BACKGROUND_CONTEXT))
    waiting.start()
    wait_until(lambda: load.priority.is_demand)
    load.held.set()
    waiting.join(10)
    assert not cache.prefetch("k", load, POLICY), "it is fresh"
    assert load.calls == 1


@pytest.mark.parametrize("is_negative", [False, True])
def test_get_after_failed_prefetch_reloads_unless_not_found(cache, is_negative):
    load = Loads()
    load.result = errors.NotFound("no") if is_negative else errors.ServerError("down")
    load.held.clear()
    cache.prefetch("k", load, POLICY)
    load.held.set()
    cache.wait_idle(WAIT)
    load.result = "there"
    if is_negative:
        assert not cache.prefetch("k", load, POLICY)
        for is_first in (True, False, False):
            with pytest.raises(errors.NotFound) as failure:
                cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
            assert failure.value.is_local != is_first
    else:
        assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "there"


def test_background_revalidation_is_not_demand(cache, time):
    load = Loads()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    assert load.priority.is_demand
    time.advance(29)
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    time.advance(1.5)
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    cache.wait_idle(WAIT)
    assert load.calls == 2
    assert not load.priority.is_demand


@pytest.mark.parametrize("result", ["value", errors.NotFound("no"), errors.ServerError("down")])
def test_concurrent_waiters_share_one_load_and_outcome(cache, result):
    load = Loads()
    load.result = result
    load.held.clear()
    outcomes = []

    def get():
        try:
            outcomes.append(cache.get("k", load, POLICY, BACKGROUND_CONTEXT))
        except errors.ApiError as error:
            outcomes.append(type(error))

    threads = [threading.Thread(target=get) for _ in range(16)]
    for thread in threads:
        thread.start()
    load.held.set()
    for thread in threads:
        thread.join(10)
    expected = type(result) if isinstance(result, Exception) else result
    assert outcomes == [expected] * 16
    assert load.calls == 1


def test_negative_entry_expires_and_is_marked_local(cache, time):
    load = Loads()
    load.result = errors.NotFound("no such run")
    with pytest.raises(errors.NotFound) as first:
        cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    assert not first.value.is_local
    time.advance(4.9)
    with pytest.raises(errors.NotFound, match="no such run") as again:
        cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    assert again.value.is_local
    assert load.calls == 1
    time.advance(0.2)
    load.result = "made"
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "made"


@pytest.mark.expect_warnings("refused|down")
def test_outage_serves_the_stale_value_and_is_reported(cache, time, telemetry):
    load = Loads()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    time.advance(31)
    load.result = errors.ConnectionFailed("refused")
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "one"
    assert "refused" in telemetry.errors.text().decode()
    assert telemetry.snapshot()["counters"]["stale_if_error_hits"] == 1
    calls = load.calls
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "one"
    assert load.calls == calls, "the failure is cached for a moment"
    time.advance(ERROR_TTL_S)
    load.result = "two"
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "two"


@pytest.mark.expect_warnings("refused|down")
def test_stale_value_is_not_served_after_its_maximum_age(cache, time):
    load = Loads()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    load.result = errors.ConnectionFailed("refused")
    time.advance(3599)
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "one"
    time.advance(3)
    with pytest.raises(errors.ConnectionFailed):
        cache.get("k", load, POLICY, BACKGROUND_CONTEXT)


@pytest.mark.parametrize("kind", [errors.Unauthorized, errors.NotFound])
def test_definite_error_replaces_the_stale_value(cache, time, kind):
    load = Loads()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    time.advance(31)
    load.result = kind("no more")
    with pytest.raises(kind):
        cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    assert cache.peek("k", BACKGROUND_CONTEXT) is None


def test_get_with_stale_value_waits_only_briefly(cache, time):
    load = Loads()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    time.advance(31)
    load.held.clear()
    load.result = "two"
    impatient = RequestContext(timeout_s=0.05)
    assert cache.get("k", load, POLICY, impatient) == "one"
    load.held.set()
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) in ("one", "two")


def test_timeout_shortens_waits_for_other_keys_of_its_kind(cache, time):
    timeouts = []

    class RecordingContext(RequestContext):
        def with_timeout(self, seconds):
            timeouts.append(seconds)
            return RequestContext(timeout_s=0.01)

    load = Loads()
    for key in [("listing", "a"), ("listing", "b"), ("record", "a")]:
        cache.get(key, load, POLICY, BACKGROUND_CONTEXT)
    time.advance(31)
    load.held.clear()
    for key in [("listing", "a"), ("listing", "b"), ("record", "a")]:
        assert cache.get(key, load, POLICY, RecordingContext()) == "one"
    assert timeouts == [REVALIDATE_WAIT_S, DEGRADED_WAIT_S, REVALIDATE_WAIT_S]
    load.held.set()
    # A successful load restores the normal wait.
    for key in [("listing", "a"), ("listing", "b"), ("record", "a")]:
        cache.reload(key, load, POLICY, BACKGROUND_CONTEXT)
    time.advance(31)
    timeouts.clear()
    cache.get(("listing", "b"), load, POLICY, RecordingContext())
    assert timeouts == [REVALIDATE_WAIT_S]


def test_first_wait_ends_with_its_timeout_or_interruption(cache):
    load = Loads()
    load.held.clear()
    with pytest.raises(TimeoutError):
        cache.get("k", load, POLICY, RequestContext(timeout_s=0.05))
    with pytest.raises(InterruptedError):
        cache.get("k", load, POLICY, RequestContext(is_cancelled=lambda: True))
    load.held.set()
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "one"
    assert load.calls == 1, "the load continued, and the next get joined it"


def test_load_started_before_an_update_is_not_cached(cache):
    old, new = Loads(), Loads()
    cache.get("k", old, POLICY, BACKGROUND_CONTEXT)
    old.held.clear()
    old.result = "before the change"
    slow = threading.Thread(target=lambda: cache.reload("k", old, POLICY, BACKGROUND_CONTEXT))
    slow.start()
    wait_until(lambda: old.calls == 2)
    cache.update("k", lambda _value: "after the change", is_authoritative=True)
    old.held.set()
    slow.join(10)
    assert cache.get("k", new, POLICY, BACKGROUND_CONTEXT) == "after the change"
    assert new.calls == 0


def test_get_after_non_authoritative_update_reloads(cache):
    load = Loads()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    cache.update("k", lambda _value: "guess", is_authoritative=False)
    assert cache.peek("k", BACKGROUND_CONTEXT) == "guess"
    load.result = "truth"
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "truth"


@pytest.mark.expect_warnings("down")
def test_expire_reloads_and_keeps_the_stale_value(cache):
    load = Loads()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    cache.expire("k")
    load.result = errors.ServerError("down")
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "one"
    cache.expire("k")
    load.result = "two"
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
    assert cache.peek("k", BACKGROUND_CONTEXT) is None


@pytest.mark.expect_warnings("refused|down")
def test_reload_never_returns_a_cached_value(cache):
    load = Loads()
    cache.get("k", load, POLICY, BACKGROUND_CONTEXT)
    load.result = "two"
    assert cache.reload("k", load, POLICY, BACKGROUND_CONTEXT) == "two"
    load.result = errors.ServerError("down")
    with pytest.raises(errors.ServerError):
        cache.reload("k", load, POLICY, BACKGROUND_CONTEXT)
    assert cache.get("k", load, POLICY, BACKGROUND_CONTEXT) == "two"


def test_load_is_started_again_after_no_thread_was_free(cache, monkeypatch):
    load = Loads()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail_to_start)
        with pytest.raises(RuntimeError):
            cache.get("k", load, POLICY, WAIT)
    assert cache.get("k", load, POLICY, WAIT) == "one"


def fail_to_start(_thread):
    raise RuntimeError("can't start new thread")


def test_wait_idle_ends_with_the_last_load_or_its_timeout(cache):
    load = Loads()
    load.held.clear()
    cache.prefetch("k", load, POLICY)
    with pytest.raises(TimeoutError):
        cache.wait_idle(RequestContext(timeout_s=0.05))
    load.held.set()
    cache.wait_idle(WAIT)
    assert cache.peek("k", BACKGROUND_CONTEXT) == "one"


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
            self.cache.get(key, lambda _priority: self.truth[key], POLICY, BACKGROUND_CONTEXT)
            == value
        )

    @rule(key=keys)
    def update(self, key):
        self.cache.update(key, lambda value: value + 100, is_authoritative=True)
        if key in self.model:
            value, until = self.model[key]
            self.model[key] = (value + 100, until)

    @rule()
    def clear(self):
        self.cache.clear()
        self.model.clear()

    @invariant()
    def peek_returns_model_values(self):
        for key in "abc":
            value = self.cache.peek(key, BACKGROUND_CONTEXT)
            assert value in (None, self.model.get(key, (None,))[0])


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


# Validity of derived values.


def validity_of_get(cache, loads, time, policy=POLICY):
    """Get a value, and return the validity that recorded its expiry."""
    validity = Validity()
    cache.get("key", loads, policy, BACKGROUND_CONTEXT.tracking(validity))
    return validity


def test_validity_lasts_while_its_dependency_is_fresh(cache, time):
    loads = Loads()
    assert validity_of_get(cache, loads, time).is_uncacheable, (
        "the value was just loaded, and may change"
    )
    validity = validity_of_get(cache, loads, time)
    time.advance(29.9)
    assert validity.check_and_touch(time.with_suspend)
    time.advance(0.1)
    assert not validity.check_and_touch(time.with_suspend)


def test_check_of_validity_marks_its_dependency_as_used(cache, telemetry, time):
    loads = Loads()
    validity_of_get(cache, loads, time)
    validity = validity_of_get(cache, loads, time)
    time.advance(29.9)
    assert validity.check_and_touch(time.with_suspend)
    time.advance(0.2)
    validity_of_get(cache, loads, time)
    assert telemetry.counter_value("background_revalidations") == 1


@pytest.mark.parametrize("ending", ["update", "clear", "reload"])
def test_validity_ends_when_its_dependency_is_replaced(cache, time, ending):
    loads = Loads()
    validity_of_get(cache, loads, time)
    validity, generation = validity_of_get(cache, loads, time), cache.generation
    if ending == "update":
        cache.update("key", lambda _value: "other", is_authoritative=True)
    elif ending == "clear":
        cache.clear()
    else:
        loads.result = "other"
        cache.reload("key", loads, POLICY, BACKGROUND_CONTEXT)
    assert not validity.check_and_touch(time.with_suspend)
    assert cache.generation != generation


def test_reload_of_an_equal_value_returns_the_cached_object(cache, time):
    loads = Loads()
    loads.result = ["a", "listing"]
    first = cache.get("key", loads, POLICY, BACKGROUND_CONTEXT)
    validity, generation = validity_of_get(cache, loads, time), cache.generation
    loads.result = ["a", "listing"]
    time.advance(20)
    assert cache.reload("key", loads, POLICY, BACKGROUND_CONTEXT) is first
    time.advance(20)
    assert validity.check_and_touch(time.with_suspend), "fresh since the reload"
    assert cache.generation == generation


def test_first_value_expires_only_what_its_absence_led_to(cache, time):
    loads = Loads()
    absence, other = Validity(), Validity()
    assert cache.peek("key", BACKGROUND_CONTEXT.tracking(absence)) is None
    cache.peek("another", BACKGROUND_CONTEXT.tracking(other))
    generation = cache.generation
    time.advance(1e6)
    assert absence.check_and_touch(time.with_suspend)
    cache.get("key", loads, POLICY, BACKGROUND_CONTEXT)
    assert not absence.check_and_touch(time.with_suspend)
    assert other.check_and_touch(time.with_suspend)
    assert cache.generation == generation


def test_negative_entry_changes_generation_once(cache, time):
    loads = Loads()
    cache.get("key", loads, POLICY, BACKGROUND_CONTEXT)
    generation, loads.result = cache.generation, errors.NotFound("gone")
    for _ in range(3):
        time.advance(31)
        with pytest.raises(errors.NotFound):
            cache.get("key", loads, POLICY, BACKGROUND_CONTEXT)
    assert (loads.calls, cache.generation) == (4, generation + 1)
    loads.result = "back"
    time.advance(31)
    assert cache.get("key", loads, POLICY, BACKGROUND_CONTEXT) == "back"
    assert cache.generation == generation + 1


def test_negative_entry_is_still_an_absence(cache):
    absence, loads = Validity(), Loads()
    cache.peek("key", BACKGROUND_CONTEXT.tracking(absence))
    loads.result = errors.NotFound("no such thing")
    with pytest.raises(errors.NotFound):
        cache.get("key", loads, POLICY, BACKGROUND_CONTEXT)
    assert absence.check_and_touch(0.0)
    loads.result = "one"
    assert cache.reload("key", loads, POLICY, BACKGROUND_CONTEXT) == "one"
    assert not absence.check_and_touch(0.0)


def test_eviction_expires_what_was_derived_from_the_value(time, telemetry):
    """A later change of the value could not expire it."""
    cache, loads = MetadataCache(telemetry, time.clock, max_entries=2), Loads()
    validity_of_get(cache, loads, time)
    validity = validity_of_get(cache, loads, time)
    for key in ("another", "a third"):
        assert validity.check_and_touch(time.with_suspend)
        cache.get(key, loads, POLICY, BACKGROUND_CONTEXT)
    assert not validity.check_and_touch(time.with_suspend)


@pytest.mark.expect_warnings("key refresh")
def test_stale_value_makes_validity_uncacheable(cache, time):
    loads = Loads()
    validity_of_get(cache, loads, time)
    time.advance(31)
    loads.result = errors.ConnectionFailed("out")
    assert validity_of_get(cache, loads, time).is_uncacheable


def test_copy_of_validity_keeps_its_state():
    first = Validity()
    first.mark_uncacheable()
    assert first.copy().is_uncacheable
    assert Validity().check_and_touch(0.0), "it has no dependencies"
