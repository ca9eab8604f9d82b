"""Messages to the service manager."""

import os

import pytest

from tests.support.service_manager import service_manager
from tinkerfs.cli.service import MountService
from tinkerfs.cli.service_notifier import ServiceNotifier


@pytest.mark.parametrize("address", ["", "@tinkerfs-test-notifier"])
def test_send_reaches_path_and_abstract_address(tmp_path, address):
    if address:
        address += f"-{os.getpid()}"
    with service_manager(tmp_path, address) as manager:
        environ = dict(manager.environment)
        notifier = ServiceNotifier(environ)
        assert environ == {}, "no child process may inherit it"
        assert notifier.is_enabled
        notifier.send("READY=1", "STATUS=two\nlines")
        assert manager.receive() == {"READY": "1", "STATUS": "two lines"}
        notifier.send_reloading()
        message = manager.receive()
        assert message["RELOADING"] == "1"
        assert int(message["MONOTONIC_USEC"]) > 0


@pytest.mark.parametrize(
    ("environ", "watchdog_s"),
    [
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "3000000"}, 3.0),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        (
            {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())},
            3.0,
        ),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "0"}, None),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "soon"}, None),
        ({"NOTIFY_SOCKET": "/x"}, None),
        ({"WATCHDOG_USEC": "3000000"}, None),
    ],
)
def test_watchdog_is_for_this_process_only(environ, watchdog_s):
    assert ServiceNotifier(environ).watchdog_s == watchdog_s


def test_failed_reload_is_logged_and_ends(tmp_path, expect_warnings):
    expect_warnings("the reload failed")
    with service_manager(tmp_path) as manager:
        service = MountService(ServiceNotifier(dict(manager.environment)), "/x", lambda: "here")
        service.on_reload(lambda: 1 // 0)
        assert manager.receive()["RELOADING"] == "1"
        assert manager.receive() == {"READY": "1", "STATUS": "here"}


@pytest.mark.parametrize("address", ["", "relative", "vsock:2:1", "/does/not/exist"])
def test_send_without_receiver_is_ignored(address):
    ServiceNotifier({"NOTIFY_SOCKET": address}).send("READY=1")
