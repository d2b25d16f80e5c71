"""A Job object of Windows: limits memory and processes, and ends all of them when it is closed."""

import ctypes
from ctypes import wintypes

KILL_ON_CLOSE, ACTIVE_PROCESSES, JOB_MEMORY = 0x2000, 0x8, 0x200
EXTENDED_LIMITS = 9


class _Basic(ctypes.Structure):
    _fields_ = (
        ("PerProcessUserTimeLimit", ctypes.c_int64),
        ("PerJobUserTimeLimit", ctypes.c_int64),
        ("LimitFlags", wintypes.DWORD),
        ("MinimumWorkingSetSize", ctypes.c_size_t),
        ("MaximumWorkingSetSize", ctypes.c_size_t),
        ("ActiveProcessLimit", wintypes.DWORD),
        ("Affinity", ctypes.c_size_t),
        ("PriorityClass", wintypes.DWORD),
        ("SchedulingClass", wintypes.DWORD),
    )


class _Extended(ctypes.Structure):
    _fields_ = (
        ("Basic", _Basic),
        ("IoInfo", ctypes.c_uint64 * 6),
        ("ProcessMemoryLimit", ctypes.c_size_t),
        ("JobMemoryLimit", ctypes.c_size_t),
        ("PeakProcessMemoryUsed", ctypes.c_size_t),
        ("PeakJobMemoryUsed", ctypes.c_size_t),
    )


class Job:
    """A job that contains one process and all that it starts."""

    def __init__(self, process: int, limits: tuple[int, int] | None) -> None:
        """Put a process into a new job.

        Args:
            process: Its handle.
            limits: Bytes of memory and number of processes, of all together.

        Raises:
            OSError: the system rejects it, so that nothing would be limited.
        """
        self._kernel = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined,unused-ignore]
        self._kernel.CreateJobObjectW.restype = wintypes.HANDLE
        self._job = wintypes.HANDLE(self._kernel.CreateJobObjectW(None, None))
        extended = _Extended()
        extended.Basic.LimitFlags = KILL_ON_CLOSE
        if limits:
            extended.Basic.LimitFlags |= ACTIVE_PROCESSES | JOB_MEMORY
            extended.JobMemoryLimit, extended.Basic.ActiveProcessLimit = limits
        size = ctypes.sizeof(extended)
        is_set = self._kernel.SetInformationJobObject(self._job, EXTENDED_LIMITS, ctypes.byref(extended), size)
        if not is_set or not self._kernel.AssignProcessToJobObject(self._job, wintypes.HANDLE(process)):
            error = ctypes.WinError(ctypes.get_last_error())  # type: ignore[attr-defined,unused-ignore]
            self.close()
            raise error

    def close(self) -> None:
        """End every process in the job."""
        self._kernel.CloseHandle(self._job)
