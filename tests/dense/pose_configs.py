"""Configurations of pose models, with the fields and in the spelling that mmpose 0.29 and 1.3 store in files."""

NAMES = ("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
         "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
         "right_ankle")  # fmt: skip
"""COCO's key points."""

SWAPPED = (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)


def _mirrored(name: str) -> str:
    swaps = {"left": "right", "right": "left"}
    side, _, rest = name.partition("_")
    return f"{swaps[side]}_{rest}" if rest else ""


def version_0(
    names: tuple[str, ...] = NAMES,
    *,
    head: str = "TopdownHeatmapSimpleHead",
    target: str = "sigma=2",
    post_process: str = "default",
    encoding: str = "",
    shift: bool = True,
) -> str:
    """Return the text that mmpose 0.x stores."""
    points = ",\n".join(
        f"            {index}:\n            dict(name='{name}', id={index}, color=[51, 153, 255], type='upper', "
        f"swap='{_mirrored(name)}')"
        for index, name in enumerate(names)
    )
    return f"""dataset_info = dict(
    dataset_name='coco',
    keypoint_info=dict({{
{points}
    }}),
    skeleton_info=dict({{0: dict(link=('left_ankle', 'left_knee'), id=0, color=[0, 255, 0])}}))
optimizer = dict(type='Adam', lr=0.001)
model = dict(
    type='TopDown',
    backbone=dict(type='MogaNet_feat', arch='small', stem_norm_cfg=dict(type='SyncBN')),
    keypoint_head=dict(
        type='{head}',
        in_channels=512,
        out_channels=17,
        loss_keypoint=dict(type='JointsMSELoss', use_target_weight=True)),
    train_cfg=dict(),
    test_cfg=dict(
        flip_test=True,
        post_process='{post_process}',
        shift_heatmap={shift},
        {encoding}
        modulate_kernel=11))
data_cfg = dict(
    image_size=[192, 256],
    heatmap_size=[48, 64],
    num_output_channels=17)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TopDownGetRandomScaleRotation', rot_factor=40, scale_factor=0.5),
    dict(
        type='NormalizeTensor',
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225]),
    dict(type='TopDownGenerateTarget', {target})
]
"""


def version_1(
    coding: str = "type='MSRAHeatmap', sigma=3",
    *,
    head: str = "HeatmapHead",
    rgb: bool = True,
    shift: bool = True,
    mean: str = "[123.675, 116.28, 103.53]",
) -> str:
    """Return the text that mmpose 1.x stores, with sorted fields as newer mmengine writes them."""
    coding = f"dict(heatmap_size=(72, 96), input_size=(288, 384), {coding})"
    return f"""auto_scale_lr = dict(base_batch_size=512)
codec = {coding}
model = dict(
    backbone=dict(
        depth=50,
        init_cfg=dict(checkpoint='torchvision://resnet50', type='Pretrained'),
        type='ResNet'),
    data_preprocessor=dict(
        bgr_to_rgb={rgb},
        mean={mean},
        std=[58.395, 57.12, 57.375],
        type='PoseDataPreprocessor'),
    head=dict(
        decoder={coding},
        in_channels=2048,
        loss=dict(type='KeypointMSELoss', use_target_weight=True),
        out_channels=17,
        type='{head}'),
    test_cfg=dict(flip_mode='heatmap', flip_test=True, shift_heatmap={shift}),
    type='TopdownPoseEstimator')
test_cfg = dict()
"""


def dataset_meta(names: tuple[str, ...] = NAMES, swapped: tuple[int, ...] = SWAPPED) -> dict[str, object]:
    """Return what mmpose 1.x stores about a data set, without its arrays."""
    return {
        "dataset_name": "coco",
        "num_keypoints": len(names),
        "keypoint_id2name": dict(enumerate(names)),
        "keypoint_name2id": {name: index for index, name in enumerate(names)},
        "flip_indices": list(swapped),
    }
