"""A Job object of Windows: limits memory and processes, and ends all of them when it is closed."""

import ctypes
import struct
import subprocess
from ctypes import wintypes

KILL_ON_CLOSE, ACTIVE_PROCESSES, JOB_MEMORY = 0x2000, 0x8, 0x200
EXTENDED_LIMITS = 9
LIMITS = struct.Struct("=16x I 20x I 76x Q 16x")
"""JOBOBJECT_EXTENDED_LIMIT_INFORMATION on 64 bits: LimitFlags, ActiveProcessLimit and JobMemoryLimit; the rest is 0.

https://learn.microsoft.com/windows/win32/api/winnt/ns-winnt-jobobject_extended_limit_information
"""


class Job:
    """A job that contains one process and all that it starts."""

    def __init__(self, process: subprocess.Popen[bytes], limits: tuple[int, int] | None) -> None:
        """Put a process into a new job. Its first child would escape, but a program takes longer to start one.

        Args:
            process: It may have ended already.
            limits: Bytes of memory and number of processes, of all together.

        Raises:
            OSError: the system rejects it, so that nothing would be limited.
        """
        self._kernel = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined,unused-ignore]
        self._kernel.CreateJobObjectW.restype = wintypes.HANDLE
        self._job = wintypes.HANDLE(self._kernel.CreateJobObjectW(None, None))
        memory, processes = limits or (0, 0)
        flags = KILL_ON_CLOSE | (ACTIVE_PROCESSES | JOB_MEMORY if limits else 0)
        values = LIMITS.pack(flags, processes, memory)
        is_set = self._kernel.SetInformationJobObject(self._job, EXTENDED_LIMITS, values, len(values))
        handle = wintypes.HANDLE(int(process._handle))  # type: ignore[attr-defined]
        is_contained = is_set and self._kernel.AssignProcessToJobObject(self._job, handle)
        if not is_contained and process.poll() is None:
            error = ctypes.WinError(ctypes.get_last_error())  # type: ignore[attr-defined,unused-ignore]
            self.close()
            raise error

    def close(self) -> None:
        """End every process in the job."""
        self._kernel.CloseHandle(self._job)
