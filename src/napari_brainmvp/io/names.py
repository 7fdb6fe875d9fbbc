"""What a file is, from its name: BraTS 2018 to 2023, ISLES, BIDS, and what hospitals call their series."""

from __future__ import annotations

import re
from pathlib import Path

from napari_brainmvp.study import MODALITIES, Modality

__all__ = ["guess_modality", "is_label_name", "modality_in_text", "stem"]

_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".dcm")

_CONTRAST = re.compile(
    r"(?<![a-z])(t1[a-z]*?(ce|gd|gad|c|km|post|contrast)|ce[- ]?gadolinium|gadolinium|gado?|gd|km|post(contrast)?|"
    r"postgd|contrast|ce|cm|c\+|\+ ?c|with ?contrast)(?![a-z])"
)
_WITHOUT = re.compile(
    r"(?<![a-z])(pre|native|nativ|without|no ?contrast|noncontrast|non ?contrast|precontrast)(?![a-z])"
)

# In this order: the first that matches decides. Names are lower case with separators turned into spaces.
_RULES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (key, re.compile(rf"(?<![a-z])(?:{pattern})(?![a-z0-9])"))
    for key, pattern in (
        ("adc", r"d?adc(?: ?map)?|apparent ?diffusion(?: ?coefficient)?"),
        ("flair", r"(?:t2 ?)?flair(?: ?3d)?|t2 ?w? ?flair|fluid ?attenuated|dark ?fluid|t2f|tirm"),
        ("dwi", r"dwi|trace ?w?|tracew|ep2d ?diff|diff(?:usion)?|isodwi|b ?(?:500|700|800|1000|1200|1500|2000)"),
        ("mra", r"mra|angio(?:graphy|gram)?|tof(?: ?3d)?|3d ?tof|tof ?mra"),
        ("t1c", r"t1 ?w? ?(?:ce|gd|gad|c|km|post|contrast)|t1 ?ce|cet1w?|t1wc"),
        ("t1", r"t1(?:w|n|pre)?(?: ?w)?|mp ?rage|mp2rage|mprage|fspgr|ir ?spgr|bravo|tfl|t1 ?mpr"),
        ("pd", r"pd(?:w)?|proton ?density|pd ?weighted"),
        ("t2", r"t2(?:w|tse|fse)?(?: ?w)?"),
    )
)
_SUBJECT = re.compile(r"^sub-[A-Za-z0-9]+_(?:ses-[A-Za-z0-9]+_)?(?=.)")
_LABEL = re.compile(
    r"(?<![a-z])(?:seg|segmentation|segm|dseg|mask|labels?|roi|annotation|gt|ground ?truth|msk)(?![a-z])"
)


def stem(path: str | Path) -> str:
    """Return a file's name without the suffixes of image formats.

    Examples
    --------
    >>> stem("a/sub-01_T1w.nii.gz")
    'sub-01_T1w'
    """
    name = Path(path).name
    for suffix in _SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _words(path: str | Path) -> str:
    """Lower case, with everything but letters, digits and '+' turned into single spaces."""
    return _plain(stem(path))


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9+]+", " ", text.lower()).strip()


def _folder(path: str | Path) -> str:
    """Name the folder a file lies in, also where the path is relative to it."""
    return Path(path).absolute().parent.name


def _own_part(path: str | Path, study: str) -> str:
    """Return a file's name without the study's name or the BIDS subject and session that it begins with."""
    name = stem(path)
    if study and re.match(rf"{re.escape(study)}(?![A-Za-z0-9]).", name, re.IGNORECASE):
        name = name[len(study) :]
    return _SUBJECT.sub("", name)


def is_label_name(path: str | Path) -> bool:
    """Tell whether a file's name says that it holds labels.

    What it shares with its folder, and a BIDS subject and session, is the study's name and says nothing.

    Examples
    --------
    >>> is_label_name("BraTS-GLI-00000-000-seg.nii.gz"), is_label_name("sub-01_T1w.nii.gz")
    (True, False)
    >>> is_label_name("mask-study/mask-study_t1.nii.gz"), is_label_name("sub-mask1_T1w.nii.gz")
    (False, False)
    >>> is_label_name("masks/seg/seg_1.nii.gz")
    True
    """
    study = _folder(path)
    name = _own_part(path, study if _LABEL.sub("", _words(study)).strip() else "")
    return _LABEL.search(_words(name)) is not None


def guess_modality(path: str | Path, *, whole: bool = True) -> Modality | None:
    """Guess a scan's modality from its file or folder name; None where the name does not say.

    A T1-weighted scan is taken as contrast-enhanced where the name says so anywhere
    (``t1_mprage_gd``, ``sub-01_ce-gadolinium_T1w``). What a name shares with its folder, and a BIDS subject and
    session, is the study's name and says nothing, unless the folder is called by a modality and nothing else.

    Parameters
    ----------
    path : str or Path
    whole : bool
        Ask the study's name after all where the rest says nothing.

    Examples
    --------
    >>> str(guess_modality("BraTS-GLI-00000-000-t1c.nii.gz"))
    't1c'
    >>> str(guess_modality("sub-01_ce-gadolinium_T1w.nii.gz"))
    't1c'
    >>> str(guess_modality("case-post/case-post_t1.nii.gz")), str(guess_modality("T1/T1_post.nii.gz"))
    ('t1', 't1c')
    """
    study = _folder(path)
    own = _said(_words(_own_part(path, "" if _is_modality(study) else study)))
    return _said(_words(path)) if own is None and whole else own


def modality_in_text(text: str) -> Modality | None:
    """Guess a scan's modality from what a protocol says of it; None where that does not say.

    Examples
    --------
    >>> str(modality_in_text("AX T1 SE/POST")), str(modality_in_text("AX T2 FLAIR BRAIN W/WO CONTRAST"))
    ('t1c', 'flair')
    """
    return _said(_plain(text))


def _is_modality(folder: str) -> bool:
    """Tell whether a folder is called by a modality and nothing else, as ``T1`` or ``t1 post``."""
    words = _words(folder)
    if _said(words) is None:
        return False
    for pattern in (*(pattern for _, pattern in _RULES), _CONTRAST, _WITHOUT):
        words = pattern.sub(" ", words)
    return not words.strip()


def _said(words: str) -> Modality | None:
    for key, pattern in _RULES:
        if pattern.search(words):
            if key == "t1" and _CONTRAST.search(words) and not _WITHOUT.search(words):
                key = "t1c"
            return MODALITIES[key]
    return None
