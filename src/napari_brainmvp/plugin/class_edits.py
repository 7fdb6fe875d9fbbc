"""What the *Annotate* panel does to the classes of its project."""

from __future__ import annotations

from collections.abc import Callable

from napari_brainmvp.annotation.content import LabelClass
from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.annotation.regions import Regions
from napari_brainmvp.plugin.annotation_view import AnnotationView
from napari_brainmvp.plugin.class_table import ClassTable

__all__ = ["ClassEdits"]


class ClassEdits:
    """Changes of the classes, a base of the panel; whoever derives from it refreshes what it shows."""

    project: AnnotationProject | None
    view: AnnotationView | None
    classes: ClassTable
    _refresh: Callable[[], None]

    def _know(self, value: int) -> None:
        """Make a class of a value that was painted, or bring it back; choose it, if it is what the brush paints."""
        assert self.project is not None
        self.project.know_values([value])
        self._refresh()
        if self.view is None:
            return
        self.view.recolor()
        if value == self.view.layer.selected_label:
            self.classes.choose(next(k for k, c in enumerate(self.project.classes) if c.value == value))

    def _edit_classes(self, classes: tuple[LabelClass, ...]) -> None:
        if self.project is None:
            return
        try:
            self.project.set_classes(classes)
        finally:
            self._refresh()
        if self.view is not None:
            self.view.recolor()

    def _unite_classes(self, regions: Regions) -> None:
        if self.project is not None:
            self.project.set_regions(regions)
            self._refresh()

    def _remove_class(self, value: int) -> None:
        """Take a class out, and choose the one above it; refused where it is painted."""
        if self.project is None:
            return
        if self.view is not None:
            self.view.save()  # what is painted this moment counts
        row = next((k for k, c in enumerate(self.project.classes) if c.value == value), 0)
        self.project.remove_class(value)
        self._refresh()
        if self.view is not None:
            self.view.recolor()
        self.classes.choose(max(0, row - 1))
