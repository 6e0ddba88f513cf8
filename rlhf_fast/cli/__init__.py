"""The command line: main.py has the commands, options.py their flags, generate.py and env.py the two longer ones."""
