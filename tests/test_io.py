"""Reading and writing: names, formats, headers."""

import datetime
import json
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from conftest import brain, ordinary_user, save, without_privilege
from napari_brainmvp.errors import FileError, StudyError
from napari_brainmvp.io import (
    by_subject,
    find_studies,
    guess_modality,
    is_label_name,
    read_datalist,
    read_image,
    read_label_map,
    read_study,
    write_image,
    write_label_map,
)
from napari_brainmvp.study import Grid, modality

NAMES = {
    "t1": "BraTS-GLI-00000-000-t1n Brats18_2013_23_1_t1 sub-01_T1w t1_mprage IXI002-Guys-0828-T1 t1_pre_contrast "
    "sub-01_acq-highres_T1w AX_T1_SE sag_MPRAGE T1 3D_BRAVO t1_native_tra",
    "t1c": "BraTS-GLI-00000-000-t1c Brats18_2013_23_1_t1ce sub-01_ce-gadolinium_T1w t1_mprage_gd T1_SE_post T1Gd "
    "AX_T1_POST_GAD patient26_T1ce T1-km t1+c_tra mprage_post",
    "t2": "BraTS-GLI-00000-000-t2w Brats18_2013_23_1_t2 sub-01_T2w AX_T2_TSE T2",
    "flair": "BraTS-GLI-00000-000-t2f Brats18_2013_23_1_flair sub-01_FLAIR T2_FLAIR t2_tirm_dark-fluid_tra FLAIR_3D",
    "dwi": "sub-strokecase0001_ses-0001_dwi ep2d_diff_trace DWI_b1000 ep2d_diff_TRACEW",
    "adc": "sub-strokecase0001_ses-0001_adc ep2d_diff_ADC ADC_map dADC",
    "mra": "3D_TOF IXI002-Guys-0828-MRA TOF_angio sub-01_angio",
    "pd": "IXI002-Guys-0828-PD sub-01_PDw proton_density",
}


@pytest.mark.parametrize(("key", "name"), [(key, name) for key, names in NAMES.items() for name in names.split()])
def test_the_modality_is_told_from_the_name(key, name):
    found = guess_modality(f"/somewhere/t1/{name}.nii.gz")
    assert found is not None
    assert found.key == key


@pytest.mark.parametrize(
    "study", ["case-post", "case_gd", "post-op-01", "patient_ce_1", "flair-01", "post", "sub-post", "seg-01"]
)
def test_what_a_study_is_called_says_nothing_of_its_scans(tmp_path, study, monkeypatch):
    folder = tmp_path / study
    folder.mkdir()
    keys = ("t1", "t1c", "t2", "flair", "swi")
    for key in keys:
        save(folder / f"{study}_{key}.nii.gz", brain())
    monkeypatch.chdir(folder)
    for source in (folder, Path()):
        files = find_studies(source)[0]
        assert {key: path.name.split("_")[-1] for key, path in files.scans.items()} == {
            key: f"{key}.nii.gz" for key in keys[:4]
        }
        assert "swi" in files.warnings[0]
    bids = f"sub-{study.replace('-', '').replace('_', '')}_ses-post_T1w.nii.gz"
    assert str(guess_modality(bids)) == "t1"


def test_a_folder_called_by_a_modality_may_say_it():
    assert str(guess_modality("T1/T1_post.nii.gz")) == "t1c"
    assert str(guess_modality("IXI002-T1/IXI002-T1_brain.nii.gz")) == "t1"


@pytest.mark.parametrize("name", ["photo", "pdf_scan", "t10", "t21", "updated", "cat1", "scan_003", "adcock"])
def test_other_words_are_no_modality(name):
    assert guess_modality(f"{name}.nii.gz") is None


@pytest.mark.parametrize("name", ["x-seg.nii.gz", "sub-01_dseg.nii.gz", "lesion_mask.nii", "labels.nrrd"])
def test_labels_are_told_from_the_name(name):
    assert is_label_name(name)


def test_a_study_folder(study_folder):
    save(study_folder / "x-seg.nii.gz", (brain() > 100).astype(np.uint8))
    study = read_study(study_folder)
    assert list(study.scans) == ["t1", "t1c", "t2", "flair"]
    assert study.name == "BraTS-GLI-00001-000"
    assert study.grid.axcodes == ("L", "P", "S")
    assert study.on_one_grid
    assert study.labels is not None
    assert set(np.unique(study.labels.data)) == {0, 1}


def test_modalities_can_be_said(study_folder):
    odd = study_folder / "scan7.nii.gz"
    save(odd, brain(seed=9))
    study = read_study(study_folder, modalities={"t1c": odd, "SWI": study_folder / "BraTS-GLI-00001-000-t2f.nii.gz"})
    assert study.scans["t1c"].path == odd
    assert "swi" in study.scans
    assert "flair" not in study.scans


def test_datalist_entries_are_held_inside_their_base(study_folder, tmp_path):
    entry = {"image": [f"{study_folder.name}/{p.name}" for p in sorted(study_folder.iterdir())]}
    assert len(read_study(entry, base=tmp_path).scans) == 4
    with pytest.raises(FileError, match="lies outside"):
        read_study({"image": ["../../etc/passwd_t1.nii.gz"]}, base=study_folder)
    with pytest.raises(StudyError, match="image"):
        read_study({"label": "x"}, base=study_folder)


def test_find_studies_in_bids_and_plain_trees(tmp_path):
    for subject in ("sub-01", "sub-02"):
        save(tmp_path / "bids" / subject / "ses-1" / "anat" / f"{subject}_ses-1_T1w.nii.gz", brain())
        save(tmp_path / "bids" / subject / "ses-1" / "dwi" / f"{subject}_ses-1_dwi.nii.gz", brain())
    save(tmp_path / "plain" / "case7" / "flair.nii.gz", brain())
    found = {s.name: sorted(s.scans) for s in find_studies(tmp_path)}
    assert found == {"sub-01_ses-1": ["dwi", "t1"], "sub-02_ses-1": ["dwi", "t1"], "case7": ["flair"]}


def test_a_folder_that_cannot_be_read_is_a_problem_and_the_rest_is_found(tmp_path):
    for name in ("case1", "case2", "case3"):
        save(tmp_path / name / "t1.nii.gz", brain())
    series = tmp_path / "case3" / "series"
    series.mkdir()
    for closed, left in ((tmp_path / "case2", ["case1", "case3"]), (series, ["case1", "case2", "case3"])):
        problems: list[tuple[str, str]] = []
        with ordinary_user(closed):
            assert [s.name for s in find_studies(tmp_path, problems)] == left
            with pytest.raises(FileError, match="cannot be read"):
                read_study(closed if closed == tmp_path / "case2" else closed.parent)
        assert [name for name, _ in problems] == [closed.name]
        assert f"{closed} cannot be read" in problems[0][1]
    with ordinary_user(tmp_path), pytest.raises(FileError, match="cannot be read"):
        find_studies(tmp_path)


def test_nifti_round_trip_keeps_header_and_integers(tmp_path):
    affine = nib.affines.from_matvec(np.diag([0.9, 1.1, 5.0]), [1, 2, 3])
    turn = np.deg2rad(11)
    affine[:3, :3] = (
        np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]) @ (affine[:3, :3])
    )
    image = nib.Nifti1Image(brain((20, 22, 6)), None)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=4)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, tmp_path / "t1.nii.gz")
    data, grid, _ = read_image(tmp_path / "t1.nii.gz")
    labels = (np.arange(data.size).reshape(data.shape) % 300).astype(np.uint16)
    write_label_map(tmp_path / "out.nii.gz", labels, grid, like=tmp_path / "t1.nii.gz")
    back, source = nib.load(tmp_path / "out.nii.gz"), nib.load(tmp_path / "t1.nii.gz")
    np.testing.assert_array_equal(np.asarray(back.dataobj), labels)
    assert back.shape == source.shape
    for get in ("get_sform", "get_qform"):
        np.testing.assert_array_equal(getattr(back, get)(), getattr(source, get)())
    np.testing.assert_array_equal(back.header.get_zooms(), source.header.get_zooms())
    for field in ("sform_code", "qform_code", "xyzt_units"):
        assert back.header[field] == source.header[field]
    again = read_label_map(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(again.data, labels)
    assert again.grid.same_as(grid)


def test_images_are_written_as_they_are(tmp_path):
    grid = Grid((4, 5, 6), np.diag([2.0, 2, 2, 1]))
    values = np.random.default_rng(0).random((4, 5, 6)).astype(np.float32)
    write_image(tmp_path / "p.nii", values, grid, description="imputed FLAIR")
    back = nib.load(tmp_path / "p.nii")
    np.testing.assert_array_equal(np.asarray(back.dataobj), values)
    assert bytes(back.header["descrip"].tobytes()).startswith(b"imputed FLAIR")


def test_nrrd_is_turned_from_lps(tmp_path):
    data = brain((10, 12, 8))
    directions = np.array([[0, 1.5, 0], [-1.0, 0, 0], [0, 0, 2.0]])
    header = {"space": "left-posterior-superior", "space directions": directions, "space origin": [5.0, 6.0, 7.0]}
    nrrd.write(str(tmp_path / "t2.nrrd"), data, header)
    values, grid, _ = read_image(tmp_path / "t2.nrrd")
    np.testing.assert_allclose(values, data)
    world_lps = np.array([5.0, 6, 7]) + 2 * directions[0] + 3 * directions[1] + 4 * directions[2]
    np.testing.assert_allclose(grid.to_world([2, 3, 4]), world_lps * [-1, -1, 1])


def write_series(folder, slices=6, rows=8, columns=10, description="t2_tse", uid=None, agent="") -> np.ndarray:
    """Write a DICOM series out of order; returns the array (column, row, slice)."""
    folder.mkdir(parents=True, exist_ok=True)
    uid = uid or generate_uid()
    data = np.random.default_rng(1).integers(0, 1000, (columns, rows, slices)).astype(np.uint16)
    for k in reversed(range(slices)):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        ds.SeriesInstanceUID, ds.SeriesDescription, ds.Modality = uid, description, "MR"
        ds.ContrastBolusAgent = agent
        ds.ContentDate = datetime.date(2020, 1, 1).strftime("%Y%m%d")
        ds.ImagePositionPatient = [-20.0, 30.0, 5.0 + 4.0 * k]
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing = [1.5, 0.8]
        ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = rows, columns, 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.RescaleSlope, ds.RescaleIntercept = "2", "-3"
        ds.PixelData = data[:, :, k].T.tobytes()
        pydicom.dcmwrite(folder / f"im{(k * 7) % 11:03d}.dcm", ds, enforce_file_format=True)
    return data


def test_a_dicom_series_is_sorted_scaled_and_turned(tmp_path):
    data = write_series(tmp_path / "study" / "series7")
    study = read_study(tmp_path / "study")
    scan = study.scans["t2"]
    np.testing.assert_allclose(scan.data, 2.0 * data - 3)
    lps = np.array([-20 + 0.8 * 2, 30 + 1.5 * 3, 5 + 4.0 * 4])
    np.testing.assert_allclose(scan.grid.to_world([2, 3, 4]), lps * [-1, -1, 1])


def test_two_series_in_one_folder_are_refused(tmp_path):
    write_series(tmp_path / "t1", slices=2)
    for path in (tmp_path / "t1").iterdir():
        path.rename(path.with_name("first_" + path.name))
    write_series(tmp_path / "t1", slices=2)
    with pytest.raises(StudyError, match="several DICOM series"):
        read_study(tmp_path / "t1")


def test_missing_slices_are_noticed(tmp_path):
    write_series(tmp_path / "t1", slices=6)
    (tmp_path / "t1" / "im010.dcm").unlink()  # slice 3
    with pytest.raises(StudyError, match="evenly spaced"):
        read_study(tmp_path / "t1")


def test_an_unreadable_slice_at_the_end_of_a_series_is_noticed(tmp_path):
    write_series(tmp_path / "t1", slices=6)
    last = tmp_path / "t1" / "im002.dcm"  # slice 5
    last.chmod(0)
    code = (
        "from napari_brainmvp.io import read_image\nfrom napari_brainmvp.errors import FileError\n"
        "try: print(read_image(path.parent)[0].shape)\nexcept FileError as e: print(e)\n"
    )
    assert "may not be read" in without_privilege(last, code)


@pytest.mark.parametrize("size", [0, 100, 500, 700])
def test_a_slice_at_the_end_that_is_cut_short_is_noticed(tmp_path, size):
    write_series(tmp_path / "t1", slices=6)
    last = tmp_path / "t1" / "im002.dcm"
    last.write_bytes(last.read_bytes()[:size])
    with pytest.raises(FileError, match=r"cut short|cannot be read"):
        read_study(tmp_path / "t1")
    last.unlink()
    (tmp_path / "t1" / "notes.txt").touch()
    for path in (tmp_path / "t1").glob("*.dcm"):
        path.rename(path.with_suffix(""))  # and some have none
    (tmp_path / "t1" / "VERSION").write_text("1.2\n")
    assert read_study(tmp_path / "t1").grid.shape == (10, 8, 5)


@pytest.mark.parametrize(
    ("said", "agent", "key"),
    [
        ("AX T2 FLAIR BRAIN W/WO CONTRAST", "", "flair"),
        ("AX T1 SE/POST", "", "t1c"),
        ("AX T1", "Gadovist", "t1c"),
        ("AX T2", "Dotarem", "t2"),
        ("AX T1", "NONE", "t1"),
    ],
)
def test_what_a_protocol_says_of_a_series(tmp_path, said, agent, key):
    write_series(tmp_path / "study" / "SE0001", description=said, agent=agent)
    assert list(read_study(tmp_path / "study").scans) == [key]


def test_a_mask_that_is_no_label_map_stays_behind(tmp_path):
    save(tmp_path / "case_t1.nii.gz", brain())
    save(tmp_path / "brain_mask.nii.gz", np.full((40, 44, 36), 0.7, np.float32))
    study = read_study(tmp_path)
    assert study.labels is None
    assert "brain_mask.nii.gz is not a label map" in study.warnings[-1]
    entry = {"image": ["case_t1.nii.gz"], "label": "brain_mask.nii.gz"}
    with pytest.raises(StudyError, match="not a label map"):
        read_study(entry, base=tmp_path)


def test_labels_that_a_tool_has_scaled_to_short_integers(tmp_path):
    labels = np.zeros((12, 12, 12), np.float32)
    labels[2:8], labels[8:10] = 1, 4
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    image = nib.Nifti1Image(labels, np.eye(4), header)
    nib.save(image, tmp_path / "seg.nii.gz")
    assert (np.asarray(nib.load(tmp_path / "seg.nii.gz").dataobj) != labels).any()
    np.testing.assert_array_equal(read_label_map(tmp_path / "seg.nii.gz").data, labels)


def test_nifti_2_and_names_in_capitals(tmp_path):
    nib.save(nib.Nifti2Image(brain((20, 20, 20)), np.eye(4)), tmp_path / "two_t1.nii.gz")
    (tmp_path / "two_t1.nii.gz").rename(tmp_path / "TWO_T1.NII.GZ")
    np.testing.assert_array_equal(read_image(tmp_path / "TWO_T1.NII.GZ")[0], brain((20, 20, 20)))


def test_a_diffusion_series_of_bids_stays_behind(tmp_path):
    for place in ("anat/sub-01_T1w", "dwi/sub-01_dwi", "dwi/sub-01_adc"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / f"{place}.nii.gz", brain())
    series = np.repeat(brain()[..., None], 3, 3)
    save(tmp_path / "dwi/sub-01_dwi.nii.gz", series)
    (tmp_path / "dwi/sub-01_dwi.bval").write_text("0 1000 1000\n")
    assert list(read_study(tmp_path).scans) == ["t1", "adc"]


def test_an_image_beside_the_studies_does_not_hide_them(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        save(tmp_path / name / f"{name}_t1.nii.gz", brain())
    save(tmp_path / "atlas_T1.nii.gz", brain())
    problems = []
    assert [s.name for s in find_studies(tmp_path, problems)] == ["a", "b", "c"]
    assert [name for name, _ in problems] == [tmp_path.name]
    assert "atlas_T1.nii.gz" in problems[0][1]


@pytest.mark.parametrize(
    ("places", "names", "people"),
    [
        (["P0/MRI", "P1/MRI"], ["P0_ses-MRI", "P1_ses-MRI"], 2),
        (["P0/post", "P0/pre", "P1/pre"], ["P0_ses-post", "P0_ses-pre", "P1_ses-pre"], 2),
        (["s1/P0", "s1/P1", "s1/P2", "s2/P1"], ["s1_P0", "s1_P1", "s1_P2", "s2_P1"], 4),
        (
            ["s1/sub-0/ses-1", "s1/sub-0/ses-2", "s2/sub-0/ses-1"],
            ["s1_sub-0_ses-1", "s1_sub-0_ses-2", "s2_sub-0_ses-1"],
            2,
        ),
        (["P0/MRI", "P1/scan"], ["MRI", "scan"], 2),
    ],
)
def test_studies_whose_folders_have_one_name_are_told_apart(tmp_path, places, names, people):
    for place in places:
        (tmp_path / place).mkdir(parents=True)
        save(tmp_path / place / "t1.nii.gz", brain())
    found = [study.name for study in find_studies(tmp_path)]
    assert found == names
    assert len(by_subject(found)) == people


def test_studies_of_a_list_in_one_folder_are_told_apart(tmp_path):
    listed = [{"image": [f"c{k}_{m}.nii.gz" for m in ("t1", "t2")]} for k in range(2)]
    (tmp_path / "list.json").write_text(json.dumps(listed))
    assert [study.name for study in read_datalist(tmp_path / "list.json")[0]] == ["c0", "c1"]
    (tmp_path / "list.json").write_text(json.dumps([{"image": [f"P{k}/MRI/t1.nii"]} for k in range(2)]))
    assert [study.name for study in read_datalist(tmp_path / "list.json")[0]] == ["P0_ses-MRI", "P1_ses-MRI"]


def test_folders_that_are_called_like_those_of_bids_are_looked_into(tmp_path):
    for place in ("anat/P1", "anat/P2", "sub-01/anat/run-1"):
        (tmp_path / place).mkdir(parents=True)
        save(tmp_path / place / "t1.nii.gz", brain())
    assert [study.name for study in find_studies(tmp_path)] == ["P1", "P2", "run-1"]


def test_a_study_with_intermediate_results_in_folders_stays_one_study(tmp_path):
    for place in (".", "raw", "mni"):
        (tmp_path / place).mkdir(exist_ok=True)
        save(tmp_path / place / "t1.nii.gz", brain())
    save(tmp_path / "flair.nii.gz", brain())
    assert [sorted(study.scans) for study in find_studies(tmp_path)] == [["flair", "t1"]]


def test_a_link_to_a_study_is_the_same_study(tmp_path):
    for name in ("b", "c"):
        (tmp_path / name).mkdir()
        save(tmp_path / name / f"{name}_t1.nii.gz", brain())
    (tmp_path / "a-newest").symlink_to("b")
    (tmp_path / "self").symlink_to(".")
    assert [s.name for s in find_studies(tmp_path)] == ["b", "c"]


def test_modality_names():
    assert modality("T1-Gd").key == "t1c"
    assert modality("SWI").key == "swi"
    with pytest.raises(StudyError):
        modality("--")
