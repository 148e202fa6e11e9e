"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def check_folder(path: str | os.PathLike[str]) -> None:
    """Look whether `replacing` could write a path, to find out before a long computation that it cannot.

    Raises:
        OSError: there is no such folder, it may not be written, or the path is a folder itself.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} to save {target.name} in")
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; name a file")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"the folder {target.parent} may not be written, so {target.name} cannot be saved in it")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; what is there when the block ends well becomes `path` in one step.

    When the block raises, or the disk is full, nothing is left behind and an old file stays as it was. A symbolic link keeps
    pointing where it did: its target is replaced. The permissions are those of the old file, or what the umask gives a new one.

    Raises:
        OSError: the folder is missing or cannot be written.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "note.txt"
        >>> with replacing(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.urandom(6).hex()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = os.fstat(descriptor).st_mode if not target.exists() else target.stat().st_mode
        os.close(descriptor)
        yield temporary
        os.chmod(temporary, mode & 0o7777)  # the block may have put a new file there
        _sync(temporary)
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):  # what went wrong may be that there is no such place
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        if error.errno is None:  # NumPy and safetensors tell no more than that they could not write
            raise OSError(f"cannot write {os.fspath(path)}: {error}") from error
        error.filename, error.filename2 = os.fspath(path), None  # the caller knows no temporary name
        raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Bring a file or a folder to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
