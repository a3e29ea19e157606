"""Formats of documents, one module each: `read` turns the bytes of an untrusted file into plain, Markdown-like text.

A module runs in the parser's process (parser_child.py), opens no file, and imports its libraries inside functions. Its VERSION
grows with every change of the text that it returns, so that files in the cache are parsed again.
"""
