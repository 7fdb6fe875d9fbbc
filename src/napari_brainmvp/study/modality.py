"""The MRI modalities the project knows, and the names the field gives them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from napari_brainmvp.errors import StudyError

__all__ = ["MODALITIES", "Modality", "modality"]


@dataclass(frozen=True)
class Modality:
    """One kind of MRI scan.

    Parameters
    ----------
    key : str
        Short lower-case identifier used in files, cards and on the command line, for example ``"t1c"``.
    title : str
        The name shown to people, for example ``"T1c"``.
    meaning : str
        One line for tooltips.
    aliases : tuple of str
        Other spellings, lower case, without separators, as they appear in file names.
    """

    key: str
    title: str
    meaning: str
    aliases: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.key


MODALITIES: dict[str, Modality] = {
    m.key: m
    for m in (
        Modality("t1", "T1", "T1-weighted, before contrast agent", ("t1w", "t1n", "t1pre", "mprage", "bravo", "tfl")),
        Modality(
            "t1c",
            "T1c",
            "T1-weighted after gadolinium contrast agent",
            ("t1ce", "t1gd", "t1post", "t1cw", "t1wce", "t1wgd", "t1wc", "t1km", "t1contrast", "t1gad"),
        ),
        Modality("t2", "T2", "T2-weighted", ("t2w", "t2tse", "t2fse")),
        Modality("flair", "FLAIR", "T2-weighted, fluid attenuated", ("t2flair", "t2f", "fluidattenuated", "darkfluid")),
        Modality("dwi", "DWI", "diffusion-weighted trace", ("trace", "tracew", "b1000", "dwib1000", "diffusion")),
        Modality("adc", "ADC", "apparent diffusion coefficient", ("adcmap", "dadc")),
        Modality("mra", "MRA", "angiography, time of flight", ("tof", "angio", "angiography", "tofmra")),
        Modality("pd", "PD", "proton-density-weighted", ("pdw", "protondensity", "pdweighted")),
    )
}
"""The eight modalities of the paper by key, in the order the project lists them."""

_BY_ALIAS = {alias: m for m in MODALITIES.values() for alias in (m.key, *m.aliases)}


def modality(name: str | Modality) -> Modality:
    """Return the modality of a name; a name the project does not know makes a user-defined one.

    Parameters
    ----------
    name : str or Modality
        A key, title or alias in any case, with or without separators (``"T1-Gd"``, ``"T2_FLAIR"``).

    Raises
    ------
    StudyError
        The name has no letter or digit in it.

    Examples
    --------
    >>> modality("T1-Gd").key
    't1c'
    >>> modality("SWI").key
    'swi'
    """
    if isinstance(name, Modality):
        return name
    squeezed = re.sub(r"[^a-z0-9]", "", name.lower())
    if not squeezed:
        raise StudyError(f"{name!r} is not a modality name: use letters and digits, for example 't1' or 'swi'.")
    return _BY_ALIAS.get(squeezed) or Modality(squeezed, name.strip(), "user-defined")
