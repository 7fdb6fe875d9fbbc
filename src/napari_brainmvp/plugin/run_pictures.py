"""The pictures a run draws of its progress: the latest, or any earlier one by a slider."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qtpy.QtCore import QRectF, Qt
from qtpy.QtGui import QColor, QPainter, QPaintEvent, QPixmap, QResizeEvent
from qtpy.QtWidgets import QHBoxLayout, QLabel, QSizePolicy, QSlider, QVBoxLayout, QWidget

from napari_brainmvp.plugin.style import quiet

__all__ = ["RunPictures"]

_CAPTION = 16


class RunPictures(QWidget):
    """Pictures of one run, hidden until there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: list[Path] = []
        self.sheet = _Sheet()
        self.slider = QSlider(Qt.Orientation.Horizontal)
        self.slider.setToolTip("See how it emerged.")
        self.step: QLabel = quiet("")
        self.step.setWordWrap(False)
        below = QHBoxLayout()
        below.addWidget(self.slider, 1)
        below.addWidget(self.step)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(4)
        layout.addWidget(self.sheet)
        layout.addLayout(below)
        self.slider.valueChanged.connect(self._show)
        self.hide()

    def show_folder(self, folder: Path, captions: Sequence[str], labels: Sequence[str]) -> None:
        """Look for new pictures; the slider follows the latest unless it was moved away from it.

        Parameters
        ----------
        folder : Path
            Holds ``STEP.png`` files.
        captions, labels : sequence of str
            Of the columns and rows of each picture.
        """
        paths = sorted(folder.glob("[0-9]*.png")) if folder.is_dir() else []
        self.sheet.captions, self.sheet.labels = tuple(captions), tuple(labels)
        if paths == self.paths:
            return
        follows = self.slider.value() == self.slider.maximum() or paths[: len(self.paths)] != self.paths
        self.paths = paths
        self.slider.blockSignals(True)
        self.slider.setRange(0, max(0, len(paths) - 1))
        if follows:
            self.slider.setValue(self.slider.maximum())
        self.slider.blockSignals(False)
        self.slider.setVisible(len(paths) > 1)
        self._show()

    def _show(self) -> None:
        self.setVisible(bool(self.paths))
        if self.paths:
            path = self.paths[self.slider.value()]
            self.sheet.show_picture(QPixmap(str(path)))
            self.step.setText(f"step {int(path.stem)}")


class _Sheet(QWidget):
    """A picture as wide as the panel, with names above its columns and on its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.captions: tuple[str, ...] = ()
        self.labels: tuple[str, ...] = ()
        self._pixmap = QPixmap()
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)

    def show_picture(self, pixmap: QPixmap) -> None:
        self._pixmap = pixmap
        self._fit()
        self.update()

    def resizeEvent(self, event: QResizeEvent | None) -> None:
        self._fit()

    def _fit(self) -> None:
        """Be as high as the picture is at this width."""
        if not self._pixmap.isNull():
            self.setFixedHeight(_CAPTION + round(self.width() * self._pixmap.height() / self._pixmap.width()))

    def paintEvent(self, event: QPaintEvent | None) -> None:
        if self._pixmap.isNull():
            return
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.SmoothPixmapTransform)
        font = self.font()
        font.setPixelSize(9)
        painter.setFont(font)
        painter.setPen(QColor("#9aa0a8"))
        height = self.height() - _CAPTION
        painter.drawPixmap(QRectF(0, _CAPTION, self.width(), height), self._pixmap, QRectF(self._pixmap.rect()))
        for number, caption in enumerate(self.captions):
            width = self.width() / len(self.captions)
            painter.drawText(QRectF(number * width, 0, width, _CAPTION), Qt.AlignmentFlag.AlignCenter, caption)
        for number, label in enumerate(self.labels):
            where = QRectF(3, _CAPTION + number * height / len(self.labels) + 3, 0, 13)
            where.setWidth(painter.fontMetrics().horizontalAdvance(label) + 8)
            painter.fillRect(where, QColor(0, 0, 0, 150))
            painter.setPen(QColor("#ffffff"))
            painter.drawText(where, Qt.AlignmentFlag.AlignCenter, label)
