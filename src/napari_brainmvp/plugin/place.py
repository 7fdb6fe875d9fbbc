"""One study of a project takes the place of another in the viewer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from napari_brainmvp.plugin.annotation_view import AnnotationView
from napari_brainmvp.plugin.layers import Frame, is_imputed, layer_path, study_layers, upright_frame
from napari_brainmvp.study import Study

__all__ = ["put_in_place"]


def put_in_place(
    viewer: Any, study: Study, view: AnnotationView | None, scans: Iterable[Any]
) -> tuple[list[Any], Frame]:
    """Show a study's scans in place of another's, whose view is closed; all else is kept, hidden.

    Parameters
    ----------
    viewer : napari.Viewer
    study : Study
    view : AnnotationView or None
        Of the other study.
    scans : iterable of napari.layers.Layer
        The other study's; those that are in files are removed, as the project knows where they are.

    Returns
    -------
    added : list of napari.layers.Layer
        The study's scans.
    frame : ndarray of shape (4, 4)
        In which they are shown.
    """
    leaving: list[Any] = []
    if view is not None:
        view.close(keep=False)
        left = [layer for layer in scans if layer in viewer.layers]
        leaving = [*view.layers, *(layer for layer in left if not is_imputed(layer) or layer_path(layer))]
        for layer in (layer for layer in left if layer not in leaving):  # in no file of yours
            layer.name = f"{layer.name} of {view.name}"
    for layer in viewer.layers:
        layer.visible = False
    frame = upright_frame(study.grid)
    layers = study_layers(study, frame)
    added = [getattr(viewer, f"add_{kind}")(data, **options) for data, options, kind in layers]
    for layer in leaving:  # last, so that the viewer is never empty in between
        viewer.layers.remove(layer)
    for layer, (_, options, _) in zip(added, layers, strict=True):
        layer.name = options["name"]  # which the last study's scan may have had
    return added, frame
