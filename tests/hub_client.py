"""The real Hub client in a process of its own, because it reads its environment when it is imported."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest

SETTINGS = dict(
    NO_PROXY="127.0.0.1",
    no_proxy="127.0.0.1",
    HF_HUB_ETAG_TIMEOUT="5",
    HF_HUB_DOWNLOAD_TIMEOUT="5",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
)


def skip_waits() -> None:
    time.sleep = lambda seconds: None  # between tries: 23 s in all


@contextmanager
def client(home: Path, endpoint: str, token: str, **env: str) -> Iterator[Callable]:
    """A function that runs `f(*args, **kwargs)` in such a process; `f` must be a module's, so that it can be sent."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))]:
            patch.delenv(name)
        for name, value in (SETTINGS | dict(HF_HOME=str(home), HF_ENDPOINT=endpoint, HF_TOKEN=token) | env).items():
            patch.setenv(name, value)
        pool = get_context("spawn").Pool(1, initializer=skip_waits)
    with pool:
        yield lambda f, *args, **kwargs: pool.apply_async(f, args, kwargs).get(timeout=300)
