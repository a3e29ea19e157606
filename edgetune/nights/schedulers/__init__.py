"""The programs of operating systems that start a night: one module each, behind the interface of scheduler.py."""
