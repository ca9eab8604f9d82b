"""Human-readable sizes and durations."""


def format_size(size_bytes: float) -> str:
    """Format a number of bytes with a binary unit: 0 B, 12.3 MiB, 4.0 GiB."""
    size, units = float(size_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1023.95 and len(units) > 1:  # 1024.0 KiB is 1.0 MiB
        size, units = size / 1024, units[1:]
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def format_duration(seconds: float) -> str:
    """Format a duration with its largest units: 0.2s, 12s, 3m 5s, 2h 10m, 4d 3h."""
    if 0 < seconds < 1:
        return f"{seconds:.1f}s"
    total = int(seconds)
    for unit_s, unit, minor_s, minor in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if total >= unit_s:
            return f"{total // unit_s}{unit} {total % unit_s // minor_s}{minor}"
    return f"{total}s"
