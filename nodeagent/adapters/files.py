"""Local files: read whole, written atomically and durably."""

from __future__ import annotations

import compileall
import contextlib
import errno
import fcntl
import os
import shutil
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path

from nodeagent.errors import HostError


class LocalFiles:
    """The machine's file system. Directories that are missing are made."""

    def read(self, path: Path) -> str | None:
        with _errors("read", path):
            try:
                # As bytes: text mode would turn CR LF into LF, and a file kept for its owner into
                # another one.
                return path.read_bytes().decode("utf-8", "surrogateescape")
            except FileNotFoundError:
                return None

    def exists(self, path: Path) -> bool:
        with _errors("look at", path):
            return path.exists()

    def is_private(self, path: Path) -> bool:
        with _errors("look at", path):
            try:
                found = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                return False
        is_ours = found.st_uid in (0, os.geteuid())
        return is_ours and stat.S_ISREG(found.st_mode) and not found.st_mode & 0o077

    def write(self, path: Path, text: str, mode: int | None) -> None:
        with _errors("write", path), replacing(path) as (temporary, old):
            temporary.write_bytes(text.encode("utf-8", "surrogateescape"))
            if mode is None and old is not None:
                os.chown(temporary, old.st_uid, old.st_gid)
                temporary.chmod(old.st_mode & 0o7777)
            else:
                temporary.chmod(0o644 if mode is None else mode)

    def remove(self, path: Path) -> None:
        with _errors("remove", path):
            path.unlink(missing_ok=True)

    def make_private_directory(self, path: Path) -> None:
        with _errors("make the directory", path):
            if not path.is_dir():
                _make_directory(path.parent)
                path.mkdir(mode=0o700)
                _sync(path.parent)

    def link(self, path: Path, target: Path) -> None:
        with _errors("link", path):
            _make_directory(path.parent)
            temporary = _beside(path)
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(target)
            try:
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            _sync(path.parent)

    def copy_tree(self, source: Path, target: Path) -> None:
        with _errors("copy", source):
            _make_directory(target.parent)
            temporary = _beside(target)
            _remove_tree(temporary)  # of a run that was killed
            try:
                shutil.copytree(source, temporary)
                for directory, _, names in os.walk(temporary):
                    for name in (*names, "."):
                        _sync(Path(directory, name))
                temporary.rename(target)
            finally:
                _remove_tree(temporary)
            _sync(target.parent)

    def compile(self, directory: Path) -> None:
        compileall.compile_dir(directory, quiet=2)  # what cannot be compiled or written stays

    def unpack_program(self, archive: Path, path: Path) -> None:
        with _errors("unpack", archive), replacing(path) as (temporary, _):
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as packed, temporary.open("wb") as file:
                    shutil.copyfileobj(packed.open(path.name), file)
            else:
                shutil.copyfile(archive, temporary)
            temporary.chmod(0o755)

    @contextlib.contextmanager
    def try_lock(self, path: Path) -> Iterator[bool]:
        with _errors("lock", path):
            _make_directory(path.parent)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)

    def is_held(self, path: Path) -> bool:
        if not path.exists():
            return False
        with _errors("look at", path):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            finally:
                os.close(descriptor)
        return False


@contextlib.contextmanager
def _errors(operation: str, target: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise HostError(operation, target, cause) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[tuple[Path, os.stat_result | None]]:
    """Yield a new file beside `path` that takes its place, synced, unless the block fails.

    A symbolic link stays and what it names is replaced: who made the link wants the file there.
    """
    path = Path(os.path.realpath(path))
    _make_directory(path.parent)
    try:
        old: os.stat_result | None = path.stat()
    except FileNotFoundError:
        old = None
    if old is not None and not stat.S_ISREG(old.st_mode):
        raise FileExistsError(errno.EEXIST, "it is there, and is no plain file")
    temporary = _beside(path)
    temporary.unlink(missing_ok=True)  # of a run that was killed; its mode may be another
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        yield temporary, old
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """Where what is to be at `path` is made: on the same file system."""
    return path.with_name(f".{path.name}.nodeagent-new")


def _remove_tree(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
