"""Fixtures of the unit tests: one thread, for one order of every sum, and pretended object storage."""

import uuid
from collections.abc import Iterator

import boto3
import moto
import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """As training on one CPU sets it."""
    torch.set_num_threads(1)


@pytest.fixture
def pretended_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty store in pretended object storage."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with moto.mock_aws():
        boto3.session.Session().client("s3").create_bucket(Bucket="bucket")
        yield f"s3://bucket/{uuid.uuid4().hex}"
