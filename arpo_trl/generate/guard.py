"""The process between arpo_trl and a program that a model wrote: contains it, limits it, and kills all it started.

Runs as `python -I -S guard.py SETTINGS` (JSON) and imports nothing but the standard library. It reports how the program
ended on the file descriptor `status`: "exit N", "signal N", or the limit that was exceeded.

    namespaces   The guard moves into its own user, pid, mount, network and IPC namespaces: every mount is read-only but
                 the working folder, an empty tmpfs. When process 1 of the pid namespace exits, the kernel kills the rest.
    none         Descendants are found by their parents; those that lose theirs become children of the guard
                 (PR_SET_CHILD_SUBREAPER), so a program that calls setsid or forks twice is found too.

Root becomes an unused user first, because RLIMIT_NPROC does not bind root. The number of processes and their memory are
counted as well.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

assert sys.platform != "win32"
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38  # prctl(2)
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV = 0x4000, 0x40000, 2, 4
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, SYS_MOUNT_SETATTR = -100, 0x8000, 1, 442
FILE_BYTES = 1 << 20
OPEN_FILES = 64
POLL_SECONDS = 0.02
FAILED = 125  # exit code: the program was not started


def main(settings: dict[str, Any]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    is_linux = sys.platform == "linux"
    if settings["user"] is not None:
        os.setgroups([])
        os.setgid(settings["user"])  # root's setgid and setuid set the real, effective and saved ids
        os.setuid(settings["user"])
        libc.prctl(PR_SET_DUMPABLE, 1)  # else /proc/self belongs to root
    if is_linux:
        if settings["mode"] != "none":  # there, the guard has to kill its descendants first
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, -10)  # root's guard stays ahead of a fork bomb
    if settings["mode"] == "namespaces":
        _enter_namespaces(libc, settings)
        if init := os.fork():
            os.waitpid(init, 0)
            os._exit(0)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        _mount_proc(libc)
    elif is_linux:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    program = os.fork()
    if not program:
        _exec(libc, settings)
    ending = _watch(program, settings)
    with contextlib.suppress(BrokenPipeError):
        os.write(settings["status"], ending.encode())
    if settings["mode"] == "none":
        _kill_descendants()
    os._exit(0)  # in a pid namespace, the kernel kills everything else


def _enter_namespaces(libc: ctypes.CDLL, settings: dict[str, Any]) -> None:
    """Raise OSError if the system doesn't allow one of them."""
    uid, gid = os.getuid(), os.getgid()
    _check(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC))
    # Not root inside: execve then drops the capabilities with which mounts could be made writable again.
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"1000 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"1000 {gid} 1")
    folder = settings["folder"].encode()
    _check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    _check(libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, ctypes.sizeof(attributes)))
    size = f"size={settings['disk_bytes']},nr_inodes=1024,mode=0700".encode()
    _check(libc.mount(b"tmpfs", folder, b"tmpfs", MS_NOSUID | MS_NODEV, size))
    os.chdir(folder)


def _mount_proc(libc: ctypes.CDLL) -> None:
    """Hide the processes outside: another process of this user could be read there, with its environment."""
    if libc.mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV, None):  # not allowed in many containers
        _check(libc.mount(b"tmpfs", b"/proc", b"tmpfs", MS_NOSUID | MS_NODEV, b"size=4096,mode=0500"))


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _exec(libc: ctypes.CDLL, settings: dict[str, Any]) -> NoReturn:
    import resource

    counts_alone = settings["user"] is not None or settings["mode"] == "namespaces"
    limits = {
        "RLIMIT_AS": settings["megabytes"] << 20,
        "RLIMIT_FSIZE": FILE_BYTES,
        "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_CPU": int(settings["seconds"]) + 2,
        "RLIMIT_NPROC": settings["processes"] if counts_alone else None,  # it counts all processes of the user
    }
    for name, limit in limits.items():
        if limit is not None and hasattr(resource, name):
            with contextlib.suppress(ValueError, OSError):  # macOS has no limit on the address space
                resource.setrlimit(getattr(resource, name), (limit, limit))
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, 0, 0)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.set_inheritable(settings["status"], False)
    try:
        os.execv(settings["command"][0], settings["command"])
    finally:
        os._exit(FAILED)


def _watch(program: int, settings: dict[str, Any]) -> str:
    """Wait for the program and return how it ended. Ends early if a limit is exceeded."""
    deadline = time.monotonic() + settings["seconds"]
    while True:
        try:
            finished, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:  # no child is left
            finished, status = program, 0
        if finished == program:
            return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
        if finished:
            continue  # an orphan
        if time.monotonic() > deadline:
            return "time"
        if settings["mode"] == "none" and os.getppid() != settings["parent"]:
            return "parent"
        if settings["mode"] != "none" and _count_processes() > settings["processes"] + 3:  # bwrap's, and the guard
            return "processes"
        processes = _descendants()
        if len(processes) > settings["processes"]:
            return "processes"
        if sum(map(_resident_bytes, processes)) > settings["megabytes"] << 20:
            return "memory"
        time.sleep(POLL_SECONDS)


def _count_processes() -> int:
    """Return the number of processes of the pid namespace, at once: a fork bomb leaves little time for more."""
    try:
        return sum(name.isdecimal() for name in os.listdir("/proc"))  # noqa: PTH208
    except OSError:
        return 0


def _descendants() -> list[int]:
    """Return the processes below this one, by their parents. Empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):  # noqa: PTH208 (thousands, in a fork bomb)
            with contextlib.suppress(OSError, ValueError, IndexError):
                parent = Path(f"/proc/{int(name)}/stat").read_text(errors="replace").rpartition(")")[2].split()[1]
                children.setdefault(int(parent), []).append(int(name))
    below: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        new = children.pop(waiting.pop(), [])
        below += new
        waiting += new
    return below


def _resident_bytes(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _kill_descendants() -> None:
    """Kill until none is left: first stop them all, so that a fork bomb can't outrun this loop."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (processes := _descendants()):
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in processes:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process, number)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
