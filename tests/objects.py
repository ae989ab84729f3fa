"""What is in a bucket."""

from typing import Any


def list_keys(client: Any, bucket: str, prefix: str) -> dict[str, int]:
    """Every key under ``prefix/`` with its size in bytes."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    return {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}
