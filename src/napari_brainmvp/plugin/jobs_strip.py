"""The jobs strip below the tabs: a line for each job that runs, waits, or has ended lately."""

from __future__ import annotations

import time
from collections.abc import Callable

from napari.utils.notifications import show_error, show_info
from qtpy.QtCore import QSize, Qt, QTimer, Signal
from qtpy.QtGui import QMouseEvent
from qtpy.QtWidgets import QFrame, QHBoxLayout, QLabel, QToolButton, QVBoxLayout, QWidget

from napari_brainmvp.errors import BrainMVPError
from napari_brainmvp.jobs import Job, JobState, list_jobs, remove_job, resume_job, say_seconds, stop_job
from napari_brainmvp.plugin.style import STATE_COLORS, link, quiet, slim_bar

__all__ = ["JobsStrip"]

_POLL = 1500
_RECENT = 24 * 3600
_MOST = 4


class JobsStrip(QWidget):
    """Watches the job folders; every window watches for itself."""

    polled = Signal(object)
    """Emits all jobs, a list of :class:`Job`, each time they were looked at."""
    clicked = Signal(str)
    """Emits the name of a job that shall be shown."""
    finished = Signal(object)
    """Emits a :class:`Job` that this window has seen working and that is now done."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, JobLine] = {}
        self._dismissed: set[str] = set()
        self._worked: set[str] = set()
        self._nothing = quiet("Nothing runs in the background.")
        self._more = quiet("")
        self._column = QVBoxLayout(self)
        self._column.setContentsMargins(0, 0, 0, 0)
        self._column.setSpacing(2)
        self._column.addWidget(self._nothing)
        self._column.addWidget(self._more)
        self._timer = QTimer(self)
        self._timer.timeout.connect(self.poll)
        self._timer.start(_POLL)
        QTimer.singleShot(0, self.poll)

    def poll(self) -> None:
        """Look at all jobs now."""
        jobs = list_jobs()
        for job in jobs:
            if job.state.active:
                self._worked.add(job.name)
                self._dismissed.discard(job.name)
            elif job.name in self._worked:
                self._worked.remove(job.name)
                self._say(job)
        shown = [job for job in jobs if self._wanted(job)]
        self._show(shown[:_MOST])
        self._more.setText(f"and {len(shown) - _MOST} more: brainmvp jobs list")
        self._more.setVisible(len(shown) > _MOST)
        self.polled.emit(jobs)

    def abandon(self) -> None:
        """Look no more, because the window closes; the jobs go on."""
        self._timer.stop()

    def _wanted(self, job: Job) -> bool:
        recent = job.spec is None or time.time() - job.ended < _RECENT
        return job.state.active or (recent and job.name not in self._dismissed)

    def _say(self, job: Job) -> None:
        if job.state is JobState.done:
            show_info(f"{job.title} is done: model {job.model}.")
            self.finished.emit(job)
        elif job.state is JobState.failed:
            show_error(f"{job.title} has failed. {job.reason}")

    def _show(self, jobs: list[Job]) -> None:
        names = [job.name for job in jobs]
        for name in set(self.lines) - set(names):
            line = self.lines.pop(name)
            self._column.removeWidget(line)
            line.deleteLater()
        for index, job in enumerate(jobs):
            if job.name not in self.lines:
                line = self.lines[job.name] = JobLine(job.name)
                line.clicked.connect(self.clicked)
                line.dismissed.connect(self._dismiss)
                line.changed.connect(self.poll)
                self._column.insertWidget(index, line)
            self.lines[job.name].show_job(job)
        self._nothing.setVisible(not jobs)

    def _dismiss(self, name: str) -> None:
        self._dismissed.add(name)
        self.poll()


class JobLine(QFrame):
    """One job: a dot for its state, its title, how far it is, and what can be done."""

    clicked = Signal(str)
    dismissed = Signal(str)
    changed = Signal()

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.dot, self.title, self.text = QLabel("●"), QLabel(), quiet("")
        self.text.setWordWrap(False)
        self.bar = slim_bar()
        self.bar.setFixedWidth(70)
        self.stop = self._button("■", "Stop: a checkpoint is written first.", lambda: stop_job(name))
        self.resume = self._button("▶", "Resume from the last checkpoint.", lambda: resume_job(name))
        self.dismiss = self._button(
            "✕", "Take this line away; the job's files stay.", lambda: self.dismissed.emit(name)
        )
        self.remove = self._button("✕", "Remove the damaged job.", lambda: remove_job(name))
        self.setObjectName("line")
        self.setStyleSheet(
            "#line { background: rgba(128,128,128,30); border-radius: 5px; }"
            "#line:hover { background: rgba(128,128,128,60); }"
        )
        self.setCursor(Qt.CursorShape.PointingHandCursor)
        row = QHBoxLayout(self)
        row.setContentsMargins(8, 3, 4, 3)
        row.setSpacing(6)
        row.addWidget(self.dot)
        row.addWidget(self.title)
        row.addWidget(self.bar)
        row.addWidget(self.text, 1)
        for button in (self.stop, self.resume, self.dismiss, self.remove):
            row.addWidget(button)

    def _button(self, text: str, tooltip: str, act: Callable[[], object]) -> QToolButton:
        button = link(text)
        button.setToolTip(tooltip)
        button.setFixedSize(QSize(24, 22))

        def press() -> None:
            try:
                act()
            except BrainMVPError as error:
                show_error(str(error))
            self.changed.emit()

        button.clicked.connect(press)
        return button

    def show_job(self, job: Job) -> None:
        """Show how the job is now."""
        state = job.state
        self.dot.setStyleSheet(f"color: {STATE_COLORS[state.value]};")
        self.title.setText(job.name)
        self.text.setText(_short(job))
        self.setToolTip(f"{job.title}: {state}. {job.progress}")
        counted = job.beat is not None and job.beat.total > 0
        self.bar.setVisible(state in (JobState.running, JobState.stopping) and counted)
        self.bar.setValue(round(1000 * job.fraction))
        self.stop.setVisible(state in (JobState.queued, JobState.running))
        self.resume.setVisible(state in (JobState.stopped, JobState.failed) and job.spec is not None)
        self.dismiss.setVisible(not state.active and job.spec is not None)
        self.remove.setVisible(job.spec is None)

    def mouseReleaseEvent(self, event: QMouseEvent | None) -> None:
        """Show the job in the Train panel."""
        self.clicked.emit(self.name)


def _short(job: Job) -> str:
    """Say how a job is in a few words."""
    if job.state is JobState.queued:
        return "waits for its device"
    if job.state is not JobState.running:
        return job.state.value
    if job.seconds_left is not None:
        return f"{job.fraction:.0%}, {say_seconds(job.seconds_left)} left"
    return f"{job.beat.step.lower()}…" if job.beat else "starting…"
