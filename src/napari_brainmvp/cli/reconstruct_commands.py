"""``brainmvp reconstruct`` and ``brainmvp impute``: a modality from the others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from napari_brainmvp.cli.console import named_scans, progress_bar, say, table
from napari_brainmvp.errors import FileError

if TYPE_CHECKING:
    from napari_brainmvp.inference import ReconstructionResult
    from napari_brainmvp.study import Study

__all__ = ["impute", "reconstruct"]

StudyArgument = Annotated[list[Path], typer.Argument(help="A study's folder, or its files.")]
TargetOption = Annotated[str, typer.Option("--target", "-t", help="Modality to make, for example flair.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Scan to write (.nii or .nii.gz).")]
FromOption = Annotated[
    str, typer.Option("--from", help="Sources, comma-separated: modalities, template. Default all others.")
]
ModelOption = Annotated[str, typer.Option("--model", "-m", help="Pre-trained model; default the one that ships.")]
ScanOption = Annotated[list[str] | None, typer.Option(help="Say which file is which: t1c=FILE. Repeatable.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace output files that exist.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def reconstruct(
    study: StudyArgument,
    target: TargetOption,
    out: OutOption,
    sources: FromOption = "",
    mask_rate: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the target that is hidden at a time.")
    ] = 1.0,
    trained: Annotated[bool, typer.Option("--trained", help="One random mask, as in pre-training.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the masks.")] = 0,
    error: Annotated[Path | None, typer.Option(help="Also write reconstruction minus truth.")] = None,
    disagreement: Annotated[Path | None, typer.Option(help="Also write the error in expected errors.")] = None,
    masked: Annotated[Path | None, typer.Option(help="Also write what the network was shown.")] = None,
    model: ModelOption = "",
    scan: ScanOption = None,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Reconstruct one modality of a study from others and say how close it comes."""
    from napari_brainmvp.inference import ReconstructionOptions
    from napari_brainmvp.inference import reconstruct as run

    maps = {"error": error, "disagreement": disagreement, "masked": masked}
    outputs = {name: path for name, path in maps.items() if path is not None}
    loaded = _read(study, scan or (), [out, *outputs.values()], overwrite)
    options = ReconstructionOptions(
        mode="trained" if trained else "whole", mask_rate=mask_rate, seed=seed, device=device
    )
    with progress_bar(quiet=as_json) as progress:
        result = run(loaded, model or None, target, _keys(sources), options, progress)
    _write(result, loaded, out, outputs)
    _report(result, loaded, [out, *outputs.values()], as_json)


def impute(
    study: StudyArgument,
    target: TargetOption,
    out: OutOption,
    sources: FromOption = "",
    model: ModelOption = "",
    scan: ScanOption = None,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a modality that a study does not have from those it has. The file says that it is imputed."""
    from napari_brainmvp.inference import ReconstructionOptions
    from napari_brainmvp.inference import impute as run

    loaded = _read(study, scan or (), [out], overwrite)
    with progress_bar(quiet=as_json) as progress:
        result = run(loaded, model or None, target, _keys(sources), ReconstructionOptions(device=device), progress)
    _write(result, loaded, out, {})
    _report(result, loaded, [out], as_json)


def _keys(text: str) -> tuple[str, ...]:
    return tuple(key.strip() for key in text.split(",") if key.strip())


def _read(paths: Sequence[Path], scan: Sequence[str], outputs: Sequence[Path], overwrite: bool) -> Study:
    """Read the study, after making sure that every output can be written and none takes a scan's place."""
    from napari_brainmvp.io import read_study

    for path in outputs:
        if not path.name.lower().endswith((".nii", ".nii.gz")):
            raise FileError(f"{path} does not end in .nii or .nii.gz: choose such a name.")
        if path.exists() and not overwrite:
            raise FileError(f"{path} exists: choose another name, or add --overwrite.")
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise FileError("Two outputs have the same name: choose different ones.")
    study = read_study(paths[0] if len(paths) == 1 else list(paths), modalities=named_scans(scan))
    sources = {scan.path.resolve() for scan in study.scans.values() if scan.path is not None}
    for path in outputs:
        if path.resolve() in sources:
            raise FileError(f"{path} is one of the scans: choose another name.")
    return study


def _write(result: ReconstructionResult, study: Study, out: Path, maps: dict[str, Path]) -> None:
    from napari_brainmvp.io import write_image

    same = study.scans.get(result.scan.modality.key) or study.scans[study.reference]
    write_image(out, result.scan.data, result.scan.grid, like=same.path, description=result.description)
    for name, path in maps.items():
        values = getattr(result, name)
        if values is None:
            raise FileError(f"{path} cannot be written: without a {result.scan.modality.title} there is no {name}.")
        write_image(path, values, result.scan.grid, like=same.path, description=f"{name}: {result.description}")


def _report(result: ReconstructionResult, study: Study, written: Sequence[Path], as_json: bool) -> None:
    if as_json:
        say(json.dumps(_as_object(result, written)))
        return
    title = f"{study.name}: {result.scan.title} from {', '.join(result.sources)}, {result.seconds:.0f} s"
    rows = [(s.name, f"{s.psnr:.1f}", f"{s.ssim:.3f}", f"{s.mae:.3f}") for s in result.similarity]
    if rows:
        table(title, ("", "PSNR, dB", "SSIM", "MAE"), rows)
    else:
        say(title)
    for warning in result.warnings:
        say(f"Note: {warning}")
    say(f"Wrote {', '.join(str(path) for path in written)}")


def _as_object(result: ReconstructionResult, written: Sequence[Path]) -> dict[str, Any]:
    return {
        "outputs": [str(path) for path in written],
        "target": result.scan.modality.key,
        "imputed": result.scan.imputed,
        "sources": list(result.sources),
        "mask_rate": result.mask_rate,
        "model": result.model,
        "device": result.device,
        "seconds": round(result.seconds, 2),
        "similarity": [
            {"name": s.name, "psnr": round(s.psnr, 3), "ssim": round(s.ssim, 4), "mae": round(s.mae, 4)}
            for s in result.similarity
        ],
        "warnings": list(result.warnings),
    }
