"""A small study with a lesion, for tests of annotation: big enough for the network, small enough for a second."""

import numpy as np

from napari_brainmvp.study import Grid, LabelMap, Scan, Study, modality

SHAPE = (40, 48, 36)


def lesion_study(folder=None, name="case", seed=0, affine=None, keys=("t1", "flair"), shape=SHAPE) -> Study:
    """A ball of tissue with a brighter (FLAIR) and darker (T1) ball in it; the truth as labels 1 (tissue) and 2."""
    from napari_brainmvp.io import read_study, write_image, write_label_map

    rng = np.random.default_rng(seed)
    index = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"), -1)
    brain = np.linalg.norm(index, axis=-1) < 0.9
    lesion = np.linalg.norm(index - [0.2, 0.1, 0.0], axis=-1) < 0.35
    grid = Grid(shape, np.diag([-1.0, -1.0, 1.0, 1.0]) if affine is None else affine)
    scans = {}
    for key, contrast in zip(keys, (-40, 60, 30, 50), strict=False):
        data = (100 + contrast * lesion + rng.normal(0, 6, shape)) * brain
        scans[key] = Scan(modality(key), np.maximum(data, brain).astype(np.float32), grid)
    truth = np.where(lesion, 2, brain).astype(np.uint8)
    if folder is None:
        return Study(name, scans, labels=LabelMap(truth, grid))
    for key, scan in scans.items():
        write_image(folder / name / f"{name}_{key}.nii.gz", scan.data, grid)
    write_label_map(folder / "truth" / f"{name}.nii.gz", truth, grid)
    return read_study(folder / name)


def truth(shape=SHAPE) -> np.ndarray:
    return lesion_study(shape=shape).labels.data


def strokes(shape=SHAPE) -> np.ndarray:
    """A stroke of each class on the middle slice, on the study's grid."""
    labels = np.zeros(shape, np.int64)
    k = shape[2] // 2
    labels[shape[0] // 2 : shape[0] // 2 + 8, shape[1] // 2 + 1 : shape[1] // 2 + 4, k] = 2
    labels[5:35, 12:14, k] = 1
    return labels * (truth(shape) > 0)
