"""The Hugging Face Hub, if it cannot be reached: then only its cache on this machine is read, without waiting."""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

_SECONDS = 3.0
"""Time to connect, after which the Hub counts as out of reach."""


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[bool]:
    """Switch huggingface_hub and datasets to offline mode in the block if the Hub does not answer.

    Without it, both try again for about a minute before they fail. Yields whether they are offline.
    """
    import datasets
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _answers(constants.ENDPOINT):
        yield bool(constants.HF_HUB_OFFLINE)
        return
    saved = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        yield True
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = saved


def _answers(endpoint: str) -> bool:
    """Whether a connection to a URL's host, or to the proxy for it, can be opened within some seconds."""
    url = urlsplit(endpoint)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}", scheme="http")
    address = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=1)
    try:  # in a thread, because looking up a name has no limit of time
        pool.submit(lambda: socket.create_connection(address, timeout=_SECONDS).close()).result(timeout=_SECONDS)
    except (OSError, concurrent.futures.TimeoutError):
        return False
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return True
