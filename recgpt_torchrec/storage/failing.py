"""Tells a disk, a mount or a network that fails from a file that is damaged.

A damaged file is restored, made again, or its rows are left out. Where storage failed, what is stored may be whole, and
the same command may work on another node or a minute later.
"""

import errno
import os
import socket

from recgpt_torchrec.errors import OtherRanksError, StorageError

FAILURES = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ENXIO,
        errno.ENODEV,
        errno.ENOTCONN,
        errno.ESHUTDOWN,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.EREMOTEIO,
    }
)
"""Numbers of the system's errors that say nothing of a file: of a disk (EIO), of a mount (ESTALE of NFS, ENOTCONN of
FUSE, ESHUTDOWN of Lustre), of a network."""


FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Numbers of the system's errors where there is no space to write, or no more is allowed."""


def is_full(error: BaseException) -> bool:
    """Whether an error of the system, or of a library that has the system's text, says that no more can be written."""
    return any(os.strerror(number) in str(error) for number in FULL)


def find_storage_failure(
    error: BaseException | None, path: str, action: str = "read", who: str | None = None
) -> StorageError | None:
    """The error to raise if storage failed; None: it did not.

    Args:
        error: what reading or writing has raised.
        path: of the file or folder.
        action: what could not be done with it.
        who: whose error it is; None: this node's, or that of an `OtherRanksError`.
    """
    if isinstance(error, StorageError):
        return error
    if not isinstance(error, OSError) or error.errno not in FAILURES:
        return None
    reason = " ".join(str(error).split())
    host = error.host if isinstance(error, OtherRanksError) else socket.gethostname()
    return StorageError(
        f"{who or host} cannot {action} {path}: {reason}. The disk, the mount or the network failed "
        "there; mend it, or leave that node out, and give the same command again"
    )


def raise_storage_failure(error: BaseException | None, path: str, action: str = "read") -> None:
    """Raise a `StorageError` if storage failed, else do nothing; to be called before a file is said to be damaged.

    Args:
        error, path, action: see `find_storage_failure`.

    Raises:
        StorageError: storage failed.
    """
    if (failure := find_storage_failure(error, path, action)) is not None:
        raise failure from None
