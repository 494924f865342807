"""ResNets against torchvision's and timm's: names, values, every gradient, files; and what is refused."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fused_ops
from fused_ops.core.dispatch import record
from fused_ops.models import resnet
from fused_ops.models.resnet import ResNet, ResNetConfig
from tests.support import assert_accurate, randn, value_and_gradients
from tests.third_party import timm, torchvision


def pair(depth, library="torchvision", **fields):
    """(theirs, ours), the same weights in both, running statistics that are neither 0 nor 1."""
    if library == "timm":
        theirs = timm.create_model(f"resnet{depth}", pretrained=False)
    else:
        theirs = getattr(torchvision.models, f"resnet{depth}")()
        if fields.get("stem") == "cifar":
            theirs.conv1, theirs.maxpool = nn.Conv2d(fields["in_channels"], 64, 3, 1, 1, bias=False), nn.Identity()
            theirs.fc = nn.Linear(512, fields["num_classes"])
    for i, (name, tensor) in enumerate(theirs.state_dict().items()):
        if "running_var" in name or ("bn" in name and "weight" in name):
            tensor.copy_(randn(*tensor.shape, seed=i).abs() * 0.2 + 0.5)
        elif "running_mean" in name or ("bn" in name and "bias" in name):
            tensor.copy_(randn(*tensor.shape, seed=i) * 0.1)
    ours = ResNet(depth=depth, **fields)
    assert ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize("depth", (18, 34, 50, 101, 152))
def test_names_and_shapes_are_torchvisions_and_timms(depth):
    with torch.device("meta"):
        ours = getattr(resnet, f"resnet{depth}")().state_dict()
        twins = getattr(torchvision.models, f"resnet{depth}")(), timm.create_model(f"resnet{depth}", pretrained=False)
    for theirs in twins:
        assert [(k, v.shape) for k, v in theirs.state_dict().items()] == [(k, v.shape) for k, v in ours.items()]


def test_initial_weights_are_torchvisions():
    for zero in (False, True):
        torch.manual_seed(1)
        ours = resnet.resnet18(zero_init_residual=zero).state_dict()
        torch.manual_seed(1)
        theirs = torchvision.models.resnet18(zero_init_residual=zero).state_dict()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert (ours["layer1.0.bn2.weight"] == 0).all()
    with torch.device("meta"):
        assert resnet.resnet50(zero_init_residual=True).config.zero_init_residual


CASES = {
    "18 cifar": (dict(depth=18, stem="cifar", in_channels=1, num_classes=7), (3, 1, 16, 12)),
    "50": (dict(depth=50), (2, 3, 33, 64)),
    "50 timm": (dict(depth=50, library="timm"), (2, 3, 33, 64)),
}


@pytest.mark.parametrize(
    "case, train", (("18 cifar", False), ("18 cifar", True), ("50", False), ("50 timm", True)), ids=str
)
def test_values_and_gradients(case, train):
    fields, shape = CASES[case]
    theirs, ours = pair(**fields)
    images = randn(*shape, requires_grad=True)

    def run(model, dtype=torch.float32):
        x = images.detach().to(dtype).requires_grad_()
        return value_and_gradients(lambda *_: model(x), [x, *model.parameters()])

    exact = run(copy.deepcopy(theirs).double().train(train), torch.float64)
    peer, found = run(theirs.train(train)), run(ours.train(train))
    assert_accurate(found[0][0], exact[0][0], peer[0][0], terms=1000)
    for value, wanted, torchs in zip(found[1], exact[1], peer[1], strict=True):
        assert_accurate(value, wanted, torchs, factor=3.0, terms=1000)
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=("nchw", "nhwc"))
@pytest.mark.parametrize("case", CASES)
def test_inference_is_one_op_per_convolution(case, layout):
    fields, shape = CASES[case]
    theirs, ours = pair(**fields)
    theirs, ours = (model.eval().to(memory_format=layout) for model in (theirs, ours))
    images = randn(*shape).contiguous(memory_format=layout)
    with torch.no_grad(), record() as choices:
        found = ours(images)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in ours.modules())
    assert [choice.op for choice in choices if choice.op != "max_pool2d"] == ["conv_bn_act2d"] * convolutions
    exact = copy.deepcopy(theirs).double()(images.double())
    with torch.no_grad():
        assert_accurate(found, exact, theirs(images), terms=1000)
        with fused_ops.use_backend("reference"):
            assert_accurate(ours(images), exact, theirs(images), terms=1000)
        half = [copy.deepcopy(model).bfloat16()(images.bfloat16()) for model in (ours, theirs)]
    assert half[0].dtype == torch.bfloat16
    assert_accurate(half[0], exact, half[1], terms=1000)


def test_children_with_hooks_and_replaced_children_run():
    theirs, ours = (model.eval() for model in pair(18))
    images, seen = randn(2, 3, 32, 32), []
    with torch.no_grad():
        wanted = theirs(images)
        for name in ("bn1", "layer1.1.conv2", "layer2.0.downsample", "layer3.0"):
            ours.get_submodule(name).register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
        torch.testing.assert_close(ours(images), wanted, atol=1e-4, rtol=1e-4)
        assert seen == ["BatchNorm2d", "Conv2d", "Shortcut", "BasicBlock"]
        theirs.layer1[0].bn2, ours.layer1[0].bn2 = nn.Identity(), nn.Identity()
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-4, rtol=1e-4)


def test_copies_pickles_and_compiles():
    ours = ResNet(depth=18, stem="cifar", num_classes=5).eval()
    images = randn(2, 3, 8, 8)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        wanted = ours(images)
        torch.testing.assert_close(compiled(images), wanted, atol=1e-5, rtol=1e-5)
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert twin.config == ours.config and torch.equal(twin(images), wanted)
    assert type(ours.layer2[0].downsample[:1]) is resnet.Shortcut


@pytest.mark.parametrize("name", ("weights.pth", "weights.safetensors", "state"))
def test_weights_go_both_ways(name, tmp_path):
    theirs = pair(18)[0]
    path = tmp_path / name
    if name == "state":
        source = dict(theirs.state_dict())
    elif name == "weights.pth":
        torch.save(theirs.state_dict(), path)
        source = str(path)
    else:
        import safetensors.torch

        safetensors.torch.save_file(theirs.state_dict(), path)
        source = path
    loaded = ResNet.from_pretrained(source)
    assert loaded.config == ResNetConfig(18) and not loaded.training and isinstance(loaded.fc.weight, nn.Parameter)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in theirs.state_dict().items())
    if name != "state":
        path = tmp_path / "new" / "folder" / name
        loaded.save_pretrained(path)
        named = timm.create_model("resnet18", checkpoint_path=str(path))
        assert all(torch.equal(named.state_dict()[key], value) for key, value in theirs.state_dict().items())
        back = torch.load(path, weights_only=True) if path.suffix == ".pth" else safetensors.torch.load_file(path)
        torchvision.models.resnet18().load_state_dict(back, strict=True)
        assert all(torch.equal(back[key], value) for key, value in theirs.state_dict().items())


def test_a_folder_as_timm_publishes_it(tmp_path):
    theirs = timm.create_model("resnet34", num_classes=5)
    timm.models.save_for_hf(theirs, tmp_path, model_config={}, safe_serialization=True)
    assert (tmp_path / "config.json").is_file()
    loaded = ResNet.from_pretrained(tmp_path)
    assert loaded.config == ResNetConfig(34, num_classes=5)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in theirs.state_dict().items())


def test_the_configuration_is_read_off_the_weights():
    for fields in (dict(depth=34, in_channels=1, num_classes=4), dict(depth=18, stem="cifar", num_classes=3)):
        ours = ResNet(**fields)
        old = {key: value for key, value in ours.state_dict().items() if "num_batches_tracked" not in key}
        loaded = ResNet.from_pretrained(old)
        assert loaded.config == ours.config == ResNetConfig(**fields)
        images = randn(1, loaded.config.in_channels, 32, 32)
        assert torch.equal(loaded(images), ours.eval()(images))
    tuned = ResNet.from_pretrained(old, num_classes=8)
    assert tuned.fc.weight.shape == (8, 512) and torch.equal(tuned.layer4[1].conv2.weight, ours.layer4[1].conv2.weight)


def without(state, *names):
    return {key: value for key, value in state.items() if key not in names}


def test_other_architectures_are_refused(tmp_path):
    ours = ResNet(depth=18, num_classes=3)
    state = ours.state_dict()
    with pytest.raises(ValueError, match=r"state .*2 missing: layer1.0.bn1.bias, layer4.1.conv2.weight"):
        ResNet.from_pretrained(without(state, "layer1.0.bn1.bias", "layer4.1.conv2.weight"))
    with pytest.raises(ValueError, match=r"state .*1 missing: layer1.0.bn1.bias"):
        ResNet.from_pretrained(without(state, "layer1.0.bn1.bias"), num_classes=8)
    with pytest.raises(ValueError, match=r"state .*1 unexpected: layer1.0.se.weight"):
        ResNet.from_pretrained({**state, "layer1.0.se.weight": randn(3)})
    with pytest.raises(ValueError, match=r"state must be the weights of a ResNet-18.*conv1.weight \(\)"):
        ResNet.from_pretrained({**state, "conv1.weight": torch.tensor(1.0)})
    for odd in ({"state_dict": state, "epoch": 3}, {**state, "fc.bias": state["fc.bias"].numpy()}):
        with pytest.raises(ValueError, match=r"state must be a state dict, .*(epoch: int, state_dict: |fc.bias: nd)"):
            ResNet.from_pretrained(odd)
    with pytest.raises(ValueError, match=r"layer2.0.conv1.weight \(128, 32, 3, 3\) instead of \(128, 64, 3, 3\)"):
        ResNet.from_pretrained({**state, "layer2.0.conv1.weight": randn(128, 32, 3, 3)})
    with torch.device("meta"):
        others = (
            torchvision.models.vgg11(),
            timm.create_model("resnet50d", pretrained=False),
            timm.create_model("resnet26"),
        )
    for other in others:
        with pytest.raises(
            ValueError, match=r"state must be the weights of a ResNet-18, 34, 50, 101, 152.*got \d+ tensors"
        ):
            ResNet.from_pretrained(other.state_dict())
    for name in ("cut.pth", "cut.safetensors"):
        ours.save_pretrained(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"path .*cut"):
            ResNet.from_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=r"path .*nowhere"):
        ResNet.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"path .*safetensors.*weights.bin"):
        ours.save_pretrained(tmp_path / "weights.bin")


@pytest.mark.parametrize(
    "fields, message",
    ((dict(depth=20), r"depth .*18, 34, 50, 101, 152.* 20"), (dict(stem="mnist"), r"stem .*imagenet, cifar.*mnist")),
)
def test_configurations_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ResNet(**fields)
    with pytest.raises(ValueError, match="config"):
        ResNet(ResNetConfig(18), depth=18)


def test_images_that_are_refused():
    model = ResNet(depth=18, stem="cifar", num_classes=2)
    before = copy.deepcopy(model.state_dict())
    for shape in ((3, 8, 8), (2, 1, 8, 8)):
        with pytest.raises(ValueError, match=r"images .*\(batch, 3, height, width\)"):
            model(torch.ones(shape))
    with pytest.raises(ValueError, match=r"images .*a pixel.*\(2, 3, 8, 0\)"):
        model(torch.ones(2, 3, 8, 0))
    with pytest.raises(TypeError, match=r"images must be a Tensor, got ndarray"):
        model(torch.ones(2, 3, 8, 8).numpy())
    with pytest.raises(ValueError, match=r"images .*floating point.*uint8"):
        model(torch.ones(2, 3, 8, 8, dtype=torch.uint8))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.eval()(randn(1, 3, 1, 1)).shape == (1, 2) and model(randn(0, 3, 8, 8)).shape == (0, 2)
