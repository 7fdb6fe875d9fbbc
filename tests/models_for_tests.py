"""A small model of the real classes with seeded random weights, for tests of everything around a network."""

from pathlib import Path

import torch

from napari_brainmvp.models import Label, ModelCard, NetworkSpec, save_model
from napari_brainmvp.models.weights import LoadedModel, build_network
from napari_brainmvp.networks import ModalityTemplates

NAMES = ("CSF", "Grey matter", "White matter")
COLORS = ("#4c9be8", "#9aa0a6", "#f2efe6")


def tiny_card(name: str = "tiny", **changes) -> ModelCard:
    network = NetworkSpec(
        in_channels=4,
        out_channels=4,
        channels=(8, 8, 16, 16),
        depths=(1, 1, 1, 1),
        head_size=8,
        full_resolution_channels=8,
        deep_supervision=False,
    )
    fields = {
        "name": name,
        "title": "Tiny random model",
        "task": "segmentation",
        "network": network,
        "modalities": ("t1", "t1c", "t2", "flair"),
        "labels": tuple(
            Label(value=k + 1, name=n, color=c) for k, (n, c) in enumerate(zip(NAMES, COLORS, strict=True))
        ),
        "channels": (0, 1, 2, 3),
        "patch_size": (32, 32, 32),
        "fill_missing": "template",
    }
    return ModelCard(**{**fields, **changes})


def tiny_model(folder: Path, name: str = "tiny", **changes) -> Path:
    """Save the tiny model as ``folder/name`` and return that folder."""
    torch.manual_seed(0)
    card = tiny_card(name, **changes)
    network = build_network(card)
    templates = ModalityTemplates(card.modalities, (6, 7, 6))
    with torch.no_grad():
        templates.volumes.uniform_(0.5, 1.5)
    return save_model(folder / name, card, network, templates)


def tiny_encoder(folder: Path, name: str = "tiny-encoder", **changes) -> Path:
    """Save a pre-training model of five modalities, told its target, as ``folder/name``."""
    torch.manual_seed(1)
    network = NetworkSpec(
        in_channels=1,
        out_channels=2,
        channels=(8, 8, 16, 16),
        depths=(1, 1, 1, 1),
        head_size=8,
        full_resolution_channels=8,
        deep_supervision=False,
        decoder="skips",
    )
    modalities = ("t1", "t1c", "t2", "flair", "adc")
    fields = {"title": "Tiny random encoder", "task": "pretraining", "network": network, "modalities": modalities}
    card = ModelCard(name=name, **{**fields, "patch_size": (32, 32, 32), "fill_missing": "template", **changes})
    made = build_network(card)
    for condition in getattr(made, "conditions", ()):
        torch.nn.init.normal_(condition.norm1.embedding.weight, std=0.5)
    templates = ModalityTemplates(card.modalities, (6, 7, 6))
    with torch.no_grad():
        templates.volumes.uniform_(0.5, 1.5)
    return save_model(folder / name, card, made.eval(), templates)


class Says(torch.nn.Module):
    """Answers with the same logits wherever it looks."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.layer = logits, torch.nn.Identity()

    def forward(self, x):
        return self.logits.expand(len(x), -1, -1, -1, -1)


def region_model(labels, probabilities):
    """A model of regions with these probabilities (R, 32, 32, 32), and a study that it knows all of."""
    card = ModelCard(
        name="x", task="segmentation", network=NetworkSpec(in_channels=1, out_channels=len(probabilities)),
        modalities=("t1",), labels=labels.card_labels(), channels=labels.painted, activation="sigmoid",
        patch_size=(32, 32, 32),
    )  # fmt: skip
    return LoadedModel(card, Says(torch.logit(torch.from_numpy(probabilities).float().clamp(0.01, 0.99))).eval(), None)
