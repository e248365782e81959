"""Serve a network with mixtures through torch.compile and ONNX: one graph for every batch size.

A small network on random weights stands in for a trained one; `widefield export RUN` does the same from the shell.
"""

# --8<-- [start:body]
import tempfile
from pathlib import Path

import timm
import torch

import widefield

model = timm.create_model("morf_convnext_tiny", depths=(1, 1, 2, 1), dims=(16, 24, 32, 40), num_classes=10).eval()
images = torch.randn(4, 3, 64, 64)
fused = widefield.reparameterize(model, images, report=print)  # verified; the tables list every layer

serve = torch.compile(fused)
with torch.inference_mode():
    for count in (4, 2, 7):  # the first call compiles, the second once more, for any batch size from 2 on
        batch = torch.randn(count, 3, 64, 64)
        scores = serve(batch)
        print(f"{count} images: compiled and eager differ by {(scores - fused(batch)).abs().max():.1e}")

folder = Path(tempfile.mkdtemp())
done = widefield.export(fused, folder / "model.onnx", images)  # runs in onnxruntime without widefield; verified
print(f"ONNX and eager differ by {done.relative:.1e} of the outputs' scale; nodes: {dict(done.operators)}")
answers = widefield.deploy.load(folder / "model.onnx")(images)
# --8<-- [end:body]
