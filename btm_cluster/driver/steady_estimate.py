"""An estimate that people can read: it does not jump about."""

TOLERANCE, SLACK_SECONDS = 0.1, 5.0
"""It moves where it is wrong by more than this share and these seconds."""


class SteadyEstimate:
    """An estimate that counts down by the clock, and moves only where it is clearly wrong."""

    def __init__(self) -> None:
        self._end: float | None = None

    def update(self, now: float, seconds_left: float | None) -> float | None:
        """Seconds left to be shown, given those that are estimated now."""
        if seconds_left is None:
            self._end = None
        elif (
            self._end is None
            or abs(self._end - now - seconds_left) > TOLERANCE * seconds_left + SLACK_SECONDS
        ):
            self._end = now + seconds_left
        return None if self._end is None else max(0.0, self._end - now)
