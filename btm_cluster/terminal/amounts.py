"""Amounts, rates and durations in words, as progress shows them. Knows no terminal."""

from btm_cluster.requests.progress import Progress

_SIZES = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def amount(progress: Progress) -> str:
    """How much is done, and of how much: `update 9/100`, `1.2/4.0 GB`, `512 documents`; empty where nothing is
    counted."""
    done, total = progress.done, progress.total
    if progress.unit == "updates":
        return f"update {done}/{total}"
    if progress.unit == "bytes":
        size, name = _size(total or done)
        return f"{done / size:.1f}/{total / size:.1f} {name}" if total else f"{done / size:.1f} {name}"
    if not progress.unit or not (done or total):
        return ""
    return f"{done:,}/{total:,} {progress.unit}" if total else f"{done:,} {progress.unit}"


def rate(progress: Progress) -> str:
    """The rate in words; empty where it is not known."""
    if progress.tokens_per_second:
        return f"{progress.tokens_per_second:,.0f} tokens/s"
    if not progress.per_second:
        return ""
    if progress.unit == "bytes":
        size, name = _size(progress.per_second)
        return f"{progress.per_second / size:.1f} {name}/s"
    digits = 0 if progress.per_second >= 10 else 1
    return f"{progress.per_second:,.{digits}f} {progress.unit}/s"


def loss(progress: Progress) -> str:
    """The loss of a training."""
    return f"loss {progress.loss:.3f}" if progress.loss is not None else ""


def checkpoint(progress: Progress) -> str:
    """Seconds that the last checkpoint of a training took, in words."""
    if progress.stall_seconds is None or progress.upload_seconds is None:
        return ""
    return f"checkpoint: stalled {progress.stall_seconds:.1f} s, stored in {progress.upload_seconds:.1f} s"


def seconds_left(progress: Progress) -> float | None:
    """How long the phase still takes, by its own rate."""
    if progress.seconds_left is not None:
        return progress.seconds_left
    if not progress.per_second or not progress.total:
        return None
    return (progress.total - progress.done) / progress.per_second


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min` or `2 d 4 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def time_left(seconds: float) -> str:
    """An estimate, as roughly as it is known: to the minute, and above an hour to five of them."""
    if seconds < 60:
        return "less than a minute left"
    step = 60 if seconds < 3600 else 300
    return f"about {duration(round(seconds / step) * step)} left"


def _size(size_bytes: float) -> tuple[int, str]:
    return next(((size, name) for size, name in _SIZES if size_bytes >= size), (1, "bytes"))
