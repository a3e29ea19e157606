"""Exports of chat apps, one module an app: each parses what its app writes into messages, and no module opens a file."""
