"""Finds what must not go into training: secrets and personal identifiers, which placeholders replace before tokens exist."""
