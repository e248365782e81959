"""Skeletons: those that come with the library, YAML files, and what is refused."""

import json

import pytest
import yaml

from widefield.data import Scenes, Skeleton


def test_the_skeleton_of_coco_is_the_published_one():
    coco = Skeleton.load("coco")
    assert len(coco) == 17
    assert coco.names[0] == "nose"
    assert coco.names[5:7] == ("left_shoulder", "right_shoulder")
    assert coco.swapped == (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)
    tenths = [26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]  # pycocotools, of a thousandth
    assert coco.sigmas == tuple(value / 1000 for value in tenths)
    published = [[16, 14], [14, 12], [17, 15], [15, 13], [12, 13], [6, 12], [7, 13], [6, 7], [6, 8], [7, 9], [8, 10],
                 [9, 11], [2, 3], [1, 2], [1, 3], [2, 4], [3, 5], [4, 6], [5, 7]]  # fmt: skip
    assert [[first + 1, second + 1] for first, second in coco.links] == published
    assert coco.upper == tuple(range(11))
    assert coco.lower == tuple(range(11, 17))


def test_the_skeleton_of_scenes_is_that_of_the_set():
    scenes = Skeleton.load("scenes")
    assert scenes.names == Scenes.keypoint_names
    assert scenes.swapped == Scenes.keypoints_flipped
    assert scenes.lower == ()


@pytest.mark.parametrize("name", ["coco", "scenes"])
def test_a_skeleton_survives_json(name):
    skeleton = Skeleton.load(name)
    assert Skeleton.from_dict(json.loads(json.dumps(skeleton.to_dict()))) == skeleton
    assert Skeleton.load(skeleton) is skeleton


def write(folder, content):
    path = folder / "crane.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_a_file_describes_any_skeleton(tmp_path):
    names = ["beak", "left_wing", "right_wing"]
    path = write(tmp_path, {"names": names, "swap": [["right_wing", "left_wing"]], "links": [["beak", "left_wing"]]})
    skeleton = Skeleton.load(path)
    assert skeleton == Skeleton(tuple(names), (0, 2, 1), (1 / 3,) * 3, ((0, 1),))
    assert Skeleton.load(str(path)) == skeleton
    path = write(tmp_path, {"names": names, "sigmas": {"left_wing": 0.2, "beak": 0.1, "right_wing": 1}, "upper": names})
    assert Skeleton.load(path).sigmas == (0.1, 0.2, 1.0)
    assert Skeleton.load(path).upper == (0, 1, 2)
    assert Skeleton.load(write(tmp_path, {"names": names, "sigmas": 0.05})).sigmas == (0.05,) * 3
    assert Skeleton.load(write(tmp_path, {"names": names, "sigmas": [0.1, 0.2, 1]})).sigmas == (0.1, 0.2, 1.0)


NAMES = ["beak", "left_wing", "right_wing"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("names: [a", "is not valid: .*expected ',' or ']'"),
        ("", "it must be a mapping with the keys names, swap"),
        ([1, 2], r"it must be a mapping .*got \[1, 2\]"),
        ({"swap": []}, "names must be a list of texts, such as .*got None"),
        ({"names": []}, r"names must be a list of texts.*got \[\]"),
        ({"names": ["a", 3]}, "names must be a list of texts"),
        ({"names": ["a", "a"]}, "names of key points must differ; 'a' is there twice"),
        ({"names": NAMES, "sigma": 0.1}, "unknown key 'sigma'.*Did you mean 'sigmas'"),
        (
            {"names": NAMES, "swap": [["left_wing", "right_win"]]},
            "swap has 'right_win', which is not in names. Did",
        ),
        ({"names": NAMES, "swap": [["left_wing", "left_wing"]]}, "pairs of different key points"),
        (
            {"names": NAMES, "swap": [["left_wing", "beak"], ["left_wing", "right_wing"]]},
            "'left_wing' in two pairs",
        ),
        ({"names": NAMES, "swap": [["left_wing"]]}, r"swap must be pairs of names.*got \['left_wing'\]"),
        ({"names": NAMES, "swap": "left_wing"}, "swap must be a list; got 'left_wing'"),
        ({"names": NAMES, "links": [[0, 1]]}, "links has 0, which is not in names"),
        ({"names": NAMES, "sigmas": {"beak": 0.1}}, "sigmas has no entry for 'left_wing'"),
        ({"names": NAMES, "sigmas": 0}, "the sigma of 'beak' must be a number above 0; got 0"),
        ({"names": NAMES, "sigmas": float("nan")}, "sigmas must be from 0.0"),
        ({"names": NAMES, "sigmas": {"tail": 0.1}}, "sigmas has 'tail', which is not in names"),
        ({"names": NAMES, "sigmas": "wide"}, "sigmas must be a number; got 'wide'"),
        ({"names": NAMES, "sigmas": [0.1, 0.2]}, "sigmas must have one entry per key point, 3; it has 2"),
        ({"names": NAMES, "sigmas": [0.1, "wide", 0.2]}, "the sigma of 'left_wing' must be a number; got 'wide'"),
        ({"names": NAMES, "upper": ["tail"]}, "upper has 'tail'"),
        ({"names": NAMES, "upper": ["beak", "beak"]}, "upper has 'beak' twice"),
        (
            {"names": NAMES, "links": [["left_wing", "beak"], ["beak", "left_wing"]]},
            "links has 'beak' - 'left_wing' twice",
        ),
    ],
)
def test_a_file_that_cannot_be_right_is_refused_by_name_and_part(tmp_path, content, text):
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=text) as raised:
        Skeleton.load(path)
    assert str(path) in str(raised.value)


def test_other_sources_are_refused():
    with pytest.raises(FileNotFoundError, match=r"no skeleton 'cocos': .*Did you mean 'coco'"):
        Skeleton.load("cocos")
    with pytest.raises(TypeError, match="skeleton must be a name or the path of a YAML file; got 17"):
        Skeleton.load(17)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"swapped": (1, 2, 0)}, "swapped must be pairs: 'beak' becomes 'left_wing', which becomes 'right_wing'"),
        ({"swapped": (0, 1)}, "swapped must have one entry per key point, 3; it has 2"),
        ({"swapped": (0, 1, 3)}, "an index in swapped must be from 0 to 2; got 3"),
        ({"links": ((0, 7),)}, "an index in links must be from 0 to 2; got 7"),
        ({"sigmas": (0.1, -1.0, 0.1)}, "the sigma of 'left_wing' must be a number above 0; got -1.0"),
        ({"links": ((0, 1), (1, 2), (0, 1))}, "links has 'beak' - 'left_wing' twice. Leave one out"),
        ({"upper": (2, 1, 2)}, "upper has 'right_wing' twice"),
        ({"names": ()}, "at least one key point"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(changes, text):
    parts = {"names": tuple(NAMES), "swapped": (0, 2, 1), "sigmas": (0.1, 0.1, 0.1), **changes}
    with pytest.raises(ValueError, match=text):
        Skeleton(**parts)
