"""One writer at a time: a lock file with a heartbeat, so that a dead window's lock is known for what it is."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from napari_brainmvp.errors import FileError
from napari_brainmvp.io import write_text_atomic

__all__ = ["ProjectLock"]

_BEAT, _SILENCE = 5.0, 30.0
_LONG_SILENCE = 120.0
"""After which a process of this machine with the number of the one that held the lock is another one."""


class ProjectLock:
    """Hold a project for writing, until :meth:`release` or the end of the process.

    Parameters
    ----------
    folder : Path
        The project's; the lock is ``lock.json`` in it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock.json"
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._writing = threading.Lock()
        self._written = 0.0
        self.held = False

    def acquire(self) -> bool:
        """Take the lock where it is free or stale; tell whether it is ours."""
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            if not self._stale() or not self._remove():
                return False
            return self.acquire()
        except OSError:
            return False  # a folder that cannot be written can still be looked at
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(self._content())
        except OSError:  # so can one on a full disk
            self._remove()
            return False
        self.held, self._written = True, time.time()
        threading.Thread(target=self._beat, name="brainmvp-lock", daemon=True).start()
        return True

    def release(self) -> None:
        """Give the lock back."""
        self._stop.set()
        with self._writing:  # else a beat that is under way would bring the file back
            if self.still_held():
                self._remove()
            self.held = False

    @property
    def owner(self) -> str:
        """Who holds it, for people."""
        said = self._read() or {}
        return f"process {said.get('pid', '?')} on {said.get('host', 'another machine')}"

    def still_held(self) -> bool:
        """Look at the file: False once somebody took over, because this machine slept for long.

        A file that cannot be read just now says nothing, and one that was deleted, by hand or by a program that keeps
        folders the same, only that it must be written again.
        """
        if self.held and self._lost():
            self.held = False
        return self.held

    def _lost(self) -> bool:
        said = self._read()
        if said is None:
            return False
        if not said and not self._path.parent.exists():  # moved: nobody comes to where it was
            return False
        if not said:  # after a long silence, somebody may have come, and gone
            return time.time() - self._written > _SILENCE
        return said.get("token") != self._token

    def _content(self) -> str:
        said = {"pid": os.getpid(), "host": socket.gethostname(), "token": self._token, "at": time.time()}
        return json.dumps(said)

    def _read(self) -> dict[str, Any] | None:
        """Return what the file says: nothing where it is gone or damaged, None where it cannot be read now."""
        try:
            said = json.loads(self._path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        except OSError:
            return None
        return said if isinstance(said, dict) else {}

    def _remove(self) -> bool:
        """Remove the file; tell whether it is gone. One that stays is stale before long."""
        try:
            self._path.unlink(missing_ok=True)
        except OSError:
            return False
        return True

    def _stale(self) -> bool:
        said = self._read() or {}
        try:
            age = time.time() - float(said.get("at") or self._path.stat().st_mtime)
        except (OSError, ValueError, TypeError):
            return False
        if said.get("host") == socket.gethostname() and os.name == "posix" and isinstance(said.get("pid"), int):
            return age > _LONG_SILENCE or not _alive(said["pid"])
        return age > _SILENCE

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT):
            with self._writing:
                if self._stop.is_set() or not self.still_held():
                    return
                with suppress(FileError, OSError):
                    if self._path.parent.is_dir():  # else the write would make a folder that was removed or unmounted
                        write_text_atomic(self._path, self._content())
                        self._written = time.time()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
