"""What can go wrong with data. All are ValueErrors whose message is one sentence for the user."""

from __future__ import annotations


class DataError(ValueError):
    """Data that can't be used."""


class FormatError(DataError):
    """A file that is not what its name or its header says: truncated, mislabelled or hostile."""


class MissingDataError(DataError):
    """Data that is not on this machine and could not be fetched."""


class WriteError(DataError):
    """A file that could not be written; nothing was left half-written."""
