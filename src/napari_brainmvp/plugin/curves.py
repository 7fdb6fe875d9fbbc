"""A small chart of curves over training steps, drawn with Qt alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import QEvent, QPointF, QRectF, Qt
from qtpy.QtGui import QColor, QMouseEvent, QPainter, QPaintEvent, QPen, QPolygonF
from qtpy.QtWidgets import QSizePolicy, QWidget

__all__ = ["CurvePlot", "Series"]

_COLORS = ("#4a90d9", "#3fbf8f", "#f2c14e", "#e0719a", "#9d7fe0", "#5ec8d8", "#e8925a", "#a3b35c")
_BACKGROUND = QColor("#1d1f24")
"""Dark in every theme: the colours are chosen for it."""
_GRID, _TEXT, _LOUD = QColor(255, 255, 255, 22), QColor("#9aa0a8"), QColor("#e6e8eb")
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 6, 18
_LEGEND = 18


@dataclass(frozen=True, eq=False)
class Series:
    """One curve: steps and values, shape (N,) each; values that are not finite are left out."""

    title: str
    steps: NDArray[np.float64]
    values: NDArray[np.float64]


class CurvePlot(QWidget):
    """Curves with a smoothed line over the noise, a legend that tells values, and a cursor.

    The scale is logarithmic where all values are positive and span more than a factor of four.

    Parameters
    ----------
    title : str
        Said in the place of curves while there are none.
    height : int
        Pixels.
    smoothed : bool
        Draw a moving average over the values.
    """

    def __init__(self, title: str, height: int = 170, smoothed: bool = True) -> None:
        super().__init__()
        self.series: tuple[Series, ...] = ()
        self._title, self._smoothed = title, smoothed
        self._log = False
        self._span = (0.0, 1.0, 0.0, 1.0)
        self._cursor: float | None = None
        self.setFixedHeight(height)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.setMouseTracking(True)

    def show_series(self, series: tuple[Series, ...]) -> None:
        """Draw other curves."""
        kept = []
        for one in series:
            good = np.isfinite(one.values)
            if good.any():
                kept.append(Series(one.title, one.steps[good], one.values[good]))
        self.series = tuple(kept)
        if kept:
            self._rescale()
        self.update()

    def _rescale(self) -> None:
        values = np.concatenate([_moving_average(s.values) if self._smoothed else s.values for s in self.series])
        low, high = (float(v) for v in np.percentile(values, (0.5, 99.5))) if len(values) > 20 else _ends(values)
        self._log = low > 0 and high / low > 4
        low, high = (math.log10(low), math.log10(high)) if self._log else (low, high)
        margin = 0.06 * (high - low) or abs(high) * 0.05 or 0.5
        first = min(float(s.steps[0]) for s in self.series)
        last = max(float(s.steps[-1]) for s in self.series)
        self._span = (first, max(last, first + 1), low - margin, high + margin)

    # --- drawing ------------------------------------------------------------------------------------------------

    def paintEvent(self, event: QPaintEvent | None) -> None:
        """Draw."""
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        font = self.font()
        font.setPixelSize(10)
        painter.setFont(font)
        painter.setPen(Qt.PenStyle.NoPen)
        painter.setBrush(_BACKGROUND)
        painter.drawRoundedRect(QRectF(self.rect()), 6, 6)
        if not self.series:
            painter.setPen(_TEXT)
            painter.drawText(self.rect(), Qt.AlignmentFlag.AlignCenter, self._title)
            return
        self._draw_axes(painter)
        painter.setClipRect(self._frame())
        for number, one in enumerate(self.series):
            self._draw_curve(painter, one, QColor(_COLORS[number % len(_COLORS)]))
        painter.setClipping(False)
        self._draw_legend(painter)

    def _frame(self) -> QRectF:
        top = _TOP + _LEGEND * self._legend_rows()
        return QRectF(_LEFT, top, self.width() - _LEFT - _RIGHT, self.height() - top - _BOTTOM)

    def _points(self, steps: NDArray[np.float64], values: NDArray[np.float64]) -> QPolygonF:
        first, last, low, high = self._span
        frame = self._frame()
        shown = np.log10(np.maximum(values, 1e-30)) if self._log else values
        x = frame.left() + (steps - first) / (last - first) * frame.width()
        y = frame.bottom() - (shown - low) / (high - low) * frame.height()
        return QPolygonF([QPointF(a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True)])

    def _draw_curve(self, painter: QPainter, one: Series, color: QColor) -> None:
        stride = max(1, len(one.steps) // max(50, self.width()))
        steps, values = one.steps[::stride], one.values[::stride]
        if self._smoothed and len(one.steps) > 12:
            faint = QColor(color)
            faint.setAlpha(42)
            painter.setPen(QPen(faint, 1.0))
            painter.drawPolyline(self._points(steps, values))
            values = _moving_average(one.values)[::stride]
        painter.setPen(QPen(color, 1.8))
        if len(steps) == 1:
            painter.setBrush(color)
            painter.drawEllipse(self._points(steps, values)[0], 2.5, 2.5)
        else:
            painter.drawPolyline(self._points(steps, values))
        if self._cursor is not None:
            nearest = int(np.abs(steps - self._cursor).argmin())
            painter.setBrush(color)
            painter.setPen(Qt.PenStyle.NoPen)
            painter.drawEllipse(self._points(steps[nearest : nearest + 1], values[nearest : nearest + 1])[0], 3, 3)

    def _draw_axes(self, painter: QPainter) -> None:
        first, last, low, high = self._span
        frame = self._frame()
        for value in _decades(low, high) if self._log else _ticks(low, high, 4):
            y = frame.bottom() - (value - low) / (high - low) * frame.height()
            painter.setPen(_GRID)
            painter.drawLine(QPointF(frame.left(), y), QPointF(frame.right(), y))
            painter.setPen(_TEXT)
            text = f"{10**value:.2g}" if self._log else f"{value:.3g}"
            painter.drawText(
                QRectF(0, y - 7, _LEFT - 6, 14), Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter, text
            )
        for value in _ticks(first, last, 4):
            if value == int(value):
                x = frame.left() + (value - first) / (last - first) * frame.width()
                text = f"{int(value):,}".replace(",", "\u2009")
                half = painter.fontMetrics().horizontalAdvance(text) / 2
                x = min(x, self.width() - 2 - half)
                painter.drawText(QPointF(x - half, frame.bottom() + 13), text)

    def _draw_legend(self, painter: QPainter) -> None:
        for number, (one, (x, y)) in enumerate(zip(self.series, self._legend_places(), strict=True)):
            painter.setPen(Qt.PenStyle.NoPen)
            painter.setBrush(QColor(_COLORS[number % len(_COLORS)]))
            painter.drawRoundedRect(QRectF(x, y + 6, 8, 4), 2, 2)
            painter.setPen(_LOUD)
            painter.drawText(QPointF(x + 12, y + 11), self._legend_text(one))

    def _legend_text(self, one: Series) -> str:
        values = _moving_average(one.values) if self._smoothed else one.values
        index = -1 if self._cursor is None else int(np.abs(one.steps - self._cursor).argmin())
        return f"{one.title} {values[index]:.3g}"

    def _legend_places(self) -> list[tuple[float, float]]:
        places, x, row = [], 10.0, 0
        for one in self.series:
            width = self.fontMetrics().horizontalAdvance(f"{one.title} 0.0000") * 0.85 + 24
            if x > 10 and x + width > self.width():
                x, row = 10.0, row + 1
            places.append((x, 2.0 + _LEGEND * row))
            x += width
        return places

    def _legend_rows(self) -> int:
        return 1 + int(max((y - 2) / _LEGEND for _, y in self._legend_places())) if self.series else 0

    # --- cursor -------------------------------------------------------------------------------------------------

    def mouseMoveEvent(self, event: QMouseEvent | None) -> None:
        """Tell the values under the cursor."""
        if event is not None and self.series:
            first, last, _, _ = self._span
            frame = self._frame()
            self._cursor = first + (event.position().x() - frame.left()) / frame.width() * (last - first)
            self.setToolTip(f"Step {max(first, min(last, self._cursor)):.0f}")
            self.update()

    def leaveEvent(self, event: QEvent | None) -> None:
        """Tell the last values again."""
        self._cursor = None
        self.update()


def _ends(values: NDArray[np.float64]) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _moving_average(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average over the last twentieth of the run so far, at least five values."""
    width = max(5, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(1, len(values) + 1)
    begin = np.maximum(0, index - width)
    averaged: NDArray[np.float64] = (sums[index] - sums[begin]) / (index - begin)
    return averaged


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Choose about ``count`` round numbers between two values."""
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= raw)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Choose 1, 2 and 5 of each decade between two logarithms, or powers of ten where those are many."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    fine = [power + math.log10(k) for power in powers for k in (1, 2, 5)]
    found = [value for value in fine if low <= value <= high]
    return found if len(found) <= 6 else [float(power) for power in powers if low <= power <= high]
