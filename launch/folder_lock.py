"""One run at a time in a folder: a lock that ends with the process that holds it."""

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO

LOCK = "lock"


def lock_folder(folder: Path, option: str) -> IO[str] | None:
    """Take the lock of a folder, or None where its file system has no locks.

    Whoever keeps the result holds the lock until the process ends, however it does. The file
    stays: taking it away could give two runs a lock each.

    Raises:
        ValueError: another process holds it.
    """
    file = (folder / LOCK).open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None
        with file:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
        raise ValueError(
            f"{option} {folder} is in use by another run, {holder}: wait for its end, or give "
            f"another folder"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
