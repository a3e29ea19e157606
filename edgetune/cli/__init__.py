"""The command line, one small module a command group: parse, call, render. It decides nothing."""
