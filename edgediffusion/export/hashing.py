"""sha256 of large files, computed by a thread beside other work: neither reading nor hashing needs the interpreter."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from edgediffusion.errors import Cancelled

_BLOCK_BYTES = 1 << 20


@contextmanager
def hashing(files: Sequence[Path]) -> Iterator[Callable[[], dict[Path, str]]]:
    """``digests()`` waits for what is not done yet. Leaving the block, however that happens, ends the thread at once."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        work = {file: pool.submit(_sha256, file, stop) for file in files}
        try:
            yield lambda: {file: future.result() for file, future in work.items()}
        finally:
            stop.set()


def _sha256(file: Path, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    block = bytearray(_BLOCK_BYTES)
    with open(file, "rb", buffering=0) as stream:
        while read := stream.readinto(block):
            if stop.is_set():
                raise Cancelled("The export was stopped")
            digest.update(memoryview(block)[:read])
    return digest.hexdigest()
