"""The one family of errors a user can cause.

Every message says what is wrong, with what, and what to do about it. The command line prints it on one
line and exits with status 2; the plugin shows it as a notification. Anything else that is raised is a bug.
"""

from __future__ import annotations

__all__ = ["BrainMVPError", "Cancelled", "FileError", "LockedError", "ModelError", "StudyError"]


class BrainMVPError(Exception):
    """Something the user can put right; the message says how."""


class FileError(BrainMVPError):
    """A file or folder cannot be read or written."""


class LockedError(FileError):
    """Somebody else writes here now."""


class StudyError(BrainMVPError):
    """The scans of a study do not make sense, or not together."""


class ModelError(BrainMVPError):
    """A model, its card or its weights cannot be used."""


class Cancelled(BrainMVPError):
    """The work was cancelled on request; nothing was written."""
