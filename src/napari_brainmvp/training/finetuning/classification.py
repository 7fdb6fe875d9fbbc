"""From studies with a class each to a classification model: a linear probe for few, fine-tuning for more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from napari_brainmvp.errors import BrainMVPError
from napari_brainmvp.io import by_subject
from napari_brainmvp.models import LoadedModel, Metric, ModelCard, NetworkSpec, save_model
from napari_brainmvp.models.sharing import plain_name
from napari_brainmvp.models.weights import build_network
from napari_brainmvp.networks import ClassificationNetwork
from napari_brainmvp.preparation import PreparationSpec
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback
from napari_brainmvp.training.cache_space import shrink_cache
from napari_brainmvp.training.finetuning.begun import keep_studies, part_usable
from napari_brainmvp.training.finetuning.linear_probe import fit_probe
from napari_brainmvp.training.finetuning.model import freeze_batch_norm, make_templates, parameter_groups
from napari_brainmvp.training.finetuning.run import Run, Trainable
from napari_brainmvp.training.finetuning.spec import SCRATCH, FinetuneSpec
from napari_brainmvp.training.finetuning.studies import (
    ClassifiedStudies,
    Subject,
    collect_classes,
    load_volume,
    stratified_folds,
)
from napari_brainmvp.training.finetuning.temperature import fit_temperature
from napari_brainmvp.training.finetuning.transfer import (
    copy_classes,
    count_classes,
    encoder_of,
    input_modalities,
    transfer,
)
from napari_brainmvp.training.loop import describe_run, make_fabric
from napari_brainmvp.training.metrics import class_scores

__all__ = ["ClassificationModel", "train_classifier"]

_PROBE_FOLDS = 5


def train_classifier(
    spec: FinetuneSpec,
    run: Path,
    source: LoadedModel | None,
    cache: Path,
    progress: ProgressCallback,
    cancel: CancelToken | None,
) -> Path:
    """Train a classification model; called by :func:`~napari_brainmvp.training.finetuning.finetune`."""
    preparation = source.card.preparation if source is not None else PreparationSpec()
    subjects, problems = collect_classes(spec, preparation, cache, progress, cancel)
    studies = [subject.study for subject in subjects]
    modalities = input_modalities(spec, source, studies)
    usable, without = part_usable(studies, modalities)
    subjects = [subject for subject in subjects if subject.study in usable]
    describe_run(run, spec, [*problems, *without])
    shrink_cache(cache)
    if (run / "model").exists():
        return run / "model"
    keep_studies(run, {s.study.name: [s.study.path.stem, s.label] for s in subjects}, modalities)
    return _Classification(spec, run, source, subjects, modalities, progress, cancel).train()


class ClassificationModel(Trainable):
    """A classification network in training."""

    def __init__(self, network: ClassificationNetwork, spec: FinetuneSpec) -> None:
        super().__init__()
        self.network, self.spec = network, spec

    def set_mode(self, done: float) -> None:
        """Switch to training mode; batch normalisation as in segmentation."""
        self.train()
        if done >= max(self.spec.freeze_norm, 0.6 if self.spec.init == SCRATCH else 0.0):
            freeze_batch_norm(self.network)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the cross entropy of a batch of ``image`` (B, C, H, W, D) and ``target`` (B,)."""
        return {"loss": F.cross_entropy(self.network(batch["image"]).float(), batch["target"])}


class _Classification:
    """A run: the studies in memory, the network's description, and the two ways to train it."""

    def __init__(
        self,
        spec: FinetuneSpec,
        run: Path,
        source: LoadedModel | None,
        subjects: Sequence[Subject],
        modalities: tuple[str, ...],
        progress: ProgressCallback,
        cancel: CancelToken | None,
    ) -> None:
        self.spec, self.run, self.source, self.progress, self.cancel = spec, run, source, progress, cancel
        self.fabric = make_fabric(spec.accelerator, spec.precision)
        studies = [subject.study for subject in subjects]
        self.labels = [subject.label for subject in subjects]
        self.people = by_subject([study.name for study in studies])
        self.classes = tuple(sorted(set(self.labels)))
        self.targets = np.array([self.classes.index(label) for label in self.labels])
        self.modalities = modalities
        self.templates = make_templates(self.modalities, source, studies)
        self.volumes = [load_volume(study, self.modalities, self.templates, spec.size) for study in studies]
        frozen = spec.encoder_rate == 0 or len(studies) <= spec.probe_up_to
        self.probe = source is not None and frozen
        own = source.card.network.in_channels if source is not None else len(self.modalities)
        own_scans = source is not None and self.modalities == source.card.modalities  # others it would not segment
        self.network = NetworkSpec(
            in_channels=1 if own == 1 else len(self.modalities),
            out_channels=len(self.classes),
            deep_supervision=False,
            hidden=0 if self.probe else spec.hidden,
            tissues=count_classes(source.card) if source is not None and self.probe and own_scans else 0,
            full_resolution_channels=source.card.network.full_resolution_channels if source is not None else None,
            **encoder_of(source, spec.encoder).model_dump(),
        )

    def train(self) -> Path:
        """Measure on studies held out, then write the model that is kept."""
        if self.probe:
            return self._train_probe()
        if self.spec.folds:
            return self._cross_validate()
        held = self._held_out()
        train = [k for k in range(len(self.labels)) if k not in held]
        model, step, made = self._fine_tune(self.run, train, held)
        return self._finish(model, made, held, "held-out studies", step)

    def _cross_validate(self) -> Path:
        """Measure on every study by a network that has not seen it, then train on all of them."""
        count = min(self.spec.folds, len(self.people))
        logits, indices = [torch.zeros(0, len(self.classes))], []
        for number, held in self._folds(count):
            train = [k for k in range(len(self.labels)) if k not in held]
            made = self._fine_tune(self.run / f"fold-{number}", train, held, f"Fold {number} of {count}: ")[2]
            logits.append(made)
            indices += held
        model, step, _ = self._fine_tune(self.run, list(range(len(self.labels))), [])
        return self._finish(model, torch.cat(logits), indices, f"{count}-fold cross-validation", step)

    def _folds(self, count: int) -> Iterator[tuple[int, list[int]]]:
        """Deal the subjects out to numbered folds, but leave out those with a class's only one: nothing knew it."""
        for number, held in enumerate(stratified_folds(self.labels, self.people, count, self.spec.seed), start=1):
            if {label for k, label in enumerate(self.labels) if k not in held} == set(self.classes):
                yield number, held

    def _held_out(self) -> list[int]:
        """Hold out about a fifth of the subjects of every class, as long as each keeps one to train on."""
        members = [
            [k for k, studies in enumerate(self.people) if self.targets[studies[0]] == target]
            for target in range(len(self.classes))
        ]
        if min(map(len, members)) < 2 or self.spec.held_out == 0:
            return []
        share = self.spec.held_out or max(1, len(self.people) // 5)
        rng = np.random.default_rng(self.spec.seed)
        held: list[int] = []
        for some in members:
            count = min(len(some) - 1, max(1, round(share * len(some) / len(self.people))))
            for k in rng.permutation(some)[:count]:
                held += self.people[int(k)]
        return sorted(held)

    def _train_probe(self) -> Path:
        """Fit a linear layer on frozen features; measured by cross-validation, which costs nothing here."""
        network = self._build()
        features, mirrored = self._features(network)
        count = min(self.spec.folds or _PROBE_FOLDS, len(self.people))
        logits, indices = [torch.zeros(0, len(self.classes))], []
        for _, held in self._folds(count):
            train = np.setdiff1d(np.arange(len(self.labels)), held)
            weight, bias = fit_probe(np.vstack([features[train], mirrored[train]]), np.tile(self.targets[train], 2))
            logits.append(torch.from_numpy(features[held]) @ weight.T + bias)
            indices += held
        weight, bias = fit_probe(np.vstack([features, mirrored]), np.tile(self.targets, 2))
        head = network.head
        assert isinstance(head, nn.Linear)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
            if network.decoder is not None:
                network.typical.copy_(torch.from_numpy(np.vstack([features, mirrored]).mean(0)))
        return self._finish(network, torch.cat(logits), indices, f"{count}-fold cross-validation", 0)

    def _build(self) -> ClassificationNetwork:
        torch.manual_seed(self.spec.seed)
        network = build_network(self._card((), {}))
        assert isinstance(network, ClassificationNetwork)
        if self.source is not None:
            transfer(network, self.source, self.modalities if self.network.in_channels > 1 else self.modalities[:1])
            if network.decoder is not None:
                copy_classes(network.decoder, self.source)
        return network

    @torch.no_grad()
    def _features(self, network: ClassificationNetwork) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Describe every study and its left-right mirror image, (N, F) each."""
        network.eval().to(self.fabric.device)
        rows: list[list[Tensor]] = [[], []]
        for number, (image, _) in enumerate(self.volumes):
            if self.cancel is not None:
                self.cancel.raise_if_cancelled()
            for row, view in zip(rows, (image, image.flip(1)), strict=True):
                x = view[None].float().to(self.fabric.device)
                with self.fabric.autocast():
                    row.append(network.describe(x).cpu())
            self.progress(Progress("Describing studies", number + 1, len(self.volumes)))
        network.cpu()
        first, second = (torch.cat(row).numpy() for row in rows)
        return first, second

    def _fine_tune(
        self, folder: Path, train: Sequence[int], held: Sequence[int], prefix: str = ""
    ) -> tuple[ClassificationNetwork, int, Tensor]:
        """Train the network and return it with its logits of the studies held out."""
        folder.mkdir(parents=True, exist_ok=True)
        model = ClassificationModel(self._build(), self.spec)

        def progress(report: Progress) -> None:
            self.progress(Progress(prefix + report.step, report.done, report.total))

        def validate(average: ClassificationModel, picture: Path | None) -> dict[str, float]:
            if not held:
                return {}
            logits = self._logits(average.network, held)
            truth = torch.from_numpy(self.targets[list(held)])
            loss = float(F.cross_entropy(logits, truth))
            return {"score": -loss, "loss": loss, "accuracy": float((logits.argmax(1) == truth).float().mean())}

        groups = parameter_groups(model.network, self.spec, train_stem=False)
        loop = Run(self.fabric, self.spec, folder, model, groups, self.spec.steps(len(train)), validate)
        step = loop.restore()
        chosen, targets = [self.volumes[k] for k in train], self.targets[list(train)].tolist()
        stream = ClassifiedStudies(chosen, targets, self.templates.fill(self.spec.size), self.spec, step)
        loader = DataLoader(stream, batch_size=None, num_workers=self.spec.workers)
        loop.train(iter(loader), step, progress, self.cancel)
        best, at = loop.result()
        return best.network, at, self._logits(best.network, held)

    @torch.no_grad()
    def _logits(self, network: ClassificationNetwork, indices: Sequence[int]) -> Tensor:
        rows = [torch.zeros(0, len(self.classes))]
        for k in indices:
            with self.fabric.autocast():
                rows.append(network(self.volumes[k][0][None].float().to(self.fabric.device)).float().cpu())
        return torch.cat(rows)

    def _card(self, metrics: Sequence[Metric], facts: dict[str, Any]) -> ModelCard:
        start = "random weights" if self.source is None else self.source.card.name
        counts = ", ".join(f"{self.labels.count(name)} {name}" for name in self.classes)
        return ModelCard(
            name="classifier",
            title="Classifier",
            description=f"Tells apart {', '.join(self.classes)}; trained from {start} on {counts}.",
            task="classification",
            network=self.network,
            modalities=self.modalities,
            classes=self.classes,
            preparation=self.source.card.preparation if self.source is not None else PreparationSpec(),
            patch_size=self.spec.size,
            fill_missing="template",
            training=facts,
            metrics=tuple(metrics),
        )

    def _finish(
        self, network: ClassificationNetwork, logits: Tensor, indices: Sequence[int], data: str, step: int
    ) -> Path:
        """Calibrate on the logits of studies held out, score them, and write the model."""
        temperature, metrics, intervals = 1.0, [], {}
        if len(indices):
            truth = self.targets[list(indices)]
            hot = F.one_hot(torch.from_numpy(truth), len(self.classes)).float()
            smooth = (hot * len(truth) + 1) / (len(truth) + len(self.classes))  # Platt (1999): few are no certainty
            temperature = fit_temperature(logits, smooth, "softmax")
            scores = class_scores((logits / temperature).double().softmax(1).numpy(), truth, self.spec.seed)
            for name in ("accuracy", "auc", "f1"):
                value = getattr(scores, name)
                if not np.isnan(value):
                    metrics.append(
                        Metric(data=data, name=name, value=round(value, 4), n=scores.n, script="brainmvp finetune")
                    )
                    intervals[name] = [round(edge, 4) for edge in getattr(scores, f"{name}_ci")]
        last = [*network.head.modules()][-1]
        if not isinstance(last, nn.Linear):
            raise BrainMVPError("The head does not end in a linear layer.")
        with torch.no_grad():
            last.weight.div_(temperature)
            last.bias.div_(temperature)
        facts = {
            "cases": {name: self.labels.count(name) for name in self.classes},
            "init": plain_name(self.spec.init),
            "method": "linear probe on frozen features" if self.probe else "fine-tuning",
            "step": step,
            "temperature": round(temperature, 4),
            "95 % intervals": intervals,
            "recipe": self.spec.recipe(),
        }
        return save_model(self.run / "model", self._card(metrics, facts), network.cpu(), self.templates)
