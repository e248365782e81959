import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from timm.data import ImageNetInfo

from widefield.data import Scales
from widefield.data.conflict import SIXTEEN, ConflictImages, _draw, write_conflicts


def paint(folder, names, side=8, seed=0):
    rng = np.random.default_rng(seed)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return folder


def test_the_sixteen_classes_are_the_published_ones():
    counts = {name: len(indices) for name, indices in SIXTEEN.items()}
    assert counts == {
        "airplane": 1, "bear": 4, "bicycle": 2, "bird": 49, "boat": 5, "bottle": 7, "car": 3, "cat": 6,
        "chair": 4, "clock": 3, "dog": 109, "elephant": 2, "keyboard": 2, "knife": 1, "oven": 1, "truck": 8,
    }  # fmt: skip
    assert len({index for indices in SIXTEEN.values() for index in indices}) == 207
    assert list(SIXTEEN) == sorted(SIXTEEN)
    wordnet = ImageNetInfo("imagenet-1k").index_to_label_name  # timm's own list
    small = {name: " ".join(map(wordnet, indices)) for name, indices in SIXTEEN.items() if len(indices) < 9}
    assert small == {
        "airplane": "n02690373",
        "bear": "n02132136 n02133161 n02134084 n02134418",
        "bicycle": "n02835271 n03792782",
        "boat": "n02951358 n03344393 n03662601 n04273569 n04612504",
        "bottle": "n02823428 n03937543 n03983396 n04557648 n04560804 n04579145 n04591713",
        "car": "n02814533 n03100240 n04285008",
        "cat": "n02123045 n02123159 n02123394 n02123597 n02124075 n02125311",
        "chair": "n02791124 n03376595 n04099969 n04429376",
        "clock": "n02708093 n03196217 n04548280",
        "elephant": "n02504013 n02504458",
        "keyboard": "n03085013 n04505470",
        "knife": "n03041632",
        "oven": "n04111531",
        "truck": "n03345487 n03417042 n03770679 n03796401 n03930630 n03977966 n04461696 n04467665",
    }
    # Of ImageNet's dogs and birds, the published lists omit these.
    assert set(range(151, 269)) - set(SIXTEEN["dog"]) == {151, 192, 204, 227, 242, 251, 258, 260, 264}
    birds = {*range(7, 25), *range(80, 101), *range(127, 147)}
    assert birds - set(SIXTEEN["bird"]) == {7, 9, 17, 21, 84, 85, 86, 97, 134, 146}
    assert not set(SIXTEEN["bird"]) - birds


def test_images_come_in_order_with_the_labels_of_their_names(tmp_path):
    names = ["bear/bear2-cat10.png", "cat/cat7-elephant1.png", "cat/cat10-cat1.png"]
    images = ConflictImages(paint(tmp_path, names), size=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), batch_size=2)
    assert images.classes == tuple(SIXTEEN)
    assert [path.name for path in images.files] == ["bear2-cat10.png", "cat10-cat1.png", "cat7-elephant1.png"]
    first, last = images
    assert (len(images), len(last["image"])) == (3, 1)
    labels = [
        (images.classes[s], images.classes[t]) for b in images for s, t in zip(b["shape"], b["texture"], strict=True)
    ]
    assert labels == [("bear", "cat"), ("cat", "cat"), ("cat", "elephant")]
    pixels = torch.from_numpy(np.array(Image.open(images.files[1]))).permute(2, 0, 1) / 255  # no margin is cropped
    expected = (pixels - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    assert torch.allclose(first["image"][1], expected, atol=1e-6)
    assert ConflictImages(tmp_path, size=5).sample(0)["image"].shape == (3, 5, 5)


def test_other_classes_are_those_of_the_folders(tmp_path):
    paint(tmp_path, ["ring/ring1-old_car2.png", "old_car/old_car1-ring1.png"])
    assert ConflictImages(tmp_path).classes == ("old_car", "ring")
    assert ConflictImages(tmp_path).sample(1)["texture"] == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cat/cat7.png", r"cat7.png is not SHAPEi-TEXTUREj.png"),
        ("cat/cat-dog.png", "is not SHAPEi-TEXTUREj.png"),
        ("cat/cat1-elephnt2.png", r"cat1-elephnt2.png gives the texture 'elephnt'.*Did you mean 'elephant'"),
        ("cat/dog1-cat2.png", "lies in the folder 'cat', and its name gives the shape 'dog'"),
    ],
)
def test_a_wrong_name_is_an_error_that_gives_the_path(name, message, tmp_path):
    paint(tmp_path, ["cat/cat1-dog1.png", name])
    with pytest.raises(ValueError, match=message):
        ConflictImages(tmp_path)


def test_what_is_not_there_or_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder of images .*nowhere.*Expected FOLDER/SHAPE"):
        ConflictImages(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no images"):
        ConflictImages(tmp_path)
    paint(tmp_path, ["cat/cat1-dog1.png"])
    with pytest.raises(TypeError, match="size must be an integer"):
        ConflictImages(tmp_path, size="8")
    (tmp_path / "cat" / "cat1-dog1.png").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"cannot read the image .*cat1-dog1.png"):
        list(ConflictImages(tmp_path))


def test_drawn_images_repeat_to_the_byte_and_can_be_read(tmp_path):
    folder = write_conflicts(tmp_path / "a", per_pair=2)
    images = ConflictImages(folder, size=32, mean=Scales.mean, std=Scales.std)
    assert len(images) == 2 * 8 * 7
    assert images.classes == tuple(sorted(Scales.classes))
    assert all(
        shape != texture for batch in images for shape, texture in zip(batch["shape"], batch["texture"], strict=True)
    )
    again = write_conflicts(tmp_path / "b", per_pair=1)
    other = write_conflicts(tmp_path / "c", per_pair=1, seed=1)
    files = sorted(path.relative_to(again) for path in again.rglob("*.png"))
    assert len(files) == 8 * 7
    assert all((folder / path).read_bytes() == (again / path).read_bytes() for path in files)
    assert not any((folder / path).read_bytes() == (other / path).read_bytes() for path in files)
    for options in ({"size": 31}, {"per_pair": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least"):
            write_conflicts(tmp_path / "d", **options)


def centered(mask, side):
    """Return masks around their center of gravity, bool (side, side)."""
    y, x = ndimage.center_of_mass(mask)
    rows = (np.arange(side) - side // 2 + round(y))[:, None]
    columns = (np.arange(side) - side // 2 + round(x))[None, :]
    inside = (rows >= 0) & (rows < mask.shape[0]) & (columns >= 0) & (columns < mask.shape[1])
    return mask[rows.clip(0, mask.shape[0] - 1), columns.clip(0, mask.shape[1] - 1)] & inside


def templates(side):
    """Return masks of `Scales` at one size in many rotations, and their classes."""
    size = round(1.15 * side)
    drawn = Scales("val", size=size, count=8 * 16, object_sizes=(side, side), clutter=0)
    samples = [drawn[k] for k in range(len(drawn))]
    masks = np.stack([centered(sample["mask"].numpy(), size) for sample in samples])
    return masks, [Scales.classes[sample["label"]] for sample in samples]


def nearest(mask, known):
    masks, names = known
    mask = centered(mask, masks.shape[1])
    overlap = (masks & mask).sum((1, 2)) / (masks | mask).sum((1, 2))
    return names[overlap.argmax()]


def test_the_silhouette_is_of_one_class_and_every_hole_of_the_other():
    size = 160
    large, small = templates(140), templates(25)
    rng = np.random.default_rng(0)
    for k, shape in enumerate(Scales.classes):
        for texture in Scales.classes[k + 1 :] + Scales.classes[:k]:
            pixels, whole, holes = (part.numpy() for part in _draw(shape, texture, size, rng))
            assert nearest(whole, large) == shape
            marks, count = ndimage.label(holes, structure=np.ones((3, 3)))
            sizes = np.bincount(marks.ravel())
            pieces = [m for m in range(1, count + 1) if sizes[m] > 5]  # a crescent's tip may be separate
            assert len(pieces) >= 2
            assert {nearest(marks == m, small) for m in pieces} == {texture}
            areas = sizes[pieces] / small[0][np.array(small[1]) == texture].sum((1, 2)).mean()
            assert ((areas > 0.85) & (areas < 1.15)).all()  # none is cropped
            assert not (ndimage.binary_dilation(holes, iterations=2) & ~whole).any()  # the outline is whole
            # Holes and background look alike, and differ from the shape.
            far = ndimage.binary_dilation(whole, iterations=2)
            filled = ndimage.binary_erosion(whole & ~holes, iterations=1)
            bare = ndimage.binary_erosion(holes, iterations=1)
            ground, solid, hole = (pixels[:, where].mean(1) for where in (~far, filled, bare))
            assert abs(hole - ground).max() < 0.35 * abs(solid - ground).max()
