"""The version of edgetune, and the only place where it stands; pyproject.toml reads it from here."""

__version__ = "0.1.0"
