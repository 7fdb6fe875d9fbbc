"""A table that says how close a reconstruction comes to the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qtpy.QtCore import Qt
from qtpy.QtWidgets import QHeaderView, QTableWidget, QTableWidgetItem

from napari_brainmvp.study import MODALITIES

if TYPE_CHECKING:
    from napari_brainmvp.inference import Similarity

__all__ = ["SimilarityTable"]

_ROW = 26


class SimilarityTable(QTableWidget):
    """PSNR, SSIM and MAE by source; hidden until there is something to show."""

    def __init__(self) -> None:
        super().__init__(0, 4)
        self.setHorizontalHeaderLabels(["From", "PSNR, dB", "SSIM", "MAE"])
        self.verticalHeader().hide()
        self.setShowGrid(False)
        self.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        self.setSelectionMode(QTableWidget.SelectionMode.NoSelection)
        self.setVerticalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.horizontalHeader().setSectionResizeMode(QHeaderView.ResizeMode.Stretch)
        self.horizontalHeader().setSectionResizeMode(0, QHeaderView.ResizeMode.ResizeToContents)
        self.setToolTip(
            "Inside the head, in prepared intensities (median tissue 1). PSNR and SSIM: more is closer. MAE: less is."
        )
        self.hide()

    def show_similarities(self, rows: Sequence[Similarity]) -> None:
        """Fill the table; hide it where there is nothing to compare."""
        self.setRowCount(len(rows))
        for row, similarity in enumerate(rows):
            known = MODALITIES.get(similarity.name)
            cells = (
                known.title if known else similarity.name.capitalize(),
                f"{similarity.psnr:.1f}",
                f"{similarity.ssim:.3f}",
                f"{similarity.mae:.3f}",
            )
            for column, text in enumerate(cells):
                item = QTableWidgetItem(text)
                item.setFlags(Qt.ItemFlag.ItemIsEnabled)
                if column:
                    item.setTextAlignment(Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter)
                if row == 0:
                    font = item.font()
                    font.setBold(True)
                    item.setFont(font)
                self.setItem(row, column, item)
            self.setRowHeight(row, _ROW)
        self.setFixedHeight(self.horizontalHeader().sizeHint().height() + _ROW * len(rows) + 6)
        self.setVisible(bool(rows))
