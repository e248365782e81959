"""List a published comparison of networks on ImageNet-1K: cited counts, and the matching names in timm's registry.

Source: Siyuan Li, "Convolution Kernel Design and Gated Attention for Modern Convolutional Neural Networks", March 2024,
tables "Comparison of CNNs: ImageNet". Numbers are as printed there. MogaNet is dated by its publication.
"""

from __future__ import annotations

from typing import NamedTuple


class Cited(NamedTuple):
    """A row of the tables."""

    architecture: str
    date: str
    kind: str
    """C: convolutions, T: transformer, H: hybrid."""
    size: int
    """Side of the images in pixels."""
    parameters: float
    """In millions."""
    macs: float
    """Multiply-accumulates in billions; the source says FLOPs."""
    top1: float
    """Percent, on ImageNet-1K, as stated in the papers."""
    note: str
    """"22K": pretrained on ImageNet-22K; "distilled"."""
    name: str
    """Name in timm's registry; empty if neither timm nor this library has the network."""


CITED = (
    Cited("ResNet-18", "CVPR'2016", "C", 224, 11.7, 1.8, 71.5, "", "resnet18"),
    Cited("ShuffleNetV2 2x", "ECCV'2018", "C", 224, 5.5, 0.6, 75.4, "", ""),
    Cited("EfficientNet-B0", "ICML'2019", "C", 224, 5.3, 0.39, 77.1, "", "efficientnet_b0"),
    Cited("RegNetY-800MF", "CVPR'2020", "C", 224, 6.3, 0.8, 76.3, "", "regnety_008"),
    Cited("DeiT-T", "ICML'2021", "T", 224, 5.7, 1.08, 74.1, "", "deit_tiny_patch16_224"),
    Cited("PVT-T", "ICCV'2021", "T", 224, 13.2, 1.6, 75.1, "", ""),
    Cited("T2T-ViT-7", "ICCV'2021", "T", 224, 4.3, 1.2, 71.7, "", ""),
    Cited("ViT-C", "NIPS'2021", "T", 224, 4.6, 1.1, 75.3, "", ""),
    Cited("SReT-T", "ECCV'2022", "T", 224, 4.8, 1.1, 77.6, "distilled", ""),
    Cited("PiT-Ti", "ICCV'2021", "H", 224, 4.9, 0.7, 74.6, "", "pit_ti_224"),
    Cited("LeViT-S", "ICCV'2021", "H", 224, 7.8, 0.31, 76.6, "", "levit_128s"),
    Cited("CoaT-Lite-T", "ICCV'2021", "H", 224, 5.7, 1.6, 77.5, "", "coat_lite_tiny"),
    Cited("Swin-1G", "ICCV'2021", "H", 224, 7.3, 1.0, 77.3, "", ""),
    Cited("MobileViT-S", "ICLR'2022", "H", 256, 5.6, 4.02, 78.4, "", "mobilevit_s"),
    Cited("MobileFormer-294M", "CVPR'2022", "H", 224, 11.4, 0.59, 77.9, "", ""),
    Cited("ConvNext-Xt", "CVPR'2022", "C", 224, 7.4, 0.6, 77.5, "", ""),
    Cited("VAN-B0", "CVMJ'2023", "C", 224, 4.1, 0.88, 75.4, "", "van_b0"),
    Cited("ParC-Net-S", "ECCV'2022", "C", 256, 5.0, 3.48, 78.6, "", ""),
    Cited("MogaNet-XT", "ICLR'2024", "C", 256, 3.0, 1.04, 77.2, "", "moganet_xtiny"),
    Cited("MogaNet-T", "ICLR'2024", "C", 224, 5.2, 1.1, 79.0, "", "moganet_tiny"),
    Cited("MogaNet-T", "ICLR'2024", "C", 256, 5.2, 1.44, 80.0, "", "moganet_tiny"),
    Cited("DeiT-S", "ICML'2021", "T", 224, 22.0, 4.6, 79.8, "", "deit_small_patch16_224"),
    Cited("Swin-T", "ICCV'2021", "T", 224, 28.0, 4.5, 81.3, "", "swin_tiny_patch4_window7_224"),
    Cited("CSWin-T", "CVPR'2022", "T", 224, 23.0, 4.3, 82.8, "", ""),
    Cited("LITV2-S", "NIPS'2022", "T", 224, 28.0, 3.7, 82.0, "", ""),
    Cited("CoaT-S", "ICCV'2021", "H", 224, 22.0, 12.6, 82.1, "", "coat_small"),
    Cited("CoAtNet-0", "NIPS'2021", "H", 224, 25.0, 4.2, 82.7, "", "coatnet_0_224"),
    Cited("UniFormer-S", "ICLR'2022", "H", 224, 22.0, 3.6, 82.9, "", ""),
    Cited("RegNetY-4GF", "CVPR'2020", "C", 224, 21.0, 4.0, 81.5, "", "regnety_040"),
    Cited("ConvNeXt-T", "CVPR'2022", "C", 224, 29.0, 4.5, 82.1, "", "convnext_tiny"),
    Cited("SLaK-T", "ICLR'2023", "C", 224, 30.0, 5.0, 82.5, "", "slak_tiny"),
    Cited("HorNet-T 7x7", "NIPS'2022", "C", 224, 22.0, 4.0, 82.8, "", "hornet_tiny_7x7"),
    Cited("MogaNet-S", "ICLR'2024", "C", 224, 25.0, 5.0, 83.4, "", "moganet_small"),
    Cited("Swin-S", "ICCV'2021", "T", 224, 50.0, 8.7, 83.0, "", "swin_small_patch4_window7_224"),
    Cited("Focal-S", "NIPS'2021", "T", 224, 51.0, 9.1, 83.6, "", ""),
    Cited("CSWin-S", "CVPR'2022", "T", 224, 35.0, 6.9, 83.6, "", ""),
    Cited("LITV2-M", "NIPS'2022", "T", 224, 49.0, 7.5, 83.3, "", ""),
    Cited("CoaT-M", "ICCV'2021", "H", 224, 45.0, 9.8, 83.6, "", ""),
    Cited("CoAtNet-1", "NIPS'2021", "H", 224, 42.0, 8.4, 83.3, "", "coatnet_1_224"),
    Cited("UniFormer-B", "ICLR'2022", "H", 224, 50.0, 8.3, 83.9, "", ""),
    Cited("FAN-B-Hybrid", "ICML'2022", "H", 224, 50.0, 11.3, 83.9, "", ""),
    Cited("EfficientNet-B6", "ICML'2019", "C", 528, 43.0, 19.0, 84.0, "", "efficientnet_b6"),
    Cited("RegNetY-8GF", "CVPR'2020", "C", 224, 39.0, 8.1, 82.2, "", "regnety_080"),
    Cited("ConvNeXt-S", "CVPR'2022", "C", 224, 50.0, 8.7, 83.1, "", "convnext_small"),
    Cited("FocalNet-S (LRF)", "NIPS'2022", "C", 224, 50.0, 8.7, 83.5, "", "focalnet_small_lrf"),
    Cited("HorNet-S 7x7", "NIPS'2022", "C", 224, 50.0, 8.8, 84.0, "", "hornet_small_7x7"),
    Cited("SLaK-S", "ICLR'2023", "C", 224, 55.0, 9.8, 83.8, "", "slak_small"),
    Cited("MogaNet-B", "ICLR'2024", "C", 224, 44.0, 9.9, 84.3, "", "moganet_base"),
    Cited("DeiT-B", "ICML'2021", "T", 224, 86.0, 17.5, 81.8, "", "deit_base_patch16_224"),
    Cited("Swin-B", "ICCV'2021", "T", 224, 89.0, 15.4, 83.5, "", "swin_base_patch4_window7_224"),
    Cited("Focal-B", "NIPS'2021", "T", 224, 90.0, 16.4, 84.0, "", ""),
    Cited("CSWin-B", "CVPR'2022", "T", 224, 78.0, 15.0, 84.2, "", ""),
    Cited("DeiT III-B", "ECCV'2022", "T", 224, 87.0, 18.0, 83.8, "", "deit3_base_patch16_224"),
    Cited("BoTNet-T7", "CVPR'2021", "H", 256, 79.0, 19.3, 84.2, "", ""),
    Cited("CoAtNet-2", "NIPS'2021", "H", 224, 75.0, 15.7, 84.1, "", "coatnet_2_224"),
    Cited("FAN-B-Hybrid", "ICML'2022", "H", 224, 77.0, 16.9, 84.3, "", ""),
    Cited("RegNetY-16GF", "CVPR'2020", "C", 224, 84.0, 16.0, 82.9, "", "regnety_160"),
    Cited("ConvNeXt-B", "CVPR'2022", "C", 224, 89.0, 15.4, 83.8, "", "convnext_base"),
    Cited("RepLKNet-31B", "CVPR'2022", "C", 224, 79.0, 15.3, 83.5, "", "replknet_31b"),
    Cited("FocalNet-B (LRF)", "NIPS'2022", "C", 224, 89.0, 15.4, 83.9, "", "focalnet_base_lrf"),
    Cited("HorNet-B 7x7", "NIPS'2022", "C", 224, 87.0, 15.6, 84.3, "", "hornet_base_7x7"),
    Cited("SLaK-B", "ICLR'2023", "C", 224, 95.0, 17.1, 84.0, "", "slak_base"),
    Cited("MogaNet-L", "ICLR'2024", "C", 224, 83.0, 15.9, 84.7, "", "moganet_large"),
    Cited("Swin-L", "ICCV'2021", "T", 384, 197.0, 104.0, 87.3, "22K", "swin_large_patch4_window12_384"),
    Cited("DeiT III-L", "ECCV'2022", "T", 384, 304.0, 191.0, 87.7, "22K", "deit3_large_patch16_384"),
    Cited("CoAtNet-3", "NIPS'2021", "H", 384, 168.0, 107.0, 87.6, "22K", ""),
    Cited("RepLKNet-31L", "CVPR'2022", "C", 384, 172.0, 96.0, 86.6, "22K", "replknet_31l"),
    Cited("ConvNeXt-L", "CVPR'2022", "C", 224, 198.0, 34.4, 84.3, "", "convnext_large"),
    Cited("ConvNeXt-L", "CVPR'2022", "C", 384, 198.0, 101.0, 87.5, "22K", "convnext_large"),
    Cited("ConvNeXt-XL", "CVPR'2022", "C", 384, 350.0, 179.0, 87.8, "22K", "convnext_xlarge"),
    Cited("HorNet-L", "NIPS'2022", "C", 384, 202.0, 102.0, 87.7, "22K", "hornet_large_gf_img384"),
    Cited("MogaNet-XL", "ICLR'2024", "C", 224, 181.0, 34.5, 85.1, "", "moganet_xlarge"),
    Cited("MogaNet-XL", "ICLR'2024", "C", 384, 181.0, 102.0, 87.8, "22K", "moganet_xlarge"),
)
