import pytest
import timm
import torch
from conformance import check_features, check_logits, check_state, filled, fixture, image, same_numbers
from timm.models import group_parameters
from torch import nn

import widefield
from tolerances import FLOAT32, FLOAT64, close
from widefield.bench import cost
from widefield.models.internimage import STATED, Block, InternImage, InternImageH
from widefield.nn.deform import DCNv3

TINY = {"depths": (1, 1, 2, 1), "widths": (8, 16, 24, 32), "groups": (1, 2, 3, 2), "num_classes": 7}
HEAD = {"head_width": 12, "heads": 3, "hidden": 10}
SIZES = {"internimage_l": 384, "internimage_xl": 384, "internimage_h": 640, "internimage_g": 512}


def settled(model):
    """Replace initial values that make whole branches add nothing or get no gradient."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                nn.init.uniform_(parameter, 0.3, 0.6)
            elif any(part in name for part in (".offset.", ".mask.", "center_feature_scale")):
                nn.init.normal_(parameter, 0, 0.1)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, 0, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def tiny(name="internimage_t", **arguments):
    given = {**TINY, **(HEAD if name == "internimage_h" else {}), **arguments}
    return settled(timm.create_model(name, **given))


def meta(name, **arguments):
    with torch.device("meta"):
        return timm.create_model(name, **arguments).eval()


def test_the_network_is_the_official_one():
    expected = fixture("internimage_t")
    model = filled(timm.create_model("internimage_t"))
    check_state(model, expected["state_dict"])
    assert list(model.state_dict()) == list(expected["state_dict"])
    check_logits(model, expected)
    check_features(model, expected)
    (run,) = expected["extra_runs"]
    check_logits(model, run)
    check_features(model, run)
    found = {}
    for i, level in enumerate(model.levels):  # inputs of the norms that end the stages
        level.norm.register_forward_pre_hook(lambda _, inputs, i=i: found.update({i: inputs[0].permute(0, 3, 1, 2)}))
    with torch.no_grad():
        model(image(64))
    for i, entry in enumerate(expected["stage_features_prenorm"]):
        assert list(found[i].shape) == entry["shape"]
        same_numbers(found[i].norm(), entry["l2"])
        same_numbers(found[i].mean(), entry["mean"])
        same_numbers(found[i].flatten()[:4], entry["first4"])
    fused = widefield.reparameterize(model, image(64), inplace=True)
    assert list(fused.conv_head.state_dict()) == ["0.weight", "0.bias"]
    check_logits(fused, expected)


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("internimage_t", 29_918_424, 4_785_752_064),  # the fixture's count
        ("internimage_s", 50_079_880, 8_173_313_280),
        ("internimage_b", 97_461_832, 15_996_712_704),
        ("internimage_l", 223_334_810, 106_887_797_760),
        ("internimage_xl", 334_819_780, 161_804_814_336),
        ("internimage_h", 1_089_636_760, 1_486_324_267_008),
        ("internimage_g", 3_076_373_352, 2_705_242_699_776),
    ],
)
def test_counts_are_those_stated(name, parameters, macs):
    size = SIZES.get(name, 224)
    found = cost(meta(name), torch.empty(1, 3, size, size, device="meta"))
    stated, of = STATED[name].parameters, STATED[name].macs.split("G")
    assert float(of[0]) == pytest.approx(macs / 1e9, rel=0.05)
    assert int(of[1].removeprefix(" at ") or 224) == size
    million = float(stated[:-1]) * {"M": 1, "B": 1000}[stated[-1]]
    assert parameters / 1e6 == pytest.approx(million, rel=0.01 if name != "internimage_g" else 0.03)  # "3B"
    assert (found.parameters, found.macs) == (parameters, macs)
    if name == "internimage_t":
        assert (parameters, macs) == (fixture(name)["params"], fixture(name)["macs_224"])


def test_variants_are_those_of_the_official_configurations():
    assert sorted(timm.list_models("internimage*")) == sorted(STATED)
    found = {}
    for name in STATED:
        model = meta(name)
        first = model.levels[0].blocks[0]
        layers = [module for module in model.modules() if isinstance(module, DCNv3)]
        found[name] = (
            model.feature_info[0]["num_chs"],
            tuple(len(level.blocks) for level in model.levels),
            tuple(level.blocks[0].dcn.sampling.groups for level in model.levels),
            {layer.sampling.offset_scale for layer in layers},
            first.norms,
            first.gamma1 is not None,
            hasattr(model.levels[0], "norm"),
        )
        assert model.pretrained_cfg["input_size"][1] == SIZES.get(name, 224)
    assert found == {
        "internimage_t": (64, (4, 4, 18, 4), (4, 8, 16, 32), {1.0}, "pre", False, True),
        "internimage_s": (80, (4, 4, 21, 4), (5, 10, 20, 40), {1.0}, "post", True, False),
        "internimage_b": (112, (4, 4, 21, 4), (7, 14, 28, 56), {1.0}, "post", True, False),
        "internimage_l": (160, (5, 5, 22, 5), (10, 20, 40, 80), {2.0}, "post", True, False),
        "internimage_xl": (192, (5, 5, 24, 5), (12, 24, 48, 96), {2.0}, "post", True, False),
        "internimage_h": (320, (6, 6, 32, 6), (10, 20, 40, 80), {1.0}, "both", False, True),
        "internimage_g": (512, (2, 2, 48, 4), (16, 32, 64, 128), {1.0}, "post", False, True),
    }
    for name, after in (("internimage_h", (5, 11, 17, 23, 29)), ("internimage_g", (5, 11, 17, 23, 29, 35, 41, 47))):
        model = meta(name)
        assert [level.norms_after for level in model.levels] == [(), (), after, ()]
        assert {block.dcn.dw_conv[0].kernel_size for level in model.levels for block in level.blocks} == {(5, 5)}
        assert all(hasattr(level, "norm") for level in model.levels)


def test_tags_carry_the_size_and_classes_of_the_published_files():
    for name, size, classes in (
        ("internimage_l.in22k", 384, 21841),
        ("internimage_xl.in22k", 384, 21841),
        ("internimage_h.in22k", 384, 21841),
        ("internimage_h.in22k_ft_in1k_384", 384, 1000),
        ("internimage_g.in22k", 384, 21841),
        ("internimage_g", 512, 1000),
    ):
        model = meta(name, depths=(1, 1, 1, 1), **({"norms_after": ()} if name[12] in "hg" else {}))
        assert (model.pretrained_cfg["input_size"], model.num_classes) == ((3, size, size), classes), name


def test_keys_of_the_largest_network_are_the_official_ones():
    shapes = {key: tuple(value.shape) for key, value in meta("internimage_h").state_dict().items()}
    expected = {
        "levels.2.blocks.31.dcn.center_feature_scale_proj_weight": (40, 1280),
        "levels.2.blocks.31.dcn.center_feature_scale_proj_bias": (40,),
        "levels.2.blocks.31.dcn.dw_conv.0.weight": (1280, 1, 5, 5),
        "levels.2.blocks.31.res_post_norm1.0.weight": (1280,),
        "levels.2.blocks.31.res_post_norm2.0.bias": (1280,),
        "levels.2.norm.0.weight": (1280,),
        "levels.2.post_norms.4.0.weight": (1280,),
        "levels.2.downsample.conv.weight": (2560, 1280, 3, 3),
        "dcnv3_head_x4.0.weight": (4096, 2560, 1, 1),
        "dcnv3_head_x4.0.bias": (4096,),
        "dcnv3_head_x3.weight": (1024, 1280, 1, 1),
        "dcnv3_head_x3.bias": (1024,),
        **{f"clip_projector.norm1_{part}.0.{kind}": (1024,) for part in "qkv" for kind in ("weight", "bias")},
        **{f"clip_projector.cross_dcn.{part}_bias": (1024,) for part in "qkv"},
        **{f"clip_projector.cross_dcn.{part}.weight": (1024, 1024) for part in "qkv"},
        "clip_projector.cross_dcn.proj.weight": (768, 1024),
        "clip_projector.cross_dcn.proj.bias": (768,),
        "fc_norm.0.weight": (768,),
        "fc_norm.0.bias": (768,),
        "head.weight": (1000, 768),
    }
    assert {key: shapes.get(key) for key in expected} == expected
    heads = ("dcnv3_head", "clip_projector", "fc_norm", "head")
    assert {k for k in shapes if k.startswith(heads)} == {k for k in expected if k.startswith(heads)} | {"head.bias"}
    assert not any(key.startswith("levels.2.post_norms.5") or "conv_head" in key for key in shapes)


def test_starts_as_the_official_code_does():
    given = {**TINY, "widths": (32, 64, 48, 96), "drop_path_rate": 0.4}
    model = timm.create_model("internimage_s", **given)
    for module in model.modules():
        if isinstance(module, Block):
            assert (module.gamma1 == 1e-5).all()
            assert (module.gamma2 == 1e-5).all()
            assert module.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.15)
            assert not module.mlp.fc2.bias.any()
        elif isinstance(module, DCNv3):
            assert not module.offset.weight.any()
            assert not module.mask.weight.any()
            bound = (3 / module.channels) ** 0.5
            assert 0.9 * bound < module.input_proj.weight.abs().max() <= bound
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.15)
    rates = [block.drop_path.drop_prob for level in model.levels for block in level.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    uniform = timm.create_model("internimage_s", **given, drop_path_type="uniform")
    assert [b.drop_path.drop_prob for level in uniform.levels for b in level.blocks] == pytest.approx([0.4] * 5)


def test_blocks_normalize_where_they_are_told():
    x = torch.randn(2, 5, 6, 16, dtype=torch.double)
    pre, post = (settled(Block(16, 2, norms=n, layer_scale_init=1.0).double()) for n in ("pre", "post"))
    y = x + pre.gamma1 * pre.dcn(pre.norm1(x))
    close(pre(x), y + pre.gamma2 * pre.mlp(pre.norm2(y)), FLOAT64)
    y = x + post.gamma1 * post.norm1(post.dcn(x))
    close(post(x), y + post.gamma2 * post.norm2(post.mlp(y)), FLOAT64)
    both = settled(Block(16, 2, norms="both").double())
    y = x + both.res_post_norm1(both.dcn(both.norm1(x)))
    close(both(x), y + both.res_post_norm2(both.mlp(both.norm2(y))), FLOAT64)


@pytest.mark.parametrize("after", [(0,), (1, 3), (0, 1, 2, 3)])
def test_norms_among_blocks_and_at_the_end_of_a_stage(after):
    model = tiny("internimage_h", depths=(1, 1, 4, 1), norms_after=after).double()
    level = model.levels[2]
    x = torch.randn(1, 24, 6, 5, dtype=torch.double)
    y = x.permute(0, 2, 3, 1)
    for index, block in enumerate(level.blocks):
        y = block(y)
        if index in after:
            y = level.post_norms[after.index(index)](y)
    close(model.stage(2, x), level.norm(y).permute(0, 3, 1, 2), FLOAT64)
    assert len(level.post_norms) == len(after)


@pytest.mark.parametrize("size", [(64, 96), (75, 90)])
def test_the_attention_head(size):
    model = tiny("internimage_h").double()
    x = torch.randn(2, 3, *size, dtype=torch.double)
    third, last = model.forward_intermediates(x, 2, intermediates_only=True)
    large = nn.functional.pixel_shuffle(model.dcnv3_head_x4[0](last), 2)[..., : third.shape[2], : third.shape[3]]
    merged = large + model.dcnv3_head_x3(third)
    close(model.forward_features(x), merged, FLOAT64)
    assert merged.shape[:2] == (2, model.num_features) == (2, 12)
    pool, tokens = model.clip_projector, merged.flatten(2).transpose(1, 2)
    attention, answers = pool.cross_dcn, []
    q = attention.q(pool.norm1_q(tokens.mean(1, keepdim=True))) + attention.q_bias
    k = attention.k(pool.norm1_k(tokens)) + attention.k_bias
    v = attention.v(pool.norm1_v(tokens)) + attention.v_bias
    for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 2).softmax(-1)
        answers.append((weights @ v[..., part])[:, 0])
    vector = model.fc_norm(attention.proj(torch.cat(answers, -1)))
    close(model.forward_head(merged, pre_logits=True), vector, FLOAT64)
    assert vector.shape == (2, model.head_hidden_size)
    close(model(x), model.head(vector), FLOAT64)


@pytest.mark.parametrize("name", ["internimage_t", "internimage_h"])
def test_timms_ways(name):
    model = tiny(name, in_chans=1, drop_path_rate=0.1, drop_rate=0.1)
    x = torch.randn(2, 1, 64, 64)
    features = model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(f.shape) for f in features] == [
        (2, c, 64 // r, 64 // r) for c, r in zip((8, 16, 24, 32), (4, 8, 16, 32), strict=True)
    ]
    last, again = model.forward_intermediates(x)
    assert all(map(torch.equal, features, again))
    assert torch.equal(last, model.forward_features(x))
    close(model.forward_head(last), model(x), FLOAT32)
    early, (second,) = model.forward_intermediates(x, [1], stop_early=True)
    assert torch.equal(early, features[1])
    assert torch.equal(second, features[1])
    (normed,) = model.forward_intermediates(x, [3], norm=True, intermediates_only=True)
    assert torch.equal(normed, last)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert model(x).shape == last.shape
    assert model.prune_intermediate_layers([1]) == [1]
    left = {".".join(key.split(".")[:3]) for key in model.state_dict() if "levels" in key}
    ending = {"levels.0.norm", "levels.1.norm"}
    assert left == {"levels.0.blocks", "levels.0.downsample", "levels.1.blocks", *ending}
    assert {key.split(".")[0] for key in model.state_dict()} == {"patch_embed", "levels"}
    assert torch.equal(model.forward_intermediates(x, [1], intermediates_only=True)[0], features[1])
    last, _ = model.forward_intermediates(x, [1])
    assert torch.equal(last, features[1])
    given = HEAD if name == "internimage_h" else {}
    only = timm.create_model(name, features_only=True, out_indices=(1, 3), **TINY, **given)
    assert [tuple(f.shape) for f in only(torch.randn(1, 3, 64, 64))] == [(1, 16, 8, 8), (1, 32, 2, 2)]
    assert only.feature_info.reduction() == [8, 32]


def test_any_size():
    stages = fixture("internimage_t")["train_extra"]["arbitrary_size_check"]["stage_hw"]
    found = tiny().forward_intermediates(torch.randn(1, 3, 75, 90), intermediates_only=True)
    assert [list(f.shape[-2:]) for f in found] == stages
    assert tiny()(torch.randn(0, 3, 64, 64)).shape == (0, 7)


@pytest.mark.parametrize("name", ["internimage_t", "internimage_h"])
@pytest.mark.parametrize("coarse", [False, True])
def test_layers_are_grouped_from_the_image_to_the_head(name, coarse):
    model = tiny(name)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    order = [sorted({".".join(n.split(".")[: 2 if coarse else 4]) for n in names}) for names in groups.values()]
    assert all(part.startswith("patch_embed") for part in order[0])
    if coarse:
        assert order[1:5] == [["levels.0"], ["levels.1"], ["levels.2"], ["levels.3"]]
    else:
        blocks = [[name for name in part if "blocks" in name] for part in order[1:-1]]
        names = ("0.blocks.0", "1.blocks.0", "2.blocks.0", "2.blocks.1", "3.blocks.0")
        assert blocks == [[f"levels.{n}"] for n in names]
        for i, part in ((0, order[2]), (1, order[3]), (2, order[5])):  # the groups of the official code
            assert {f"levels.{i}.downsample.conv", f"levels.{i}.norm.0"} <= set(part)
        assert order[-1] == ["head.bias", "head.weight"]
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


def test_what_a_new_network_learns_first():
    """Offsets and masks start at zero, so the layers that predict them get no gradient in the first step."""
    model = timm.create_model("internimage_t", **TINY).train()
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    still = {key for key, parameter in model.named_parameters() if not parameter.grad.any()}
    assert still == {key for key in dict(model.named_parameters()) if ".dw_conv." in key}


@pytest.mark.parametrize("name", ["internimage_t", "internimage_s", "internimage_h"])
def test_the_head_merges(name):
    model = tiny(name).double()
    x = torch.randn(2, 3, 48, 64, dtype=torch.double)
    fused = widefield.reparameterize(model, x)
    close(fused(x), model(x), FLOAT64)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    if name != "internimage_h":
        with pytest.raises(RuntimeError, match=r"model.eval\(\)"):
            model.train().conv_head.fuse()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": (1, 2, 3)}, r"must have one entry a stage each; got .* and \(1, 2, 3\)"),
        ({"groups": (3, 2, 3, 4)}, "channels=8 and groups=3"),
        ({"norms": "res"}, "norms must be one of 'pre', 'post', 'both'; got 'res'"),
        ({"norms": "both", "layer_scale_init": 1.0}, "no layer scale; got layer_scale_init=1.0"),
        ({"layer_scale_init": -1}, "layer_scale_init must be from 0.0"),
        ({"drop_path_rate": 1.5}, "drop_path_rate must be from 0.0 to 1.0; got 1.5"),
        ({"drop_path_type": "cosine"}, "drop_path_type must be one of 'linear', 'uniform'"),
        ({"head_factor": 0.01}, "the last of widths times head_factor must be at least 1; got 0"),
        ({"norms_after": (2,)}, "every entry of norms_after must be from 0 to 1; got 2"),
        ({"norms_after": (1, 0)}, r"norms_after must rise; got \(1, 0\)"),
        ({"mlp_ratio": -1}, "mlp_ratio must be from 0.0"),
        ({"backend": "bag"}, "Did you mean 'bags'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        InternImage(**{**TINY, **arguments})


def test_bad_arguments_of_the_attention_head_are_refused():
    with pytest.raises(ValueError, match="divisible by heads; got 12 and 5"):
        InternImageH(**TINY, **{**HEAD, "heads": 5})
    with pytest.raises(ValueError, match="global_pool must be one of 'map', ''; got 'avg'"):
        InternImageH(**TINY, **HEAD, global_pool="avg")
    with pytest.raises(ValueError, match="no vector for 7 classes: use num_classes=0"):
        InternImageH(**TINY, **HEAD, global_pool="")
    with pytest.raises(TypeError, match="head_width"):
        InternImageH(**TINY, **HEAD, head_factor=1.5)
    model = InternImageH(**{**TINY, "num_classes": 0}, **HEAD, global_pool="")
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 12, 4, 4)


# Weights in the authors' format


def saved(model, path):
    torch.save({"model": model.state_dict()}, path)
    return {"file": str(path)}


def load(overlay, name="internimage_t", **arguments):
    given = {**TINY, **(HEAD if name == "internimage_h" else {}), **arguments}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **given)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"depths": (1, 1, 1, 1)}, r"do not fit internimage_t: missing: levels.2.blocks.1.norm1.0.weight"),
        ({"depths": (1, 1, 3, 1)}, r"not known: levels.2.blocks.2.norm1.0.weight.* and \d+ more"),
        ({"groups": (2, 2, 3, 4)}, r"dcn.offset.weight is \(36, 8\) and should be \(18, 8\)"),
        ({"norms": "post", "layer_scale_init": 1.0}, r"missing: levels.0.norm.0.weight.*not known: .*gamma1"),
        ({"dw_kernel_size": 5}, r"dcn.dw_conv.0.weight is \(8, 1, 5, 5\) and should be \(8, 1, 3, 3\)"),
    ],
)
def test_the_wrong_weights_are_refused_with_the_keys_that_differ(tmp_path, other, message):
    with pytest.raises(ValueError, match=message):
        load(saved(tiny(**other), tmp_path / "w.pth"))
