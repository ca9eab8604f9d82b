import pytest

from tinkerfs.formatting import format_duration, format_size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.9, "0.9s"), (59, "59s"), (61, "1m 1s"), (7384, "2h 3m"), (90000, "1d 1h")],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (5 << 20, "5.0 MiB"),
        (3 << 50, "3072.0 TiB"),
    ],
)
def test_format_size(size_bytes, text):
    assert format_size(size_bytes) == text
