"""An estimate that people can read: it does not jump about."""

import math

DRIFT_SHARE, DRIFT_SECONDS = 0.15, 10.0
"""It goes after what is estimated now within this share of the time left, and no faster than in these seconds."""
LEAP_SHARE, LEAP_SECONDS = 0.5, 30.0
"""Where it is wrong by more than this share and these seconds, it is set right at once."""


class SteadyEstimate:
    """An estimate that counts down by the clock and drifts towards what is estimated now: other work on the
    machine changes the pace for a while, and back. It leaps only where it is far off."""

    def __init__(self) -> None:
        self._end: float | None = None
        self._updated = 0.0

    def left(self, now: float) -> float | None:
        """Seconds left to be shown."""
        return None if self._end is None else max(0.0, self._end - now)

    def update(self, now: float, seconds_left: float | None) -> float | None:
        """Takes what is estimated now, and returns what is to be shown."""
        shown = self.left(now)
        if seconds_left is None:
            self._end = None
        elif self._end is None or shown is None or _is_far(shown, seconds_left):
            self._end = now + seconds_left
        else:
            span = max(DRIFT_SECONDS, DRIFT_SHARE * seconds_left)
            passed = now - self._updated
            self._end += (now + seconds_left - self._end) * (1 - math.exp(-passed / span))
        self._updated = now
        return self.left(now)


def _is_far(shown: float, seconds_left: float) -> bool:
    return abs(shown - seconds_left) > LEAP_SHARE * max(shown, seconds_left) + LEAP_SECONDS
