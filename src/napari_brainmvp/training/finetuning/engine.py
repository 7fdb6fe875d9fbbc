"""The run: annotated studies in, a segmentation model out; classification has a module of its own."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from napari_brainmvp.errors import BrainMVPError
from napari_brainmvp.io import by_subject, write_text_atomic
from napari_brainmvp.models import LoadedModel, ModelCard, NetworkSpec, find_model, load_model, name_digest, save_model
from napari_brainmvp.models.sharing import plain_name
from napari_brainmvp.models.weights import build_network
from napari_brainmvp.networks import SegmentationNetwork
from napari_brainmvp.preparation import PreparationSpec
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback, no_progress
from napari_brainmvp.training.cache import CachedStudy
from napari_brainmvp.training.cache_space import shrink_cache
from napari_brainmvp.training.checkpoints import has_checkpoint
from napari_brainmvp.training.finetuning.begun import holds_run, keep_studies, part_usable
from napari_brainmvp.training.finetuning.data import Case, LabelledCrops, collect, split
from napari_brainmvp.training.finetuning.folds import Folds, Settings
from napari_brainmvp.training.finetuning.head import Parts, fit_head, match_classes
from napari_brainmvp.training.finetuning.model import SegmentationModel, make_templates, parameter_groups
from napari_brainmvp.training.finetuning.run import Run
from napari_brainmvp.training.finetuning.spec import SCRATCH, FinetuneSpec
from napari_brainmvp.training.finetuning.transfer import (
    Transfer,
    class_network,
    has_exclusive_classes,
    input_modalities,
    network_spec,
    same_output,
    transfer,
)
from napari_brainmvp.training.finetuning.validation import (
    CropValidation,
    card_metrics,
    measure,
    mix_in,
    write_scores,
)
from napari_brainmvp.training.labels import LabelDescription
from napari_brainmvp.training.loop import describe_run, hold_run, make_fabric, run_cache
from napari_brainmvp.training.memory import keep_freed_memory
from napari_brainmvp.training.metrics import CaseScores
from napari_brainmvp.training.sources import find_projects, own_name

__all__ = ["finetune"]

logger = logging.getLogger(__name__)


def finetune(
    spec: FinetuneSpec,
    run: Path,
    *,
    resume: bool = False,
    cache: Path | None = None,
    progress: ProgressCallback = no_progress,
    cancel: CancelToken | None = None,
) -> Path:
    """Fine-tune a model on annotated studies, or on studies with a class each.

    Parameters
    ----------
    spec : FinetuneSpec
    run : Path
        Folder for ``spec.json``, ``problems.txt``, ``metrics.csv``, ``validation.csv``, ``held_out.csv``,
        ``pictures``, ``parts.json``, checkpoints and, in the end, ``model``; with cross-validation also ``fold-1`` and
        so on, each with its own.
    resume : bool
        Go on from the last checkpoint; without, the folder must not hold one.
    cache : Path, optional
        Where prepared studies are kept; see :func:`~napari_brainmvp.training.loop.run_cache`.
    progress, cancel
        Called and asked at every step. A cancelled run writes a checkpoint first.

    Returns
    -------
    Path
        The model's folder.

    Raises
    ------
    BrainMVPError
        The folder holds another run, there is nothing to train on, or the model to start from cannot be used.
    Cancelled
        After the checkpoint is written.
    """
    with hold_run(run):
        if not resume and holds_run(run):
            raise BrainMVPError(f"{run} already holds a run: resume it, or choose another folder.")
        folder = run_cache(run, cache)
        keep_freed_memory()
        torch.set_flush_denormal(True)
        source = None
        if spec.init != SCRATCH:
            entry = find_model(spec.init)
            source = load_model(entry, entry.card.task)
        if spec.task == "classification":
            from napari_brainmvp.training.finetuning.classification import train_classifier

            return train_classifier(spec, run, source, folder, progress, cancel)
        preparation = source.card.preparation if source is not None else PreparationSpec()
        studies, labels, problems = collect(spec, preparation, folder, progress, cancel)
        modalities = input_modalities(spec, source, studies)
        studies, without = part_usable(studies, modalities)
        describe_run(run, spec, [*problems, *without])
        shrink_cache(folder)
        if (run / "model").exists():
            return run / "model"
        known = {s.name: [s.path.stem, s.labels_path.stem if s.labels_path else ""] for s in studies}
        keep_studies(run, known, [labels.model_dump(mode="json", exclude={"colors"}), modalities])
        job = _Segmentation(spec, run, source, studies, labels, modalities, progress, cancel)
        return job.cross_validate() if spec.folds else job.train_once()


class _Segmentation:
    """Everything that stays the same over the folds of a run."""

    def __init__(
        self,
        spec: FinetuneSpec,
        run: Path,
        source: LoadedModel | None,
        studies: list[CachedStudy],
        labels: LabelDescription,
        modalities: tuple[str, ...],
        progress: ProgressCallback,
        cancel: CancelToken | None,
    ) -> None:
        self.spec, self.run, self.source, self.studies, self.labels = spec, run, source, studies, labels
        self.progress, self.cancel = progress, cancel
        self.fabric = make_fabric(spec.accelerator, spec.precision)
        self.preparation = source.card.preparation if source is not None else PreparationSpec()
        self.modalities = modalities
        self.network: NetworkSpec = network_spec(
            source, spec.encoder, len(self.modalities), len(labels.channels), spec.deep_supervision
        )

    def _kept_parts(self, folder: Path, train: Sequence[Case]) -> Parts:
        """Return what was found when training began, or find it: a resumed run must mean the same by its weights."""
        path = folder / "parts.json"
        if has_checkpoint(folder):
            for known in (path, self.run / "parts.json"):  # once, the folds of a run shared it
                if known.is_file():
                    return tuple(tuple(map(int, unions)) for unions in json.loads(known.read_text(encoding="utf-8")))
            return ()  # a run from before labels were unions
        self.progress(Progress("Comparing classes with labels"))
        parts = self._parts(train)
        if self.cancel is not None:
            self.cancel.raise_if_cancelled()
        write_text_atomic(path, json.dumps(parts) + "\n")
        return parts

    def _parts(self, train: Sequence[Case]) -> Parts:
        """Return which of the source's classes make up each output channel; empty where they do not."""
        if self.source is None or not has_exclusive_classes(self.source.card):
            return ()
        if same_output(self.source.card, self.labels.channels):
            return self.source.card.network.parts
        network = class_network(self.source, self.modalities)
        model = SegmentationModel(network, make_templates(self.modalities, self.source, []), self.labels, self.spec)
        return match_classes(model, LabelledCrops(train, self.modalities, self.labels, self.spec), self.fabric)

    @property
    def patch(self) -> tuple[int, int, int]:
        """The window in which the model will be used."""
        if self.source is not None and self.source.card.task == "segmentation":
            return self.source.card.patch_size
        return (self.spec.crop, self.spec.crop, self.spec.crop)

    def train_once(self) -> Path:
        """Train on all but what is held out, and measure on that."""
        train, held = split(self.studies, self.spec, self.labels)
        model, facts, scores = self.train(self.run, train, held)
        kind = "slices kept back of the training cases" if held and held[0].slices else "held-out cases"
        return self.finish(model, facts, scores, kind, len(train))

    def cross_validate(self) -> Path:
        """Measure on every case by a model that has not seen its subject, then train on all of them."""
        people = by_subject([study.name for study in self.studies])
        folds = min(self.spec.folds, len(people))
        if folds < 2:
            raise BrainMVPError("Cross-validation needs two subjects or more: leave out folds, or add studies.")
        scores: list[CaseScores] = []
        learned = Folds()
        for fold in range(folds):
            away = {index for studies in people[fold::folds] for index in studies}
            held = [Case(self.studies[k]) for k in sorted(away)]
            train = [Case(s) for k, s in enumerate(self.studies) if k not in away]
            _, facts, found = self.train(self.run / f"fold-{fold + 1}", train, held, f"Fold {fold + 1} of {folds}: ")
            scores += found
            learned.add(facts)
        cases = [Case(study) for study in self.studies]
        model, facts, _ = self.train(self.run, cases, [], settings=learned.settings(self.spec.start_share))
        facts |= {
            "cross-validation": f"{folds} folds",
            "best steps of the folds": learned.best_steps,
            "score by start share": learned.mean_scores,
        }
        return self.finish(model, facts, scores, f"{folds}-fold cross-validation", len(cases))

    def train(
        self,
        folder: Path,
        train: Sequence[Case],
        held: Sequence[Case],
        prefix: str = "",
        settings: Settings | None = None,
    ) -> tuple[SegmentationModel, dict[str, Any], list[CaseScores]]:
        """Train one model, resuming where its folder has a checkpoint, and calibrate and measure it.

        With nothing held out ``settings`` may say what could not be found out.
        """
        spec = self.spec
        settings = settings or Settings(spec.steps(len(train)), spec.start_share)
        folder.mkdir(parents=True, exist_ok=True)

        def progress(report: Progress) -> None:
            self.progress(Progress(prefix + report.step, report.done, report.total))

        self.network = self.network.model_copy(update={"parts": self._kept_parts(folder, train)})
        torch.manual_seed(spec.seed)
        model, facts, done = self._model([case.study for case in train])
        if (done is None or not done.has_head) and not has_checkpoint(folder):
            fit_head(model, LabelledCrops(train, self.modalities, self.labels, spec), self.fabric)
        crops = LabelledCrops(held, self.modalities, self.labels, spec)
        validation = CropValidation(crops, self.labels, self.fabric)
        start = copy.deepcopy(model.state_dict())
        groups = parameter_groups(model.network, spec, train_stem=done is not None and done.widened)
        loop = Run(self.fabric, spec, folder, model, groups, settings.steps, validation)
        step = loop.restore()
        stream = LabelledCrops(train, self.modalities, self.labels, spec, step)
        loader = DataLoader(stream, batch_size=None, num_workers=spec.workers)
        loop.train(iter(loader), step, progress, self.cancel)
        best, at = loop.result()
        share, by_share = 0.0, dict[float, float]()
        if done is not None and done.all_from_source and settings.start_share:
            whole = not any(case.slices for case in held)
            share, by_share = mix_in(start, best, validation, settings.start_share, whole_cases=whole)
        temperature = validation.temperature(best) if held else settings.temperature
        with torch.no_grad():  # before it is measured: where classes make up a region, it changes what is decided
            for parameter in best.network.get_submodule("decoder.out").parameters():
                parameter.div_(temperature)
        spacing = self.preparation.spacing
        scores = measure(best, held, crops, self.patch, spacing, self.fabric, progress, self.cancel)
        if scores:
            write_scores(folder / "held_out.csv", scores)
        facts |= {
            "step": at,
            "start share": share,
            "score by start share": {str(s): round(score, 4) for s, score in by_share.items()},
            "temperature": round(temperature, 4),
        }
        return best, facts, scores

    def _model(self, studies: Sequence[CachedStudy]) -> tuple[SegmentationModel, dict[str, Any], Transfer | None]:
        """Make the network, from the source's weights where there is one."""
        card = self._card((), {}, 1)
        network = build_network(card)
        assert isinstance(network, SegmentationNetwork)
        facts: dict[str, Any] = {
            "init": plain_name(self.spec.init),
            "projects": find_projects(self.spec.data),
            "study digests": [name_digest(own_name(s.name)) for s in studies],
        }
        done = None
        if self.source is not None:
            done = transfer(network, self.source, self.modalities, self.labels.channels)
            facts["transferred tensors"] = len(done.taken) + len(done.adapted)
            facts["new tensors"] = len(done.new)
            logger.info("From %s: %d tensors, %d new.", self.spec.init, facts["transferred tensors"], len(done.new))
        templates = make_templates(self.modalities, self.source, studies)
        return SegmentationModel(network, templates, self.labels, self.spec), facts, done

    def _card(self, metrics: Sequence[Any], facts: dict[str, Any], cases: int) -> ModelCard:
        labels = self.labels
        painted = labels.painted if labels.regions else (0, *labels.painted)
        start = "random weights" if self.source is None else self.source.card.name
        return ModelCard(
            name="finetuned",
            title="Fine-tuned model",
            description=f"{', '.join(labels.names)}; fine-tuned from {start} on {cases} studies.",
            task="segmentation",
            network=self.network,
            modalities=self.modalities,
            labels=labels.card_labels(),
            channels=painted,
            activation="sigmoid" if labels.regions else "softmax",
            preparation=self.preparation,
            patch_size=self.patch,
            fill_missing="template",
            training=facts,
            metrics=tuple(metrics),
        )

    def finish(
        self, model: SegmentationModel, facts: dict[str, Any], scores: list[CaseScores], data: str, cases: int
    ) -> Path:
        """Write the model, without the heads that only training needs."""
        self.network = self.network.model_copy(update={"deep_supervision": False})
        training = {
            "cases": cases,
            **facts,
            "labels": self.labels.model_dump(mode="json"),
            "recipe": self.spec.recipe(),
        }
        card = self._card(card_metrics(scores, data), training, cases)
        plain = build_network(card)
        state = model.network.state_dict()
        plain.load_state_dict({key: value.cpu() for key, value in state.items() if not key.startswith("ms_out.")})
        return save_model(self.run / "model", card, plain, model.templates.cpu())
