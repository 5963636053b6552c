"""Readers of the forms of record, a file each: `read_...(record, images) -> Body`.

A new form is a file here and a line in the table of `documents.formats`.
"""
