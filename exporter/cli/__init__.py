"""The command line: a file for each command, and how commands end."""
