"""The command line: one small module for each group of commands. Each parses, calls, renders, and decides nothing."""
