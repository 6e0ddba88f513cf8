"""The command line: main.py dispatches, options.py has the flags, the other files one longer command each."""
