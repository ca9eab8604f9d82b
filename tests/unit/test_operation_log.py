"""The operation log: subscriptions, and threads that work for an operation."""

import os
import threading

import pytest

from tinkerfs.concurrency import run_concurrently, run_in_thread
from tinkerfs.context import Caller
from tinkerfs.operation_log import MAX_REQUEST_IDS, OperationLog, RequestRecord

CALLER = Caller(os.getpid(), os.getuid(), os.getpgrp(), os.getpid())


@pytest.fixture
def operation_log():
    return OperationLog()


def test_subscriptions_are_independent(operation_log):
    first, second = [], []
    assert not operation_log.is_observed
    end_first = operation_log.subscribe(first.append)
    end_second = operation_log.subscribe(second.append)
    operation_log.end(operation_log.begin("read", "/a", CALLER), 0, read_bytes=5)
    end_first()
    end_first()
    assert operation_log.is_observed
    operation_log.end(operation_log.begin("write", "/b", CALLER), 0, written_bytes=2)
    end_second()
    assert not operation_log.is_observed
    assert [(record.operation, record.read_bytes, record.written_bytes) for record in second] == [
        ("read", 5, 0),
        ("write", 0, 2),
    ]
    assert first == second[:1]


def test_failing_subscriber_does_not_fail_the_operation(operation_log, expect_warnings):
    expect_warnings("a subscriber of the operation log failed")
    records = []

    def fail(_record):
        raise ZeroDivisionError

    operation_log.subscribe(fail)
    operation_log.subscribe(records.append)
    operation_log.end(operation_log.begin("getattr", "/a", CALLER), 2)
    assert [record.errno_name for record in records] == ["ENOENT"]


def test_threads_work_for_the_operation_that_started_them(operation_log):
    records = []
    operation_log.subscribe(records.append)

    def request(request_id):
        operation_log.record_request(
            RequestRecord(
                endpoint="GET training_runs",
                url="https://api.example/",
                outcome="200",
                started_at=0,
                duration_s=0,
                request_id=request_id,
            )
        )

    active = operation_log.begin("opendir", "/a", CALLER)
    inner = operation_log.begin("getattr", "/b", CALLER)
    operation_log.end(inner, 0)
    run_in_thread(lambda: run_in_thread(lambda: request("1"), "inner").result(), "outer").result()
    run_concurrently([lambda: request("2")], 1, "pages")
    thread = threading.Thread(target=request, args=("unrelated",))
    thread.start()
    thread.join()
    operation_log.end(active, 0)
    request("late")
    assert [record.request_ids for record in records] == [(), ("1", "2")]


def test_request_ids_of_an_operation_are_limited(operation_log):
    records = []
    operation_log.subscribe(records.append)
    active = operation_log.begin("opendir", "/", CALLER)
    for number in range(2 * MAX_REQUEST_IDS):
        active.add_request_id(f"{number}")
    operation_log.end(active, 0)
    assert records[0].request_ids == tuple(map(str, range(MAX_REQUEST_IDS)))
