"""Average precision by the rules of COCO's evaluation, in numpy: overlaps, matches and curves.

Whole sets are measured by :mod:`widefield.tasks`, a few images before and after a change of a model by
:mod:`widefield.surgery`.
"""
