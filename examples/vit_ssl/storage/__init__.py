"""Files that outlive a process: whole or absent, checked when they are read, written by one process at a time."""
