"""Patience with object storage that is out: an operation is tried again for minutes, where boto3's own
retries bridge seconds."""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from boto3.exceptions import S3UploadFailedError

from btm_cluster.errors import MissingError
from btm_cluster.storage.s3_errors import FAILURES, is_transient, message_of, store_error
from btm_cluster.storage.store_calls import DONE, FAILED, TRIED_AGAIN, count_store_call

log = logging.getLogger(__name__)
PATIENCE_SECONDS = 300.0
"""How long a store may be out before an operation on it fails."""
LONGEST_PAUSE_SECONDS = 20.0
Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """Tries operations on one store."""

    location: str
    seconds: float

    def attempt(self, verb: str, key: str, act: Callable[[], Result]) -> Result:
        """Does it, again and again while the store is out.

        Raises:
            StoreError: it is out for too long, or something that trying again does not mend.
        """
        deadline = time.monotonic() + self.seconds
        pause = 1.0
        while True:
            try:
                result = act()
                count_store_call(verb, DONE)
                return result
            except FAILURES as failed:
                # Which has only words.
                exc = failed.__context__ if isinstance(failed, S3UploadFailedError) else failed
                assert exc is not None
                if not is_transient(exc) or time.monotonic() + pause > deadline:
                    error = store_error(verb, key, self.location, exc)
                    count_store_call(verb, DONE if isinstance(error, MissingError) else FAILED)
                    raise error from exc
                count_store_call(verb, TRIED_AGAIN)
                what, why = key or "it", message_of(exc)
                log.warning("%s: cannot %s %s yet, trying again: %s", self.location, verb, what, why)
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
