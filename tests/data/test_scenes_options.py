"""How the set of generated scenes is created, and which options it refuses."""

import pytest

from widefield.data import Scenes, create, create_both


def test_recipes_create_the_set_by_name():
    train, val = create_both("scenes", size=64, count=3)
    assert isinstance(train, Scenes)
    assert len(train) == len(val) == 3
    assert (len(Scenes("train")), len(Scenes("val"))) == (4000, 500)
    with pytest.raises(TypeError, match=r"has no option 'object_size'.*Did you mean 'object_sizes'"):
        create("scenes", "val", object_size=(4, 8))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"size": 31}, ValueError, "size must be at least 32; got 31"),
        ({"count": 0}, ValueError, "count must be at least 1; got 0"),
        ({"seed": -1}, ValueError, "seed must be from 0"),
        ({"objects": 5}, TypeError, "objects must be a pair .*got 5"),
        ({"objects": (5, 4)}, ValueError, r"increasing order; got \(5, 4\)"),
        ({"objects": (0, 4)}, ValueError, "the fewest of objects must be at least 1; got 0"),
        ({"object_sizes": 5}, TypeError, "object_sizes must be a pair .*got 5"),
        ({"object_sizes": (3, 5)}, ValueError, "the smallest of object_sizes must be from 4.*got 3"),
        ({"object_sizes": (20, 8)}, ValueError, r"increasing order.*got \(20, 8\)"),
        ({"object_sizes": (8, 129)}, ValueError, "at most 128 in images.*Draw smaller objects or give a larger size"),
        ({"min_visible": 0}, ValueError, "min_visible must be above 0"),
        ({"min_visible": 1.5}, ValueError, "min_visible must be from 0.0 to 1; got 1.5"),
        ({"clutter": 3}, ValueError, "clutter must be from 0.0 to 2; got 3"),
        ({"camouflage": -1}, ValueError, "camouflage must be from 0.0 to 1; got -1"),
        ({"rotation": 200}, ValueError, "rotation must be from 0.0 to 180; got 200"),
        ({"background": "photo"}, ValueError, "background must be one of 'textures', 'photos'.*Did you mean 'photos'"),
        ({"hflip": 2}, ValueError, "hflip must be from 0.0 to 1; got 2"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, error, text):
    with pytest.raises(error, match=text):
        Scenes("train", **options)


def test_a_wrong_split_is_refused():
    with pytest.raises(ValueError, match="split must be one of 'train', 'val'; got 'test'"):
        Scenes("test")
