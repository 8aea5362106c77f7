"""What the stage files stand on, one subject a file."""

import ctypes
import os
import sys

# OpenMP's threads sleep while they wait for each other. They spin by default, which makes training many times
# slower when another process has one of the cores. OpenMP reads it when torch is imported: this comes first.
if "GOMP_SPINCOUNT" not in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Freed memory stays with the process. glibc gives tensors of some MiB back to the system, and each new one
# costs thousands of page faults: up to a fifth of a step of psi and R. Other systems have no mallopt.
if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 2**30), mallopt(-1, 2**31 - 1)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD

for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows its escape
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
