"""What users' files do to a program: a sentence each, and nothing half-written."""

import gzip
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from conftest import brain, save, without_privilege
from napari_brainmvp.errors import BrainMVPError, FileError, StudyError
from napari_brainmvp.io import (
    atomic_path,
    find_studies,
    image_files,
    read_image,
    read_label_map,
    read_study,
    write_label_map,
)
from napari_brainmvp.study import Grid


def test_truncated_and_corrupt_files(tmp_path):
    path = tmp_path / "t1.nii.gz"
    save(path, brain())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileError, match="truncated or damaged"):
        read_study(tmp_path)
    middle = bytearray(whole)
    middle[len(whole) // 2 : len(whole) // 2 + 400] = os.urandom(400)
    path.write_bytes(bytes(middle))
    with pytest.raises(FileError, match=r"damaged|not a valid"):
        read_study(tmp_path)
    path.write_bytes(b"this is no gzip file at all")
    with pytest.raises(FileError):
        read_study(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(FileError):
        read_study(tmp_path)


def test_a_truncated_plain_nifti(tmp_path):
    save(tmp_path / "t1.nii", brain())
    whole = (tmp_path / "t1.nii").read_bytes()
    (tmp_path / "t1.nii").write_bytes(whole[:20_000])
    with pytest.raises(FileError, match=r"does not fit|damaged"):
        read_study(tmp_path)


def test_wrong_extension_and_no_file(tmp_path):
    (tmp_path / "t1.docx").write_bytes(b"x")
    with pytest.raises(FileError, match="not an image"):
        read_study(tmp_path / "t1.docx")
    with pytest.raises(FileError, match="does not exist"):
        read_study(tmp_path / "nothing")


def test_an_empty_folder(tmp_path):
    with pytest.raises(FileError, match="holds no image"):
        read_study(tmp_path)


def test_no_modality_recognised(tmp_path):
    save(tmp_path / "scan1.nii.gz", brain())
    with pytest.raises(StudyError, match=r"no modality recognised in scan1.nii.gz.*--scan"):
        read_study(tmp_path)


def test_two_files_for_one_modality(tmp_path):
    save(tmp_path / "a_t1.nii.gz", brain())
    save(tmp_path / "b_t1.nii.gz", brain())
    with pytest.raises(StudyError, match=r"both a_t1.nii.gz and b_t1.nii.gz look like T1.*--scan t1="):
        read_study(tmp_path)
    problems = []
    (tmp_path / "next").mkdir()
    save(tmp_path / "next" / "scan.nii.gz", brain())
    assert find_studies(tmp_path, problems) == []  # where there is no --scan
    assert all(word in reason for (_, reason), word in zip(problems, ("datalist", "next_t1.nii.gz"), strict=True))
    assert "--scan" not in str(problems)


def test_nan_and_inf_become_zero_with_a_warning(tmp_path):
    data = brain()
    data[20, 20, 20], data[21, 20, 20] = np.nan, np.inf
    save(tmp_path / "t1.nii.gz", data)
    study = read_study(tmp_path)
    assert "2 voxels" in study.warnings[0]
    assert np.isfinite(study.scans["t1"].data).all()


def test_an_all_zero_scan(tmp_path):
    save(tmp_path / "t1.nii.gz", np.zeros((5, 5, 5), np.float32))
    with pytest.raises(StudyError, match="nothing but zeros"):
        read_study(tmp_path)


def test_singular_and_missing_affines(tmp_path):
    image = nib.Nifti1Image(brain((8, 8, 8)), None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    nib.save(image, tmp_path / "t1.nii.gz")
    with pytest.raises(StudyError, match="no affine"):
        read_study(tmp_path)
    image = nib.Nifti1Image(brain((8, 8, 8)), None)
    image.set_sform(np.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), code=1)
    nib.save(image, tmp_path / "t1.nii.gz")
    with pytest.raises(StudyError, match="singular"):
        read_study(tmp_path)


def test_float_labels(tmp_path):
    save(tmp_path / "seg.nii.gz", np.full((4, 4, 4), 3.0, np.float32))
    assert read_label_map(tmp_path / "seg.nii.gz").data.dtype == np.uint8
    save(tmp_path / "seg.nii.gz", np.full((4, 4, 4), 0.5, np.float32))
    with pytest.raises(StudyError, match="not whole numbers"):
        read_label_map(tmp_path / "seg.nii.gz")
    save(tmp_path / "seg.nii.gz", np.full((4, 4, 4), -1, np.int16))
    with pytest.raises(StudyError, match="not whole numbers"):
        read_label_map(tmp_path / "seg.nii.gz")


def test_single_slices_4d_and_colours(tmp_path):
    save(tmp_path / "t1.nii.gz", brain((9, 9, 1)) + 1)
    with pytest.raises(StudyError, match="single slice"):
        read_study(tmp_path)
    save(tmp_path / "t1.nii.gz", np.ones((4, 4, 4, 3), np.float32))
    with pytest.raises(StudyError, match="one 3D volume"):
        read_study(tmp_path)
    save(tmp_path / "t1.nii.gz", (brain((9, 9, 9)) + 1)[..., None])
    assert read_study(tmp_path).grid.shape == (9, 9, 9)
    rgb = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    save(tmp_path / "t1.nii.gz", rgb)
    with pytest.raises(StudyError, match="RGB"):
        read_study(tmp_path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_huge_declared_shape_in_a_tiny_file_is_refused_before_it_is_allocated(tmp_path, suffix):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float32)
    header.set_data_shape((1024, 1024, 512))
    header["sform_code"], header["vox_offset"], header["magic"] = 1, 352, b"n+1"
    header["srow_x"], header["srow_y"], header["srow_z"] = (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0)
    content = header.binaryblock + b"\0" * 100
    path = tmp_path / f"t1{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    code = (
        "import sys; from pathlib import Path; from napari_brainmvp.io import read_image\n"
        "from napari_brainmvp.errors import FileError\n"
        "try: read_image(Path(sys.argv[1]))\n"
        "except FileError as e: print(e); print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "does not fit in the file" in done.stdout
    assert int(done.stdout.split()[-1]) < 600_000  # kilobytes


@pytest.mark.parametrize("closed", ["t1.nii.gz", "."])
def test_an_unreadable_file(tmp_path, closed):
    study = tmp_path / "study"
    study.mkdir()
    save(study / "t1.nii.gz", brain())
    (study / closed).chmod(0)
    code = (
        "from napari_brainmvp.io import find_studies, read_image, read_study\n"
        "from napari_brainmvp.errors import FileError\n"
        "for read in (read_image, read_study, find_studies):\n"
        "    try: read(path)\n    except FileError as e: print(e)\n"
    )
    said = without_privilege(study / "t1.nii.gz", code).splitlines()
    (study / closed).chmod(0o755)
    assert len(said) == 3
    assert all("permissions" in line or "not a folder" in line for line in said)


def test_a_closed_place_for_results(tmp_path):
    save(tmp_path / "case_t1.nii.gz", brain())
    closed = tmp_path / "closed"
    closed.mkdir()
    old = closed / "seg.nii.gz"
    old.touch()
    closed.chmod(0)
    command = (
        "from napari_brainmvp.cli.app import main\nfrom napari_brainmvp.io import make_folder, write_text_atomic\n"
        "from napari_brainmvp.errors import FileError\n"
        "for place in (path, path / 'on' / 'and', path.with_name(251 * 'x')):\n"
        "    for write in (write_text_atomic, make_folder):\n"
        "        try: write(place, '')\n        except FileError as e: print(e)\n"
        "sys.argv[1:] = ['segment', str(path.parent.parent / 'case_t1.nii.gz'), '--out', str(path)]\nmain()\n"
    )
    said = without_privilege(old, command).splitlines()
    closed.chmod(0o755)
    assert len(said) == 7
    assert all("cannot be written (" in line for line in said[:6]), said
    assert said[6].startswith(f"brainmvp: {old}: Permission denied")


def test_a_full_disk_leaves_nothing_and_keeps_the_old_file(tmp_path):
    """The process may write no more than 20 kB to a file: the kernel refuses the rest, as a full disk does."""
    old = tmp_path / "seg.nii.gz"
    old.write_bytes(b"the user's old file")
    code = (
        "import resource, signal, sys, numpy as np; from pathlib import Path\n"
        "from napari_brainmvp.io import write_label_map; from napari_brainmvp.study import Grid\n"
        "from napari_brainmvp.errors import FileError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "data = np.random.default_rng(0).integers(0, 255, (64, 64, 64)).astype('u1')\n"
        "try: write_label_map(Path(sys.argv[1]), data, Grid(data.shape, np.eye(4)))\nexcept FileError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(old)], capture_output=True, text=True, check=True)
    assert "cannot be written" in done.stdout
    assert old.read_bytes() == b"the user's old file"
    assert list(tmp_path.iterdir()) == [old]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def write() -> None:
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []


def test_results_need_a_nifti_name(tmp_path):
    with pytest.raises(FileError, match=r"\.nii"):
        write_label_map(tmp_path / "x.png", np.zeros((2, 2, 2), np.uint8), Grid((2, 2, 2), np.eye(4)))


@pytest.mark.parametrize("shape", [(1, 2), (0, 1, 2), (1, 2, 3, 4)])
def test_grids_are_three_dimensional(shape):
    with pytest.raises(BrainMVPError):
        Grid(shape, np.eye(4))


def test_a_damaged_nrrd(tmp_path):
    (tmp_path / "t1.nrrd").write_bytes(b"NRRD0004\ntype: float\ndimension: 3\nsizes: 900 900 900\nencoding: raw\n\nab")
    with pytest.raises(FileError, match=r"does not fit|valid NRRD"):
        read_image(tmp_path / "t1.nrrd")
    (tmp_path / "t1.nrrd").write_bytes(b"")
    with pytest.raises(FileError, match="it is empty"):
        read_image(tmp_path / "t1.nrrd")


@pytest.mark.parametrize("said", ["data file: ../x.raw\n", "datafile: ../x.raw\ndata file: x.raw\n"])
def test_a_header_does_not_lead_out_of_its_folder(tmp_path, said):
    header = f"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 4 4 4\nencoding: raw\n{said}\n"
    (tmp_path / "study").mkdir()
    path = tmp_path / "study" / "t1.nhdr"
    path.write_text(header)
    for folder in (tmp_path, tmp_path / "study"):
        (folder / "x.raw").write_bytes(b"x" * 64)
    for ask in (read_image, image_files):
        with pytest.raises(FileError, match="outside its folder"):
            ask(path)
