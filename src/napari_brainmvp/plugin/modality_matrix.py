"""Which study has which modality, at a glance: a row for each modality, a cell for each study."""

from __future__ import annotations

from collections.abc import Sequence

from qtpy.QtCore import QEvent, QRectF, Qt
from qtpy.QtGui import QColor, QHelpEvent, QPainter, QPaintEvent
from qtpy.QtWidgets import QSizePolicy, QToolTip, QWidget

from napari_brainmvp.plugin.style import ACCENT
from napari_brainmvp.study import MODALITIES

__all__ = ["ModalityMatrix"]

_ROW, _NAME, _COUNT = 16, 46, 62


class ModalityMatrix(QWidget):
    """Studies from left to right, modalities from top to bottom; where studies are many, a cell is a share of some."""

    def __init__(self) -> None:
        super().__init__()
        self._studies: tuple[tuple[str, tuple[str, ...]], ...] = ()
        self.keys: tuple[str, ...] = ()
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.hide()

    def show_studies(self, studies: Sequence[tuple[str, tuple[str, ...]]]) -> None:
        """Draw studies, given by name and modalities."""
        self._studies = tuple(studies)
        present = {key for _, keys in self._studies for key in keys}
        own = sorted(present - set(MODALITIES))
        self.keys = (*(key for key in MODALITIES if key in present), *own)
        self.setFixedHeight(_ROW * len(self.keys) + 2)
        self.setVisible(bool(self.keys))
        self.update()

    def count(self, key: str) -> int:
        """Tell how many studies have a modality."""
        return sum(key in keys for _, keys in self._studies)

    def _columns(self) -> list[range]:
        """Return which studies each cell of a row stands for: at least three pixels each."""
        total = len(self._studies)
        cells = max(1, min(total, (self.width() - _NAME - _COUNT) // 3))
        return [range(k * total // cells, (k + 1) * total // cells) for k in range(cells)]

    def paintEvent(self, event: QPaintEvent | None) -> None:
        """Draw."""
        painter = QPainter(self)
        font = self.font()
        font.setPixelSize(11)
        painter.setFont(font)
        columns = self._columns()
        width = (self.width() - _NAME - _COUNT) / len(columns)
        gap = 1.0 if width >= 3 else 0.0
        for row, key in enumerate(self.keys):
            top = row * _ROW
            painter.setPen(QColor("#9aa0a8"))
            title = MODALITIES[key].title if key in MODALITIES else key
            painter.drawText(QRectF(0, top, _NAME - 6, _ROW), Qt.AlignmentFlag.AlignVCenter, title)
            said = f"{self.count(key)} of {len(self._studies)}"
            where = QRectF(self.width() - _COUNT, top, _COUNT, _ROW)
            painter.drawText(where, Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter, said)
            for number, part in enumerate(columns):
                share = sum(key in self._studies[k][1] for k in part) / len(part)
                color = QColor(ACCENT if share else "#808080")
                color.setAlphaF(0.3 + 0.7 * share if share else 0.2)
                cell = QRectF(_NAME + number * width, top + 2, max(1.0, width - gap), _ROW - 4)
                painter.fillRect(cell, color)

    def event(self, event: QEvent | None) -> bool:
        """Name the study under the pointer."""
        if isinstance(event, QHelpEvent) and self._studies:
            columns = self._columns()
            place = (event.pos().x() - _NAME) / max(1, self.width() - _NAME - _COUNT)
            if 0 <= place < 1:
                name, keys = self._studies[columns[int(place * len(columns))].start]
                QToolTip.showText(event.globalPos(), f"{name}: {', '.join(keys)}", self)
                return True
        return bool(super().event(event))
