"""The command line: a file for each verb; nothing else in the library imports this room."""
