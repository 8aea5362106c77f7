"""What the stage files stand on, one subject a file."""

import os
import sys

# OpenMP's threads sleep while they wait for each other. They spin by default, which makes training many times
# slower when another process has one of the cores. OpenMP reads it when torch is imported: this comes first.
if "GOMP_SPINCOUNT" not in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows its escape
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
