"""The switches and buttons of the *Annotate* panel, each with its key, and the list of all keys."""

from __future__ import annotations

from collections.abc import Callable

from qtpy.QtCore import Signal
from qtpy.QtGui import QKeySequence
from qtpy.QtWidgets import QCheckBox, QGridLayout, QPushButton, QShortcut, QVBoxLayout, QWidget
from superqt import QCollapsible

from napari_brainmvp.plugin.style import quiet

__all__ = ["AnnotationTools", "key_list"]

_TOOLS = (
    ("Next slice", "Alt+N", "next_slice", "Go to the slice on which the prediction is least certain."),
    ("Take over here", "Alt+T", "point", "Label the predicted part clicked on next; the key: that under the cursor."),
    ("Take over slice", "Alt+Shift+T", "take_over_slice", "Label all of this slice as it is predicted."),
    ("Grow", "Alt+G", "grow", "Let the class grow from its strokes on this slice, as far as it is predicted."),
    ("Interpolate", "Alt+I", "interpolate", "Fill the class between the slices on which it is painted."),
    ("Undo stroke", "Alt+Z", "undo", "Take back the last stroke, also one of an earlier session."),
    ("Redo stroke", "Alt+Shift+Z", "redo", "Do again what was taken back."),
    ("Update now", "Alt+R", "update_now", "Predict from the labels as they are."),
)
_SWITCHES = (
    ("Alt+B", "Follow the brush", "Predict after every stroke."),
    ("Alt+U", "Show uncertainty", "Bright where the prediction cannot decide."),
    ("Alt+A", "Learn from all studies", "Use the strokes on every study of the project."),
)
_OTHERS = (
    "Alt+E: annotate this study",
    "Alt+X: which next?",
    "Delete, in the list of studies: take the study off the project",
    "Alt+1 to Alt+9: choose a class",
    "Alt+K: add class",
    "Delete, in the table of classes: remove the class",
    "Alt+O: regions",
    "Alt+M: fine-tune",
    "Alt+Q: probe or model?",
    "Alt+Shift+Q: start from the model, or the probe again",
    "napari's own: 2 paint, 1 erase, 3 polygon, 4 fill, 5 pick, 6 move, [ and ] brush size, V show and hide.",
)


class AnnotationTools(QWidget):
    """Three switches and a grid of buttons; what they do is a matter of the study that is annotated."""

    used = Signal(str)
    """Emits the name of the tool that was chosen: a method of the view."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.uncertainty, self.everything = self.switches = tuple(
            QCheckBox(f"{text}  ({key})") for key, text, _ in _SWITCHES
        )
        self.buttons: dict[str, QPushButton] = {}
        self.live.setChecked(True)
        self.here = QShortcut(self)  # no shortcut of the button: the mouse leaves the part on the way to that
        self.here.activated.connect(lambda: self.used.emit("take_over_part"))
        self._escape = QShortcut(QKeySequence("Escape"), self)
        self._escape.activated.connect(lambda: self.used.emit("stop_pointing"))
        self._escape.setEnabled(False)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        for box, (key, _, tip) in zip(self.switches, _SWITCHES, strict=True):
            box.setToolTip(tip)
            box.setShortcut(key)
            layout.addWidget(box)
        grid = QGridLayout()
        for k, (text, key, name, tip) in enumerate(_TOOLS):
            self.buttons[name] = button = QPushButton(text)
            button.setToolTip(f"{tip} ({key})")
            if name == "point":
                self.here.setKey(QKeySequence(key))
            else:
                button.setShortcut(key)
            button.clicked.connect(lambda _=False, name=name: self.used.emit(name))
            grid.addWidget(button, k // 2, k % 2)
        layout.addLayout(grid)
        self._point = self.buttons["point"]
        self._point.setCheckable(True)
        self._point.clicked.connect(lambda: self._point.setChecked(self._escape.isEnabled()))  # not before one waits

    def show_waiting(self, on: bool) -> None:
        """Show whether a click on the canvas is waited for; Escape ends that."""
        self._point.setChecked(on)
        self._escape.setEnabled(on)

    def allow(self, can: Callable[[str], bool]) -> None:
        """Enable the tools that can be used now."""
        for name, button in self.buttons.items():
            button.setEnabled(can(name))
        self.here.setEnabled(can("point"))


def key_list() -> QCollapsible:
    """Make a list of all keys of the panel, folded."""
    lines = [f"{key}: {text.lower()}" for text, key, _, _ in _TOOLS]
    lines += [f"{key}: {text.lower()}" for key, text, _ in _SWITCHES]
    keys = QCollapsible("Keys")
    keys.addWidget(quiet("\n".join([*lines, *_OTHERS])))
    return keys
