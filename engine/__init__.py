"""What the stage files stand on: one subject a file, each readable alone (see the file map in the README)."""
