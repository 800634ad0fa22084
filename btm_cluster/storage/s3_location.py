"""The parts of an s3:// URL."""

from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from btm_cluster.errors import UserError

_OPTIONS = ("owner", "encryption", "kms_key", "storage_class")


def parse_location(location: str) -> tuple[str, str, dict[str, str]]:
    """Bucket, prefix with its slash (or empty), and options of an s3:// URL."""
    found, parts, options = "", SplitResult("", "", "", "", ""), dict[str, str]()
    try:
        parts = urlsplit(location)
    except ValueError as exc:
        found = str(exc)
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    options = dict(pairs)
    unknown = sorted(set(options) - set(_OPTIONS))
    if found:
        pass
    elif unknown:
        found = f"the option {unknown[0]}"
    elif len(options) < len(pairs):
        found = f"an option twice, of {', '.join(options)}"
    elif "" in options.values():
        found = "an option without a value"
    elif parts.fragment:
        found = "a #, which stands as %23 in a prefix"
    elif "@" in parts.netloc:
        found = "a user name before the bucket"
    elif not parts.netloc or ":" in parts.netloc:
        found = "no bucket name"
    if found:
        # Nothing that could be a secret.
        shown = location.partition("?")[0].rpartition("@")[2].removeprefix("s3://")
        raise UserError(
            f"s3://{shown} is no store",
            found=found,
            expected=f"s3://bucket/prefix, and any of the options {', '.join(_OPTIONS)}",
            remedy="endpoint, region and credentials belong in the environment (AWS_ENDPOINT_URL_S3, "
            "AWS_REGION, …)",
        )
    prefix = unquote(parts.path).strip("/")
    return parts.netloc, f"{prefix}/" if prefix else "", options
