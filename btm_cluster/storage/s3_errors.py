"""Errors of an S3 service: which are transient, and what is told of the others."""

import botocore.exceptions as failures
from boto3.exceptions import RetriesExceededError, S3UploadFailedError
from s3transfer.exceptions import S3DownloadFailedError

from btm_cluster.errors import MissingError, StoreError

_TRANSIENT_CODES = {"SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "ThrottlingException",
    "OperationAborted", "ConditionalRequestConflict", "NoSuchUpload"}  # fmt: skip
_REMEDIES = {
    "NoSuchBucket": "create the bucket, or mend `store`",
    "PermanentRedirect": "set AWS_REGION to the bucket's region",
    "AuthorizationHeaderMalformed": "set AWS_REGION to the bucket's region",
    "AccessDenied": "allow these credentials to get, put, delete and list there, and check `owner`",
    "403": "allow these credentials to get, put, delete and list there, and check `owner`",
    "RequestTimeTooSkewed": "set this machine's clock",
    "InvalidAccessKeyId": "check the credentials that boto3 finds: environment, profile, role",
    "SignatureDoesNotMatch": "check the credentials that boto3 finds: environment, profile, role",
    "InvalidToken": "check the credentials that boto3 finds: environment, profile, role",
    "ExpiredToken": "renew the credentials; the same command goes on",
    "ExpiredTokenException": "renew the credentials; the same command goes on",
    "TokenRefreshRequired": "renew the credentials; the same command goes on",
}
FAILURES = (
    failures.ClientError,
    failures.BotoCoreError,
    S3UploadFailedError,
    RetriesExceededError,
    S3DownloadFailedError,
)


def is_transient(exc: BaseException) -> bool:
    """Whether trying again can help: the service or the network is at fault, not the request."""
    if isinstance(exc, failures.ClientError):
        status = exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or code_of(exc) in _TRANSIENT_CODES
    return isinstance(
        exc,
        failures.HTTPClientError
        | failures.EndpointConnectionError
        | failures.ConnectTimeoutError
        | failures.ProxyConnectionError
        | failures.IncompleteReadError
        | failures.ResponseStreamingError
        | RetriesExceededError
        | S3DownloadFailedError,  # the object was replaced under way
    )


def store_error(verb: str, key: str, location: str, exc: BaseException) -> StoreError:
    """The package's error for a failed operation, with nothing in it but the service's code and message."""
    code = code_of(exc) if isinstance(exc, failures.ClientError) else ""
    if code in ("NoSuchKey", "404"):
        return MissingError(f"cannot {verb} {key}", found="no such object", expected=f"one in {location}")
    remedy = _REMEDIES.get(code, "check the endpoint, the network and the service; the same command goes on")
    if isinstance(exc, failures.NoCredentialsError | failures.PartialCredentialsError):
        remedy = "give credentials by boto3's chain: environment, profile or role"
    what = f"{key} in {location}" if key else location
    return StoreError(f"cannot {verb} {what}", found=message_of(exc), remedy=remedy)


def code_of(exc: failures.ClientError) -> str:
    """The service's code of an error; empty where it has none."""
    return str(exc.response.get("Error", {}).get("Code", ""))


def starts_behind_the_end(exc: failures.ClientError) -> bool:
    """Whether a range was asked for that begins at or behind the object's end."""
    status = exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status == 416 or code_of(exc) == "InvalidRange"


def message_of(exc: BaseException) -> str:
    """The message of the service or the network, on one line."""
    if isinstance(exc, failures.ClientError):
        return f"{code_of(exc)}: {exc.response.get('Error', {}).get('Message') or 'no message'}"
    return " ".join(str(exc).split())
