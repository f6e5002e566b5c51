"""What tests ask about processes that they did not start themselves, and give those they do."""

import contextlib
import ctypes
import os
from pathlib import Path

NEW_USERS, NEW_MOUNTS = 0x10000000, 0x00020000
"""CLONE_NEWUSER and CLONE_NEWNS of unshare."""


def runs(process: int) -> bool:
    """A zombie does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def mount_disk(folder: str, size: str) -> None:
    """In a process that begins: a disk of this size, which its children see and others do not.

    Its number stands in ``folder``.pid: /proc/NUMBER/root/``folder`` is that disk for others.
    """
    users = {"uid_map": os.getuid(), "gid_map": os.getgid()}
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *given: object) -> None:
        if getattr(libc, name)(*given):
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")

    call("unshare", NEW_USERS | NEW_MOUNTS)
    Path("/proc/self/setgroups").write_text("deny")
    for file, mine in users.items():
        Path("/proc/self", file).write_text(f"0 {mine} 1")
    call("mount", b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode())
    Path(f"{folder}.pid").write_text(str(os.getpid()))


def disk_of(folder: Path) -> Path:
    """The disk of a process that began by ``mount_disk(folder)``, for others."""
    process = folder.with_suffix(".pid").read_text()
    return Path(f"/proc/{process}/root") / folder.relative_to("/")
