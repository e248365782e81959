"""Convert a network, fine-tune it and reparameterize it: a minute on a laptop.

A network trained on the embedded digits stands in for pretrained weights. With internet access,
``ModelSpec("convnext_atto", pretrained=True)`` starts from timm's weights instead.
"""

# --8<-- [start:body]
import torch

import widefield
from widefield.train import ConversionSpec, DataSpec, GroupSpec, ModelSpec, OptimizerSpec, Recipe, train

small = {"patch_size": 2, "depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "ls_init_value": None}
common = {"data": DataSpec("digits", {"size": 32}), "epochs": 3, "batch_size": 64, "workers": 0, "output": "runs"}
plain = train(Recipe(name="plain", model=ModelSpec("convnext_atto", small), optimizer=OptimizerSpec(lr=4e-3), **common))

tuned = train(
    Recipe(
        name="tuned",
        model=ModelSpec("convnext_atto", small, pretrained=str(plain.folder)),
        conversion=ConversionSpec("morf", "stages.*.conv_dw", {"kernel_sizes": [3, 5, 7]}),  # keeps the function
        freeze="stem.*",
        optimizer=OptimizerSpec(lr=1e-3, args={"layer_decay": 0.8}, groups=[GroupSpec("*.router.*", lr_scale=10)]),
        **common,
    )
)
images = torch.randn(4, 3, 32, 32)
fused = widefield.reparameterize(tuned.model.cpu(), images)  # verified; raises if the outputs differed
print(f"plain {plain.metrics['top1']:.3f}, tuned {tuned.metrics['top1']:.3f}")
# --8<-- [end:body]
