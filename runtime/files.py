"""Files that are written whole or not at all, and locks between processes."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into; it takes the name ``path`` when the block ends well, else it goes."""
    building = path.parent / f".fluxkontext-{secrets.token_hex(8)}"
    file = building.open("xb")
    try:
        with file:
            yield file
        building.replace(path)
    except BaseException:
        building.unlink()
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into; it takes the name ``path`` when the block ends well, else it goes.

    Processes that make the same folder take turns, and what one left that was killed goes. Raises
    FileExistsError if ``path`` is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock"), lambda: None):
        if path.exists():
            raise FileExistsError(path)
        building = path.with_name(f".{path.name}.building")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        try:
            yield building
            building.rename(path)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise


@contextmanager
def locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file ``path``; ``waiting`` is called once if another process holds it.

    A process that dies lets go. The file goes with the lock: whoever waited for a file that is no
    longer there starts over with the new one.
    """
    import fcntl  # not there on Windows, where nothing is built

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _same_file(handle, path):
                try:
                    yield
                finally:
                    path.unlink()
                return
        finally:
            os.close(handle)


def cache_folder() -> Path:
    """Where what can be made again is kept between runs; it need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fluxkontext"


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
