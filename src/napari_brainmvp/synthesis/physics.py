"""From tissue to signal: relaxation constants and the signal equations of the eight modalities.

Times are in milliseconds, diffusivities in 10^-3 mm^2/s, proton densities relative to water. Constants of healthy
tissue follow BrainWeb (Kwan et al., IEEE TMI 1999); those of lesions span the ranges the literature reports at 1.5 to
3 T. Every study draws its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from napari_brainmvp.synthesis.draws import Draws

__all__ = ["TISSUES", "Tissue", "draw_sequence", "draw_tissue"]


@dataclass(frozen=True)
class Tissue:
    """What a voxel is made of.

    Parameters
    ----------
    t1, t2 : float
        Relaxation times, ms.
    pd : float
        Proton density relative to water.
    adc : float
        Apparent diffusion coefficient, 10^-3 mm^2/s.
    uptake : float
        Gadolinium taken up, as the added relaxation rate 1/T1 in 1/s.
    inflow : float
        Share of fresh blood flowing in, 0..1: bright in time-of-flight angiography, dark in spin echoes.
    spread : float
        Standard deviation of the log of each constant from study to study.
    """

    t1: float
    t2: float
    pd: float
    adc: float
    uptake: float = 0.0
    inflow: float = 0.0
    spread: float = 0.08

    def with_contrast_agent(self) -> Tissue:
        """Return the tissue after injection: 1/T1 grows by the uptake."""
        return replace(self, t1=1.0 / (1.0 / self.t1 + self.uptake / 1000.0))


TISSUES: dict[str, Tissue] = {
    "csf": Tissue(2569, 329, 1.00, 3.0),
    "grey": Tissue(833, 83, 0.86, 0.82, uptake=0.06),
    "white": Tissue(500, 70, 0.77, 0.72, uptake=0.03),
    "oedema": Tissue(1050, 135, 0.88, 1.35, spread=0.18),
    "infiltration": Tissue(1200, 160, 0.90, 1.3, uptake=0.05, spread=0.16),
    "necrosis": Tissue(1500, 215, 0.95, 1.9, uptake=0.08, spread=0.25),
    "enhancing": Tissue(1050, 125, 0.87, 1.05, uptake=2.6, spread=0.18),
    "demyelination": Tissue(752, 180, 0.80, 1.2, spread=0.22),
    "infarct": Tissue(1000, 125, 0.88, 0.45, spread=0.15),
    "blood": Tissue(1500, 40, 0.85, 0.9, uptake=3.5, inflow=1.0, spread=0.2),
    "bone": Tissue(500, 8, 0.12, 0.3, spread=0.3),
    "scalp": Tissue(330, 60, 0.80, 0.5, uptake=0.3, spread=0.25),
}
"""Mean constants per tissue."""


def draw_tissue(name: str, draws: Draws) -> Tissue:
    """Draw one study's (or one lesion's) constants of a tissue of :data:`TISSUES`."""
    mean = TISSUES[name]
    t1, t2, pd, adc, uptake = (draws.jitter(v, mean.spread) for v in (mean.t1, mean.t2, 1.0, mean.adc, mean.uptake))
    pd = mean.pd * pd**0.3  # proton density varies far less than the relaxation times
    return replace(mean, t1=t1, t2=min(t2, 0.8 * t1), pd=min(pd, 1.0), adc=adc, uptake=uptake)


def _spin_echo(t: Tissue, tr: float, te: float) -> float:
    """S = PD (1 - exp(-TR/T1)) exp(-TE/T2); flowing blood has left the slice before the echo."""
    return t.pd * (1 - math.exp(-tr / t.t1)) * math.exp(-te / t.t2) * (1 - 0.8 * t.inflow)


def _mprage(t: Tissue, tr: float, ti: float) -> float:
    """S = PD |1 - 2 exp(-TI/T1) / (1 + exp(-TR/T1))|: inversion recovery in the steady state, short echo."""
    return t.pd * abs(1 - 2 * math.exp(-ti / t.t1) / (1 + math.exp(-tr / t.t1)))


def _inversion_recovery(t: Tissue, tr: float, te: float, ti: float) -> float:
    """S = PD |1 - 2 exp(-TI/T1) + exp(-TR/T1)| exp(-TE/T2)."""
    recovered = abs(1 - 2 * math.exp(-ti / t.t1) + math.exp(-tr / t.t1))
    return t.pd * recovered * math.exp(-te / t.t2) * (1 - 0.8 * t.inflow)


def _time_of_flight(t: Tissue, tr: float, flip: float) -> float:
    """Spoiled gradient echo; fresh blood has not been saturated: S = PD sin(a)."""
    e1 = math.exp(-tr / t.t1)
    saturated = t.pd * math.sin(flip) * (1 - e1) / (1 - math.cos(flip) * e1)
    return saturated + t.inflow * (t.pd * math.sin(flip) - saturated)


def draw_sequence(modality: str, draws: Draws) -> Callable[[Tissue], float]:
    """Draw a protocol of a modality and return its signal equation.

    Parameters
    ----------
    modality : str
        One of the eight modality keys.
    draws : Draws
        Protocols differ between sites: repetition, echo and inversion times are drawn from clinical ranges.

    Returns
    -------
    callable
        Takes a :class:`Tissue` to its signal, relative to fully recovered water.

    Raises
    ------
    ValueError
        There is no signal equation for the modality.
    """
    u = draws.uniform
    if modality in ("t1", "t1c"):
        mprage = draws.chance(0.5)
        tr, te, ti = u(420, 750), u(8, 18), u(820, 1080)

        def t1_weighted(t: Tissue) -> float:
            seen = t.with_contrast_agent() if modality == "t1c" else t
            return _mprage(seen, 2100, ti) if mprage else _spin_echo(replace(seen, inflow=0.3 * t.inflow), tr, te)

        return t1_weighted
    if modality == "t2":
        tr, te = u(2800, 6500), u(80, 125)
        return lambda t: _spin_echo(t, tr, te)
    if modality == "flair":
        tr, te = u(7000, 11000), u(85, 145)
        null_csf = -TISSUES["csf"].t1 * math.log((1 + math.exp(-tr / TISSUES["csf"].t1)) / 2)
        ti = null_csf * u(0.92, 1.05)
        return lambda t: _inversion_recovery(t, tr, te, ti)
    if modality == "pd":
        tr, te = u(2200, 3500), u(12, 28)
        return lambda t: _spin_echo(t, tr, te)
    if modality == "dwi":
        tr, te, b = u(4000, 8000), u(70, 110), u(0.8, 1.2)
        return lambda t: _spin_echo(t, tr, te) * math.exp(-b * t.adc)
    if modality == "adc":
        return lambda t: t.adc * min(1.0, 4 * t.pd)  # no map is computed where there is no signal
    if modality == "mra":
        tr, flip = u(20, 35), math.radians(u(16, 26))
        return lambda t: _time_of_flight(t, tr, flip)
    raise ValueError(f"There is no signal equation for {modality!r}.")
