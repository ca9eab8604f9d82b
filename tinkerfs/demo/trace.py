"""Perfetto traces of sessions, in the format of protocol buffers.

The field numbers are those of Perfetto's `trace_packet.proto`, `track_event.proto` and
`track_descriptor.proto`.
"""

from collections.abc import Iterator

from tinkerfs.demo.sample_data import Run, Session

_STEPS = 20
"""Number of training steps that a trace shows for each run."""
_STEP_NS = 2_000_000_000
_OPERATIONS = (("forward_backward", 1_500_000_000), ("optim_step", 300_000_000))
"""The requests of a step, and their durations."""
_BEGIN, _END = 1, 2


def trace_of(session: Session, runs: list[Run]) -> bytes:
    """Return the trace of a session: a track for each run, with the requests of its steps."""
    steps = _STEPS + session.trace_generation
    packets = [_packet(_track(1, f"session {session.id}"))]
    for number, run in enumerate(runs, start=2):
        packets.append(_packet(_track(number, f"{run.id} ({run.base_model})")))
        packets += _slices(number, int(session.created_at_s * 1e9), steps)
    return b"".join(packets)


def _slices(track: int, began_ns: int, steps: int) -> Iterator[bytes]:
    for step in range(steps):
        time_ns = began_ns + step * _STEP_NS
        for name, length_ns in _OPERATIONS:
            yield _packet(_number(8, time_ns) + _event(_BEGIN, track, name))
            time_ns += length_ns
            yield _packet(_number(8, time_ns) + _event(_END, track, ""))


def _packet(content: bytes) -> bytes:
    return _bytes(1, content + _number(10, 1))


def _track(number: int, name: str) -> bytes:
    return _bytes(60, _number(1, number) + _bytes(2, name.encode("utf-8", "replace")))


def _event(kind: int, track: int, name: str) -> bytes:
    named = _bytes(23, name.encode()) if name else b""
    return _bytes(11, _number(9, kind) + _number(11, track) + named)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
