"""A row of small buttons that stay pressed: choose one, or any number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qtpy.QtCore import Signal
from qtpy.QtWidgets import QButtonGroup, QPushButton, QSizePolicy, QWidget
from superqt import QFlowLayout

from napari_brainmvp.plugin.style import ACCENT

__all__ = ["ToggleRow"]

_LOOK = (
    "QPushButton { padding: 3px 10px; border-radius: 11px; border: 1px solid #5a626c; background: transparent; }"
    "QPushButton:hover { border-color: #868d96; }"
    f"QPushButton:checked {{ background: {ACCENT}; border-color: {ACCENT}; color: white; }}"
    "QPushButton[absent='true'] { border-style: dashed; color: #9aa0a8; }"
    "QPushButton[absent='true']:checked { color: white; }"
)


class ToggleRow(QWidget):
    """Choices as toggles.

    Parameters
    ----------
    exclusive : bool
        Exactly one is chosen; else any number.
    """

    changed = Signal()
    """Emitted when the user has changed the choice."""

    def __init__(self, exclusive: bool) -> None:
        super().__init__()
        self.buttons: dict[str, QPushButton] = {}
        self._exclusive = exclusive
        self._group = QButtonGroup(self)
        self._group.setExclusive(exclusive)
        self._by_hand: dict[str, bool] = {}
        self._row = QFlowLayout(self)
        self._row.setContentsMargins(0, 0, 0, 0)
        self._row.setSpacing(4)
        policy = QSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Minimum)
        policy.setHeightForWidth(True)
        self.setSizePolicy(policy)
        self.setStyleSheet(_LOOK)

    def offer(self, choices: Iterable[tuple[str, str, str, bool]], default: str = "", off: Sequence[str] = ()) -> None:
        """Show these choices; what was chosen stays chosen where it still can be.

        Parameters
        ----------
        choices : iterable of (key, title, tooltip, absent)
            Those that are absent have a dashed border.
        default : str
            Chosen at first where only one can be.
        off : sequence of str
            Not chosen at first where several can be; all others are.
        """
        wanted = list(choices)
        if self._exclusive:
            on = {(self.chosen() or ("",))[0]} & {key for key, *_ in wanted} or {default}
        else:
            on = {key for key, *_ in wanted if self._by_hand.get(key, key not in off)}
        for button in self.buttons.values():
            self._group.removeButton(button)
            self._row.removeWidget(button)
            button.hide()
            button.deleteLater()
        self.buttons = {}
        for key, title, tooltip, absent in wanted:
            button = QPushButton(title)
            button.setCheckable(True)
            button.setToolTip(tooltip)
            button.setProperty("absent", "true" if absent else "false")
            button.setChecked(key in on)
            button.clicked.connect(lambda checked, key=key: self._clicked(key, checked))
            self._group.addButton(button)
            self._row.addWidget(button)
            self.buttons[key] = button

    def chosen(self) -> tuple[str, ...]:
        """Return the keys that are chosen, in order."""
        return tuple(key for key, button in self.buttons.items() if button.isChecked())

    def _clicked(self, key: str, checked: bool) -> None:
        self._by_hand[key] = checked
        self.changed.emit()
