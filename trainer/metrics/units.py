"""Numbers as people read them."""


def si(value: float, unit: str = "") -> str:
    """Three significant digits: "1.23 GFLOP" with k, M, G, T or P; of plain numbers "1.23B" with k, M, B or T."""
    space = " " if unit else ""
    for prefix in ("", "k", "M", "G", "T") if unit else ("", "k", "M", "B"):
        if abs(value) < 999.5:
            return f"{_three(value)}{space}{prefix}{unit}"
        value /= 1000
    return f"{_three(value)}{space}{'P' if unit else 'T'}{unit}"


def duration(seconds: float) -> str:
    """The two largest units: "4.2s", "3m 05s", "2h 07m", "3d 04h"."""
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if minutes < 60:
        return f"{minutes}m {whole % 60:02d}s"
    if hours < 24:
        return f"{hours}h {minutes % 60:02d}m"
    return f"{days}d {hours % 24:02d}h"


def gib(size: float) -> str:
    """Bytes in GiB: "0.81 GiB"."""
    return f"{size / 2**30:.2f} GiB"


def _three(value: float) -> str:
    if value == int(value) and abs(value) < 1000:
        return str(int(value))
    return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}"
