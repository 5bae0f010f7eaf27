"""Files from elsewhere: kept only with the right digest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import requests

from nodeagent.adapters.files import replacing
from nodeagent.errors import HostError

CONNECT_S, READ_S = 5, 20
CHUNK_BYTES = 1 << 16  # small: a slow line must fill one well within the watchdog's 60 s


class WebFetcher:
    """HTTP, and local paths for machines that have no network to fetch from."""

    def fetch(self, location: str, path: Path, sha256: str, alive: Callable[[], None]) -> None:
        digest = hashlib.sha256()
        try:
            with replacing(path) as (temporary, _):
                with temporary.open("wb") as file:
                    for chunk in _chunks(location):
                        alive()
                        digest.update(chunk)
                        file.write(chunk)
                if digest.hexdigest() != sha256:
                    found = digest.hexdigest()
                    raise HostError("fetch", location, f"its sha256 is {found}, not {sha256}")
        except (OSError, requests.RequestException) as error:
            raise HostError("fetch", location, error) from error


def _chunks(location: str) -> Iterator[bytes]:
    if location.startswith("/"):
        with open(location, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
        return
    with requests.get(location, stream=True, timeout=(CONNECT_S, READ_S)) as answer:
        answer.raise_for_status()
        yield from answer.iter_content(CHUNK_BYTES)
