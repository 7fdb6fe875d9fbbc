"""The command line as users run it: real processes, real files."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from conftest import save

BRAINMVP = str(Path(sys.executable).with_name("brainmvp"))


def run(*arguments, **keywords) -> subprocess.CompletedProcess:
    return subprocess.run([BRAINMVP, *map(str, arguments)], capture_output=True, text=True, timeout=240, **keywords)


def test_help_is_quick_and_imports_no_torch():
    run("--help")  # warm the file cache
    times = []
    for _ in range(3):
        before = os.times()
        done = run("--help")
        times.append(sum(os.times()[2:4]) - sum(before[2:4]))  # of the processor, as other tests run meanwhile
        assert done.returncode == 0
        assert "segment" in done.stdout
    assert min(times) < 0.5
    code = "import sys\nfrom napari_brainmvp.cli import app\nprint([m for m in ('torch', 'monai') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_segment_writes_labels_maps_and_volumes(home, study_folder, tmp_path):
    out, table = tmp_path / "out" / "seg.nii.gz", tmp_path / "volumes.csv"
    done = run(
        "segment",
        study_folder,
        "-m",
        "tiny",
        "-o",
        out,
        "--probabilities",
        "--uncertainty",
        "--volumes",
        table,
        "--json",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"output", "model", "device", "seconds", "labels", "warnings"}
    assert report["output"] == str(out)
    assert report["model"] == "tiny"
    labels, source = nib.load(out), nib.load(next(study_folder.glob("*t1n*")))
    np.testing.assert_array_equal(labels.affine, source.affine)
    assert labels.shape == source.shape
    for row in report["labels"]:
        voxels = int((np.asarray(labels.dataobj) == row["value"]).sum())
        assert row["volume_ml"] == pytest.approx(voxels / 1000, abs=1e-3)
    assert nib.load(out.with_name("seg_probabilities.nii.gz")).shape == (*labels.shape, 4)
    assert 0 < nib.load(out.with_name("seg_uncertainty.nii.gz")).get_fdata().max() <= 1
    assert [r["name"] for r in csv.DictReader(table.open())] == ["CSF", "Grey matter", "White matter"]


def test_segment_for_people(home, study_folder, tmp_path):
    done = run("segment", study_folder, "-m", "tiny", "-o", tmp_path / "s.nii.gz")
    assert done.returncode == 0, done.stderr
    assert "Grey matter" in done.stdout
    assert "Wrote" in done.stdout


def test_files_can_be_named(home, study_folder, tmp_path):
    odd = study_folder / "series7.nii.gz"
    next(study_folder.glob("*t2f*")).rename(odd)
    done = run("segment", odd, "--scan", f"flair={odd}", "-m", "tiny", "-o", tmp_path / "s.nii.gz", "--json")
    assert done.returncode == 0, done.stderr
    assert "T1, T1c, T2 missing" in json.loads(done.stdout)["warnings"][0]


def one_line_error(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("brainmvp: ")
    return lines[0]


def test_users_errors_are_one_line_and_status_2(home, study_folder, tmp_path):
    out = tmp_path / "s.nii.gz"
    assert "does not exist" in one_line_error(run("segment", tmp_path / "none", "-o", out))
    assert "no model 'x'" in one_line_error(run("segment", study_folder, "-m", "x", "-o", out))
    assert ".nii" in one_line_error(run("segment", study_folder, "-o", tmp_path / "s.png"))
    assert "no device" in one_line_error(run("segment", study_folder, "-m", "tiny", "-o", out, "--device", "tpu"))
    assert "MODALITY=FILE" in one_line_error(run("segment", study_folder, "-m", "tiny", "-o", out, "--scan", "t1"))
    save(study_folder / "other_t1.nii.gz", np.ones((3, 3, 3), np.float32))
    assert "look like T1" in one_line_error(run("segment", study_folder, "-m", "tiny", "-o", out))
    assert not out.exists()
    assert run("segment").returncode == 2


def test_nothing_is_overwritten_unasked_and_scans_never(home, study_folder, tmp_path):
    out = tmp_path / "s.nii.gz"
    out.write_bytes(b"precious")
    assert "--overwrite" in one_line_error(run("segment", study_folder, "-m", "tiny", "-o", out))
    assert out.read_bytes() == b"precious"
    assert run("segment", study_folder, "-m", "tiny", "-o", out, "--overwrite").returncode == 0
    scan = next(study_folder.glob("*t1n*"))
    before = scan.read_bytes()
    assert "one of the scans" in one_line_error(run("segment", study_folder, "-m", "tiny", "-o", scan, "--overwrite"))
    named = scan.rename(study_folder / "scan3.nii.gz")  # is only known to be one because that is said
    arguments = ("--scan", f"t1={named}", "-o", named, "--overwrite")
    assert "one of the scans" in one_line_error(run("segment", study_folder, "-m", "tiny", *arguments))
    assert named.read_bytes() == before
    within = study_folder / "anat" / "sub-01_T1w.nii.gz"
    within.parent.mkdir()
    named.rename(within)
    assert "one of the scans" in one_line_error(run("segment", study_folder, "-m", "tiny", "-o", within, "--overwrite"))
    assert within.read_bytes() == before


def test_an_interrupted_run_leaves_nothing(home, tmp_path):
    folder = tmp_path / "big"
    rng = np.random.default_rng(0)
    save(folder / "t1.nii.gz", rng.uniform(1, 2, (200, 200, 160)).astype(np.float32))
    out = tmp_path / "out" / "s.nii.gz"
    command = [BRAINMVP, "segment", str(folder), "-m", "tiny", "--overlap", "0.9", "-o", str(out)]  # takes minutes
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    try:
        time.sleep(6)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


def test_synth_writes_a_dataset_and_the_same_again(tmp_path):
    for name in ("a", "b"):
        done = run("synth", "--n", 1, "--seed", 5, "--lesion", "ms", "--modalities", "t1,flair", "-o", tmp_path / name)
        assert done.returncode == 0, done.stderr
    study = next(p for p in (tmp_path / "a").iterdir() if p.is_dir())
    names = sorted(p.name for p in study.iterdir())
    assert names == [f"{study.name}-{key}.nii.gz" for key in ("flair", "seg", "t1")]
    for name in names:
        first, second = (np.asarray(nib.load(tmp_path / x / study.name / name).dataobj) for x in ("a", "b"))
        np.testing.assert_array_equal(first, second)
    assert json.loads((tmp_path / "a" / "dataset.json").read_text())["labels"]["4"] == "oedema"
    assert "not an empty folder" in one_line_error(run("synth", "-o", tmp_path / "a"))
    assert "Cannot make swi" in one_line_error(run("synth", "--modalities", "swi", "-o", tmp_path / "c"))


def test_models_and_info(home):
    assert "tiny" in run("models", "list").stdout
    assert json.loads(run("models", "show", "tiny").stdout)["name"] == "tiny"
    assert run("models", "remove", "tiny").returncode == 0
    assert "no model" in one_line_error(run("models", "show", "tiny"))
    info = run("info").stdout
    assert "torch" in info
    assert str(home / "models") in info


def test_demo_makes_files_and_a_picture(home, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    done = run("demo", "--out", tmp_path / "demo", "-m", "tiny", env=environment)
    assert done.returncode == 0, done.stderr
    from PIL import Image

    picture = np.asarray(Image.open(tmp_path / "demo" / "segmentation.png"))
    assert picture.shape[0] > 600
    assert picture.std() > 20
    labels = nib.load(tmp_path / "demo" / "segmentation.nii.gz")
    assert labels.shape == nib.load(next((tmp_path / "demo" / "study").glob("*t1.nii.gz"))).shape
    assert str(tmp_path / "demo" / "segmentation.png") in done.stdout
