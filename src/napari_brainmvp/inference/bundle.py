"""The parts of an exported MONAI bundle: transforms, inferer and evaluator that its configuration names.

They do exactly what ``brainmvp segment`` does, in the pieces MONAI expects: scans in, prepared tensor, probabilities,
labels on the scan's own grid.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import MapTransform
from torch import Tensor, nn

from napari_brainmvp.errors import StudyError
from napari_brainmvp.inference.device import choose_dtype
from napari_brainmvp.inference.segment import activation, decide_labels, fill_missing
from napari_brainmvp.inference.windows import SlidingWindow
from napari_brainmvp.io import find_studies, is_image_path, read_study, write_label_map
from napari_brainmvp.models import LoadedModel, find_model, load_model
from napari_brainmvp.preparation import prepare

__all__ = ["PrepareStudyd", "RestoreLabelsd", "SaveLabelsd", "StudyEvaluator", "WindowInferer", "find_cases"]

logger = logging.getLogger(__name__)

_PREPARED, _STUDY = "brainmvp_prepared", "brainmvp_study"


def find_cases(folder: str) -> list[dict[str, Any]]:
    """List the studies of a folder, or the one study that the folder itself is, as MONAI data items.

    Each has its scans, or its folder, as ``image``, and a ``name`` of its own.

    Raises
    ------
    StudyError
        There is none.
    """
    root = Path(folder)
    if root.is_dir() and any(is_image_path(path) for path in root.iterdir()):
        return [{"image": str(root), "name": root.resolve().name}]
    problems: list[tuple[str, str]] = []
    studies = find_studies(root, problems)
    for name, reason in problems:
        logger.warning("Passed over %s: %s", name, reason)
    if not studies:
        raise StudyError(f"{root} holds no study: give a folder of scans, or a folder of such folders as dataset_dir.")
    return [{"image": [str(path) for path in study.scans.values()], "name": study.name} for study in studies]


def _model(folder: str) -> LoadedModel:
    return load_model(find_model(folder))


class PrepareStudyd(MapTransform):
    """Read a study and prepare it as the model's card says.

    Parameters
    ----------
    keys : str or sequence of str
        Entries that hold a study's folder or the list of its files; each becomes a tensor (C, X, Y, Z).
    model : str
        Folder with ``card.json`` and ``model.safetensors``.
    """

    def __init__(self, keys: str | Sequence[str], model: str) -> None:
        super().__init__(keys)
        self.model = _model(model)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Prepare the entries and remember the way back."""
        out = dict(data)
        for key in self.key_iterator(out):
            given = out[key]
            files = [Path(p) for p in given] if isinstance(given, (list, tuple)) else Path(given)
            study = read_study(files, name=out.get("name"))
            prepared = prepare(study, self.model.card.modalities, self.model.card.preparation)
            images, _ = fill_missing(prepared, self.model)
            out[key] = MetaTensor(images, affine=torch.from_numpy(prepared.grid.affine.copy()))
            out[_PREPARED], out[_STUDY] = prepared, study
        return out


class WindowInferer(Inferer):
    """Sliding windows of the model's patch size; gives probabilities.

    Parameters
    ----------
    model : str
        The model's folder.
    device : torch.device
    overlap : float
        Share of a window that its neighbour covers.
    """

    def __init__(self, model: str, device: torch.device, overlap: float = 0.5) -> None:
        super().__init__()
        self.card, self.device, self.overlap = _model(model).card, device, overlap

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Map prepared tensors (B, C, X, Y, Z) to probabilities (B, K, X, Y, Z).

        Windows without foreground are skipped; ``foreground`` (X, Y, Z), bool, says where it is, else what is not 0.
        """
        assert isinstance(network, nn.Module)
        window = SlidingWindow(
            patch_size=self.card.patch_size,
            overlap=self.overlap,
            batch=0,
            device=self.device,
            dtype=choose_dtype(self.device),
        )
        network.eval()
        images = torch.as_tensor(inputs)
        found = []
        for image in images.cpu():
            foreground = kwargs.get("foreground", (image != 0).any(0))
            found.append(window(network, image, foreground, activation(self.card)))
        return torch.stack(found)


class RestoreLabelsd(MapTransform):
    """Turn probabilities (K, X, Y, Z) into labels (1, i, j, k) on the grid of the study's reference scan.

    Parameters
    ----------
    keys : str or sequence of str
    model : str
        The model's folder.
    """

    def __init__(self, keys: str | Sequence[str], model: str) -> None:
        super().__init__(keys)
        self.card = _model(model).card

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the entries by labels."""
        out = dict(data)
        prepared = out[_PREPARED]
        for key in self.key_iterator(out):
            probabilities = torch.as_tensor(out[key])
            labels = decide_labels(probabilities, prepared, self.card, prepared.source)
            affine = torch.from_numpy(prepared.source.affine.copy())
            out[key] = MetaTensor(torch.from_numpy(labels.astype("int32"))[None], affine=affine)
        return out


class SaveLabelsd(MapTransform):
    """Write labels as ``OUTPUT_DIR/STUDY_seg.nii.gz`` with the reference scan's header.

    Parameters
    ----------
    keys : str or sequence of str
    output_dir : str
    """

    def __init__(self, keys: str | Sequence[str], output_dir: str) -> None:
        super().__init__(keys)
        self.output_dir = Path(output_dir)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the entries and leave them as they are."""
        study = data[_STUDY]
        for key in self.key_iterator(dict(data)):
            path = self.output_dir / f"{study.name}_seg.nii.gz"
            labels = torch.as_tensor(data[key])[0].numpy()
            write_label_map(path, labels, study.grid, like=study.scans[study.reference].path)
        return dict(data)


class StudyEvaluator:
    """Run the bundle over its studies, one at a time.

    Parameters
    ----------
    dataset : sequence of dict
        Prepared items.
    network : Module
    inferer : callable
    postprocessing : callable
    """

    def __init__(
        self,
        dataset: Sequence[dict[Hashable, Any]],
        network: nn.Module,
        inferer: WindowInferer,
        postprocessing: Callable[[dict[Hashable, Any]], dict[Hashable, Any]],
    ) -> None:
        self.dataset, self.network, self.inferer, self.postprocessing = dataset, network, inferer, postprocessing

    def run(self) -> None:
        """Segment every study."""
        for index in range(len(self.dataset)):
            item = dict(self.dataset[index])
            foreground = item[_PREPARED].foreground
            item["pred"] = self.inferer(item["image"][None], self.network, foreground=foreground)[0]
            self.postprocessing(item)
