"""The command line: one thin file a verb; nothing imports this room."""
