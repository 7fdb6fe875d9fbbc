"""How a study becomes a network's input: the choices a model card records."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["PreparationSpec"]


class PreparationSpec(BaseModel):
    """The preparation one model was trained with and must be given again.

    Parameters
    ----------
    spacing : float
        Edge of the isotropic voxels, mm.
    intensity : {"robust", "percentile"}
        ``"robust"`` keeps lesions apart from healthy tissue; ``"percentile"`` maps the 5th to 95th percentile to
        0..1 as the released weights expect. See :func:`napari_brainmvp.preparation.intensity.normalise`.
    clip : bool
        With ``"percentile"``, clip to 0..1 (as in the published pre-training, not in its fine-tuning).
    margin : int
        Voxels kept around the foreground box.
    symmetric : bool
        Keep the box symmetric about the volume's centre, as the release does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    spacing: float = Field(1.0, gt=0.1, le=10.0)
    intensity: Literal["robust", "percentile"] = "robust"
    clip: bool = False
    margin: int = Field(2, ge=0, le=64)
    symmetric: bool = False
