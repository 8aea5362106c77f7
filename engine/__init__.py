"""What the stage files stand on, one subject a file."""

import sys

for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows its escape
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
