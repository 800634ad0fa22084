"""A process that opens the files of a thousand experts raises its own limit first."""

import resource
from collections.abc import Iterator

import pytest

from btm_cluster.storage.open_files import OPEN_FILES, allow_open_files


@pytest.fixture
def low_limit() -> Iterator[int]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_as_many_files_may_be_open_as_the_system_allows(low_limit: int) -> None:
    allow_open_files()
    allowed = OPEN_FILES if low_limit == resource.RLIM_INFINITY else min(low_limit, OPEN_FILES)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (allowed, low_limit)
