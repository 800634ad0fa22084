"""An estimate that people can read: it does not jump about."""

TOLERANCE, SLACK_SECONDS = 0.1, 5.0
"""It moves where it is wrong by more than this share and these seconds."""


class SteadyEstimate:
    """An estimate that counts down by the clock, and moves only where it is clearly wrong."""

    def __init__(self) -> None:
        self._end: float | None = None

    def left(self, now: float) -> float | None:
        """Seconds left to be shown."""
        return None if self._end is None else max(0.0, self._end - now)

    def update(self, now: float, seconds_left: float | None) -> float | None:
        """Takes what is estimated now, and returns what is to be shown."""
        shown = self.left(now)
        if seconds_left is None:
            self._end = None
        elif shown is None or abs(shown - seconds_left) > TOLERANCE * seconds_left + SLACK_SECONDS:
            self._end = now + seconds_left
        return self.left(now)
