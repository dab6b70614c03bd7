"""``SOURCE_DATE_EPOCH`` of the environment, see https://reproducible-builds.org/specs/source-date-epoch/."""

from __future__ import annotations

import os
import re

from layerfs.errors import InvalidArgument


def source_date_epoch() -> int | None:
    """The seconds since 1970 that no time in what is written is later than; None where it is not set, or empty.

    Raises `InvalidArgument`.
    """
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,11}", text):
        shown = text if len(text) < 40 else f"{text[:40]}…"
        raise InvalidArgument(f"SOURCE_DATE_EPOCH is {shown!r}; it has to be a number of seconds since 1970")
    return int(text)
