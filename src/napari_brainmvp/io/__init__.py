"""Files to studies and back. No torch here."""

from napari_brainmvp.io.atomic import atomic_path, make_folder, write_text_atomic
from napari_brainmvp.io.images import (
    IMAGE_SUFFIXES,
    image_files,
    is_image_path,
    read_image,
    read_label_map,
    read_scan,
    readable,
)
from napari_brainmvp.io.names import guess_modality, is_label_name, stem
from napari_brainmvp.io.participants import by_subject, class_of, read_participants
from napari_brainmvp.io.sorting import StudyFiles, sort_files
from napari_brainmvp.io.studies import find_studies, read_datalist, read_study
from napari_brainmvp.io.writing import write_image, write_label_map

__all__ = [
    "IMAGE_SUFFIXES",
    "StudyFiles",
    "atomic_path",
    "by_subject",
    "class_of",
    "find_studies",
    "guess_modality",
    "image_files",
    "is_image_path",
    "is_label_name",
    "make_folder",
    "read_datalist",
    "read_image",
    "read_label_map",
    "read_participants",
    "read_scan",
    "read_study",
    "readable",
    "sort_files",
    "stem",
    "write_image",
    "write_label_map",
    "write_text_atomic",
]
