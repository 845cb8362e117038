"""The command line: a file for each verb; nothing else in the library but `__main__.py` imports this room."""
