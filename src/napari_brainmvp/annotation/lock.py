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
        self.held = False

    def acquire(self) -> bool:
        """Take the lock where it is free or stale; tell whether it is ours."""
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            if not self._stale():
                return False
            with suppress(OSError):
                self._path.unlink()
            return self.acquire()
        except OSError:
            return False  # a folder that cannot be written can still be looked at
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(self._content())
        self.held = True
        threading.Thread(target=self._beat, name="brainmvp-lock", daemon=True).start()
        return True

    def release(self) -> None:
        """Give the lock back."""
        self._stop.set()
        if self.held and self._read().get("token") == self._token:
            self._path.unlink(missing_ok=True)
        self.held = False

    @property
    def owner(self) -> str:
        """Who holds it, for people."""
        said = self._read()
        return f"process {said.get('pid', '?')} on {said.get('host', 'another machine')}"

    def still_held(self) -> bool:
        """Look at the file: False once somebody took over, because this machine slept for long."""
        self.held = self.held and self._read().get("token") == self._token
        return self.held

    def _content(self) -> str:
        said = {"pid": os.getpid(), "host": socket.gethostname(), "token": self._token, "at": time.time()}
        return json.dumps(said)

    def _read(self) -> dict[str, Any]:
        try:
            said = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return said if isinstance(said, dict) else {}

    def _stale(self) -> bool:
        said = self._read()
        try:
            age = time.time() - float(said.get("at") or self._path.stat().st_mtime)
        except (OSError, ValueError, TypeError):
            return False
        if said.get("host") == socket.gethostname() and os.name == "posix" and isinstance(said.get("pid"), int):
            return age > _LONG_SILENCE or not _alive(said["pid"])
        return age > _SILENCE

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT):
            if not self.still_held():
                return
            with suppress(FileError):
                write_text_atomic(self._path, self._content())


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
