"""The boto3 client of object storage: endpoint, region and credentials by the standard chain."""

from datetime import datetime
from functools import cache
from typing import Any

import boto3
import botocore.session
from botocore.config import Config
from botocore.utils import parse_timestamp

ANSWER_SECONDS = 60.0
"""How long a service that has taken a request may be silent."""
CONNECTIONS = 64
"""Kept open at most: of four files that are downloaded at once, or of as many small requests as the ledger has
under way."""


def new_client() -> Any:
    """A client whose integrity checks are left to the ledger."""
    session = botocore.session.get_session()
    session.register_component("data_loader", _service_models())
    # As the AWS command line does it.
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_time_of)
    return boto3.session.Session(botocore_session=session).client(
        "s3",
        config=Config(
            # Not adaptive: its rate would be learned from boto3's own requests alone, and hold back those of
            # s3_reads.py for ever. Whoever calls waits between tries too.
            retries={"mode": "standard", "total_max_attempts": 5},
            connect_timeout=10,
            read_timeout=ANSWER_SECONDS,
            tcp_keepalive=True,
            max_pool_connections=CONNECTIONS,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


@cache
def _service_models() -> Any:
    """botocore's descriptions of services, which took five sixths of the time of making a client."""
    return botocore.session.get_session().get_component("data_loader")


def _time_of(value: Any) -> datetime:
    """botocore's own parser tries many forms: it took 7 of 11 ms of each 100 listed objects."""
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return parse_timestamp(value)  # type: ignore[no-any-return]
